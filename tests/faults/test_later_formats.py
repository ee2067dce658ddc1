"""What a later version wrote is refused with the version named, and is neither read half nor removed."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

from crc32c import crc32c
from harness import DaemonProcess, Stage

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.index import VERSION as INDEX_VERSION
from ckptd.format.slot import VERSION as SLOT_VERSION
from ckptd.format.slot import SlotState, decode_header, encode_header, read_state


def save(stage: Stage, daemon: DaemonProcess, steps: int = 1) -> None:
    stage.trainer(daemon, "--steps", steps, "--wait", "durable" if daemon.tiers else "staged").finish()


def sealed(daemon: DaemonProcess) -> Path:
    return next(p for p in daemon.slot_files() if read_state(memoryview(p.read_bytes())) is SlotState.SEALED)


def failure(stage: Stage, daemon: DaemonProcess) -> dict[str, str]:
    trainer = stage.trainer(daemon)
    assert trainer.wait(60) == 1
    return trainer.events[-1]


def test_a_slot_of_a_later_format_is_kept_for_the_daemon_that_can_read_it(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    daemon.kill()
    slot = sealed(daemon)
    data = bytearray(slot.read_bytes())
    data[8:12] = struct.pack("<I", SLOT_VERSION + 7)
    slot.write_bytes(data)
    daemon.restart()
    problem = next(p for p in daemon.status()["problems"] if slot.name in p)
    assert f"slot format {SLOT_VERSION + 7} is newer than this ckptd reads ({SLOT_VERSION})" in problem
    assert f"use a ckptd that reads slot format {SLOT_VERSION + 7}" in problem
    stage.trainer(daemon, "--run", "other", "--steps", 3, "--wait", "staged").finish()
    assert slot.read_bytes() == data


def test_an_index_of_a_later_format_is_refused_by_its_version(stage: Stage, daemon: DaemonProcess) -> None:
    save(stage, daemon)
    daemon.kill()
    slot = sealed(daemon)
    data = bytearray(slot.read_bytes())
    header, _ = decode_header(memoryview(data), slot.name)
    layout = header.layout
    data[HEADER_BYTES + 8 : HEADER_BYTES + 12] = struct.pack("<I", INDEX_VERSION + 3)
    table_at = HEADER_BYTES + layout.payload_bytes
    for block in range(layout.blocks):  # whole and well checksummed: only the version is beyond us
        start = HEADER_BYTES + block * layout.block_bytes
        struct.pack_into("<I", data, table_at + 4 * block, crc32c(data[start : start + layout.block_bytes]))
    encoded = encode_header(header, crc32c(data[table_at : table_at + 4 * layout.blocks]))
    data[: len(encoded)] = encoded
    slot.write_bytes(data)
    daemon.restart()
    failed = failure(stage, daemon)
    assert failed["error"] == "FormatTooNew"
    assert f"index format {INDEX_VERSION + 3}" in failed["message"]


def test_a_manifest_of_a_later_format_leaves_the_restore_undecided(stage: Stage, tier_daemon: DaemonProcess) -> None:
    save(stage, tier_daemon, steps=2)
    tier_daemon.kill()
    shutil.rmtree(tier_daemon.arena)
    manifest = max((tier_daemon.folder / "tier" / "tiny").glob("step-*")) / "manifest.json"
    text = manifest.read_text()
    later = text.replace('"format": 1', '"format": 9', 1)
    assert json.loads(later)["format"] == 9
    manifest.write_text(later)
    tier_daemon.restart()
    failed = failure(stage, tier_daemon)
    assert failed["error"] == "RestoreUndecided"
    assert "9" in failed["message"]
    assert "newer" in failed["message"]
    rc, stdout, _ = tier_daemon.cli("verify", "tiny", 2)
    assert rc == 4
    assert "newer" in stdout
    assert manifest.read_text() == later
