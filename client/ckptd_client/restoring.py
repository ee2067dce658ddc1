"""Restore: all ranks agree on one snapshot, check every byte of it, and only then touch their state.

Rank 0 asks its daemon for candidates, best first, and publishes one; every rank has it fetched and verified in daemon
memory, compares it with its own state, and reports; when all are well rank 0 has the decision recorded and publishes
"apply", else the next candidate. Whoever cannot tell whether a checkpoint exists raises RestoreUndecided.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import torch

from ckptd.errors import CkptdError, Corrupt, RestoreFailed, RestoreUndecided, StateMismatch, error_from_wire
from ckptd.format.blocks import HEADER_BYTES, SlotLayout
from ckptd.format.index import decode_index
from ckptd.format.manifest import snapshot_from_json, snapshot_to_json
from ckptd.format.tree import decode_tree
from ckptd.memory import Bytes
from ckptd.model import Box, Segment, SnapshotId
from ckptd_api.convert import roster_to_pb, snapshot_from_pb, snapshot_to_pb
from ckptd_api.v1 import node_pb2, types_pb2
from ckptd_client.board import Board, wait_for
from ckptd_client.handover import ENV
from ckptd_client.link import Link
from ckptd_client.mapping import map_readable
from ckptd_client.membership import Membership
from ckptd_client.snapshot import Restored
from ckptd_client.state import TORCH_DECODERS, TORCH_DTYPES, RestorePlan, plan_restore, restore_rng

AGREE_S: Final = 1800.0
FETCH_S: Final = 1700.0
_CALL_S: Final = 60.0
log = logging.getLogger("ckptd_client")


@dataclass(slots=True)
class _Shard:
    """This rank's shard of the candidate, checked, in memory, not yet applied."""

    plan: RestorePlan
    rng: Any
    boxes: Mapping[str, Box]
    payload: Bytes
    layout: SlotLayout
    source: str
    lease: int

    def tensor(self, name: str) -> torch.Tensor:
        """The saved tensor as a view of the payload."""
        box = self.boxes[name]
        number = next(n for n, s in enumerate(self.layout.segments) if s.dtype == box.dtype)
        start = self.layout.segment_offsets[number] + box.position
        flat = torch.from_numpy(self.payload[start : start + box.size_bytes])
        return flat.view(TORCH_DTYPES[box.dtype]).view(box.shape)


