"""The DeviceMesh of a training program, if it has one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed import device_mesh

from ckptd_api.v1 import timings_pb2


def meshes_of(tensors: Iterable[torch.Tensor]) -> list[Any]:
    """The whole meshes that DTensors among ``tensors`` lie on, each once."""
    found = {id(mesh): mesh for tensor in tensors if (mesh := getattr(tensor, "device_mesh", None)) is not None}
    return [_root(mesh) for mesh in found.values()]


def find_mesh(known: Iterable[Any] = ()) -> timings_pb2.Mesh | None:
    """The largest of ``known`` meshes and of those in whose ``with`` block the program is; None when there is none."""
    resources = getattr(device_mesh, "_mesh_resources", None)
    meshes = [*known, *getattr(resources, "mesh_stack", ())]
    mesh = max(meshes, key=lambda mesh: int(mesh.size()), default=None)
    if mesh is None:
        return None
    return timings_pb2.Mesh(names=mesh.mesh_dim_names or (), shape=mesh.mesh.shape, ranks=mesh.mesh.flatten().tolist())


def _root(mesh: Any) -> Any:
    root = getattr(mesh, "_get_root_mesh", None)
    return root() if root else mesh
