"""Pictures of a run: asked of any of its daemons, made by the analyst.

Drawn from a copy of what the analyst sees, so that judging goes on meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

from ckptd.detect.pictures import encode, has_something, pictures
from ckptd.errors import InvalidRequest, UnknownRun
from ckptd.model import Incarnation
from ckptd.replay.recording import encode_recording
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import coordinator_pb2, operator_pb2

if TYPE_CHECKING:
    from ckptd.serve.node import Node

_CALL_S: Final = 8.0
_SOON: Final = "ask again when it has been training for a few steps; `ckptd faults` tells what is not seen of it"


def only_run(node: Node, runs: Iterable[str]) -> str:
    """The one of ``runs`` that anything was heard of. UnknownRun when there is none, InvalidRequest when several."""
    known = [run for run in runs if node.diagnosis.newest(run) is not None]
    if not known:
        raise UnknownRun("no run reports timings to this daemon")
    if len(known) > 1:
        raise InvalidRequest(f"a picture is of one run, and here are {', '.join(sorted(known))}", "name one: RUN")
    return known[0]


def find_pictures(node: Node, run: str, *, is_recording: bool = False) -> operator_pb2.GetPicturesResponse:
    """Those of the newest incarnation of ``run``, or what they are drawn from, from its analyst.

    Raises:
        UnknownRun: no rank reports timings, nobody judges them, or there are none yet.
        DaemonUnreachable: the analyst does not answer.
    """
    found = node.diagnosis.newest(run)
    if found is None:
        raise UnknownRun(f"run {run} has no picture: no rank reports timings to this daemon", _SOON)
    incarnation, coverage = found
    if not coverage.is_judging:
        raise UnknownRun(
            f"run {run} has no picture: nobody judges it",
            "its coordinator is gone, and no daemon reaches half of it: start the daemon of rank 0's node",
        )
    if coverage.analyst == node.node_id:
        found_here = pictures_here(node, run, incarnation, is_recording=is_recording)
    else:
        found_here = _ask(node, run, incarnation, coverage.analyst, is_recording=is_recording)
    pictures, recording = found_here.pictures, found_here.recording
    return operator_pb2.GetPicturesResponse(pictures=pictures, recording=recording, analyst=coverage.analyst)


def pictures_here(
    node: Node, run: str, incarnation: Incarnation, *, is_recording: bool = False
) -> coordinator_pb2.CoordinatorServiceGetPicturesResponse:
    """Made by the analyst here. UnknownRun when there is none, or it has nothing to draw yet."""
    analyst = node.diagnosis.analyst(run, incarnation)
    if analyst is None:
        raise UnknownRun(f"run {run} has no picture: daemon {node.node_id} does not judge it any more", _SOON)
    if is_recording:
        recording = encode_recording(analyst.recording(time.monotonic()))
        return coordinator_pb2.CoordinatorServiceGetPicturesResponse(recording=recording)
    document = pictures(analyst.scene(time.monotonic()), run, str(incarnation))
    if not has_something(document):
        raise UnknownRun(f"run {run} has no picture yet: no step of it is known", _SOON)
    return coordinator_pb2.CoordinatorServiceGetPicturesResponse(pictures=encode(document))


def _ask(
    node: Node, run: str, incarnation: Incarnation, analyst: str, *, is_recording: bool
) -> coordinator_pb2.CoordinatorServiceGetPicturesResponse:
    joined = node.find_run(run, incarnation)
    entry = joined.roster.nodes.get(analyst) if joined else None
    if entry is None:
        raise UnknownRun(f"run {run} has no picture: node {analyst}, which judges it, is not in it any more", _SOON)
    peer = node.peering.channels.peer(entry.address)
    request = coordinator_pb2.CoordinatorServiceGetPicturesRequest(
        run=run, incarnation=incarnation_to_pb(incarnation), is_recording=is_recording
    )
    answer: coordinator_pb2.CoordinatorServiceGetPicturesResponse = peer.call(
        peer.coordinator.GetPictures, request, _CALL_S
    )
    return answer
