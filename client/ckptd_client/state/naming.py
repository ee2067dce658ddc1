"""Names of tensors and parameters: the same with and without DDP, FSDP2, torch.compile or an optimizer wrapper.

Layer: inside ``ckptd_client.state``, above nothing but torch. Invariants: names depend on the structure of the state
only, never on ids, ranks or wrappers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

import torch
from torch import nn
from torch.optim import Optimizer

from ckptd.errors import StateNotEncodable

MAX_DEPTH: Final = 100
PLAIN: Final = frozenset({type(None), bool, int, float, str, complex, bytes})
_WRAPPERS: Final = {"DistributedDataParallel": "module", "DataParallel": "module", "OptimizedModule": "_orig_mod"}

ModuleItems = dict[str, Any]  # state_dict key -> tensor, Parameter or extra state


def is_stateful(value: Any) -> bool:
    """Whether ``value`` gives its state away and takes it back: schedulers, scalers, data loaders. Not a class."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def wrapped_attribute(module: nn.Module) -> str | None:
    """The attribute under which a transparent wrapper keeps the user's module; None for any other module."""
    return next((_WRAPPERS[base.__name__] for base in type(module).__mro__ if base.__name__ in _WRAPPERS), None)


def unwrap_module(module: nn.Module, path: str) -> nn.Module:
    """The user's module beneath DDP, DataParallel and torch.compile; StateNotEncodable for what cannot be walked."""
    if any(base.__name__ == "FullyShardedDataParallel" for base in type(module).__mro__):
        raise StateNotEncodable(f"{path} is an FSDP1 module, whose state_dict() is a collective", "use fully_shard")
    attribute = wrapped_attribute(module)
    return module if attribute is None else unwrap_module(getattr(module, attribute), path)


def unwrap_optimizer(optimizer: Optimizer) -> Optimizer:
    """The optimizer that really steps, beneath wrappers that keep it as ``optimizer`` (as Accelerate's does)."""
    inner = getattr(optimizer, "optimizer", None)
    return unwrap_optimizer(inner) if isinstance(inner, Optimizer) else optimizer


def module_items(module: nn.Module) -> ModuleItems:
    """``module.state_dict()`` with the parameters themselves (not detached), so that they can be told apart by id."""
    items: ModuleItems = module.state_dict(keep_vars=True)
    return items


def clean_key(module: nn.Module, key: str) -> str:
    """``key`` of ``module.state_dict()`` without the steps that wrappers inside the module add to it."""
    if "module." not in key and "_orig_mod." not in key:
        return key
    parts: list[str] = []
    at: Any = module
    for part in key.split("."):
        is_wrapper_step = isinstance(at, nn.Module) and wrapped_attribute(at) == part
        at = getattr(at, part, None)
        if not is_wrapper_step:
            parts.append(part)
    return ".".join(parts)


def find(value: Any, path: str, kinds: tuple[type, ...], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """(path, object) of every instance of ``kinds`` in nested dicts, lists and tuples, in order."""
    if isinstance(value, kinds):
        yield path, value
    elif isinstance(value, (dict, list, tuple)) and depth < MAX_DEPTH:
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            if type(item) not in PLAIN:
                yield from find(item, f"{path}.{key}", kinds, depth + 1)


def find_in_state(state: Mapping[str, Any], kinds: tuple[type, ...]) -> list[tuple[str, Any]]:
    return [found for key, value in state.items() for found in find(value, str(key), kinds)]


def optimizers_in(state: Mapping[str, Any]) -> list[Optimizer]:
    """Every optimizer of the state once, beneath its wrappers, in the order of the state."""
    found = (unwrap_optimizer(optimizer) for _, optimizer in find_in_state(state, (Optimizer,)))
    return list({id(optimizer): optimizer for optimizer in found}.values())


class ParameterNames:
    """Names of parameters, from the modules of a state.

    Args:
        modules: path in the state, unwrapped module and its ``module_items``, in the order of the state.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module, ModuleItems]]) -> None:
        self._modules = list(modules)
        self._names: dict[int, tuple[str, str]] = {}
        for path, module, items in self._modules:
            for key, tensor in items.items():
                if id(tensor) not in self._names:
                    self._names[id(tensor)] = (path, clean_key(module, key))
        self._has_all = False

    def of(self, optimizer: Optimizer) -> list[list[str]]:
        """The names of the parameters of every param group.

        A name is that within the module when all parameters belong to one module, else it starts with the module's
        path; a parameter of no tracked module gets its position, ``group0.param3``.
        """
        groups = [group["params"] for group in optimizer.param_groups]
        if not self._has_all and any(id(p) not in self._names for group in groups for p in group):
            self._add_unsaved()
        names = self._names
        found = [[names.get(id(parameter)) for parameter in group] for group in groups]
        is_one_module = len({name[0] for group in found for name in group if name is not None}) <= 1
        return [
            [
                f"group{g}.param{p}" if name is None else name[1] if is_one_module else f"{name[0]}.{name[1]}"
                for p, name in enumerate(group)
            ]
            for g, group in enumerate(found)
        ]

    def _add_unsaved(self) -> None:
        """Names of parameters that a module's own state_dict() leaves out or replaces."""
        self._has_all = True
        for path, module, _ in self._modules:
            for key, parameter in module.named_parameters(remove_duplicate=False):
                self._names.setdefault(id(parameter), (path, clean_key(module, key)))


def tensors_in(value: Any, depth: int = 0) -> Iterator[torch.Tensor]:
    """Every tensor of a tensor, module, Stateful or nesting of containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, nn.Module):
        yield from tensors_in(module_items(unwrap_module(value, "fenced")), depth + 1)
    elif isinstance(value, (dict, list, tuple)) and depth < MAX_DEPTH:
        for item in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(item, depth + 1)
    elif is_stateful(value):
        yield from tensors_in(value.state_dict(), depth + 1)
