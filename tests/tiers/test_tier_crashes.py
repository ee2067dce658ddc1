"""A writer that dies or fails at any point leaves no checkpoint, and the next one commits; deletions resume."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from tier_shards import RUN, SNAPSHOT, drain, make_shard, manifest_of, read_back, small_shard, write

from ckptd.errors import CkptdError, CommitConflict, TierFailed
from ckptd.failpoints import ENV
from ckptd.format.manifest import MANIFEST_NAME, folder_name
from ckptd.model import Incarnation, SnapshotId
from ckptd.tiers import StoredSnapshot, ZarrTier
from ckptd.tiers import flush as flush_module
from ckptd.tiers.arrays import CHUNK_BYTES

KILLED = -9
BEFORE_MANIFEST = ["tier.before_array", "tier.after_array", "tier.before_index", "tier.before_manifest"]


def child(url: str, mode: str = "drain", failpoints: str = "") -> tuple[int, str]:
    """Drain (or delete) in a process of its own; its exit code and what it said."""
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("tier_shards.py")), url, mode],
        env={**os.environ, ENV: failpoints, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def step_folder(tier: ZarrTier) -> Path:
    return tier.spec.path / RUN / folder_name(SNAPSHOT)


@pytest.mark.parametrize(
    ("name", "nth"),
    [
        *((name, nth) for name in ("tier.before_array", "tier.after_array") for nth in (1, 3, 6)),
        *(("tier.before_index", nth) for nth in (1, 2)),
        ("tier.before_manifest", 1),
    ],
)
def test_a_writer_killed_before_the_manifest_leaves_no_checkpoint_and_the_retry_commits(
    tier: ZarrTier, name: str, nth: int
) -> None:
    assert child(tier.spec.url, failpoints=f"{name}=kill@{nth}")[0] == KILLED
    assert tier.snapshots(RUN) == [StoredSnapshot(SNAPSHOT, False)]
    shards = [small_shard(0), small_shard(1)]
    manifest = drain(tier, shards)
    assert read_back(tier, manifest, 1)[1] == bytes(shards[1].payload)
    assert tier.verify(RUN, SNAPSHOT) == []
    assert not list(step_folder(tier).glob(".tmp-*"))


def test_a_writer_killed_after_the_manifest_has_committed(tier: ZarrTier) -> None:
    assert child(tier.spec.url, failpoints="tier.after_manifest=kill")[0] == KILLED
    assert tier.snapshots(RUN) == [StoredSnapshot(SNAPSHOT, True)]
    assert tier.verify(RUN, SNAPSHOT) == []
    with pytest.raises(CommitConflict):
        tier.commit(tier.manifest(RUN, SNAPSHOT))


@pytest.mark.parametrize("name", BEFORE_MANIFEST)
def test_a_full_disk_is_one_line_with_a_hint_and_no_checkpoint(tier: ZarrTier, name: str) -> None:
    code, said = child(tier.spec.url, failpoints=f"{name}=raise")
    assert code == 9, said
    assert said.startswith("TierFailed")
    assert "No space left on device" in said
    assert "prune" in said
    assert said.count("\n") == 1
    assert tier.snapshots(RUN) == [StoredSnapshot(SNAPSHOT, False)]
    assert not list(step_folder(tier).glob(".tmp-*")), "what was half written gives its space back"
    drain(tier, [small_shard(0), small_shard(1)])


@pytest.mark.parametrize("codec", ["none", "blosc"])
def test_a_write_the_kernel_refuses_in_a_thread_of_zarrs_surfaces(tier: ZarrTier, codec: str) -> None:
    code, said = child(f"{tier.spec.url},codec={codec}", "limit=50000")
    assert code == 9, said
    assert said.startswith("TierFailed")
    assert "File too large" in said
    assert "ulimit" in said
    assert tier.snapshots(RUN) == [StoredSnapshot(SNAPSHOT, False)]
    assert drain(tier, [small_shard(0), small_shard(1)]).world_size == 2


def test_an_fsync_that_fails_in_a_flush_thread_surfaces(tier: ZarrTier, monkeypatch: pytest.MonkeyPatch) -> None:
    real = flush_module.files.fsync_path

    def fail_on_last_chunk(path: Path) -> None:
        if path.name == "4":
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(flush_module.files, "fsync_path", fail_on_last_chunk)
    with pytest.raises(TierFailed, match=r"c/4: cannot fsync: Input/output error"):
        write(tier, [make_shard({"uint8": 5 * CHUNK_BYTES})])
    monkeypatch.undo()
    assert not step_folder(tier).joinpath("rank-00000").exists()


def test_every_file_and_folder_is_synced_before_its_manifest(tier: ZarrTier, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[int] = set()
    real = os.fsync

    def note(fd: int) -> None:
        synced.add(os.fstat(fd).st_ino)
        real(fd)

    monkeypatch.setattr(os, "fsync", note)
    manifest = write(tier, [small_shard(0), small_shard(1)])
    tier.commit(manifest)
    run_folder = tier.spec.path / RUN
    for path in [tier.spec.path, run_folder, *run_folder.rglob("*")]:
        assert path.stat().st_ino in synced, path


def test_a_late_writer_cannot_tear_what_another_finished(tier: ZarrTier) -> None:
    shard = make_shard({"float32": 4 * CHUNK_BYTES})
    is_late, go = threading.Event(), threading.Event()

    def stall(_: int) -> None:
        is_late.set()
        go.wait(30)

    errors: list[BaseException] = []

    def late() -> None:
        try:
            tier.write_rank(RUN, SNAPSHOT, 0, shard.layout, shard.payload, shard.table, stall)
        except CkptdError as error:
            errors.append(error)

    thread = threading.Thread(target=late)
    thread.start()
    assert is_late.wait(30)
    manifest = drain(tier, [shard])
    go.set()
    thread.join(30)
    assert tier.verify(RUN, SNAPSHOT) == []
    assert read_back(tier, manifest)[1] == bytes(shard.payload)
    assert all(isinstance(error, TierFailed) for error in errors)


def test_two_commits_at_once_end_with_one_winner(tier: ZarrTier) -> None:
    manifest = write(tier, [small_shard()])
    outcomes: list[str] = []
    start = threading.Barrier(4)

    def commit() -> None:
        start.wait(10)
        try:
            tier.commit(manifest)
            outcomes.append("won")
        except CommitConflict:
            outcomes.append("lost")

    threads = [threading.Thread(target=commit) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert tier.manifest(RUN, SNAPSHOT) == manifest


def test_ranks_written_at_once_make_one_checkpoint(tier: ZarrTier) -> None:
    shards = [small_shard(seed) for seed in range(4)]
    records = {}

    def one(rank: int) -> None:
        shard = shards[rank]
        records[rank] = tier.write_rank(RUN, SNAPSHOT, rank, shard.layout, shard.payload, shard.table)

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    manifest = manifest_of([records[rank] for rank in range(4)])
    tier.commit(manifest)
    assert [read_back(tier, manifest, rank)[1] for rank in range(4)] == [bytes(s.payload) for s in shards]


def test_a_deletion_takes_the_manifest_first_and_resumes(tier: ZarrTier) -> None:
    drain(tier, [small_shard(0), small_shard(1)])
    assert child(tier.spec.url, "delete", "tier.mid_delete=kill")[0] == KILLED
    assert step_folder(tier).exists()
    assert not (step_folder(tier) / MANIFEST_NAME).exists()
    assert tier.snapshots(RUN) == [StoredSnapshot(SNAPSHOT, False)]
    tier.delete(RUN, SNAPSHOT)
    assert tier.snapshots(RUN) == []
    tier.delete(RUN, SNAPSHOT)


def test_an_interrupted_save_leaves_the_one_before_it_as_the_newest(tier: ZarrTier) -> None:
    older = SnapshotId(Incarnation(1, 0xC0FFEE), 1100)
    manifest = drain(tier, [small_shard(5)], older)
    assert child(tier.spec.url, failpoints="tier.before_manifest=kill")[0] == KILLED
    assert max(entry.snapshot for entry in tier.snapshots(RUN) if entry.is_committed) == older
    assert read_back(tier, manifest)[1] == bytes(small_shard(5).payload)
