"""A flipped bit in every region of a slot and of a checkpoint in a tier: found, named, and the next source serves."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from harness import DaemonProcess, Nursery, Stage, TrainerProcess

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.slot import STATE_OFFSET, SlotState, decode_header, read_state

REGIONS = ("header", "index", "float32", "float64", "table")
NAMED = {"table": "CRC table", "header": "header"}


class Saved(NamedTuple):
    run: str
    trainer: TrainerProcess


@pytest.fixture(scope="module")
def home(nursery: Nursery) -> Iterator[Stage]:
    """One daemon with a tier serves every test that leaves it alive."""
    stage = Stage(nursery)
    stage.tier_daemon(memory="128MiB")
    yield stage
    stage.close()


def save(stage: Stage, daemon: DaemonProcess, run: str, steps: int = 3) -> Saved:
    trainer = stage.trainer(daemon, "--run", run, "--steps", steps, "--half", "--wait", "durable")
    assert trainer.finish()["durable"] == steps
    return Saved(run, trainer)


def restore(stage: Stage, daemon: DaemonProcess, saved: Saved) -> tuple[int, str]:
    """(step, source) of a restore that is held against what was saved, bit by bit."""
    trainer = stage.trainer(daemon, "--run", saved.run, "--steps", 0, "--half")
    ready = trainer.wait_event("ready")
    trainer.finish()
    assert ready["hash"] == saved.trainer.hashes()[ready["restored"]]
    return ready["restored"], ready["source"]


def newest_slot(daemon: DaemonProcess, run: str) -> Path:
    pages = {p: memoryview(p.read_bytes()) for p in daemon.arena.glob(f"{run}.*")}
    sealed = {p: page for p, page in pages.items() if read_state(page) is SlotState.SEALED}
    found = [(decode_header(page, p.name)[0].snapshot, p) for p, page in sealed.items()]
    return max(found)[1]


def flip(path: Path, offset: int, bit: int = 3) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ (1 << bit)]))


def flip_region(slot: Path, region: str) -> None:
    """One bit of a region of a sealed slot."""
    layout = decode_header(memoryview(slot.read_bytes()), slot.name)[0].layout
    places = {"header": 150, "state": STATE_OFFSET, "table": HEADER_BYTES + layout.payload_bytes + 5}
    for name, offset, size_bytes in layout.parts():
        places[name] = HEADER_BYTES + offset + size_bytes // 2
    flip(slot, places[region])


@pytest.mark.parametrize("region", REGIONS)
def test_a_bit_flipped_under_a_living_daemon_is_named_and_the_tier_serves(home: Stage, region: str) -> None:
    daemon = home.daemons[0]
    saved = save(home, daemon, f"live-{region}")
    flip_region(newest_slot(daemon, saved.run), region)
    rc, stdout, stderr = daemon.cli("verify", saved.run)
    assert rc == 4, stderr
    assert NAMED.get(region, f"{region}: block") in stdout
    assert "memory" in stdout
    assert restore(home, daemon, saved) == (3, daemon.tiers[0].split(",")[0])


@pytest.mark.slow
def test_a_bit_flipped_while_no_daemon_ran_is_named_and_the_tier_serves(stage: Stage) -> None:
    daemon = stage.tier_daemon(memory="128MiB")
    runs = {region: save(stage, daemon, f"dead-{region}") for region in (*REGIONS, "state")}
    daemon.kill()
    for region, saved in runs.items():
        flip_region(newest_slot(daemon, saved.run), region)
    daemon.restart()
    problems = daemon.status()["problems"]
    for region, saved in runs.items():
        name = NAMED.get(region, "unknown state" if region == "state" else f"{region}: block")
        assert any(saved.run in problem and name in problem for problem in problems), (region, problems)
        assert restore(stage, daemon, saved) == (3, daemon.tiers[0].split(",")[0])
        assert daemon.cli("verify", saved.run).rc == 0  # what was set aside is no copy any more


def test_a_mark_or_unused_header_byte_that_flips_harms_nothing(home: Stage) -> None:
    daemon = home.daemons[0]
    saved = save(home, daemon, "unused")
    flip(newest_slot(daemon, saved.run), 3900)
    assert daemon.cli("verify", saved.run).rc == 0
    assert restore(home, daemon, saved) == (3, "memory")


@pytest.mark.parametrize("part", ["chunk", "index", "manifest", "array metadata"])
def test_a_bit_flipped_in_the_newest_checkpoint_of_a_tier_is_named_and_the_one_before_serves(
    stage: Stage, part: str
) -> None:
    daemon = stage.tier_daemon()
    saved = save(stage, daemon, "tiny")
    daemon.kill()
    shutil.rmtree(daemon.arena)
    folder = max((daemon.folder / "tier" / "tiny").glob("step-*"))
    path = {
        "chunk": lambda: next(p for p in folder.rglob("float32/c/*") if p.is_file()),
        "index": lambda: next(p for p in folder.rglob("*") if "index" in p.name and p.is_file()),
        "manifest": lambda: folder / "manifest.json",
        "array metadata": lambda: next(folder.rglob("float32/zarr.json")),
    }[part]()
    flip(path, path.stat().st_size // 2, bit=0)
    daemon.restart()
    rc, stdout, stderr = daemon.cli("verify", "tiny", "3")
    assert rc == 4, stdout + stderr
    assert {"chunk": "float32", "array metadata": "zarr.json"}.get(part, part) in stdout
    assert daemon.cli("verify", "tiny", "2").rc == 0
    assert restore(stage, daemon, saved) == (2, daemon.tiers[0].split(",")[0])


def test_when_every_copy_is_corrupt_the_restore_says_so_and_touches_nothing(stage: Stage) -> None:
    daemon = stage.daemon()
    save_only = stage.trainer(daemon, "--steps", 1, "--half", "--wait", "staged")
    save_only.finish()
    flip_region(newest_slot(daemon, "tiny"), "float32")
    trainer = stage.trainer(daemon, "--half", "--steps", 2)
    assert trainer.wait() == 1
    failed = trainer.events[-1]
    fresh = stage.trainer(daemon, "--half", "--run", "fresh", "--steps", 0)
    assert failed["error"] == "RestoreFailed"
    assert "step 1 of incarnation" in failed["message"]
    assert failed["hash"] == fresh.wait_event("ready")["hash"]