class Restoration:
    """One call of ``restore()`` on one rank; ``number`` counts the calls of this incarnation, the same on all ranks."""

    def __init__(self, link: Link, board: Board, state: Mapping[str, Any], number: int) -> None:
        assert link.membership is not None
        self._link = link
        self._board = board
        self._state = state
        self._prefix = _prefix(link, link.membership, number)
        self._started = time.monotonic()

    @property
    def _roster(self) -> types_pb2.Roster:
        """The newest: a daemon may have moved since the restore began."""
        assert self._link.membership is not None
        return roster_to_pb(self._link.membership.roster)

    def run(self, step: int | None, source: str | None) -> Restored | None:
        """Restore ``step`` (None: the newest) from ``source`` (None: wherever it is first found whole)."""
        attempt = 0
        candidates = self._candidates(step, source) if self._link.rank == 0 else iter(())
        while True:
            proposal = self._propose(attempt, candidates)
            if proposal.get("error"):
                raise error_from_wire(*proposal["error"])
            snapshot = snapshot_from_json(proposal["snapshot"])
            if snapshot is None:
                self._agree(attempt, None, None)
                return None
            shard, error = self._fetch(snapshot, proposal["source"])
            if self._agree(attempt, error, snapshot):
                assert shard is not None
                return self._apply(shard, snapshot)
            if shard is not None:
                self._release(shard.lease)
            attempt += 1

    # --- rank 0 ------------------------------------------------------------------------------------------------------
    def _candidates(self, step: int | None, source: str | None) -> Iterator[dict[str, Any]]:
        """What to propose, in order; the last proposal is nothing, or why it cannot be told."""
        link = self._link
        request = node_pb2.ListCandidatesRequest(
            run=link.run,
            incarnation=link.incarnation,
            roster=self._roster,
            source="" if source in (None, "tier") else source,
        )
        if step is not None:
            request.step = step
        try:
            answer = link.daemon.call("ListCandidates", request, _CALL_S)
        except CkptdError as error:
            if not isinstance(error, RestoreUndecided):
                error = RestoreUndecided(error.message)
            yield _refusal(error)
            return
        for note in answer.notes:
            log.warning("restore: %s", note)
        tried = []
        for candidate in answer.candidates:
            fetch_from = source or ""
            if source == "tier":
                tiers = [s for s in candidate.sources if "://" in s]
                if not tiers:
                    continue
                fetch_from = tiers[0]
            snapshot = snapshot_from_pb(candidate.snapshot)
            tried.append(str(snapshot))
            yield {"snapshot": snapshot_to_json(snapshot), "source": fetch_from}
        if tried:
            yield _refusal(RestoreFailed(f"none of {', '.join(tried)} can be restored", "`ckptd verify` says why"))
        elif step is not None:
            yield _refusal(RestoreFailed(f"step {step} of run {link.run} does not exist", "`ckptd ls` lists the steps"))
        else:
            yield {"snapshot": None}

    # --- every rank --------------------------------------------------------------------------------------------------
    def _propose(self, attempt: int, candidates: Iterator[dict[str, Any]]) -> dict[str, Any]:
        key = f"{self._prefix}/{attempt}/candidate"
        if self._link.rank == 0:
            proposal = next(candidates)
            self._board.set(key, json.dumps(proposal).encode())
            return proposal
        found: dict[str, Any] = json.loads(wait_for(self._board, [(0, key)], AGREE_S, "restore candidate")[0])
        return found

    def _agree(self, attempt: int, error: CkptdError | None, snapshot: SnapshotId | None) -> bool:
        """True to apply, False for the next candidate; raises when every rank must."""
        prefix = f"{self._prefix}/{attempt}"
        self._board.set(f"{prefix}/report/{self._link.rank}", json.dumps(_wire(error)).encode())
        if self._link.rank == 0:
            ranks = range(self._link.meeting.world_size)
            reports = wait_for(self._board, [(r, f"{prefix}/report/{r}") for r in ranks], AGREE_S, "restore report")
            verdict = _judge([json.loads(reports[rank]) for rank in ranks])
            if verdict == ["apply"]:
                verdict = self._record(snapshot)
            self._board.set(f"{prefix}/verdict", json.dumps(verdict).encode())
        else:
            verdict = json.loads(wait_for(self._board, [(0, f"{prefix}/verdict")], AGREE_S, "restore verdict")[0])
        if verdict[0] == "raise":
            raise error_from_wire(*verdict[1])
        return bool(verdict == ["apply"])

    def _record(self, snapshot: SnapshotId | None) -> list[Any]:
        """Have the decision recorded before any rank applies it."""
        request = node_pb2.DecideRequest(
            run=self._link.run,
            incarnation=self._link.incarnation,
            roster=self._roster,
            parent=snapshot_to_pb(snapshot) if snapshot else None,
        )
        try:
            self._link.daemon.call("Decide", request, _CALL_S)
        except CkptdError as error:
            return ["raise", _wire(RestoreUndecided(error.message))]
        return ["apply"]

    def _fetch(self, snapshot: SnapshotId, source: str) -> tuple[_Shard | None, CkptdError | None]:
        link = self._link
        request = node_pb2.FetchRequest(
            run=link.run,
            incarnation=link.incarnation,
            snapshot=snapshot_to_pb(snapshot),
            rank=link.rank,
            world_size=link.meeting.world_size,
            source=source,
        )
        try:
            fetched = link.daemon.call("Fetch", request, FETCH_S)
            with self._released_on_error(fetched.lease):
                shard = self._map(fetched)
                shard.plan.check()
        except CkptdError as error:
            return None, error
        except Exception as error:  # noqa: BLE001  every rank must report, or the others wait for it
            return None, CkptdError(f"{type(error).__name__}: {error}")
        return shard, None

    def _map(self, fetched: node_pb2.FetchResponse) -> _Shard:
        segments = [Segment(s.dtype, s.size_bytes) for s in fetched.segments]
        layout = SlotLayout.plan(fetched.index_bytes, segments, fetched.block_bytes)
        payload = _payload(self._link, fetched, layout)
        index = decode_index(payload[: layout.index_bytes].tobytes(), fetched.slot)
        tree = decode_tree(index.tree, TORCH_DECODERS)
        boxes = {box.name: box for box in index.boxes}
        plan = plan_restore(self._state, tree["state"], boxes)
        return _Shard(plan, tree["rng"], boxes, payload, layout, fetched.source, fetched.lease)

    @contextmanager
    def _released_on_error(self, lease: int) -> Iterator[None]:
        try:
            yield
        except Exception:
            self._release(lease)
            raise

    def _release(self, lease: int) -> None:
        with suppress(CkptdError):  # it expires by itself, and a daemon that restarted has forgotten it
            self._link.daemon.call("Release", node_pb2.ReleaseRequest(lease=lease), _CALL_S)

    def _apply(self, shard: _Shard, snapshot: SnapshotId) -> Restored:
        try:
            shard.plan.apply(shard.tensor)
            restore_rng(shard.rng)
        finally:
            self._release(shard.lease)
        return Restored(
            step=snapshot.step,
            incarnation=snapshot.incarnation,
            source=shard.source,
            seconds=time.monotonic() - self._started,
            bytes=sum(segment.size_bytes for segment in shard.layout.segments),
        )


