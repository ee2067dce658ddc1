"""The state walk: from what the user tracks to tensors with names and fence classes, and a tree of everything else.

Layer: above ``leaves`` and ``naming``. It runs inside the training loop at every save, so it remembers names and places
between walks (weakly: it keeps no tensor of the user alive). Invariants: it reads ``state_dict()``, never parameters();
it never creates optimizer state, starts no collective and changes nothing; every name is that of one tensor.

The tree mirrors ``state``. A module is ``{"ckptd.module": {key: extra state}}`` (its tensors are known by their boxes),
an optimizer ``{"ckptd.optimizer": {...}}`` (see ``_optimizer``), any other object with ``state_dict()``
``{"ckptd.stateful": its value}``; plain values stand for themselves, tensors in them are ``TensorRef``.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Mapping
from itertools import chain, repeat
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import StateNotEncodable
from ckptd.format.tree import TensorRef
from ckptd_client.state.leaves import FenceClass, Found, LeafMaker, Walk
from ckptd_client.state.naming import (
    MAX_DEPTH,
    PLAIN,
    ModuleItems,
    ParameterNames,
    clean_key,
    find_in_state,
    is_stateful,
    module_items,
    tensors_in,
    unwrap_module,
    unwrap_optimizer,
)

MODULE: Final = "ckptd.module"
OPTIMIZER: Final = "ckptd.optimizer"
STATEFUL: Final = "ckptd.stateful"

Region = tuple[int, int]  # address and bytes
EntryNames = dict[str, tuple[tuple[str, ...], list[str]]]  # parameter -> keys of its state, names of their leaves


def walk_state(state: Mapping[str, Any], fenced: Mapping[str, Any] | None = None) -> Walk:
    """One walk without memory; see ``StateWalker``."""
    return StateWalker(state, fenced).walk()


class StateWalker:
    """Walks one state again and again.

    Args:
        state: name -> module, optimizer, Stateful or plain value; read anew at every walk.
        fenced: name -> tensor, module, Stateful or nesting of them that the user's own code mutates.
    """

    def __init__(self, state: Mapping[str, Any], fenced: Mapping[str, Any] | None = None) -> None:
        self._state = state
        self._fenced = dict(fenced or {})
        self._maker = LeafMaker()
        self._module_names: dict[str, dict[str, str]] = {}
        self._entry_names: dict[str, EntryNames] = {}

    def walk(self) -> Walk:
        """The state as it is now.

        Raises:
            StateNotEncodable: a tensor whose bytes cannot be taken, or two tensors that would have one name. Values
                that the tree cannot carry are refused by ``encode_tree``.
        """
        return _Walking(self._state, self._fenced, self._maker, self._module_names, self._entry_names).run()


class _Walking:
    """One walk: what is true only while it lasts."""

    def __init__(
        self,
        state: Mapping[str, Any],
        fenced: Mapping[str, Any],
        maker: LeafMaker,
        module_names: dict[str, dict[str, str]],
        entry_names: dict[str, EntryNames],
    ) -> None:
        self._state, self._maker, self._module_names, self._entry_names = state, maker, module_names, entry_names
        self._found: list[Found] = []
        self._modules: dict[str, tuple[nn.Module, ModuleItems]] = {}
        optimizers: list[Optimizer] = []
        for path, found in find_in_state(state, (nn.Module, Optimizer)):
            if isinstance(found, Optimizer):
                optimizers.append(unwrap_optimizer(found))
            else:
                module = unwrap_module(found, path)
                self._modules[path] = (module, module_items(module))
        self._owners = {id(p): opt for opt in optimizers for group in opt.param_groups for p in group["params"]}
        self._optimizers = optimizers
        self._names = ParameterNames((path, *found) for path, found in self._modules.items()) if optimizers else None
        self._owned_regions: dict[Region, Optimizer] | None = None
        self._declared, self._declared_regions = self._find_declared(fenced)

    def run(self) -> Walk:
        tree = {key: self._value(value, str(key), 0) for key, value in self._state.items()}
        if len({found[0] for found in self._found}) != len(self._found):
            counts = Counter(name for name, *_ in self._found)
            raise StateNotEncodable(
                f"two tensors of the state would both be saved as {counts.most_common(1)[0][0]}",
                "rename one of their keys",
            )
        return Walk(self._maker.make(self._found), tree)

    # --- nodes ----------------------------------------------------------------------------------------------------
    def _value(self, value: Any, path: str, depth: int) -> Any:
        kind = type(value)
        if kind in PLAIN:
            return value
        if isinstance(value, torch.Tensor):
            self._found.append((path, value, *self._fence(value, is_alias=True)))
            return TensorRef(path)
        if depth > MAX_DEPTH:
            raise StateNotEncodable(f"{path[:200]}... is nested too deep, or contains itself", "break the cycle")
        if kind in (dict, defaultdict, OrderedDict):
            if PLAIN.issuperset(map(type, value.values())):
                return value
            items = {key: self._value(item, f"{path}.{key}", depth + 1) for key, item in value.items()}
            return OrderedDict(items) if kind is OrderedDict else items
        if kind in (list, tuple):
            if PLAIN.issuperset(map(type, value)):
                return value
            return kind([self._value(item, f"{path}.{position}", depth + 1) for position, item in enumerate(value)])
        if isinstance(value, nn.Module):
            return self._module(value, path, depth)
        if isinstance(value, Optimizer):
            return self._optimizer(unwrap_optimizer(value), path, depth)
        if is_stateful(value):
            return {STATEFUL: self._value(value.state_dict(), path, depth + 1)}
        return value

    def _module(self, value: nn.Module, path: str, depth: int) -> dict[str, Any]:
        if path not in self._modules:  # within what a Stateful gave: not known before the walk
            module = unwrap_module(value, path)
            self._modules[path] = (module, module_items(module))
        module, items = self._modules[path]
        names = self._module_names.setdefault(path, {})
        extra: dict[str, Any] = {}
        for key, item in items.items():
            name = names.get(key)
            if name is None:
                name = names[key] = f"{path}.{clean_key(module, key)}"
            if isinstance(item, torch.Tensor):
                self._found.append((name, item, *self._fence(item)))
            else:
                extra[name[len(path) + 1 :]] = self._value(item, name, depth + 1)
        return {MODULE: extra}

    def _optimizer(self, optimizer: Optimizer, path: str, depth: int) -> dict[str, Any]:
        """``groups``: names of the parameters and hyperparameters, per param group. ``tensors``: [keys, parameter
        names] of all parameters whose state is just tensors under these keys. ``state``: that of all others by
        parameter name. ``host``: keys whose tensors lie on the CPU though their parameter does not."""
        assert self._names is not None
        names = self._names.of(optimizer)
        groups = []
        for position, (group, group_names) in enumerate(zip(optimizer.param_groups, names, strict=True)):
            hyper = {key: value for key, value in group.items() if key != "params"}
            where = f"{path}.param_groups.{position}"
            groups.append({"params": group_names, "hyper": self._value(hyper, where, depth + 1)})
        entries = {id(key): entry for key, entry in optimizer.state.items()}
        found = [
            (name, parameter, entry)
            for group, group_names in zip(optimizer.param_groups, names, strict=True)
            for parameter, name in zip(group["params"], group_names, strict=True)
            if (entry := entries.get(id(parameter)))
        ]
        uniform = found
        kinds = set(map(type, chain.from_iterable(entry.values() for *_, entry in found)))
        if not all(issubclass(kind, torch.Tensor) for kind in kinds):
            uniform = [one for one in found if all(isinstance(value, torch.Tensor) for value in one[2].values())]
        by_keys, host = self._uniform_entries(optimizer, uniform, path)
        mixed: dict[str, Any] = {}
        if len(uniform) != len(found):
            names_done = {name for name, *_ in uniform}
            for name, parameter, entry in found:
                if name not in names_done:
                    mixed[name] = self._mixed_entry(optimizer, entry, f"{path}.state.{name}", depth)
                    host |= _host_keys(parameter, entry)
        tensors = [[list(keys), members] for keys, members in by_keys.items()]
        return {OPTIMIZER: {"groups": groups, "tensors": tensors, "state": mixed, "host": sorted(host)}}

    def _uniform_entries(
        self, optimizer: Optimizer, found: list[tuple[str, torch.Tensor, dict[str, Any]]], path: str
    ) -> tuple[dict[tuple[str, ...], list[str]], set[str]]:
        """``tensors`` and ``host`` of ``_optimizer``. The inner loop of a save: names are remembered between walks."""
        known = self._entry_names.setdefault(path, {})
        by_keys: dict[tuple[str, ...], list[str]] = {}
        host: set[str] = set()
        leaf_names: list[str] = []
        values: list[torch.Tensor] = []
        for name, parameter, entry in found:
            keys = tuple(entry)
            names = known.get(name)
            if names is None or names[0] != keys:
                names = known[name] = keys, [f"{path}.state.{name}.{key}" for key in keys]
            leaf_names += names[1]
            values += entry.values()
            members = by_keys.get(keys)
            if members is None:  # what lies on the host is a matter of the optimizer's class: one tells for all
                by_keys[keys] = [name]
                host |= _host_keys(parameter, entry)
            else:
                members.append(name)
        self._found += zip(leaf_names, values, repeat(FenceClass.OWNED), repeat(optimizer))
        return by_keys, host

    def _mixed_entry(self, optimizer: Optimizer, entry: dict[Any, Any], path: str, depth: int) -> Any:
        first = len(self._found)
        tree = self._value(entry, path, depth + 1)
        self._found[first:] = [(name, tensor, FenceClass.OWNED, optimizer) for name, tensor, *_ in self._found[first:]]
        return tree

    # --- fences ---------------------------------------------------------------------------------------------------
    def _fence(self, tensor: torch.Tensor, is_alias: bool = False) -> tuple[FenceClass, Optimizer | None]:
        """The class of a tensor. ``is_alias``: it may be a view of an owned one that a state_dict() detached."""
        owner = self._owners.get(id(tensor))
        if owner is not None:
            return FenceClass.OWNED, owner
        if self._declared and (id(tensor) in self._declared or region(tensor) in self._declared_regions):
            return FenceClass.DECLARED, None
        if not tensor.requires_grad and isinstance(tensor, nn.Parameter):
            return FenceClass.FROZEN, None
        if is_alias and self._optimizers:
            owner = self._owned_by_region().get(region(tensor) or (0, 0))
            if owner is not None:
                return FenceClass.OWNED, owner
        return FenceClass.REST, None

    def _owned_by_region(self) -> dict[Region, Optimizer]:
        if self._owned_regions is None:
            self._owned_regions = {
                where: optimizer
                for optimizer in self._optimizers
                for group in optimizer.param_groups
                for parameter in group["params"]
                for owned in (parameter, *tensors_in(optimizer.state.get(parameter, {})))
                if (where := region(owned)) is not None
            }
        return self._owned_regions

    def _find_declared(self, fenced: Mapping[str, Any]) -> tuple[set[int], set[Region | None]]:
        walked = {id(module): items for module, items in self._modules.values()}
        tensors: list[torch.Tensor] = []
        for path, value in fenced.items():
            items = walked.get(id(unwrap_module(value, path))) if isinstance(value, nn.Module) else None
            tensors += tensors_in(value if items is None else items)
        return {id(tensor) for tensor in tensors}, {region(tensor) for tensor in tensors} - {None}


def _host_keys(parameter: torch.Tensor, entry: dict[Any, Any]) -> set[str]:
    """Keys of the tensors that lie on the CPU though their parameter does not."""
    if parameter.is_cpu:
        return set()
    return {str(key) for key, value in entry.items() if isinstance(value, torch.Tensor) and value.is_cpu}


def region(tensor: torch.Tensor) -> Region | None:
    """Where the bytes of a plain tensor or of a DTensor's local part lie; None when it has none of its own."""
    local = getattr(tensor, "_local_tensor", tensor)
    if local.layout is not torch.strided or local.is_meta or not local.numel() or hasattr(local, "__tensor_flatten__"):
        return None
    return local.data_ptr(), local.numel() * local.element_size()
