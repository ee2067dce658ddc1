"""Typed JSON for the non-tensor state: plain JSON where that is exact, ``{"$": tag, "v": payload}`` where it is not.

None, bool, int, finite float, str, list and dicts with str keys are plain JSON, so a tree can be read by eye; every
other leaf carries a tag. Nothing is pickled. Pure: standard library and NumPy; types of other packages come in through
``extend``. Invariants: ``decode_tree(encode_tree(x))`` equals ``x`` in value and type (a defaultdict comes back as a
dict, an IntEnum, IntFlag or StrEnum as its int or str; a memory map as an array); what cannot be carried is refused by
path, never approximated.
"""

from __future__ import annotations

import base64
import datetime as dt
import enum
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Literal
from zoneinfo import ZoneInfo

import numpy as np

from ckptd.errors import Corrupt, StateNotEncodable

TAG: Final = "$"
MARK: Final = "ckptd."  # starts keys that the state walk adds: the user never wrote them, so paths leave them out
MAX_DEPTH: Final = 150
_PLAIN_INT_BITS: Final = 512  # longer ones go as hexadecimal: Python refuses decimals of more than 4,300 digits
_PLAIN_INT_LIMIT: Final = 1 << _PLAIN_INT_BITS
_MAX_PATH: Final = 240
_MICROSECOND = dt.timedelta(microseconds=1)
_NUMPY_KINDS: Final = "biufcSUmM"
_HINT: Final = (
    "keep it out of `state`, or give its owner a state_dict() of numbers, text, bytes, containers and tensors"
)

Extend = Callable[[Any], "tuple[str, Any] | None"]


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands in the tree for a tensor whose bytes are a box of the shard: ``name`` is that of the box."""

    name: str


class _Refused(Exception):
    """A value that cannot be carried; collects its path on the way up."""

    def __init__(self, reason: str, hint: str = _HINT) -> None:
        super().__init__(reason)
        self.reason, self.hint, self.path = reason, hint, ""


def encode_tree(value: Any, extend: Extend | None = None) -> bytes:
    """``value`` as UTF-8 JSON.

    Args:
        value: any nesting of the leaves named in the module's docstring, ``TensorRef`` and what ``extend`` knows.
        extend: gets each value of a type unknown here; answers (tag with a dot, encodable payload) or None.

    Raises:
        StateNotEncodable: names the path of the first value that cannot be carried.
    """
    try:
        plain = _Encoder(extend).encode(value, 0)
        return json.dumps(
            plain, ensure_ascii=False, allow_nan=False, check_circular=False, separators=(",", ":")
        ).encode()
    except _Refused as refused:
        where = refused.path.lstrip(".") or "state"
        where = where if len(where) <= _MAX_PATH else f"{where[:_MAX_PATH]}..."
        raise StateNotEncodable(f"{where}: {refused.reason}", refused.hint) from None
    except RecursionError:
        raise StateNotEncodable("state: nested too deep for the stack of the caller", _HINT) from None


def decode_tree(data: bytes, extend: Mapping[str, Callable[[Any], Any]] | None = None) -> Any:
    """The inverse of ``encode_tree``; ``extend`` maps a foreign tag to what builds the value from its payload.

    Raises:
        Corrupt: the bytes are not a tree, or carry a tag that nobody knows.
    """

    def build(node: dict[str, Any]) -> Any:
        tag = node.get(TAG)
        if tag is None:
            return node
        decoder = _DECODERS.get(tag) or (extend or {}).get(tag)
        if decoder is None:
            raise ValueError(f"unknown leaf type {tag!r}")
        return decoder(node["v"])

    try:
        return json.loads(bytes(data), object_hook=build, parse_constant=_refuse_constant)
    except Exception as error:  # whatever a decoder stumbles over means that the bytes are not a tree
        raise Corrupt(f"state tree cannot be decoded: {type(error).__name__}: {error}") from error


def _refuse_constant(text: str) -> Any:
    raise ValueError(f"{text} is not of this format")


def join_path(path: str, key: Any) -> str:
    """``path`` with one more step: ``.key`` for strings, ``[key]`` for everything else, none for our own marks."""
    if type(key) is str and key.startswith(MARK):
        return path
    return f"{path}.{key}" if type(key) is str else f"{path}[{key!r}]"


def is_plain_text(text: str) -> bool:
    """Whether UTF-8 carries ``text``: false for lone surrogates, as in file names that are not UTF-8."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- encoding -----------------------------------------------------------------------------------------------------
