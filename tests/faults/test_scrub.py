"""Memory that rots on several nodes: found by `ckptd verify` or by the scrubber, made again byte for byte."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crc32c import crc32c
from harness import DaemonProcess, Nursery, Stage, wait_until
from shard_ranks import ShardJob

from ckptd.format.blocks import HEADER_BYTES, digest
from ckptd.format.parity import ParityHeader, decode_header, encode_header
from ckptd.format.slot import SlotHeader, SlotState, read_state
from ckptd.format.slot import decode_header as decode_slot
from ckptd.model import SnapshotId


def start(stage: Stage, count: int, scrub_every: float = 0, **options: Any) -> None:
    """Daemons, all at once; without rounds unless ``scrub_every``."""
    env = {"CKPTD_SCRUB_EVERY": str(scrub_every)}
    for daemon in [stage.daemon(listen=True, http=True, wait=False, env=env, **options) for _ in range(count)]:
        daemon.wait_ready()


@pytest.fixture(scope="module")
def job(nursery: Nursery) -> Iterator[ShardJob]:
    """Step 1 of four nodes, one of which has two ranks, protected; every test leaves it whole. What is corrupt is found
    by verify only."""
    stage = Stage(nursery)
    start(stage, 4)
    yield protected([*stage.daemons, stage.daemons[2]])
    stage.close()


@pytest.fixture(scope="module")
def scrubbed(nursery: Nursery) -> Iterator[list[DaemonProcess]]:
    """Two nodes whose scrubbers hardly rest."""
    stage = Stage(nursery)
    start(stage, 2, scrub_every=0.1, slots=5)
    yield stage.daemons
    stage.close()


@pytest.fixture(scope="module")
def uneven(nursery: Nursery) -> Iterator[list[DaemonProcess]]:
    """Two nodes, of which the second takes its time to make parity."""
    stage = Stage(nursery)
    start(stage, 1)
    start(stage, 1, failpoints="protect.before=sleep:2")
    yield stage.daemons
    stage.close()


def protected(nodes: Sequence[DaemonProcess], protect: str = "2+2", run: str = "shards") -> ShardJob:
    """A job with step 1 saved and protected, of shards that differ in length."""
    sizes = {rank: 300_000 - 70_000 * (rank % 3) for rank in range(len(nodes))}
    job = ShardJob(nodes, run=run, protect=protect, sizes=sizes)
    job.save(1)
    job.wait_protected(1)
    return job


def snapshot_of(job: ShardJob, step: int = 1) -> SnapshotId:
    return SnapshotId(job.incarnation, step)


# --- files --------------------------------------------------------------------------------------------------------
def slots_of(daemon: DaemonProcess, job: ShardJob, step: int = 1) -> dict[Path, SlotHeader]:
    found = {}
    for path in daemon.arena.glob(f"{job.run}.*.slot"):
        page = memoryview(path.read_bytes())
        if read_state(page) is SlotState.SEALED and (held := decode_slot(page, path.name)[0]).snapshot.step == step:
            found[path] = held
    return found


def parity_of(daemon: DaemonProcess, job: ShardJob) -> dict[Path, ParityHeader]:
    found = {}
    for path in sorted(daemon.arena.glob(f"{job.run}.*.parity")):
        page = memoryview(path.read_bytes())
        if read_state(page) is SlotState.SEALED:
            found[path] = decode_header(page, path.name)[0]
    return found


def contents(daemon: DaemonProcess, job: ShardJob) -> dict[tuple[int, int], bytes]:
    """Every fragment, with header and table, by (stripe, row)."""
    return {
        (held.stripe, held.row): path.read_bytes()[: held.table_offset + 4 * held.piece_blocks]
        for path, held in parity_of(daemon, job).items()
    }


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 8]))


def flip_slot(path: Path, held: SlotHeader, region: str = "uint8") -> None:
    layout = held.layout
    places = {"header": 150, "version": 9, "table": HEADER_BYTES + layout.payload_bytes + 5}
    places |= {name: HEADER_BYTES + offset + size // 2 for name, offset, size in layout.parts()}
    flip(path, places[region])


def forge(path: Path, held: ParityHeader) -> None:
    """Another fragment whose checksums are right."""
    data = bytearray(path.read_bytes())
    data[held.fragment_offset + 77] ^= 1
    size = held.group.block_bytes
    block = bytes(data[held.fragment_offset : held.fragment_offset + size])
    data[held.table_offset : held.table_offset + 4] = crc32c(block).to_bytes(4, "little")
    table = np.frombuffer(data, "<u4", held.piece_blocks, held.table_offset)
    page = encode_header(held, digest(table))
    with path.open("r+b") as file:
        file.write(page)
        file.seek(held.fragment_offset)
        file.write(data[held.fragment_offset : held.table_offset + 4 * held.piece_blocks])


# --- questions ----------------------------------------------------------------------------------------------------
def count(daemon: DaemonProcess, name: str, job: ShardJob, **labels: str) -> float:
    """The value of a counter, 0 when there is none."""
    wanted = {"run": job.run, **labels}
    for line in daemon.get("/metrics")[1].splitlines():
        found = re.fullmatch(rf"{name}\{{(.*)\}} ([\d.e+]+)", line)
        if found and dict(re.findall(r'(\w+)="([^"]*)"', found[1])) == wanted:
            return float(found[2])
    return 0


def counts(daemon: DaemonProcess, job: ShardJob, place: str) -> tuple[float, float]:
    """(found corrupt, made again) of "memory" or "parity"."""
    kind = {"memory": "slot", "parity": "parity"}[place]
    corrupt = count(daemon, "ckptd_corrupt_total", job, place=place)
    return corrupt, count(daemon, "ckptd_repaired_total", job, kind=kind)


def wait_counts(daemon: DaemonProcess, job: ShardJob, place: str, corrupt: float, repaired: float) -> None:
    wanted = (corrupt, repaired)
    wait_until(lambda: counts(daemon, job, place) == wanted, f"{wanted} of {place} to be found and made again")


def check_every_byte(job: ShardJob) -> None:
    """Every rank's shard of step 1 is as it was saved, and in the memory of its own node."""
    assert list(job.pool.map(lambda rank: job.fetch(rank, snapshot_of(job)), job.ranks)) == ["memory"] * len(job.ranks)


