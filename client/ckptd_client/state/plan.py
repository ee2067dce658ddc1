"""The inverse of the walk: what a live state needs from a snapshot, whether it fits, and putting it in place.

Layer: the top of ``ckptd_client.state``. Planning reads the live state and the saved tree and touches nothing; only a
plan without a single mismatch can be applied. Invariants: tensors that exist are filled in place, also those of
optimizers; only missing ones are made; no collective is ever started; each rank asks for its own boxes, so a snapshot
of another world size needs nothing special here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping
from typing import Any, Final

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ckptd.errors import StateMismatch
from ckptd.format.tree import TensorRef
from ckptd.model import Box
from ckptd_client.state.fill import empty_like, fill_all
from ckptd_client.state.leaves import DTYPE_NAMES, TORCH_DTYPES, Place, place_tensor
from ckptd_client.state.naming import (
    ParameterNames,
    clean_key,
    find,
    find_in_state,
    is_stateful,
    module_items,
    unwrap_module,
    unwrap_optimizer,
)
from ckptd_client.state.optim import OptimizerPlan
from ckptd_client.state.values import MISSING, call_load, has_anchor, kind_of, node_name, put_in_place, type_name
from ckptd_client.state.walk import MODULE, OPTIMIZER, STATEFUL, region

Load = Callable[[str], torch.Tensor]
Resolve = Callable[[], Any]  # gives the restored value of one node, once all tensors are loaded
SHOWN: Final = 5


def check_state(state: Mapping[str, Any], tree: Any, boxes: Mapping[str, Box]) -> None:
    """StateMismatch, listing the first differences, unless ``state`` can take the snapshot. Touches nothing.

    Args:
        tree: decoded from the shard's index.
        boxes: name -> a box of that tensor as saved; only its dtype and global shape count.
    """
    plan_restore(state, tree, boxes)


def apply_state(state: Mapping[str, Any], tree: Any, load: Load, boxes: Mapping[str, Box]) -> None:
    """Check, then put the snapshot into ``state``; see ``RestorePlan.apply``."""
    plan_restore(state, tree, boxes).apply(load)


def plan_restore(state: Mapping[str, Any], tree: Any, boxes: Mapping[str, Box]) -> RestorePlan:
    """What ``state`` needs; StateMismatch when it does not fit."""
    plan = RestorePlan(state, tree, boxes)
    plan.check()
    return plan


class RestorePlan:
    """A checked way to put one snapshot into one live state.

    Attributes:
        boxes: name -> the box this rank needs (global shape, offset and local shape; its position is 0).
    """

    def __init__(self, state: Mapping[str, Any], tree: Any, saved: Mapping[str, Box]) -> None:
        self._state, self._saved = state, saved
        self.boxes: dict[str, Box] = {}
        self._problems: list[str] = []
        self._refused: list[str] = []  # prefixes of names that a problem has been told about already
        self._fills: dict[str, torch.Tensor] = {}  # name -> live local tensor
        self._outers: list[torch.Tensor] = []
        self._made: dict[str, Callable[[], torch.Tensor]] = {}  # name -> how to make what does not exist
        self._loaded: dict[str, torch.Tensor] = {}
        self._aliases: set[tuple[Any, ...]] = set()
        self._actions: tuple[list[Resolve], list[Resolve], list[Resolve]] = ([], [], [])
        modules = [(path, unwrap_module(m, path)) for path, m in find_in_state(state, (nn.Module,))]
        self._items = {path: module_items(module) for path, module in modules}
        self._names = ParameterNames((path, module, self._items[path]) for path, module in modules)
        self._top = self._plan_top(tree if isinstance(tree, dict) else {})

    def check(self) -> None:
        """StateMismatch that lists the first differences in one line, or nothing."""
        refused = tuple(self._refused)
        unexpected = [
            f"{name} is in the snapshot but not here"
            for name in self._saved
            if name not in self.boxes and not name.startswith(refused)
        ]
        problems = self._problems + unexpected
        if problems:
            more = f"; and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
            raise StateMismatch(f"the state does not fit the snapshot: {'; '.join(problems[:SHOWN])}{more}")

    def apply(self, load: Load) -> None:
        """Load each box at most once and put everything in place: modules, then optimizers, then the rest.

        Args:
            load: name -> plain tensor of the box's shape and dtype. It may alias read-only memory, which must stay
                valid until this returns; nothing keeps a reference to it.

        Raises:
            StateMismatch: ``load`` answered another shape, or a load_state_dict() of the user refused.
        """
        self._loaded = {name: make() for name, make in self._made.items()}
        fill_all([*self._fills.items(), *((n, _local(t)) for n, t in self._loaded.items())], load)
        # Bytes written behind autograd's back: say so, or a frozen tensor would count as unchanged at the next save.
        torch.autograd.graph.increment_version([t for t in self._outers if not t.is_inference()])
        for actions in self._actions:
            for action in actions:
                action()
        for key, resolve in self._top.items():
            value = resolve()
            if value is not self._state[key]:
                assert isinstance(self._state, MutableMapping)
                self._state[key] = value

    # --- planning -------------------------------------------------------------------------------------------------
    def _plan_top(self, tree: dict[str, Any]) -> dict[str, Resolve]:
        for key in tree:
            if key not in self._state:
                self.problem(f"{key} is in the snapshot but not here")
                self._refused.append(f"{key}.")
        for key in self._state:
            if key not in tree:
                self.problem(f"{key} is not in the snapshot")
        return {key: self._value(value, tree[key], str(key)) for key, value in self._state.items() if key in tree}

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def _value(self, live: Any, node: Any, path: str) -> Resolve:
        if isinstance(live, torch.Tensor):
            return self._tensor(live, node, path)
        if isinstance(live, nn.Module):
            return self._module(live, node, path)
        if isinstance(live, Optimizer):
            return self._optimizer(unwrap_optimizer(live), node, path)
        if isinstance(live, (dict, list, tuple)):
            return self._container(live, node, path)
        if live is not MISSING and is_stateful(live):
            return self._stateful(live, node, path)
        return self._refuse(live, node, path) if kind_of(node) else self._plain(live, node, path)

    def _refuse(self, live: Any, node: Any, path: str) -> Resolve:
        """The whole node does not fit: say so once, and nothing of the tensors beneath it."""
        self._refused.append(f"{path}.")
        self.problem(f"{path} is {node_name(node)} in the snapshot but {type_name(live)} here")
        return lambda: live

    def _tensor(self, live: torch.Tensor, node: Any, path: str) -> Resolve:
        if node != TensorRef(path):
            return self._refuse(live, node, path)
        self.fill(path, live)
        return lambda: live

    def _plain(self, live: Any, node: Any, path: str) -> Resolve:
        """A value that is replaced: the saved one, as the content of the live one where that can change."""
        if isinstance(node, TensorRef):
            self.make(node.name, None)
            return lambda: self._loaded[node.name]
        if isinstance(node, (dict, list, tuple)):
            return self._container(type(node)(), node, path)
        return lambda: put_in_place(live, node)

    def _container(self, live: Any, node: Any, path: str) -> Resolve:
        is_alike = any(isinstance(live, kind) and isinstance(node, kind) for kind in (dict, list, tuple))
        if kind_of(node) or not is_alike:
            is_replaced = not kind_of(node) and not has_anchor(live)
            return self._plain(MISSING, node, path) if is_replaced else self._refuse(live, node, path)
        here = dict(live) if isinstance(live, dict) else dict(enumerate(live))
        there = node if isinstance(node, dict) else dict(enumerate(node))
        for key, value in here.items():
            if key not in there and has_anchor(value):
                self.problem(f"{path}.{key} is not in the snapshot")
                self._refused.append(f"{path}.{key}.")
        parts = {key: self._value(here.get(key, MISSING), value, f"{path}.{key}") for key, value in there.items()}

        def resolve() -> Any:
            new = {key: part() for key, part in parts.items()}
            if isinstance(live, dict):
                live.clear()
                live.update(new)
                return live
            if isinstance(live, list):
                live[:] = new.values()
                return live
            is_same = len(live) == len(new) and all(a is b for a, b in zip(live, new.values(), strict=True))
            return live if is_same else tuple(new.values())

        return resolve

    def _module(self, live: nn.Module, node: Any, path: str) -> Resolve:
        module = unwrap_module(live, path)
        extra = self._payload(node, MODULE, live, path)
        if extra is None:
            return lambda: live
        items = self._items[path] if path in self._items else module_items(module)
        resolves: dict[str, Resolve] = {}
        for key, item in items.items():
            name = clean_key(module, key)
            if isinstance(item, torch.Tensor):
                self.fill(f"{path}.{name}", item)
            elif name not in extra:
                self.problem(f"{path}.{name} is not in the snapshot")
            else:
                resolves[key] = self._value(MISSING, extra[name], f"{path}.{name}")
        known = {clean_key(module, key) for key in items}
        for name in extra:
            if name not in known:
                self.problem(f"{path}.{name} is in the snapshot but not here")

        def act() -> None:
            # The tensors are already in place: given back as they are, copying them is nothing, and the module's own
            # hooks, overrides and set_extra_state() run as they would for any checkpoint.
            call_load(module, {**items, **{key: resolve() for key, resolve in resolves.items()}}, path)

        self._actions[0].append(act)
        return lambda: live

    def _optimizer(self, live: Optimizer, node: Any, path: str) -> Resolve:
        payload = self._payload(node, OPTIMIZER, live, path)
        if payload is not None:
            plan = OptimizerPlan(live, payload, self._names.of(live), path, self)
            self._actions[1].append(lambda: plan.apply(self._loaded))
        return lambda: live

    def _stateful(self, live: Any, node: Any, path: str) -> Resolve:
        payload = self._payload(node, STATEFUL, live, path)
        if payload is None and not (isinstance(node, dict) and STATEFUL in node):
            return lambda: live
        if any(True for _ in find(payload, path, (TensorRef,))):
            like = dict(find(live.state_dict(), path, (torch.Tensor,)))
            for name, ref in find(payload, path, (TensorRef,)):
                self.make(ref.name, like.get(name))
        resolve = self._value(MISSING, payload, path)

        def act() -> None:
            value = resolve()
            if value or not isinstance(
                value, dict
            ):  # what saved nothing, like a disabled GradScaler, gets nothing back
                call_load(live, value, path)

        self._actions[2].append(act)
        return lambda: live

    def _payload(self, node: Any, kind: str, live: Any, path: str) -> Any:
        if kind_of(node) == kind:
            return node[kind]
        self._refuse(live, node, path)
        return None

    # --- tensors --------------------------------------------------------------------------------------------------
    def fill(self, name: str, live: torch.Tensor) -> None:
        """Plan that the box ``name`` is copied into ``live``."""
        place, dtype = place_tensor(live, name), DTYPE_NAMES[live.dtype]
        self.boxes[name] = Box(name, dtype, place.global_shape, place.offset, tuple(place.local.shape), 0)
        saved = self._saved.get(name)
        if saved is None:
            self.problem(f"{name} is not in the snapshot")
        elif saved.global_shape != place.global_shape or saved.dtype != dtype:
            there, here = describe(saved.global_shape, saved.dtype), describe(place.global_shape, dtype)
            self.problem(f"{name} is {there} in the snapshot but {here} here")
        else:
            destination = live.detach() if place.is_copy and type(live) in (torch.Tensor, nn.Parameter) else place.local
            alias = (region(live), destination.shape, destination.stride())
            if alias[0] is None or alias not in self._aliases:  # tied tensors hold the same bytes: once is enough
                self._aliases.add(alias)
                self._fills[name] = destination
                self._outers.append(live)

    def make(self, name: str, like: torch.Tensor | None, device: torch.device | None = None) -> None:
        """Plan that a new tensor is made for the box ``name``, placed like ``like`` when that has the same shape."""
        saved = self._saved.get(name)
        if saved is None:
            self.problem(f"{name} is not in the snapshot")
            self.boxes[name] = Box(name, "uint8", (), (), (), 0)
            return
        shape, dtype = saved.global_shape, TORCH_DTYPES[saved.dtype]
        place = None if like is None else place_tensor(like, name)
        if like is not None and place is not None and place.global_shape == shape:
            self.boxes[name] = Box(name, saved.dtype, shape, place.offset, tuple(place.local.shape), 0)
            self._made[name] = lambda: make_like(like, place, dtype, device)
        else:
            where = device or (place.local.device if place is not None else None)
            self.boxes[name] = Box(name, saved.dtype, shape, (0,) * len(shape), shape, 0)
            self._made[name] = lambda: torch.empty(shape, dtype=dtype, device=where)

    def saved_box(self, name: str) -> Box | None:
        return self._saved.get(name)


def make_like(like: torch.Tensor, place: Place, dtype: torch.dtype, device: torch.device | None) -> torch.Tensor:
    """Fresh memory with the shape, strides and (for a DTensor) the mesh and placements of ``like``."""
    local = empty_like(place.local, dtype, device)
    if not isinstance(like, DTensor):
        return local
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _local(tensor: torch.Tensor) -> torch.Tensor:
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def describe(shape: tuple[int, ...], dtype: str) -> str:
    return f"{shape} {dtype}"