class _Encoder:
    """Turns values into what ``json.dumps`` writes exactly. ``depth`` counts nested values, also in cycles."""

    def __init__(self, extend: Extend | None) -> None:
        self._extend = extend

    def encode(self, value: Any, depth: int) -> Any:
        kind = type(value)
        if kind is str:
            return value if is_plain_text(value) else _text(value)
        if kind is bool or value is None:
            return value
        if kind is float:
            return value if math.isfinite(value) else _float(value)
        if kind is int:
            return value if -_PLAIN_INT_LIMIT < value < _PLAIN_INT_LIMIT else _tagged("int", hex(value))
        if depth >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep, or contains itself", "flatten it or break the cycle")
        if kind is list:
            return self._items(value, depth)
        if kind is dict or kind is defaultdict:
            return self._mapping(value, depth)
        leaf = _LEAVES.get(kind)
        if leaf is not None:
            return leaf(value)
        if kind in _CONTAINERS:
            tag, parts = _CONTAINERS[kind]
            return _tagged(tag, self._items(parts(value), depth))
        return self._other(value, depth)

    def _items(self, items: Any, depth: int) -> list[Any]:
        kinds = set(map(type, items))
        if kinds == {int} and min(items) > -_PLAIN_INT_LIMIT and max(items) < _PLAIN_INT_LIMIT:
            return list(items)
        if kinds == {float} and all(map(math.isfinite, items)):
            return list(items)
        if kinds == {str} and all(map(str.isascii, items)):
            return list(items)
        encoded, position = [], 0
        try:
            for item in items:
                encoded.append(self.encode(item, depth + 1))
                position += 1
        except _Refused as refused:
            refused.path = f"[{position}]{refused.path}"
            raise
        return encoded

    def _mapping(self, mapping: Mapping[Any, Any], depth: int) -> Any:
        encoded: dict[Any, Any] = {}
        are_names, key = True, None
        try:
            for key, value in mapping.items():
                kind = type(value)
                # The common leaf without a call: a dict of a few dozen hyperparameters is most of what trees hold.
                is_plain = value is None or kind is bool or (kind is float and math.isfinite(value))
                encoded[key] = value if is_plain else self.encode(value, depth + 1)
                are_names = are_names and type(key) is str and is_plain_text(key)
        except _Refused as refused:
            refused.path = join_path("", key) + refused.path
            raise
        if are_names and TAG not in encoded:
            return encoded
        return _tagged("dict", [[self._key(key, depth), value] for key, value in encoded.items()])

    def _key(self, key: Any, depth: int) -> Any:
        try:
            return self.encode(key, depth + 1)
        except _Refused as refused:
            raise _Refused(f"the key {key!r:.60} cannot be saved: {refused.reason}") from None

    def _other(self, value: Any, depth: int) -> Any:
        if isinstance(value, np.generic):
            return _numpy_scalar(value)
        if isinstance(value, np.dtype):
            return _tagged("dtype", _dtype_text(value))
        if isinstance(value, enum.Enum) and isinstance(value, (int, str)):
            return self.encode(int(value) if isinstance(value, int) else str(value.value), depth)
        if isinstance(value, Path):
            return _tagged("path", self.encode(str(value), depth))
        if isinstance(value, np.memmap):
            return _array(np.asarray(value))
        extended = self._extend(value) if self._extend is not None else None
        if extended is None:
            raise _Refused(f"{type(value)} cannot be saved")
        return _tagged(extended[0], self.encode(extended[1], depth + 1))


def _tagged(tag: str, payload: Any) -> dict[str, Any]:
    return {TAG: tag, "v": payload}


def _base64(data: bytes | bytearray) -> str:
    return base64.b64encode(data).decode("ascii")


def _text(value: str) -> Any:
    return value if is_plain_text(value) else _tagged("str", _base64(value.encode("utf-8", "surrogatepass")))


def _float(value: float) -> Any:
    """Finite ones are exact in JSON (repr); NaN goes by its bits, which also keep its sign and payload."""
    return value if math.isfinite(value) else _tagged("float", struct.pack(">d", value).hex())


def _int(value: int) -> Any:
    return value if value.bit_length() < _PLAIN_INT_BITS else _tagged("int", hex(value))


def _dtype_text(dtype: np.dtype[Any]) -> str:
    if dtype.kind not in _NUMPY_KINDS or np.dtype(dtype.str) != dtype:
        raise _Refused(f"NumPy dtype {dtype!r} cannot be saved", "use an array of numbers, booleans, strings or dates")
    return dtype.str


def _array(value: np.ndarray[Any, Any]) -> Any:
    dtype = _dtype_text(value.dtype)
    order: Literal["C", "F"] = "F" if value.flags.f_contiguous and not value.flags.c_contiguous else "C"
    return _tagged("ndarray", [dtype, list(value.shape), order, _base64(value.tobytes(order=order))])


def _numpy_scalar(value: np.generic) -> Any:
    if isinstance(value, np.str_):
        return _tagged("np.str", _text(str(value)))
    if isinstance(value, np.bytes_):
        return _tagged("np.bytes", _base64(bytes(value)))
    return _tagged("np", [_dtype_text(value.dtype), _base64(value.tobytes())])