# --- by verify ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("region", ["header", "version", "index", "uint8", "table", "file"])
def test_a_corrupt_slot_is_named_and_made_again_from_peers(job: ShardJob, region: str) -> None:
    daemon = job.daemons[2]
    (path, held), *_ = slots_of(daemon, job).items()
    corrupt, repaired = counts(daemon, job, "memory")
    if region == "file":
        path.unlink()
    else:
        flip_slot(path, held, region)
    (finding,) = daemon.findings(job.run)
    names = {"table": "CRC table", "header": "header", "version": "slot format", "file": "the file is gone"}
    assert finding.startswith(f"memory: rank {held.rank}: ")
    assert names.get(region, f"{region}: block") in finding
    wait_counts(daemon, job, "memory", corrupt + 1, repaired + 1)
    assert daemon.findings(job.run) == []
    assert not path.exists()
    assert any(path.name in problem and "made again" in problem for problem in daemon.status()["problems"])
    check_every_byte(job)
    assert job.marks["losses_tolerated"] == 2


@pytest.mark.parametrize("region", ["header", "record", "fragment", "table", "forged"])
def test_corrupt_parity_is_named_and_only_that_is_made_again(job: ShardJob, region: str) -> None:
    daemon = job.daemons[1]
    before = [contents(node, job) for node in job.daemons[:4]]
    (path, held), (other, _) = parity_of(daemon, job).items()
    corrupt, repaired = counts(daemon, job, "parity")
    if region == "forged":
        forge(path, held)
    else:
        places = {"header": 160, "record": HEADER_BYTES + 99, "fragment": held.fragment_offset + 70_000}
        flip(path, places.get(region, held.table_offset + 1))
    kept = other.stat().st_ino
    (finding,) = daemon.findings(job.run)
    names = {"table": "CRC table", "record": "group record", "forged": "block 0 is not the parity of its data"}
    assert finding.startswith(f"parity: stripe {held.stripe} row {held.row} of 2+2: ")
    assert names.get(region, region) in finding
    wait_counts(daemon, job, "parity", corrupt + 1, repaired + 1)
    job.wait_whole(snapshot_of(job), 2)
    assert daemon.findings(job.run) == []
    assert [contents(node, job) for node in job.daemons[:4]] == before
    assert other.stat().st_ino == kept
    check_every_byte(job)


