"""Data that is pickled but comes from somebody else: plain values only, never code.

Layer: beside ``restore``. Invariants: no name is ever looked up, so nothing of the file can run; what comes out is made
of dict, list, tuple, str, int, float, bool and None, contains itself nowhere, and is of bounded size even with all that
it shares written out each time.
"""

from __future__ import annotations

import io
import pickle
from typing import Any, Final

from ckptd.errors import Corrupt

# Values, and 16 characters of a text, that the whole may have with all that is shared written out each time.
MOST_VALUES: Final = 1 << 24
_CHARACTERS: Final = 16
_PLAIN = (str, int, float, bool, type(None))


class _PlainUnpickler(pickle._Unpickler):
    """The one in Python: that in C makes room for as many values as the file says that it will remember."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise pickle.UnpicklingError(f"it names {module_name}.{global_name}, and only plain values are read")


def unpickle_plain(data: bytes, name: str) -> Any:
    """The value pickled in ``data``; Corrupt, naming ``name``, when it is truncated, damaged or not plain."""
    try:
        value = _PlainUnpickler(io.BytesIO(data)).load()
    # A damaged stream fails in whatever its opcodes do: index, stack, encoding, memory.
    except Exception as error:
        raise Corrupt(f"{name} is no pickle of plain values: {error or type(error).__name__}", "") from error
    _check(value, name)
    return value


def _check(value: Any, name: str) -> None:
    """Walks without recursion, each container once: a pickle may nest deeply and share its parts."""
    sizes: dict[int, int] = {}  # of containers, by identity; 0 while one is looked through
    todo = [(value, False)]
    while todo:
        item, is_done = todo.pop()
        if not isinstance(item, (dict, list, tuple)):
            if not isinstance(item, _PLAIN):
                raise Corrupt(f"{name} holds a {type(item).__name__}, and only plain values are read", "")
        elif is_done:
            sizes[id(item)] = size = 1 + sum(_size(part, sizes) for part in _parts(item))
            if size > MOST_VALUES:
                raise Corrupt(f"{name} holds more than {MOST_VALUES} values", "")
        elif id(item) not in sizes:
            sizes[id(item)] = 0
            todo.append((item, True))
            todo += [(part, False) for part in _parts(item)]
        elif not sizes[id(item)]:
            raise Corrupt(f"{name} holds a value that contains itself", "")


def _parts(item: dict[Any, Any] | list[Any] | tuple[Any, ...]) -> list[Any]:
    return [*item.keys(), *item.values()] if isinstance(item, dict) else list(item)


def _size(item: Any, sizes: dict[int, int]) -> int:
    return sizes.get(id(item), 1 + len(item) // _CHARACTERS if isinstance(item, str) else 1)