def _zone(value: dt.tzinfo | None, moment: dt.datetime | None) -> Any:
    if value is None:
        return None
    if isinstance(value, dt.timezone):
        return [value.utcoffset(moment) // _MICROSECOND, _text(str(value.tzname(moment)))]
    if isinstance(value, ZoneInfo) and value.key is not None:
        return value.key
    raise _Refused(f"time zone {type(value)} cannot be saved", "use datetime.timezone or a ZoneInfo with a key")


def _datetime(v: dt.datetime) -> Any:
    parts = [v.year, v.month, v.day, v.hour, v.minute, v.second, v.microsecond, v.fold, _zone(v.tzinfo, v)]
    return _tagged("datetime", parts)


def _time(v: dt.time) -> Any:
    return _tagged("time", [v.hour, v.minute, v.second, v.microsecond, v.fold, _zone(v.tzinfo, None)])


_LEAVES: dict[type, Callable[[Any], Any]] = {
    TensorRef: lambda v: _tagged("tensor", _text(v.name)),
    complex: lambda v: _tagged("complex", [_float(v.real), _float(v.imag)]),
    bytes: lambda v: _tagged("bytes", _base64(v)),
    bytearray: lambda v: _tagged("bytearray", _base64(v)),
    np.ndarray: _array,
    dt.datetime: _datetime,
    dt.date: lambda v: _tagged("date", [v.year, v.month, v.day]),
    dt.time: _time,
    dt.timedelta: lambda v: _tagged("timedelta", [v.days, v.seconds, v.microseconds]),
    dt.timezone: lambda v: _tagged("timezone", _zone(v, None)),
    Fraction: lambda v: _tagged("fraction", [_int(v.numerator), _int(v.denominator)]),
    Decimal: lambda v: _tagged("decimal", str(v)),
    range: lambda v: _tagged("range", [_int(v.start), _int(v.stop), _int(v.step)]),
}


def _pairs(value: Mapping[Any, Any]) -> Iterable[Any]:
    return [list(pair) for pair in value.items()]


_CONTAINERS: dict[type, tuple[str, Callable[[Any], Any]]] = {
    tuple: ("tuple", lambda v: v),
    set: ("set", lambda v: v),
    frozenset: ("frozenset", lambda v: v),
    slice: ("slice", lambda v: [v.start, v.stop, v.step]),
    deque: ("deque", lambda v: [v.maxlen, list(v)]),
    OrderedDict: ("ordereddict", _pairs),
    Counter: ("counter", _pairs),
}


# --- decoding -----------------------------------------------------------------------------------------------------
def _decode_array(payload: Any) -> np.ndarray[Any, Any]:
    dtype, shape, order, data = payload
    # On a bytearray, so that the array is writable like the one that was saved.
    return np.ndarray(tuple(shape), np.dtype(dtype), bytearray(base64.b64decode(data)), order=order)


def _decode_numpy_scalar(payload: Any) -> Any:
    return np.frombuffer(base64.b64decode(payload[1]), np.dtype(payload[0]), count=1)[0]


def _decode_zone(payload: Any) -> dt.tzinfo | None:
    if payload is None:
        return None
    if isinstance(payload, str):
        return ZoneInfo(payload)
    offset = dt.timedelta(microseconds=payload[0])
    unnamed = dt.timezone(offset)
    return unnamed if unnamed.tzname(None) == payload[1] else dt.timezone(offset, payload[1])


def _decode_datetime(parts: Any) -> dt.datetime:
    naive = dt.datetime(*parts[:7])  # noqa: DTZ001 - the zone, if any, is the next thing to be put in
    return naive.replace(fold=parts[7], tzinfo=_decode_zone(parts[8]))


def _decode_time(parts: Any) -> dt.time:
    return dt.time(*parts[:4]).replace(fold=parts[4], tzinfo=_decode_zone(parts[5]))


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "tensor": TensorRef,
    "str": lambda v: base64.b64decode(v).decode("utf-8", "surrogatepass"),
    "float": lambda v: struct.unpack(">d", bytes.fromhex(v))[0],
    "int": lambda v: int(v, 16),
    "complex": lambda v: complex(*v),
    "bytes": base64.b64decode,
    "bytearray": lambda v: bytearray(base64.b64decode(v)),
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "ordereddict": OrderedDict,
    "counter": lambda v: Counter(dict(v)),
    "deque": lambda v: deque(v[1], maxlen=v[0]),
    "slice": lambda v: slice(*v),
    "range": lambda v: range(*v),
    "ndarray": _decode_array,
    "np": _decode_numpy_scalar,
    "np.str": np.str_,
    "np.bytes": lambda v: np.bytes_(base64.b64decode(v)),
    "dtype": np.dtype,
    "path": Path,
    "datetime": _decode_datetime,
    "date": lambda v: dt.date(*v),
    "time": _decode_time,
    "timedelta": lambda v: dt.timedelta(*v),
    "timezone": _decode_zone,
    "fraction": lambda v: Fraction(*v),
    "decimal": Decimal,
}
