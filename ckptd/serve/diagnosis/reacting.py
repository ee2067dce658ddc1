"""What the coordinator does about a fault by itself: a snapshot soon, or what is staged made safe. Once a fault."""

from __future__ import annotations

from typing import Final

import structlog

from ckptd.detect.faultlog import FAMILIES, Family
from ckptd.detect.records import Confidence, Fault, Kind
from ckptd.serve.coordinator import Coordinator

_MOST_REMEMBERED: Final = 1024
_SUSPECTS_S: Final = 300.0
log = structlog.get_logger()


class Reactions:
    """For one incarnation. A slow node: the next step that all ranks hear of in time is due, and durable once the fault
    is confirmed. A hang or a death: no new snapshot is possible, so the newest staged one is drained."""

    def __init__(self) -> None:
        self._hurried_s = -_SUSPECTS_S
        self._done: dict[tuple[Kind, tuple[int, ...], tuple[str, ...], bool], None] = {}

    def react(self, coordinator: Coordinator, fault: Fault, now_s: float) -> None:
        is_sure = fault.confidence is not Confidence.SUSPECT
        key = (fault.kind, fault.ranks, fault.nodes, is_sure)
        if key in self._done:
            return
        if FAMILIES[fault.kind] is Family.STOP:
            if not is_sure:
                return
            coordinator.safeguard()
        elif not is_sure and now_s - self._hurried_s < _SUSPECTS_S:
            return  # suspects come and go
        elif (step := coordinator.hurry(is_durable=is_sure)) is None:
            return  # the schedule is changing: the next look tries again
        else:
            self._hurried_s = now_s
            log.info("snapshot due for a fault", run=coordinator.run, step=step, kind=fault.kind.value)
        self._done[key] = None
        while len(self._done) > _MOST_REMEMBERED:
            del self._done[next(iter(self._done))]