def test_verify_of_a_node_exits_4_and_then_0(job: ShardJob) -> None:
    daemon = job.daemons[3]
    _, repaired = counts(daemon, job, "parity")
    (path, held), *_ = parity_of(daemon, job).items()
    flip(path, held.fragment_offset)
    rc, stdout, _ = daemon.cli("verify", job.run, 1)
    assert rc == 4
    assert "in this node's memory, its parity and the tiers: 1 finding" in stdout
    assert re.search(r"^ +1 .* parity +stripe", stdout, re.MULTILINE)
    wait_until(lambda: counts(daemon, job, "parity")[1] > repaired, "the parity to be made again")
    done = daemon.cli("verify", job.run, "--json")
    assert done.rc == 0
    assert json.loads(done.stdout)["copies_checked"] == 2


def test_two_nodes_that_rot_at_once_are_both_mended(job: ShardJob) -> None:
    places = [job.daemons[0], job.daemons[3]]
    before = [counts(daemon, job, "memory") for daemon in places]
    for daemon in places:
        (path, held), *_ = slots_of(daemon, job).items()
        flip_slot(path, held)
    for daemon in places:
        assert any(finding.startswith("memory: ") for finding in daemon.findings(job.run))
    for daemon, (corrupt, repaired) in zip(places, before, strict=True):
        wait_counts(daemon, job, "memory", corrupt + 1, repaired + 1)
    check_every_byte(job)


# --- by the scrubber ----------------------------------------------------------------------------------------------
def test_the_scrubber_finds_and_mends_by_itself(scrubbed: list[DaemonProcess]) -> None:
    job = protected(scrubbed, "1+1")
    first, second = scrubbed
    (path, held), *_ = slots_of(first, job).items()
    flip_slot(path, held)
    wait_counts(first, job, "memory", 1, 1)  # before the parity is hit: one loss at a time is what it makes up for
    before = [contents(node, job) for node in scrubbed]
    ((fragment, parity),) = parity_of(second, job).items()
    flip(fragment, parity.fragment_offset + 9)
    ((forged, other),) = parity_of(first, job).items()
    forge(forged, other)
    wait_counts(second, job, "parity", 1, 1)
    wait_counts(first, job, "parity", 1, 1)
    job.wait_whole(snapshot_of(job), 1)
    assert [contents(node, job) for node in scrubbed] == before
    assert count(first, "ckptd_bytes_total", job, direction="scrubbed", tier="memory") > 0
    check_every_byte(job)


def test_what_is_being_written_is_left_alone_and_what_is_recycled_is_no_finding(scrubbed: list[DaemonProcess]) -> None:
    job = ShardJob(scrubbed, run="busy", protect="1+1", size_bytes=900_000)
    for step in range(1, 13):
        job.save(step)
    job.wait_protected(12)
    for daemon in scrubbed:
        assert (counts(daemon, job, "memory"), counts(daemon, job, "parity")) == ((0, 0), (0, 0))
        assert not [problem for problem in daemon.status()["problems"] if "busy" in problem]
    assert job.marks["dead"] == []


# --- protection follows -------------------------------------------------------------------------------------------
def test_losses_tolerated_drop_while_parity_is_missing_and_come_back(uneven: list[DaemonProcess]) -> None:
    job = protected(uneven, "1+1", run="drop")
    assert job.marks["losses_tolerated"] == 1
    ((path, held),) = parity_of(uneven[1], job).items()
    flip(path, held.fragment_offset)
    assert len(uneven[1].findings(job.run)) == 1
    wait_until(lambda: job.marks["losses_tolerated"] is None, "protection to be withdrawn")
    assert uneven[0].rows(job.run)[0]["state"] == "staged"
    job.wait_whole(snapshot_of(job), 1)
    wait_counts(uneven[1], job, "parity", 1, 1)


