from __future__ import annotations

import contextlib
import datetime as dt
import enum
import inspect
import json
import math
import random
import struct
import sys
import time
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from ckptd.errors import Corrupt, StateNotEncodable
from ckptd.format.tree import MAX_DEPTH, TensorRef, decode_tree, encode_tree


def round_trip(value):
    data = encode_tree(value)
    json.loads(data, parse_constant=lambda text: pytest.fail(f"{text} is not JSON"))
    return decode_tree(data)


def is_same(a, b) -> bool:
    """Equal in type and value all the way down; floats by their bits, arrays by dtype, order and bytes."""
    if type(a) is not type(b):
        return False
    if isinstance(a, float) and not isinstance(a, np.generic):
        return struct.pack("<d", a) == struct.pack("<d", b)
    if isinstance(a, complex) and not isinstance(a, np.generic):
        return is_same(a.real, b.real) and is_same(a.imag, b.imag)
    if isinstance(a, np.generic):
        return a.dtype == b.dtype and a.tobytes() == b.tobytes()
    if isinstance(a, np.ndarray):
        return (a.dtype.str, a.shape, a.tobytes()) == (b.dtype.str, b.shape, b.tobytes())
    if isinstance(a, Decimal):
        return str(a) == str(b)
    if isinstance(a, dict):
        return len(a) == len(b) and all(is_same(x, y) for x, y in zip(a.items(), b.items(), strict=True))
    if isinstance(a, (list, tuple, deque)):
        return len(a) == len(b) and all(map(is_same, a, b))
    return a == b


keys = st.one_of(
    st.text(), st.integers(), st.booleans(), st.none(), st.binary(), st.just("$"), st.tuples(st.integers(), st.text())
)
leaves = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=-(10**400), max_value=10**400),
    st.floats(),
    st.text(st.characters(codec=None), max_size=8),
    st.complex_numbers(),
    st.binary(max_size=20),
    st.binary(max_size=20).map(bytearray),
    st.datetimes(),
    st.datetimes(timezones=st.just(dt.UTC)),
    st.dates(),
    st.timedeltas(),
    st.fractions(),
    st.decimals(),
    st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3)),
    st.builds(slice, st.none() | st.integers(), st.none() | st.integers(), st.none() | st.integers()),
    st.frozensets(st.integers() | st.text(), max_size=4),
    st.sets(st.integers() | st.text(), max_size=4),
    st.text(max_size=6).map(TensorRef),
    hnp.arrays(hnp.scalar_dtypes(), hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    hnp.from_dtype(np.dtype("f4")),
)
trees = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.lists(inner, max_size=4).map(tuple),
        st.dictionaries(keys, inner, max_size=4),
        st.dictionaries(keys, inner, max_size=4).map(OrderedDict),
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(trees)
def test_every_tree_comes_back_in_type_and_value(tree):
    assert is_same(round_trip(tree), tree)


@settings(max_examples=300)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_bytes_that_are_no_tree_are_corrupt_and_nothing_else(data):
    with contextlib.suppress(Corrupt):
        decode_tree(data)


@pytest.mark.parametrize(
    "value",
    [
        math.nan,
        struct.unpack("<d", struct.pack("<Q", 0xFFF8_0000_0000_1234))[0],
        math.inf,
        -math.inf,
        -0.0,
        [0.5, math.nan],
        2**70,
        10**5000,
        [1, 10**5000],
        "\ud800",
        "\ud800\udc00",
        {"\udcff": 1},
        {"$": "tensor", "v": "x"},
        {True: 1, 2: 2},
        {1: "a", "1": "b"},
        OrderedDict(b=1, a=2),
        Counter({30: 1, 80: 2}),
        deque([1, (2,)], maxlen=5),
        dt.timezone(dt.timedelta(hours=5, minutes=30), "IST"),
        dt.datetime(2025, 10, 26, 2, 30, fold=1, tzinfo=ZoneInfo("Europe/Berlin")),
        dt.time(1, 2, 3, 4, tzinfo=dt.UTC),
        Path("/tmp/caf\udce9"),
        np.dtype(">f4"),
        np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        np.arange(6, dtype=">i2")[::2],
        np.array(["a", "bcd"]),
        np.array([], dtype="<U1"),
        np.array(3.5, dtype=np.float16),
        np.zeros((2, 0, 3), dtype=bool),
        np.datetime64("2024-01-01T00:00:01"),
        np.str_(""),
        np.bytes_(b"ab"),
        np.float32(0.1),
        Fraction(-(10**5000), 7),
        {frozenset({1}): [set(), ()]},
    ],
    ids=lambda value: type(value).__name__,
)
def test_awkward_values_come_back_exactly(value):
    assert is_same(round_trip(value), value)


