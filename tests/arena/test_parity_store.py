"""Parity in an arena on real files: sealed whole or not at all, reused only when nobody wants it, within the budget."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ckptd import failpoints
from ckptd.arena import arena as arena_module
from ckptd.arena.arena import Arena
from ckptd.arena.parity import ParityFile
from ckptd.arena.recycle import RunMarks
from ckptd.arena.room import Holding, Order, to_drop
from ckptd.errors import BudgetRefused, Corrupt, InvalidRequest, NoSlot
from ckptd.format.blocks import HEADER_BYTES, SlotLayout, checksum_blocks
from ckptd.format.image import GroupRecord, ImageRecord
from ckptd.format.parity import ParityHeader, file_bytes
from ckptd.format.slot import SlotHeader, SlotState
from ckptd.model import Geometry, Incarnation, Segment, SnapshotId

BLOCK = 64 * 1024
NOW = Incarnation(2, 2)
LAYOUT = SlotLayout.plan(100, [Segment("float32", 5000)], BLOCK)
PIECE = 4


def parity(step: int, stripe: int = 0, run: str = "r", blocks: int = PIECE) -> ParityHeader:
    group = GroupRecord(run, SnapshotId(NOW, step), Geometry(2, 1), BLOCK, (ImageRecord(()),) * 3)
    return ParityHeader(group, stripe, 0, blocks)


NEEDED = file_bytes(parity(1))
CAPACITY = NEEDED + BLOCK + HEADER_BYTES


def shard(step: int, run: str = "r", rank: int = 0) -> SlotHeader:
    return SlotHeader(run, rank, 1, 0, SnapshotId(NOW, step), None, 1, 0, False, 0.0, LAYOUT)


def fill(file: ParityFile) -> bytes:
    """Fill fragment and table as an encoder does, and seal; what the fragment is."""
    content = os.urandom(64) * (len(file.fragment) // 64)
    file.fragment[:] = np.frombuffer(content, np.uint8)
    checksum_blocks(file.fragment.data, BLOCK, 0, len(file.table), file.table)
    file.seal()
    return content


def content_of(file: ParityFile) -> bytes:
    return file.fragment.tobytes()


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm") as name:
        yield Path(name)


@pytest.fixture
def opened(folder: Path) -> Iterator[Callable[..., Arena]]:
    """Opens the arena of ``folder``; one that is open already is closed first, as a daemon that restarts does."""
    arenas: list[Arena] = []

    def open_again(memory_bytes: int = 16 << 20, ended: str = "") -> Arena:
        while arenas:
            arenas.pop().close()
        arena = Arena(folder, memory_bytes, 3)
        arena.marks_of = lambda _run: RunMarks(current=NOW, is_decided=True)
        arena.is_ended = lambda run: run == ended
        arena.open()
        arenas.append(arena)
        return arena

    yield open_again
    for arena in arenas:
        arena.check_invariants()
        arena.close()


Opened = Callable[..., Arena]


# --- life ---------------------------------------------------------------------------------------------------------
def test_parity_is_found_once_it_is_sealed(opened: Opened) -> None:
    store = opened().parity
    header = parity(1, stripe=2)
    key, snapshot = header.group.key, header.group.snapshot
    file = store.begin(header)
    assert store.find("r", snapshot, key, 2, 0) is None
    content = fill(file)
    assert store.find("r", snapshot, key, 2, 0) is file
    assert store.sealed("r") == [file]
    assert file.held == header
    assert content_of(file) == content
    for run, other, of, stripe, row in (
        ("other", snapshot, key, 2, 0),
        ("r", SnapshotId(NOW, 2), key, 2, 0),
        ("r", snapshot, key + 1, 2, 0),
        ("r", snapshot, key, 1, 0),
        ("r", snapshot, key, 2, 1),
    ):
        assert store.find(run, other, of, stripe, row) is None


def test_the_file_is_laid_out_as_its_format_says(opened: Opened, folder: Path) -> None:
    file = opened().parity.begin(parity(1))
    content = fill(file)
    assert file.id == "r.00000001.parity"
    data = (folder / file.id).read_bytes()
    header = file.held
    assert (folder / file.id).stat().st_mode & 0o777 == 0o600
    assert data[HEADER_BYTES : HEADER_BYTES + len(header.record)] == header.record
    assert data[header.fragment_offset : header.table_offset] == content
    assert data[header.table_offset : file_bytes(header)] == file.table.tobytes()


def test_sealing_twice_is_sealing_once_and_what_was_given_back_cannot_be_sealed(opened: Opened) -> None:
    store = opened().parity
    file, other = store.begin(parity(1)), store.begin(parity(1, stripe=1))
    fill(file)
    file.seal()
    store.abort(other)
    assert other.state is SlotState.FREE
    with pytest.raises(InvalidRequest, match="taken back"):
        other.seal()
    with pytest.raises(InvalidRequest, match="holds nothing"):
        _ = other.fragment


def test_an_aborted_file_is_used_again_and_its_use_tells(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    before = file.use
    store.abort(file)
    assert store.begin(parity(2)) is file
    assert file.use == before + 1


# --- generations --------------------------------------------------------------------------------------------------
def test_two_generations_take_turns_in_the_memory_of_two(opened: Opened, folder: Path) -> None:
    arena = opened(memory_bytes=4 * CAPACITY)
    contents = {}
    for step in range(1, 8):
        files = [arena.parity.begin(parity(step, stripe)) for stripe in (0, 1)]
        contents[step] = [fill(file) for file in files]
        arena.parity.recycle("r", [SnapshotId(NOW, step)])
        assert [content_of(file) for file in files] == contents[step]
    assert arena.used_bytes == 4 * CAPACITY
    assert len(list(folder.glob("*.parity"))) == 4


def test_a_generation_stays_while_the_next_is_made(opened: Opened) -> None:
    store = opened().parity
    old = store.begin(parity(1))
    content = fill(old)
    new = store.begin(parity(2))
    store.recycle("r", [SnapshotId(NOW, 1), SnapshotId(NOW, 2)])
    assert content_of(old) == content
    fill(new)
    store.recycle("r", [SnapshotId(NOW, 2)])
    assert store.sealed("r") == [new]
    assert old.state is SlotState.FREE


def test_what_is_being_written_is_not_recycled(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    store.recycle("r", [])
    fill(file)
    assert store.sealed("r") == [file]


def test_another_run_is_not_recycled(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1, run="other"))
    fill(file)
    store.recycle("r", [])
    assert store.sealed("other") == [file]


def test_a_piece_that_grew_a_little_finds_its_file_again(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    store.abort(file)
    assert store.begin(parity(2, blocks=PIECE + 1)) is file


def test_neither_a_small_nor_a_much_too_large_file_is_reused(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1, blocks=8))
    store.abort(file)
    for blocks in (2, 10):
        assert store.begin(parity(2, blocks=blocks)) is not file
    assert store.begin(parity(3, blocks=5)) is file


def test_the_record_of_the_last_use_leaves_nothing_behind(opened: Opened, folder: Path) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    store.abort(file)
    file.path.open("r+b").write(b"\xff" * file.capacity_bytes)
    fill(store.begin(parity(2)))
    after = HEADER_BYTES + len(file.held.record)
    assert not any(file.path.read_bytes()[after : file.held.fragment_offset])


# --- leases -------------------------------------------------------------------------------------------------------
def test_a_leased_file_is_freed_by_its_last_release(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    content = fill(file)
    store.lease(file)
    store.lease(file)
    store.recycle("r", [])
    store.release(file)
    assert store.begin(parity(2)) is not file
    assert content_of(file) == content
    store.release(file)
    assert file.state is SlotState.FREE
    assert store.begin(parity(3)) is file


def test_a_leased_file_that_is_wanted_again_stays(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    fill(file)
    store.lease(file)
    store.recycle("r", [])
    store.recycle("r", [SnapshotId(NOW, 1)])
    store.release(file)
    assert store.sealed("r") == [file]


def test_what_is_not_sealed_cannot_be_leased(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1))
    with pytest.raises(InvalidRequest, match="taken back"):
        store.lease(file)
    store.abort(file)
    with pytest.raises(InvalidRequest, match="taken back"):
        store.lease(file)


def test_a_file_removed_under_a_lease_stays_readable_to_who_holds_its_view(opened: Opened, folder: Path) -> None:
    arena = opened()
    file = arena.parity.begin(parity(1))
    content, view = fill(file), file.fragment
    arena.parity.lease(file)
    arena.parity.set_aside(file, "r: block 0 does not match")
    assert "parity set aside: r: block 0 does not match" in arena.problems
    assert view.tobytes() == content
    assert arena.parity.files() == []
    assert list(folder.glob("*.parity")) == []
    arena.parity.release(file)
    assert arena.used_bytes == 0


def test_a_removed_run_leaves_only_what_is_leased_until_it_is_released(opened: Opened, folder: Path) -> None:
    arena = opened()
    leased, written, other = (arena.parity.begin(parity(1, s, run)) for s, run in ((0, "r"), (1, "r"), (0, "other")))
    fill(leased)
    fill(other)
    arena.parity.lease(leased)
    arena.remove_run("r")
    assert {path.name for path in folder.glob("*.parity")} == {leased.id, other.id}
    with pytest.raises(InvalidRequest, match="taken back"):
        written.seal()
    arena.parity.release(leased)
    assert leased.state is SlotState.FREE
    arena.remove_run("r")
    assert arena.parity.files() == [other]


# --- adoption -----------------------------------------------------------------------------------------------------
def test_a_restarted_arena_adopts_sealed_parity_whole_and_removes_the_rest(opened: Opened, folder: Path) -> None:
    store = opened().parity
    files = [store.begin(parity(1, stripe)) for stripe in range(3)]
    contents = [fill(file) for file in files[:2]]
    store.abort(store.begin(parity(2)))
    again = opened()
    assert sorted(file.held.stripe for file in again.parity.sealed("r")) == [0, 1]
    assert [content_of(file) for file in again.parity.sealed("r")] == contents
    assert {path.name for path in folder.glob("*.parity")} == {file.id for file in again.parity.files()}
    assert again.problems == []
    assert again.used_bytes == 2 * CAPACITY
    assert again.parity.begin(parity(3)).id == "r.00000005.parity"


@pytest.mark.parametrize("phase", ["arena.allocate", "parity.before_flip"])
def test_a_daemon_killed_while_it_makes_parity_leaves_none(opened: Opened, folder: Path, phase: str) -> None:
    code = (
        "import sys, pathlib; sys.path.insert(0, sys.argv[2]); import test_parity_store as t\n"
        "arena = t.Arena(pathlib.Path(sys.argv[1]), 16 << 20, 3); arena.open()\n"
        "t.fill(arena.parity.begin(t.parity(1)))\n"
        "t.fill(arena.parity.begin(t.parity(2)))"
    )
    env = {**os.environ, failpoints.ENV: f"{phase}=kill@2"}
    done = subprocess.run([sys.executable, "-c", code, folder, Path(__file__).parent], env=env, check=False)
    assert done.returncode == -9
    assert len(list(folder.glob("*.parity"))) == 2
    arena = opened()
    assert [file.held.group.snapshot.step for file in arena.parity.sealed("r")] == [1]
    assert len(list(folder.glob("*.parity"))) == 1


def damage(folder: Path, name: str, offset: int) -> None:
    with (folder / name).open("r+b") as file:
        file.seek(offset)
        (byte,) = file.read(1)
        file.seek(offset)
        file.write(bytes([byte ^ 1]))


OFFSETS = {
    "magic": (0, "wrong magic"),
    "field": (164, "header does not match"),
    "digest": (200, "header does not match"),
    "state": (3072, "unknown state"),
    "record": (HEADER_BYTES + 30, "group record does not match"),
    "fragment": (parity(1).fragment_offset + 2 * BLOCK + 5, "fragment: block 2 does not match"),
    "table": (parity(1).table_offset + 3, "CRC table does not match its digest"),
}


@pytest.mark.parametrize("where", OFFSETS)
def test_a_flipped_bit_is_found_at_adoption(opened: Opened, folder: Path, where: str) -> None:
    store = opened().parity
    files = [store.begin(parity(1, stripe)) for stripe in (0, 1)]
    for file in files:
        fill(file)
    offset, message = OFFSETS[where]
    damage(folder, files[0].id, offset)
    again = opened()
    assert [file.id for file in again.parity.sealed("r")] == [files[1].id]
    assert not (folder / files[0].id).exists()
    assert len(again.problems) == 1
    assert again.problems[0].startswith(f"parity set aside: {files[0].id}: ")
    assert message in again.problems[0]


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 8191, NEEDED - 1])
def test_a_truncated_file_is_set_aside_at_adoption(opened: Opened, folder: Path, size: int) -> None:
    file = opened().parity.begin(parity(1))
    fill(file)
    os.truncate(folder / file.id, size)
    again = opened()
    assert again.parity.files() == []
    assert len(again.problems) == 1
    assert not (folder / file.id).exists()


def test_parity_of_a_later_format_is_left_to_the_daemon_that_reads_it(opened: Opened, folder: Path) -> None:
    file = opened().parity.begin(parity(1))
    fill(file)
    file.path.open("r+b").write(b"CKPTPRTY\x02")
    again = opened()
    assert "parity format 2 is newer" in again.problems[0]
    assert file.path.exists()
    assert again.parity.files() == []
    assert again.parity.begin(parity(1)).id == "r.00000002.parity"


def test_a_file_that_no_daemon_named_is_set_aside(opened: Opened, folder: Path) -> None:
    (folder / "notes.parity").write_bytes(bytes(5000))
    arena = opened()
    assert len(arena.problems) == 1
    assert not (folder / "notes.parity").exists()


# --- checks -------------------------------------------------------------------------------------------------------
def test_a_check_names_the_block_that_differs(opened: Opened) -> None:
    store = opened().parity
    file = store.begin(parity(1, blocks=5))
    fill(file)
    with ThreadPoolExecutor(2) as pool:
        file.check(pool)
        file.fragment[3 * BLOCK + 17] ^= 1
        file.check_blocks(0, 3)
        file.check_blocks(4, 99)
        with pytest.raises(Corrupt, match=f"{file.id}: fragment: block 3 does not match"):
            file.check_blocks(2, 2)
        with pytest.raises(Corrupt, match="block 3 does not match"):
            file.check(pool)
        file.fragment[3 * BLOCK + 17] ^= 1
        file.table[1] ^= 1
        with pytest.raises(Corrupt, match="CRC table does not match its digest"):
            file.check(pool)


def test_a_fragment_without_blocks_holds(opened: Opened) -> None:
    file = opened().parity.begin(parity(1, blocks=0))
    fill(file)
    assert [f.held.piece_blocks for f in opened().parity.sealed("r")] == [0]


# --- the budget ---------------------------------------------------------------------------------------------------
def test_without_room_nothing_is_made_and_nothing_dropped(opened: Opened, folder: Path) -> None:
    arena = opened(memory_bytes=2 * CAPACITY)
    files = [arena.parity.begin(parity(1, stripe)) for stripe in (0, 1)]
    fill(files[0])
    with pytest.raises(NoSlot, match=f"memory is full: .* bytes used, parity of {CAPACITY} bytes more needed"):
        arena.parity.begin(parity(2))
    arena.parity.abort(files[1])
    with pytest.raises(NoSlot, match="memory is full"):
        arena.parity.begin(parity(2, blocks=4 * PIECE))
    assert arena.parity.files() == files
    assert len(list(folder.glob("*.parity"))) == 2


def test_shared_memory_that_is_full_leaves_no_file_and_no_bytes_behind(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = opened()
    monkeypatch.setitem(failpoints._points, "arena.allocate", ("raise", 0))
    with pytest.raises(NoSlot, match="no shared memory for parity of"):
        arena.parity.begin(parity(1))
    monkeypatch.delitem(failpoints._points, "arena.allocate")
    assert list(folder.glob("*.parity")) == []
    assert arena.used_bytes == 0
    fill(arena.parity.begin(parity(1)))


def test_memory_that_cannot_be_mapped_leaves_no_file_behind(
    opened: Opened, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = opened()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOMEM, "cannot map")

    monkeypatch.setattr("ckptd.arena.mapped.map_file", refuse)
    with pytest.raises(NoSlot, match="cannot map"):
        arena.parity.begin(parity(1))
    assert list(folder.glob("*.parity")) == []
    assert arena.used_bytes == 0


def test_slots_and_parity_share_the_budget(opened: Opened) -> None:
    slot_bytes = LAYOUT.slot_bytes + BLOCK
    arena = opened(memory_bytes=CAPACITY + slot_bytes)
    arena.begin(shard(1))
    fill(arena.parity.begin(parity(1)))
    assert arena.used_bytes == CAPACITY + slot_bytes
    with pytest.raises(NoSlot, match="memory is full"):
        arena.begin(shard(2))
    with pytest.raises(NoSlot, match="memory is full"):
        arena.parity.begin(parity(2))
    arena.check_invariants()


def test_a_slot_takes_the_room_of_free_parity_of_any_run(opened: Opened) -> None:
    arena = opened(memory_bytes=CAPACITY)
    file = arena.parity.begin(parity(1, run="other"))
    arena.parity.abort(file)
    slot = arena.begin(shard(1))
    assert arena.slots() == [slot]
    assert arena.parity.files() == []


def test_a_slot_takes_free_parity_before_a_free_slot(opened: Opened) -> None:
    slot_bytes = LAYOUT.slot_bytes + BLOCK
    arena = opened(memory_bytes=CAPACITY + slot_bytes)
    arena.free(arena.begin(shard(1, rank=1)))
    arena.parity.abort(arena.parity.begin(parity(1)))
    arena.begin(shard(1))
    assert len(arena.slots()) == 2
    assert arena.parity.files() == []


def test_parity_never_takes_a_free_slot_of_an_active_run(opened: Opened) -> None:
    arena = opened(memory_bytes=2 * (LAYOUT.slot_bytes + BLOCK) + CAPACITY - 1)
    for run in ("r", "other"):
        arena.free(arena.begin(shard(1, run=run)))
    with pytest.raises(NoSlot, match="memory is full"):
        arena.parity.begin(parity(1))
    assert len(arena.slots()) == 2


def test_parity_takes_the_room_of_free_parity_that_does_not_fit_and_of_other_runs(opened: Opened) -> None:
    arena = opened(memory_bytes=2 * CAPACITY)
    small, foreign = arena.parity.begin(parity(1, blocks=1)), arena.parity.begin(parity(1, run="other"))
    arena.parity.abort(small)
    arena.parity.abort(foreign)
    first = arena.parity.begin(parity(2, stripe=0))
    assert set(arena.parity.files()) == {foreign, first}
    second = arena.parity.begin(parity(2, stripe=1))
    assert set(arena.parity.files()) == {first, second}


def test_what_an_ended_run_has_goes_when_parity_of_another_needs_room(opened: Opened) -> None:
    arena = opened(memory_bytes=CAPACITY, ended="old")
    arena.free(arena.begin(shard(1, run="old")))
    file = arena.parity.begin(parity(1))
    assert arena.slots() == []
    assert arena.parity.files() == [file]


def test_free_parity_of_an_ended_run_is_reused_by_another(opened: Opened) -> None:
    arena = opened(memory_bytes=CAPACITY, ended="old")
    file = arena.parity.begin(parity(1, run="old"))
    arena.parity.abort(file)
    assert arena.parity.begin(parity(1)) is file
    fill(file)
    assert arena.parity.sealed("old") == []
    assert opened().parity.sealed("r")[0].id == file.id


def test_sealed_parity_of_an_ended_run_goes_for_slots_and_parity_unless_it_is_leased(opened: Opened) -> None:
    for begin in (lambda arena: arena.begin(shard(1)), lambda arena: arena.parity.begin(parity(1))):
        arena = opened(memory_bytes=CAPACITY, ended="old")
        old = arena.parity.begin(parity(1, run="old"))
        fill(old)
        arena.parity.lease(old)
        with pytest.raises(NoSlot, match="memory is full"):
            begin(arena)
        arena.parity.release(old)
        begin(arena)
        assert old not in arena.parity.files()
        arena.remove_run("r")


def test_a_daemon_with_parity_to_adopt_never_refuses_and_makes_nothing_new(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(opened().parity.begin(parity(1)))

    def refuse(*_: object) -> None:
        raise BudgetRefused("memory is short")

    monkeypatch.setattr(arena_module, "check_budget", refuse)
    arena = opened()
    assert len(arena.parity.sealed("r")) == 1
    assert arena.problems == ["no new slots or parity: memory is short"]
    with pytest.raises(NoSlot, match="no new slots or parity"):
        arena.parity.begin(parity(2))
    arena.parity.recycle("r", [])
    assert arena.parity.begin(parity(2)).state is SlotState.WRITING


def test_parity_being_made_counts_against_the_budget_and_keeps_nobody_waiting(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    arena = opened(memory_bytes=2 * CAPACITY - 1)
    making, may_go_on = threading.Event(), threading.Event()
    make = ParityFile.make

    def slow(*arguments: object) -> ParityFile:
        making.set()
        assert may_go_on.wait(30)
        return make(*arguments)

    monkeypatch.setattr(ParityFile, "make", slow)
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(arena.parity.begin, parity(1))
        assert making.wait(30)
        arena.begin(shard(1))
        with pytest.raises(NoSlot, match="memory is full"):
            arena.parity.begin(parity(1, stripe=1))
        may_go_on.set()
        file = first.result()
    assert arena.parity.files() == [file]


def test_as_little_as_it_takes_goes_in_order_and_nothing_when_all_is_not_enough() -> None:
    holdings = [
        Holding(Order.HELD_BY_ENDED_RUN, 1, "held"),
        Holding(Order.FREE_SLOT, 5, "large"),
        Holding(Order.FREE_SLOT, 4, "small"),
        Holding(Order.OWN, 3, "own"),
    ]
    assert to_drop(holdings, 0) == []
    assert to_drop(holdings, 3) == ["own"]
    assert to_drop(holdings, 4) == ["own", "small"]
    assert to_drop(holdings, 13) == ["own", "small", "large", "held"]
    assert to_drop(holdings, 14) is None


class ParityMachine(RuleBasedStateMachine):
    """Any order of protections, aborts, recycling, leases, slots and restarts: nothing kept is lost or overwritten."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm")
        self.step = 0
        self.writing: list[ParityFile] = []
        self.leased: list[tuple[ParityFile, bytes]] = []
        self.content: dict[tuple[int, int], bytes] = {}
        self.kept: set[tuple[int, int]] = set()
        self.arena = self.start()

    def start(self) -> Arena:
        arena = Arena(Path(self.folder.name), 8 * CAPACITY, 3)
        arena.marks_of = lambda _run: RunMarks(current=NOW, is_decided=True)
        arena.open()
        return arena

    @rule(stripe=st.integers(0, 2), blocks=st.integers(1, 6))
    def begin(self, stripe: int, blocks: int) -> None:
        self.step += 1
        with suppress(NoSlot):
            self.writing.append(self.arena.parity.begin(parity(self.step, stripe, blocks=blocks)))

    @rule()
    def seal(self) -> None:
        if self.writing:
            file = self.writing.pop(0)
            held = file.held.group.snapshot.step, file.held.stripe
            self.content[held] = fill(file)
            self.kept.add(held)

    @rule()
    def abort(self) -> None:
        if self.writing:
            self.arena.parity.abort(self.writing.pop())

    @rule(generations=st.integers(0, 3))
    def recycle(self, generations: int) -> None:
        steps = sorted({step for step, _ in self.kept}, reverse=True)[:generations]
        self.kept = {held for held in self.kept if held[0] in steps}
        self.arena.parity.recycle("r", [SnapshotId(NOW, step) for step in steps])

    @rule(number=st.integers(0, 50))
    def lease(self, number: int) -> None:
        sealed = self.arena.parity.sealed("r")
        if sealed and len(self.leased) < 3:
            file = sealed[number % len(sealed)]
            self.arena.parity.lease(file)
            self.leased.append((file, content_of(file)))

    @rule()
    def release(self) -> None:
        if self.leased:
            self.arena.parity.release(self.leased.pop(0)[0])

    @rule(rank=st.integers(0, 3))
    def save(self, rank: int) -> None:
        with suppress(NoSlot):
            self.arena.free(self.arena.begin(shard(self.step, rank=rank)))

    @rule()
    def restart(self) -> None:
        self.writing.clear()
        self.leased.clear()
        self.arena.close()
        self.arena = self.start()
        self.kept = {(f.held.group.snapshot.step, f.held.stripe) for f in self.arena.parity.sealed("r")} | self.kept

    @invariant()
    def nothing_is_lost(self) -> None:
        self.arena.check_invariants()
        assert self.arena.used_bytes <= 8 * CAPACITY
        sealed = {(f.held.group.snapshot.step, f.held.stripe): f for f in self.arena.parity.sealed("r")}
        assert self.kept <= sealed.keys(), "kept parity is gone"
        assert all(content_of(file) == self.content[held] for held, file in sealed.items())
        assert all(content_of(file) == content for file, content in self.leased)
        assert all(file.state is SlotState.WRITING for file in self.writing)
        assert len({id(file) for file in self.writing}) == len(self.writing), "a file was handed out twice"

    def teardown(self) -> None:
        self.arena.close()
        self.folder.cleanup()


TestParityMachine = ParityMachine.TestCase
TestParityMachine.settings = settings(max_examples=30, stateful_step_count=30)