def test_parity_that_rots_while_the_others_still_make_theirs_is_mended_afterwards(uneven: list[DaemonProcess]) -> None:
    daemon = uneven[0]
    job = ShardJob(uneven, run="early", protect="1+1")
    job.save(1)
    wait_until(lambda: parity_of(daemon, job), "the first node's parity")
    ((path, held),) = parity_of(daemon, job).items()
    flip(path, held.fragment_offset)
    assert len(daemon.findings(job.run)) == 1
    wait_counts(daemon, job, "parity", 1, 1)
    job.wait_whole(snapshot_of(job), 1)
    assert daemon.findings(job.run) == []


def test_a_slot_that_a_restarted_daemon_did_not_adopt_is_made_again(stage: Stage) -> None:
    start(stage, 2)
    job = protected(stage.daemons, "1+1")
    daemon = stage.daemons[1]
    daemon.kill()
    (path, held), *_ = slots_of(daemon, job).items()
    flip_slot(path, held)
    daemon.restart()
    job.rejoin(daemon)
    wait_until(lambda: counts(daemon, job, "memory")[1] == 1, "the slot to be made again")
    check_every_byte(job)


def test_without_room_for_both_the_corrupt_slot_goes_first(stage: Stage) -> None:
    # Step 2 is held as well, because its protection does not get on; there is no memory for a third slot.
    start(stage, 1, slots=2, memory="2400KiB")
    start(stage, 1, slots=2, memory="2400KiB", failpoints="protect.before=sleep:60@2")
    job = protected(stage.daemons, "1+1")
    job.save(2)
    daemon = stage.daemons[0]
    (path, held), *_ = slots_of(daemon, job).items()
    flip_slot(path, held)
    assert len(daemon.findings(job.run)) == 1
    wait_counts(daemon, job, "memory", 1, 1)
    assert any("no room for another" in problem for problem in daemon.status()["problems"])
    check_every_byte(job)


# --- what cannot be mended ----------------------------------------------------------------------------------------
def test_a_corrupt_slot_without_another_copy_is_set_aside_and_an_unstaged_step_dies(stage: Stage) -> None:
    daemon = stage.daemon(listen=True, http=True, env={"CKPTD_SCRUB_EVERY": "0"})
    job = ShardJob([daemon, daemon], protect="off")
    job.save(1)
    job.save(2, ranks=[0])
    for step in (1, 2):
        (path, held), *_ = slots_of(daemon, job, step).items()
        flip_slot(path, held)
    assert len(daemon.findings(job.run)) == 2
    wait_until(lambda: daemon.findings(job.run) == [], "what is corrupt to be set aside")
    wait_until(lambda: [o["error"] for o in job.marks["dead"]] == ["Corrupt"], "the step to be dead")
    assert counts(daemon, job, "memory") == (2, 0)
    job.save(3)
    assert job.marks["staged"] == 3


def test_a_trainer_goes_on_when_a_slot_that_it_maps_is_set_aside(stage: Stage) -> None:
    daemon = stage.daemon(env={"CKPTD_SCRUB_EVERY": "0"})
    trainer = stage.trainer(daemon, "--steps", 9, "--hold-at", 4, "--wait", "staged")
    trainer.wait_step(4)
    for path in daemon.slot_files():
        page = memoryview(path.read_bytes())
        if read_state(page) is SlotState.SEALED:
            flip_slot(path, decode_slot(page, path.name)[0], "float32")
    assert daemon.findings("tiny")
    wait_until(lambda: daemon.findings("tiny") == [], "the slots to be set aside")
    trainer.release(4)
    assert trainer.finish()["staged"] == 9
    assert [step["error"] for step in trainer.of("step")] == [None] * 9
    restored = stage.trainer(daemon, "--steps", 0).wait_event("ready")
    assert (restored["restored"], restored["hash"]) == (9, trainer.hashes()[9])


def test_parity_is_not_held_against_data_whose_daemon_is_gone_and_verify_says_so(stage: Stage) -> None:
    start(stage, 2)
    job = protected(stage.daemons, "1+1")
    stage.daemons[1].kill()
    rc, stdout, stderr = stage.daemons[0].cli("verify", job.run)
    assert rc == 0, stdout + stderr
    assert re.search(r"^note: step 1 .*stripe 0 row 0 of 1\+1: not held against its data: ", stdout, re.MULTILINE)
    assert "no findings" in stdout
