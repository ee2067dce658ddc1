"""Putting saved optimizer state back: by parameter name, in place where it exists, bit for bit in its own dtype.

``Optimizer.load_state_dict`` goes by position, keeps references to what it is given and casts state to the dtype of its
parameter; none of that is wanted here. Its rule for devices is: a ``step`` lies on the host unless the group is
capturable or fused, everything else beside its parameter, except what is known to have lain on the host when saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch.optim import Optimizer

from ckptd.format.tree import TensorRef
from ckptd.model import Box
from ckptd_client.state.leaves import DTYPE_NAMES, place_tensor


class Planner(Protocol):
    """What an optimizer's plan asks of the plan of the whole state."""

    def problem(self, text: str) -> None: ...

    def fill(self, name: str, live: torch.Tensor) -> None: ...

    def make(self, name: str, like: torch.Tensor | None, device: torch.device | None = None) -> None: ...

    def saved_box(self, name: str) -> Box | None: ...


class OptimizerPlan:
    """How an optimizer takes the saved ``payload`` (see ``walk``); ``names``: of its parameters, by group."""

    def __init__(
        self, live: Optimizer, payload: Mapping[str, Any], names: list[list[str]], path: str, planner: Planner
    ) -> None:
        self._live, self._path, self._planner = live, path, planner
        self._groups: list[Mapping[str, Any]] = payload["groups"]
        self._host = set(payload["host"])
        self._entries = entries_by_name(payload, path)
        self._new: list[tuple[torch.Tensor, dict[Any, Any]]] = []
        if len(self._groups) != len(names):
            planner.problem(f"{path} has {len(self._groups)} param groups in the snapshot but {len(names)} here")
            self._groups = []
        for position, (saved, group, group_names) in enumerate(
            zip(self._groups, live.param_groups, names, strict=False)
        ):
            self._plan_hyper(saved["hyper"], group, f"{path}.param_groups.{position}")
            self._plan_group(saved, group, group_names, f"{path}.param_groups.{position}")

    def apply(self, loaded: Mapping[str, torch.Tensor]) -> None:
        """Put hyperparameters and state in place; ``loaded``: the tensors that were made, by name."""
        for saved, group in zip(self._groups, self._live.param_groups, strict=True):
            for key, value in saved["hyper"].items():
                live = group.get(key)
                if not isinstance(live, torch.Tensor):
                    group[key] = resolve(value, loaded)
                elif not isinstance(value, TensorRef):
                    live.fill_(value)
        for parameter, entry in self._new:
            if entry:
                self._live.state[parameter] = {key: resolve(value, loaded) for key, value in entry.items()}
            else:
                self._live.state.pop(parameter, None)
        # What subclasses do with state from an older version of themselves: defaults of new hyperparameters, and so on.
        self._live.__setstate__({"state": self._live.state, "param_groups": self._live.param_groups})

    def _plan_hyper(self, saved: Mapping[str, Any], group: Mapping[str, Any], path: str) -> None:
        for key, value in saved.items():
            live = group.get(key)
            if isinstance(value, TensorRef) and isinstance(live, torch.Tensor):
                self._planner.fill(value.name, live)
            else:
                for ref in refs_in(value):
                    self._planner.make(ref.name, None)

    def _plan_group(self, saved: Mapping[str, Any], group: Mapping[str, Any], names: list[str], path: str) -> None:
        there = set(saved["params"])
        for name in saved["params"]:
            if name not in set(names):
                self._planner.problem(f"{path}: parameter {name} is in the snapshot but not here")
        is_step_on_device = bool(saved["hyper"].get("capturable") or saved["hyper"].get("fused"))
        for name, parameter in zip(names, group["params"], strict=True):
            if name not in there:
                self._planner.problem(f"{path}: parameter {name} is not in the snapshot")
                continue
            self._new.append((parameter, self._plan_entry(name, parameter, is_step_on_device)))

    def _plan_entry(self, name: str, parameter: torch.Tensor, is_step_on_device: bool) -> dict[Any, Any]:
        """The state of one parameter to be: tensors that are filled in place, references to made ones, values."""
        live = self._live.state.get(parameter, {})
        entry: dict[Any, Any] = {}
        for key, value in self._entries.get(name, {}).items():
            entry[key] = value
            if isinstance(value, TensorRef):
                if self._is_fitting(live.get(key), value.name):
                    self._planner.fill(value.name, live[key])
                    entry[key] = live[key]
                else:
                    on_host = key in self._host or (key == "step" and not is_step_on_device)
                    self._planner.make(value.name, parameter, torch.device("cpu") if on_host else None)
            else:
                for ref in refs_in(value):
                    self._planner.make(ref.name, parameter)
        return entry

    def _is_fitting(self, live: Any, name: str) -> bool:
        saved = self._planner.saved_box(name)
        if saved is None or not isinstance(live, torch.Tensor):
            return False
        return (DTYPE_NAMES.get(live.dtype), place_tensor(live, name).global_shape) == (saved.dtype, saved.global_shape)


def entries_by_name(payload: Mapping[str, Any], path: str) -> dict[str, Mapping[Any, Any]]:
    """Parameter name -> its saved state, both forms of it in one."""
    entries: dict[str, Mapping[Any, Any]] = dict(payload["state"])
    for keys, names in payload["tensors"]:
        for name in names:
            entries[name] = {key: TensorRef(f"{path}.state.{name}.{key}") for key in keys}
    return entries


def refs_in(value: Any) -> list[TensorRef]:
    if isinstance(value, TensorRef):
        return [value]
    if isinstance(value, (dict, list, tuple)):
        items = value.values() if isinstance(value, dict) else value
        return [ref for item in items for ref in refs_in(item)]
    return []


def resolve(value: Any, loaded: Mapping[str, torch.Tensor]) -> Any:
    """``value`` with the loaded tensors in place of their references."""
    if isinstance(value, TensorRef):
        return loaded[value.name]
    if isinstance(value, dict):
        return type(value)((key, resolve(item, loaded)) for key, item in value.items())
    if isinstance(value, (list, tuple)):
        return type(value)(resolve(item, loaded) for item in value)
    return value
