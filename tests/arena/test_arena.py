"""The arena on real files: nothing kept is handed out, nothing is leaked, and what was sealed is adopted whole."""

from __future__ import annotations

import fcntl
import os
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from crc32c import crc32c
from harness import wait_until
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from ckptd.arena.arena import Arena
from ckptd.arena.recycle import RunMarks
from ckptd.arena.slot import Slot
from ckptd.errors import ArenaLocked, Corrupt, InvalidRequest, NoSlot
from ckptd.format.blocks import HEADER_BYTES, SlotLayout
from ckptd.format.slot import SlotHeader, SlotState, write_mark
from ckptd.model import Incarnation, Segment, SnapshotId

BLOCK = 64 * 1024
LAYOUT = SlotLayout.plan(100, [Segment("float32", 5000)], BLOCK)
NOW = Incarnation(2, 2)


def header(step: int, run: str = "r", rank: int = 0, incarnation: Incarnation = NOW) -> SlotHeader:
    snapshot = SnapshotId(incarnation, step)
    return SlotHeader(run, rank, 1, 0, snapshot, None, 1, 0, False, 0.0, LAYOUT)


def fill(slot: Slot) -> None:
    """Write the whole payload and seal it."""
    content = os.urandom(64) * (LAYOUT.payload_bytes // 64)
    slot.payload[:] = content
    write_mark(slot.page, LAYOUT.payload_bytes)
    slot.seal(crc32c(slot.index))


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm") as name:
        yield Path(name)


def opened(folder: Path, slots: int = 3, memory_bytes: int = 16 << 20) -> Arena:
    arena = Arena(folder, memory_bytes, slots)
    arena.marks_of = lambda _run: RunMarks(current=NOW, is_decided=True)
    arena.open()
    return arena


def test_one_daemon_at_a_time_has_the_folder(folder: Path) -> None:
    arena = opened(folder)
    with pytest.raises(ArenaLocked):
        opened(folder)
    arena.close()
    opened(folder).close()


def test_when_every_slot_is_held_the_refusal_names_what_holds_each(folder: Path) -> None:
    arena = opened(folder, slots=2)
    for step in (1, 2):
        fill(arena.begin(header(step)))
    with pytest.raises(NoSlot, match=r"step 1 of incarnation.*sealed, not yet staged.*step 2"):
        arena.begin(header(3))
    arena.close()


def test_a_restore_has_one_slot_more_than_saves_have(folder: Path) -> None:
    arena = opened(folder, slots=2)
    arena.marks_of = lambda _run: RunMarks(current=NOW, is_decided=False)
    old = Incarnation(1, 1)
    for step in (1, 2):
        fill(arena.begin(header(step, incarnation=old)))
    fill(arena.begin_restore(header(9, incarnation=Incarnation(0, 7))))
    assert len(arena.sealed("r")) == 3
    arena.close()


def test_without_room_a_restore_takes_the_oldest_slot_that_waits_and_never_the_newest(folder: Path) -> None:
    arena = opened(folder, slots=2, memory_bytes=2 * (LAYOUT.slot_bytes + BLOCK))
    arena.marks_of = lambda _run: RunMarks(current=NOW, is_decided=False)
    old = Incarnation(1, 1)
    for step in (1, 2):
        fill(arena.begin(header(step, incarnation=old)))
    fill(arena.begin_restore(header(9, incarnation=Incarnation(0, 7))))
    assert sorted(s.sealed_header.snapshot.step for s in arena.sealed("r")) == [2, 9]
    arena.close()


def test_the_slot_of_a_halted_writer_is_dropped_and_that_of_a_dead_one_used_again(folder: Path) -> None:
    arena = opened(folder)
    slot = arena.begin(header(1))
    child = os.fork()
    if child == 0:  # holds its lock as a client does, until it is killed
        try:
            fd = os.open(slot.path, os.O_RDWR)
            fcntl.lockf(fd, fcntl.LOCK_SH)
            (folder / "locked").touch()
            signal.pause()
        finally:
            os._exit(1)
    wait_until((folder / "locked").exists, "the writer's lock")
    arena.take_back(slot)
    assert not slot.path.exists()
    assert slot not in arena.slots()
    os.kill(child, 9)
    os.waitpid(child, 0)
    other = arena.begin(header(2))
    arena.take_back(other)
    assert other.state is SlotState.FREE
    assert other.path.exists()
    arena.close()


def test_a_late_writer_of_an_earlier_use_is_refused(folder: Path) -> None:
    arena = opened(folder, slots=2)
    slot = arena.begin(header(1))
    before = slot.generation
    arena.free(slot)
    with pytest.raises(InvalidRequest, match="taken back"):
        arena.writing(slot.id, before)
    assert arena.begin(header(2)) is slot
    with pytest.raises(InvalidRequest, match="taken back"):
        arena.writing(slot.id, before)
    arena.close()


def test_a_slot_sealed_before_its_payload_is_complete_stays_unsealed(folder: Path) -> None:
    arena = opened(folder)
    slot = arena.begin(header(1))
    write_mark(slot.page, LAYOUT.payload_bytes - BLOCK)
    with pytest.raises(Corrupt, match="blocks written"):
        slot.seal(0)
    assert slot.state is SlotState.WRITING
    arena.close()


def test_a_restarted_arena_adopts_what_was_sealed_and_drops_what_nobody_writes(folder: Path) -> None:
    arena = opened(folder)
    fill(arena.begin(header(4)))
    arena.begin(header(5))
    arena.close()
    again = opened(folder)
    assert [s.sealed_header.snapshot.step for s in again.sealed("r")] == [4]
    assert not [s for s in again.slots() if s.state is SlotState.WRITING]
    assert {p.name for p in folder.glob("*.slot")} == {s.id for s in again.slots()}
    assert again.begin(header(6)).id not in {s.id for s in again.sealed("r")}
    again.close()


def test_a_leased_slot_is_neither_freed_nor_removed(folder: Path) -> None:
    arena = opened(folder)
    slot = arena.begin(header(1))
    fill(slot)
    lease = arena.lease(slot, "reader")
    arena.free(slot)
    arena.remove_run("r")
    assert slot.state is SlotState.SEALED
    assert slot.path.exists()
    arena.release(lease.id)
    arena.remove_run("r")
    assert not slot.path.exists()
    arena.close()


class ArenaMachine(RuleBasedStateMachine):
    """Any order of saves, stagings, deaths, leases and restarts: within the budget, and nothing kept is lost."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory(prefix="ckptd-test-", dir="/dev/shm")
        self.step = 0
        self.staged: SnapshotId | None = None
        self.dead: set[SnapshotId] = set()
        self.leases: list[int] = []
        self.content: dict[tuple[int, int], bytes] = {}
        self.budget = 5 * (LAYOUT.slot_bytes + BLOCK)
        self.arena = self.start()

    def start(self) -> Arena:
        arena = Arena(Path(self.folder.name), self.budget, 3)
        arena.marks_of = lambda _run: RunMarks(NOW, True, None, self.staged, dead=self.dead)
        arena.open()
        return arena

    @rule(rank=st.integers(0, 1), is_sealed=st.booleans())
    def save(self, rank: int, is_sealed: bool) -> None:
        self.step += 1
        try:
            slot = self.arena.begin(replace(header(self.step), rank=rank))
        except NoSlot:
            return
        if is_sealed:
            fill(slot)
            self.content[rank, self.step] = bytes(slot.payload)
        else:
            self.arena.free(slot)

    @rule(number=st.integers(0, 50))
    def stage(self, number: int) -> None:
        sealed = sorted(s.sealed_header.snapshot for s in self.arena.sealed("r"))
        newer = [s for s in sealed if (self.staged is None or s > self.staged) and s not in self.dead]
        if newer:
            self.staged = newer[number % len(newer)]

    @rule()
    def die(self) -> None:
        snapshot = SnapshotId(NOW, self.step)
        if snapshot != self.staged:
            self.dead.add(snapshot)

    @rule(number=st.integers(0, 50))
    def lease(self, number: int) -> None:
        if (sealed := self.arena.sealed("r")) and len(self.leases) < 3:
            self.leases.append(self.arena.lease(sealed[number % len(sealed)], "test").id)

    @rule()
    def release(self) -> None:
        if self.leases:
            self.arena.release(self.leases.pop())

    @rule()
    def restart(self) -> None:
        self.leases.clear()
        self.arena.close()
        self.arena = self.start()

    @invariant()
    def nothing_is_lost(self) -> None:
        self.arena.check_invariants()
        assert self.arena.used_bytes <= self.budget
        for slot in self.arena.sealed("r"):
            rank, step = slot.sealed_header.rank, slot.sealed_header.snapshot.step
            assert bytes(slot.payload) == self.content[rank, step]
        if self.staged is not None:
            ranks = [rank for rank, step in self.content if step == self.staged.step]
            assert all(self.arena.find_sealed("r", self.staged, rank) for rank in ranks), "the staged slot is gone"

    def teardown(self) -> None:
        self.arena.close()
        self.folder.cleanup()


TestArenaMachine = ArenaMachine.TestCase
TestArenaMachine.settings = settings(max_examples=25, stateful_step_count=25)


def test_the_payload_of_a_slot_begins_after_its_header_page(folder: Path) -> None:
    arena = opened(folder)
    slot = arena.begin(header(1))
    fill(slot)
    assert slot.path.read_bytes()[HEADER_BYTES : HEADER_BYTES + LAYOUT.payload_bytes] == bytes(slot.payload)
    arena.close()


def test_what_ended_runs_hold_goes_when_another_run_needs_memory(folder: Path) -> None:
    arena = opened(folder, memory_bytes=3 * header(1).layout.slot_bytes)
    held = arena.begin(header(1))
    fill(held)
    arena.is_ended = lambda run: run == held.sealed_header.run
    other = replace(header(1), run="other")
    first, second = arena.begin(other), arena.begin(replace(other, rank=1))
    assert held not in arena.slots()
    assert {first, second} <= set(arena.slots())
    arena.close()