def refuse(link: Link, board: Board, number: int, error: CkptdError) -> None:
    """Say to the other ranks that this one takes no part in ``restore()`` number ``number``: they raise when they hear
    of it and do not wait for it. A rank that has not met the others has nobody to say it to."""
    if link.membership is None:
        return
    name, content = ("candidate", _refusal(error)) if link.rank == 0 else (f"report/{link.rank}", _wire(error))
    with suppress(CkptdError):  # then they wait until their own deadline
        board.set(f"{_prefix(link, link.membership, number)}/0/{name}", json.dumps(content).encode())


def _prefix(link: Link, membership: Membership, number: int) -> str:
    return link.meeting.rosters(membership.roster.incarnation_id).key(f"restore/{number}")


def _payload(link: Link, fetched: node_pb2.FetchResponse, layout: SlotLayout) -> Bytes:
    """The payload of the leased slot: mapped, or read as a stream when memory cannot be shared."""
    if os.environ.get(ENV, "auto") != "grpc" and link.daemon.can_share_memory:
        fd, size_bytes = link.daemon.slot_descriptor(fetched.slot, is_writable=False)
        return map_readable(fd, size_bytes)[HEADER_BYTES : HEADER_BYTES + layout.payload_bytes]
    payload = np.empty(layout.payload_bytes, np.uint8)
    request, at = node_pb2.ReadRequest(lease=fetched.lease, offset=0, size_bytes=layout.payload_bytes), 0
    for part in link.daemon.stream("Read", request, FETCH_S):
        data = np.frombuffer(part.data, np.uint8)
        payload[at : at + len(data)] = data
        at += len(data)
    if at != layout.payload_bytes:
        raise Corrupt(f"slot {fetched.slot}: {at} of {layout.payload_bytes} bytes arrived")
    return payload


def _wire(error: CkptdError | None) -> list[str] | None:
    return None if error is None else [type(error).__name__, error.message, error.hint]


def _refusal(error: CkptdError) -> dict[str, Any]:
    return {"error": _wire(error), "snapshot": None}


def _judge(reports: list[list[str] | None]) -> list[Any]:
    """Apply when every rank is well; the next candidate when bytes were bad; else all ranks raise the same error."""
    problems = [(rank, report) for rank, report in enumerate(reports) if report is not None]
    if not problems:
        return ["apply"]
    for rank, (name, message, hint) in problems:
        if name not in (Corrupt.__name__, RestoreFailed.__name__):
            is_final = name == StateMismatch.__name__
            kind = name if is_final or not error_from_wire(name, "", "").is_retryable else RestoreUndecided.__name__
            return ["raise", [kind, f"rank {rank}: {message}", hint]]
    return ["next"]
