"""Own recordings: what is read is what was written, or an error that names the file."""

from __future__ import annotations

import json
import tracemalloc
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.layout import Layout
from ckptd.detect.records import Communicator, Count, Pending, RankState, Timings
from ckptd.errors import Corrupt, FormatTooNew, InvalidRequest
from ckptd.format.timings import SAMPLE, SELF, Op, Rows
from ckptd.replay.recording import VERSION, Recording, read_recording, write_recording

texts = st.text(max_size=8)
numbers = st.integers(0, 2**40)
seconds = st.floats(0, 1e9)
ops = st.sampled_from(list(Op))


def plain(recording: Recording) -> Any:
    """The recording in values that compare."""
    timings, layout = recording.timings, recording.layout
    arrays = [
        [(rank, rows.dtype, rows.tobytes()) for rank, rows in sorted(table.items())]
        for table in (timings.steps, timings.samples)
    ]
    ids = None
    if layout is not None:
        replica = None if layout.replica is None else layout.replica.tolist()
        ids = [
            layout.program.tolist(),
            layout.data.tolist(),
            layout.stage.tolist(),
            replica,
            layout.dims,
            layout.is_inferred,
        ]
    tables = {rank: dict(table) for rank, table in timings.tables.items()}
    rest = recording.states, recording.communicators, recording.run, recording.incarnation
    return timings.world_size, timings.nodes, arrays, tables, ids, rest


def rows_of(dtype: np.dtype[Any], count: int, seed: int) -> Rows:
    return np.frombuffer(np.random.default_rng(seed).bytes(count * dtype.itemsize), dtype)


@st.composite
def states(draw: st.DrawFn, rank: int) -> RankState:
    name = draw(texts)
    pending = Pending(
        name, draw(numbers), draw(ops), draw(numbers), draw(st.integers(-1, 9)), draw(seconds), draw(texts)
    )
    return RankState(
        rank,
        draw(texts),
        {name: Count(draw(numbers), draw(numbers))} if draw(st.booleans()) else {},
        (pending,) * draw(st.integers(0, 2)),
        {(name, draw(numbers)): (draw(ops), draw(numbers))} if draw(st.booleans()) else {},
        draw(seconds),
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.integers(-1, 9)),
        draw(texts),
        draw(st.none() | seconds),
        draw(texts),
        draw(st.integers(0, 64)),
        draw(st.integers(0, 31)),
        draw(st.booleans()),
    )


@st.composite
def recordings(draw: st.DrawFn) -> Recording:
    world_size = draw(st.integers(1, 6))
    some_ranks = st.sets(st.integers(0, world_size - 1))
    pool = draw(st.lists(st.builds(Communicator, texts, st.tuples(numbers, numbers), texts), min_size=1, max_size=4))
    ids = st.lists(st.integers(-1, 9), min_size=world_size, max_size=world_size).map(lambda i: np.array(i, np.int64))
    layouts = st.builds(Layout, ids, ids, ids, st.just((("dp", 2), ("tp", 3))), st.booleans(), st.none() | ids)
    seeds = st.integers(0, 99)
    return Recording(
        Timings(
            world_size,
            tuple(draw(texts) for _ in range(world_size)),
            {rank: rows_of(SELF, draw(st.integers(0, 4)), draw(seeds)) for rank in draw(some_ranks)},
            {rank: rows_of(SAMPLE, draw(st.integers(0, 4)), draw(seeds)) for rank in draw(some_ranks)},
            {rank: {draw(numbers): draw(st.sampled_from(pool))} for rank in draw(some_ranks)},
        ),
        draw(st.none() | layouts),
        tuple(draw(states(rank)) for rank in draw(some_ranks)),
        {known.id: known for known in pool} if draw(st.booleans()) else {},
        draw(texts),
        draw(texts),
    )


def example() -> Recording:
    world = Communicator("w", (0, 1))
    return Recording(
        Timings(2, ("a", "b"), {r: rows_of(SELF, 5, r) for r in (0, 1)}, {1: rows_of(SAMPLE, 3, 7)}, {1: {0: world}}),
        Layout.from_sizes(2, 1, 1),
        (RankState(0, pending=(Pending("w", 3, Op.ALL_REDUCE, 8),)),),
        {"w": world},
        "run",
    )


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """The same recording with another head."""
    with zipfile.ZipFile(path) as file:
        parts = {name: file.read(name) for name in file.namelist()}
    head = {**json.loads(parts["head.json"]), **change}
    with zipfile.ZipFile(path, "w") as file:
        for name, data in {**parts, "head.json": json.dumps(head).encode()}.items():
            file.writestr(name, data)


@settings(max_examples=60)
@given(recordings())
def test_what_is_read_is_what_was_written(recording: Recording) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.ckptd-timings"
        write_recording(path, recording)
        assert plain(read_recording(path)) == plain(recording)


def test_every_field_of_a_state_is_kept() -> None:
    """A field that is added to RankState and not to ``states()`` above would go unseen."""
    assert len(RankState.__dataclass_fields__) == 15
    assert len(Layout.__dataclass_fields__) == 6


