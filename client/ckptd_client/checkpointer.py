"""``Checkpointer``: what user code sees. Wires walk, plan, capture, link and restore together.

Layer: the top of the client. Invariants: nothing of ours stops or blocks training beyond the fence's deadlines
(``on_error="warn"``); a due step is captured or skipped with a reason, never silently.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from types import TracebackType
from typing import Any, Final, Literal

import torch

from ckptd.errors import (
    CaptureBusy,
    CkptdError,
    DaemonUnreachable,
    InvalidRequest,
    NoProtection,
    NoTier,
    NotPersisted,
    RestoreUndecided,
    StepDead,
    StepRepeated,
)
from ckptd.format.timings import Mask
from ckptd.format.tree import encode_tree
from ckptd.model import Roster
from ckptd_api.v1 import types_pb2
from ckptd_client.arguments import interval, protection, resolve_run
from ckptd_client.board import find_board
from ckptd_client.capture import Capture
from ckptd_client.daemon import Daemon, resolve_address
from ckptd_client.engine import CaptureEngine
from ckptd_client.hooks import OptimizerHooks
from ckptd_client.link import Link
from ckptd_client.membership import Meeting
from ckptd_client.pending import Pending
from ckptd_client.plan import Plan, plan_key
from ckptd_client.restoring import Restoration, refuse
from ckptd_client.snapshot import Restored, Snapshot
from ckptd_client.state import FenceClass, Leaf, StateWalker, capture_rng, encode_torch, optimizers_in
from ckptd_client.timing import checkpointer_timing

JOIN_S: Final = 10.0
CLOSE_S: Final = 30.0
TORN_ENV: Final = "CKPTD_TORN_CHECK"
_PACE_S: Final = 1.0
_NO_STALL: Final = -1.0
log = logging.getLogger("ckptd_client")


class Checkpointer:
    """Snapshots of ``state`` while it trains.

    Args:
        state: modules, optimizers, ``Stateful`` objects, schedulers or plain values by name; the same names on restore.
        run: the training job across its restarts; default CKPTD_RUN, then TORCHELASTIC_RUN_ID when that names a job.
        daemon: ``unix:///path`` or ``host:port``; default CKPTD_DAEMON, then the default sockets.
        every: a snapshot every so many steps, or so much time, or "auto": lost time at most 1 % of training time, and
            at least one snapshot every 10 minutes.
        persist_every: the same for durable snapshots; None: as the daemon's tiers say.
        protect: parity on other nodes: "k+m" (any m nodes of a group of k + m may be lost), "auto" (m = 1 below 4
            nodes, else 2) or "off"; rank 0's counts, capped by the daemons' --protect-max. One node alone has none.
        fenced: {name: tensors} that the caller's own code mutates (EMA weights): copied lazily, and the caller calls
            ``fence()`` before mutating them.
        timing: time collectives and steps, so that the daemons can tell a slow or stuck rank from its victims;
            ``timing.masked("evaluation")`` is a context for steps that are not like the others. The first
            CKPTD_WARM_UP_STEPS (20) steps count as such by themselves.
        shadow: device memory that may be used so that a fence need not wait: "auto", bytes, 0. Not in use yet.
        on_error: "warn" logs what went wrong with a save; "raise" raises it from ``save()`` and ``step()``.

    Raises:
        InvalidRequest: no run name, or an argument that can never work.
    """

    def __init__(
        self,
        state: Mapping[str, Any],
        run: str | None = None,
        daemon: str | None = None,
        every: int | timedelta | Literal["auto"] = "auto",
        persist_every: int | timedelta | None = None,
        protect: str = "auto",
        fenced: Mapping[str, Any] | None = None,
        timing: bool = True,
        shadow: int | Literal["auto"] = "auto",
        on_error: Literal["warn", "raise"] = "warn",
    ) -> None:
        if on_error not in ("warn", "raise"):
            raise InvalidRequest(f"on_error={on_error!r} is not valid", 'use "warn" or "raise"')
        if os.environ.get("GRPC_ENABLE_FORK_SUPPORT", "0") in ("1", "true", "True"):
            log.warning("GRPC_ENABLE_FORK_SUPPORT=1 hangs forked DataLoader workers: unset it or set it to 0")
        self._run = resolve_run(run)
        self._state = state
        self._on_error = on_error
        self._walker = StateWalker(state, fenced)
        self._pending = Pending()
        self._plan: Plan | None = None
        self._restores = 0
        self._newest_step = -1
        self._last_step: int | None = None
        self._last_step_at = 0.0
        self._step_s: float | None = None
        self._paced_at = 0.0
        self._measured: Capture | None = None
        self._last_skip: type[CkptdError] | None = None
        self._newest: Snapshot | None = None
        self._is_closed = False
        self._board, rank, world_size = find_board()
        leaves = self._walker.walk().leaves
        self._link = Link(
            Daemon(resolve_address(daemon)),
            Meeting(self._board, self._run, rank, world_size),
            self._run,
            interval(every, "every"),
            types_pb2.Interval() if persist_every is None else interval(persist_every, "persist_every"),
            protection(protect),
            estimate_bytes(leaves, state),
            self._pending,
            lambda: (self._newest_step, self._step_s),
            lambda: self._engine.forget_mappings(),
        )
        device = next((leaf.tensor.device for leaf in leaves if leaf.tensor.is_cuda), None)
        self._engine = CaptureEngine(self._link, device)
        self._hooks = OptimizerHooks(self._fence)
        self._hooks.attach(optimizers_in(state))
        self.timing = checkpointer_timing(self._run, is_on=timing)
        self._link.start()
        self.timing.report(self._link, [leaf.outer for leaf in leaves])
        if problem := self._link.wait_joined(JOIN_S):
            log.warning("training goes on without snapshots: %s", problem)

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._link.note_failure(error)
        self.close()

    # --- saving --------------------------------------------------------------------------------------------------
    def step(self, step: int) -> Snapshot | None:
        """Say that optimizer step ``step`` is done; the snapshot when the schedule has one due, else None."""
        self.timing.mark(step)
        self._note_pace(step)
        return self.save(step) if self._pending.schedule.is_due(step) else None

    def save(self, step: int, persist: bool = False) -> Snapshot:
        """Begin a snapshot of the state as it is after ``step`` and return at once. All ranks call it with the same
        step. ``persist``: make it durable whatever the schedule says."""
        newest = self._newest
        if newest is not None and step == newest.step and not (persist and not newest.is_persisted):
            return newest
        snapshot = Snapshot(step)
        self.timing.mark(step)
        with self.timing.masked("checkpoint"):  # of the step that begins here
            self._begin(snapshot, persist)
        return snapshot

    def fence(self) -> None:
        """Wait until every lazily copied tensor may be mutated: call it before changing what ``fenced`` lists."""
        self._fence(None)

    def restore(self, step: int | None = None, source: str | None = None) -> Restored | None:
        """Put the newest snapshot (or ``step``) into the state, every byte checked; None only when every daemon and
        every tier answered and none holds the run.

        Args:
            source: "memory" (that of any node), "tier" or a tier's URL; None: wherever it is first found whole.

        Raises:
            RestoreUndecided: it cannot be told whether a checkpoint exists, whatever ``on_error`` says.
            StateMismatch: the state differs from the snapshot in name, shape or dtype; nothing was changed.
            RestoreFailed: every copy of every candidate is broken.
        """
        if self._newest is not None:
            raise InvalidRequest(
                "restore() after a save", "restore before the first save, or make a new Checkpointer to go back"
            )
        with self.timing.masked("checkpoint"):
            return self._restore(step, source)

    def close(self) -> None:
        """Finish the capture under way and leave the run; the daemon goes on draining what is staged."""
        if self._is_closed:
            return
        self._is_closed = True
        self._engine.close(CLOSE_S)
        self._hooks.detach()
        self.timing.close()
        self._link.close(CLOSE_S)
        self._pending.close(DaemonUnreachable("the Checkpointer was closed before this was known", ""))

    # --- inside --------------------------------------------------------------------------------------------------
    def _restore(self, step: int | None, source: str | None) -> Restored | None:
        self._restores += 1  # first, so that ranks that fail below stay in step with those that do not
        if problem := self._link.wait_joined(JOIN_S):
            undecided = RestoreUndecided(f"no answer from the daemon: {problem.message}")
            refuse(self._link, self._board, self._restores, undecided)
            raise undecided
        try:
            restored = Restoration(self._link, self._board, self._state, self._restores).run(step, source)
        except CkptdError as error:
            if error.is_retryable and not isinstance(error, RestoreUndecided):
                raise RestoreUndecided(error.message) from error
            raise
        if restored:
            self._newest_step = max(self._newest_step, restored.step)
            log.info("restored %s", restored)
        return restored

    def _begin(self, snapshot: Snapshot, persist: bool) -> None:
        started = time.monotonic()
        try:
            capture = self._capture(snapshot, persist)
        except CkptdError as error:
            self._skip(snapshot, error)
            if self._on_error == "raise":
                raise
        except Exception as error:  # whatever a state_dict() raises must not stop the training
            problem = StepDead(f"the state cannot be captured: {type(error).__name__}: {error}")
            self._skip(snapshot, problem)
            if self._on_error == "raise":
                raise problem from error
        else:
            capture.stall_s = time.monotonic() - started
            self._last_skip = None
            self._report_stall(snapshot.step)
            self._measured = capture
            self._newest = snapshot
            self._engine.submit(capture)

    def _capture(self, snapshot: Snapshot, persist: bool) -> Capture:
        """Everything save() does on the training thread: walk, check the plan, clone the rest, encode the tree."""
        step = snapshot.step
        if self._is_closed:
            raise StepDead(f"step {step}: the Checkpointer is closed")
        if not isinstance(step, int) or step < 0:
            raise InvalidRequest(f"step {step!r} is not a step number")
        if self._newest is not None and step <= self._newest.step:
            raise StepRepeated(f"step {step} comes after step {self._newest.step} was saved")
        self._newest_step = max(self._newest_step, step)
        if problem := self._link.problem_at(step):
            raise DaemonUnreachable(f"step {step} skipped: {problem.message}", problem.hint)
        if (before := self._engine.current) is not None:
            raise CaptureBusy(f"step {step} skipped: step {before.snapshot.step} is still being captured")
        walk = self._walker.walk()
        leaves = walk.leaves
        if self._plan is None or self._plan.key != plan_key(leaves):
            self._plan = Plan(leaves)
            self._hooks.attach(optimizers_in(self._state))
            self._log_plan(leaves)
        tree = encode_tree({"state": walk.tree, "rng": capture_rng()}, encode_torch)
        is_persisted = persist or self._pending.schedule.is_persisted(step)
        capture = Capture(
            snapshot,
            self._plan,
            leaves,
            _sources(leaves),
            self._plan.columns + tree,
            is_persisted=is_persisted,
            checks_all=os.environ.get(TORN_ENV) == "all",
            patience=self._engine.patience,
        )
        self._settle_early(snapshot, is_persisted)
        self._pending.add(snapshot)
        return capture

    def _settle_early(self, snapshot: Snapshot, is_persisted: bool) -> None:
        """End the futures whose answer is known already."""
        assert self._link.membership is not None
        if reason := _unprotected(self._link.membership.roster_at(snapshot.step)):
            snapshot.protected.set_exception(NoProtection(reason))
        if not self._link.about.tiers:
            snapshot.durable.set_exception(NoTier("the daemon has no shared tier"))
        elif not is_persisted:
            snapshot.durable.set_exception(NotPersisted(f"step {snapshot.step} is not due to become durable"))
        snapshot.is_persisted = is_persisted

    def _skip(self, snapshot: Snapshot, error: CkptdError) -> None:
        snapshot.skip(error)
        if not isinstance(error, StepRepeated):  # the step is not this rank's to declare dead: it has been captured
            self._engine.submit_drop(snapshot.step, error)
        # One line for a reason, not one a step: a daemon may be away for hours.
        is_news = type(error) is not self._last_skip
        self._last_skip = type(error)
        log.log(logging.WARNING if is_news else logging.DEBUG, "snapshot of step %s skipped: %s", snapshot.step, error)

    def _fence(self, optimizer: torch.optim.Optimizer | None) -> None:
        capture = self._engine.current
        if capture is None:
            return
        stalled_s = capture.stall_s
        try:
            with self.timing.during(Mask.CHECKPOINT):
                capture.fence(optimizer)
            if capture.stall_s > stalled_s:
                self.timing.flag(Mask.CHECKPOINT)
        except Exception as error:  # in the middle of optimizer.step(): nothing of ours may stop it
            log.warning("fence", exc_info=True)
            capture.fail(StepDead(f"fence: {type(error).__name__}: {error}"))

    def _note_pace(self, step: int) -> None:
        """Measure the step time, and report it about once a second."""
        now = time.monotonic()
        self._newest_step = max(self._newest_step, step)
        if self._last_step is not None and step == self._last_step + 1:
            took_s = now - self._last_step_at
            self._step_s = took_s if self._step_s is None else 0.8 * self._step_s + 0.2 * took_s
            if now - self._paced_at > _PACE_S or self._paced_at == 0.0:
                self._paced_at = now
                self._engine.submit_pace(step, self._step_s, _NO_STALL)
        self._last_step, self._last_step_at = step, now

    def _report_stall(self, step: int) -> None:
        """What the snapshot before this one cost the training loop: known only now, after its fence."""
        if self._measured is not None:
            self._engine.submit_pace(step, self._step_s or 0.0, self._measured.stall_s)

    def _log_plan(self, leaves: list[Leaf]) -> None:
        sizes = dict.fromkeys(FenceClass, 0)
        for leaf in leaves:
            sizes[leaf.fence] += leaf.tensor.numel() * leaf.tensor.element_size()
        log.info("capture plan: %s", ", ".join(f"{kind.value} {size} bytes" for kind, size in sizes.items()))


def _unprotected(roster: Roster) -> str:
    """Why no snapshot under ``roster`` will be protected; "" when they may be."""
    if roster.protect == "off":
        return "protect is off"
    return "" if len(roster.nodes) > 1 else "the run has one node: there is no peer to hold parity"


def _sources(leaves: list[Leaf]) -> list[torch.Tensor]:
    """Per leaf, what to copy from: the tensor itself, or for the rest a clone made now (on a device: on its compute
    stream, without a wait of the host). Aliases share one clone."""
    clones: dict[int, torch.Tensor] = {}
    with torch.no_grad():
        return [leaf.tensor if leaf.fence is not FenceClass.REST else _clone(leaf.tensor, clones) for leaf in leaves]


def _clone(tensor: torch.Tensor, clones: dict[int, torch.Tensor]) -> torch.Tensor:
    clone = clones.get(id(tensor))
    if clone is None:
        clone = clones[id(tensor)] = tensor.clone(memory_format=torch.contiguous_format)
    return clone


def estimate_bytes(leaves: list[Leaf], state: Mapping[str, Any]) -> int:
    """Bytes of the state once every optimizer has made its own (Adam: two per parameter)."""
    total = sum(leaf.tensor.numel() * leaf.tensor.element_size() for leaf in leaves)
    for optimizer in optimizers_in(state):
        if optimizer.state:
            continue
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        of_parameters = sum(_local_bytes(p) for p in parameters)
        name = type(optimizer).__name__
        per_parameter = 2 if "Adam" in name else 1 if any(g.get("momentum") for g in optimizer.param_groups) else 0
        total += per_parameter * of_parameters + (64 * len(parameters) if per_parameter else 0)
    return total


def _local_bytes(parameter: torch.Tensor) -> int:
    local = getattr(parameter, "_local_tensor", parameter)
    return int(local.numel() * local.element_size())
