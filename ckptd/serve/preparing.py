"""What is done for a rank when it joins, before it saves for the first time: its slots, a word if memory is short."""

from __future__ import annotations

import structlog

from ckptd.config import Settings
from ckptd.erasure.groups import group_of
from ckptd.format.blocks import HEADER_BYTES
from ckptd.serve.node_run import NodeRun

log = structlog.get_logger()


def prepare_slots(run: NodeRun, rank: int, estimated_bytes: int, settings: Settings, *, is_decided: bool) -> None:
    """Start to make the slots of ``rank``, for a state of about ``estimated_bytes``."""
    run.slot_bytes[rank] = HEADER_BYTES + estimated_bytes + 8 * run.roster.block_bytes
    # After a restart one is enough for the restore, which must not wait for the others to be made.
    run.prepare_slots(settings.slots if is_decided or run.incarnation.ordinal == 1 else 1)
    _warn_of_parity(run, settings)


def _warn_of_parity(run: NodeRun, settings: Settings) -> None:
    """Say before the first save that memory will not do for slots and two generations of parity."""
    group = group_of(run.groups, run.node_id)
    if group is None:
        return
    sizes: dict[str, int] = {}
    for entry in run.roster.entries:
        sizes[entry.node_id] = sizes.get(entry.node_id, 0) + entry.estimated_bytes
    longest = max(sizes[node] for node in group.members)
    needed = settings.slots * sizes[run.node_id] + 2 * longest * group.geometry.m // group.geometry.k
    if needed > settings.memory_bytes:
        log.warning(
            "memory is short for this run: steps will be skipped or not protected",
            run=run.run,
            needed_bytes=needed,
            memory_bytes=settings.memory_bytes,
        )