def test_a_recording_of_a_later_version_is_refused_as_that(tmp_path: Path) -> None:
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, example())
    rewrite(path, {"version": VERSION + 1, "steps": "another shape"})
    with pytest.raises(FormatTooNew, match=str(VERSION + 1)):
        read_recording(path)


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"version": "one"},
        {"steps": [[0, 5], [1, 4]]},
        {"steps": [[0, 11], [1, -1]]},
        {"steps": [[0, 5], [2, 5]]},
        {"steps": 3},
        {"nodes": ["a"]},
        {"world_size": None},
        {"tables": [[1, [[0, 9]]]]},
        {"layout": {"program": [0]}},
        {"layout": {"program": [0], "data": [0], "stage": [0], "replica": None, "dims": [], "is_inferred": False}},
        {"states": [{"rank": 0}]},
        {"states": [{"rank": 0, "counts": [], "pending": [["w", 1, 99, 8]], "signatures": []}]},
        {"communicators": [["w"]]},
        {"world_size": 1 << 40},
        {"world_size": 2.0},
        {"steps": [[0, 5], [0, 5]]},
        {"steps": [[0, 5.0], [1, 5]]},
        {"states": [{"rank": 2, "counts": [], "pending": [], "signatures": []}]},
        {"states": [{"rank": 0, "step": "5", "counts": [], "pending": [], "signatures": []}]},
        {"states": [{"rank": 0, "gone_s": [], "counts": [], "pending": [], "signatures": []}]},
        {"states": [{"rank": 0, "counts": [["w", "1", 2]], "pending": [], "signatures": []}]},
        {"states": [{"rank": 0, "counts": [], "pending": [["w", 1, 1, 8, 0, [], ""]], "signatures": []}]},
    ],
    ids=str,
)
def test_a_head_that_contradicts_itself_is_damage_of_that_file(tmp_path: Path, change: dict[str, Any]) -> None:
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, example())
    rewrite(path, change)
    with pytest.raises(Corrupt, match=r"x\.ckptd-timings"):
        read_recording(path)


@settings(max_examples=150)
@given(st.data())
def test_a_damaged_file_is_never_read_as_another_recording(data: st.DataObject) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "x.ckptd-timings"
        write_recording(path, example())
        whole = path.read_bytes()
        if data.draw(st.booleans()):
            damaged = whole[: data.draw(st.integers(0, len(whole) - 1))]
        else:
            at = data.draw(st.integers(0, len(whole) - 1))
            damaged = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
        path.write_bytes(damaged)
        # A zip has bytes that mean nothing: dates, attributes.
        assert outcome(path) in (plain(example()), "damage that names the file")


def outcome(path: Path) -> Any:
    try:
        return plain(read_recording(path))
    except Corrupt as error:
        return "damage that names the file" if path.name in error.message else error.message


def test_a_file_that_is_not_there_is_said_so(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a file"):
        read_recording(tmp_path / "x.ckptd-timings")


def test_a_recording_replaces_the_one_before_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, Recording(Timings(1, ("",))))
    write_recording(path, example())
    assert plain(read_recording(path)) == plain(example())
    assert list(tmp_path.iterdir()) == [path]


def bomb(path: Path, name: str, size_bytes: int, kind: int = zipfile.ZIP_DEFLATED) -> None:
    """The recording with ``size_bytes`` zeros in place of the member ``name``."""
    with zipfile.ZipFile(path) as file:
        parts = {part: file.read(part) for part in file.namelist()}
    with zipfile.ZipFile(path, "w", kind) as file:
        for part, data in parts.items():
            with file.open(part, "w", force_zip64=True) as out:
                for begin in range(0, size_bytes if part == name else 0, 1 << 20):
                    out.write(bytes(min(1 << 20, size_bytes - begin)))
                out.write(b"" if part == name else data)


@pytest.mark.parametrize("name", ["head.json", "steps.bin", "samples.bin"])
@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("is_lying", [False, True])
def test_a_member_that_unpacks_to_far_more_is_not_unpacked(
    tmp_path: Path, name: str, kind: int, is_lying: bool
) -> None:
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, example())
    with zipfile.ZipFile(path) as file:
        told_bytes = file.getinfo(name).file_size
    is_within = name == "head.json" and kind == zipfile.ZIP_DEFLATED and not is_lying
    bomb(path, name, (65 if is_within else 12) << 20, kind)
    if is_lying:
        path.write_bytes(path.read_bytes().replace((12 << 20).to_bytes(4, "little"), told_bytes.to_bytes(4, "little")))
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match=r"x\.ckptd-timings"):
            read_recording(path)
        assert tracemalloc.get_traced_memory()[1] < 6 << 20
    finally:
        tracemalloc.stop()


def test_more_steps_of_a_rank_than_a_recording_holds_are_refused_before_they_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.ckptd-timings"
    write_recording(path, example())
    rewrite(path, {"steps": [[0, 4097], [1, 5]]})
    with pytest.raises(Corrupt, match="4097, not up to 4096"):
        read_recording(path)