def test_arrays_come_back_writable_and_in_their_order():
    array = round_trip(np.asfortranarray(np.ones((3, 4))))
    assert array.flags.f_contiguous
    array[0, 0] = 5
    plain = round_trip(np.ones((3, 4)))
    assert plain.flags.c_contiguous
    assert plain.flags.writeable


def test_a_defaultdict_comes_back_as_a_dict_and_plain_enums_as_their_value():
    class Level(enum.IntEnum):
        HIGH = 3

    class Mode(enum.StrEnum):
        FAST = "fast"

    assert is_same(round_trip(defaultdict(list, a=1)), {"a": 1})
    assert is_same(round_trip([Level.HIGH, Mode.FAST, {Level.HIGH: 1}]), [3, "fast", {3: 1}])


def test_what_cannot_be_saved_is_named_by_its_path():
    with pytest.raises(StateNotEncodable, match=r"^loader\.sampler\.fn: <class 'function'> cannot be saved \(.+\)$"):
        encode_tree({"loader": {"sampler": {"fn": lambda: 0}}})
    with pytest.raises(StateNotEncodable, match=r"^a\[2\]\[\(1, 'x'\)\]\[7\]: "):
        encode_tree({"a": [0, 1, {(1, "x"): {7: object()}}]})
    with pytest.raises(StateNotEncodable, match=r"the key .* cannot be saved"):
        encode_tree({"a": {object(): 1}})


class Color(enum.Enum):
    RED = 1


class Name(str):
    __slots__ = ()


@pytest.mark.parametrize(
    "value",
    [
        Color.RED,
        Name("a"),
        namedtuple("Point", "x y")(1, 2),
        np.array([object()]),
        np.zeros(2, dtype=[("a", "f4")]),
        np.ma.masked_array([1.0]),
        random.Random,
        print,
        object(),
    ],
    ids=lambda value: type(value).__name__,
)
def test_values_that_would_change_are_refused(value):
    with pytest.raises(StateNotEncodable, match=r"^x: "):
        encode_tree({"x": value})


def test_cycles_and_deep_nesting_end_in_a_clear_error():
    cycle: list = []
    cycle.append({"again": cycle})
    deep: list = []
    for _ in range(5000):
        deep = [deep]
    for value in (cycle, deep):
        with pytest.raises(StateNotEncodable, match=f"nested more than {MAX_DEPTH} deep") as caught:
            encode_tree(value)
        assert len(str(caught.value)) < 500
    nested: object = 1
    for level in range(MAX_DEPTH):
        nested = {level: nested} if level % 2 else (nested,)
    assert round_trip(nested) == nested
    with pytest.raises(Corrupt):
        decode_tree(b"[" * 100_000)


def test_a_caller_deep_in_its_stack_gets_a_clear_error():
    value: object = 1
    for _ in range(60):
        value = [value]

    def descend(depth: int) -> bytes:
        return descend(depth - 1) if depth else encode_tree(value)

    room = sys.getrecursionlimit() - len(inspect.stack(0)) - 40
    with pytest.raises(StateNotEncodable, match="too deep for the stack of the caller"):
        descend(room)


def test_foreign_types_come_in_through_hooks():
    class Celsius:
        def __init__(self, degrees):
            self.degrees = degrees

    def extend(value):
        return ("test.celsius", [value.degrees]) if isinstance(value, Celsius) else None

    data = encode_tree({"t": (Celsius(3.5),)}, extend)
    assert decode_tree(data, {"test.celsius": lambda payload: Celsius(*payload)})["t"][0].degrees == 3.5
    with pytest.raises(Corrupt, match=r"unknown leaf type 'test\.celsius'"):
        decode_tree(data)


@pytest.mark.parametrize(
    "data", [b"", b"{", b"NaN", b'{"$":"nope","v":1}', b'{"$":"tuple"}', b'{"$":"bytes","v":3}', b"\xff"]
)
def test_undecodable_bytes_are_corrupt(data):
    with pytest.raises(Corrupt, match="state tree cannot be decoded"):
        decode_tree(data)


def test_the_common_small_trees_take_well_under_a_millisecond():
    for value in (random.Random(1).getstate(), {f"key{i}": i * 0.1 for i in range(48)}):
        data = encode_tree(value)
        assert decode_tree(data) == value
        for work in (lambda value=value: encode_tree(value), lambda data=data: decode_tree(data)):
            took = []
            for _ in range(20):
                start = time.perf_counter()
                work()
                took.append(time.perf_counter() - start)
            assert min(took) < 1e-3
