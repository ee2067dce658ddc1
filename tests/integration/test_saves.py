"""What ``step``, ``save`` and ``close`` promise: schedules, levels, futures that end, errors, and no stall."""

from __future__ import annotations

import itertools
import time
import uuid
from datetime import timedelta
from typing import Any

import pytest
from harness import DaemonProcess, Stage, wait_until
from programs import RUN, bits, checkpointer, program, restore, train

from ckptd.errors import (
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
from ckptd_client import Checkpointer, Snapshot
from ckptd_client.binding import Binding
from ckptd_client.checkpointer import resolve_run


def run_steps(ckpt: Checkpointer, state: dict[str, Any], steps: int, step_s: float = 0.0) -> list[Snapshot]:
    """The snapshots that were due."""
    due = []
    for step in range(1, steps + 1):
        train(state)
        time.sleep(step_s)
        if (snapshot := ckpt.step(step)) is not None:
            due.append(snapshot)
    return due


# --- schedules ------------------------------------------------------------------------------------------------------
def test_every_n_steps_is_every_nth_step(daemon: DaemonProcess) -> None:
    state = program()
    with checkpointer(daemon, state, every=3, on_error="warn") as ckpt:
        assert [s.step for s in run_steps(ckpt, state, 10, 0.02)] == [3, 6, 9]


@pytest.mark.slow
@pytest.mark.parametrize("every", ["auto", timedelta(seconds=0.3)])
def test_schedules_by_time_produce_snapshots(daemon: DaemonProcess, every: Any) -> None:
    state = program()
    with checkpointer(daemon, state, every=every, on_error="warn") as ckpt:
        due = run_steps(ckpt, state, 150, 0.04)
        staged = [s.step for s in due if s.staged.exception(10) is None]
    assert len(staged) >= 2
    assert restore(daemon, program(2)).step == staged[-1]


def test_persist_every_says_which_steps_become_durable(stage: Stage) -> None:
    daemon = stage.tier_daemon()
    state = program()
    with checkpointer(daemon, state, persist_every=4) as ckpt:
        for step in range(1, 9):
            train(state)
            snapshot = ckpt.step(step)
            assert snapshot is not None
            if step % 4 == 0:
                assert snapshot.wait("durable", 20) == step
            else:
                with pytest.raises(NotPersisted):
                    snapshot.wait("durable", 20)
                snapshot.wait("staged", 10)
    assert daemon.steps(RUN, "tier") == [8, 4]


def test_a_save_may_ask_to_become_durable_whatever_the_schedule_says(stage: Stage) -> None:
    daemon = stage.tier_daemon()
    state = program()
    with checkpointer(daemon, state, persist_every=1000) as ckpt:
        assert ckpt.save(5, persist=True).wait("durable", 20) == 5
    fresh = program(2)
    assert restore(daemon, fresh, source="tier").step == 5
    assert bits(fresh) == bits(state)


# --- futures --------------------------------------------------------------------------------------------------------
def test_levels_that_a_node_without_tier_and_peers_cannot_reach_fail_with_the_reason(daemon: DaemonProcess) -> None:
    with checkpointer(daemon, program()) as ckpt:
        snapshot = ckpt.save(1)
        assert snapshot.wait("staged", 10) == 1
        with pytest.raises(NoProtection):
            snapshot.wait("protected", 10)
        with pytest.raises(NoTier):
            snapshot.wait("durable", 10)


def test_wait_gives_up_after_its_timeout(stage: Stage) -> None:
    daemon = stage.daemon()
    with checkpointer(daemon, program(), on_error="warn") as ckpt:
        daemon.stop()
        snapshot = ckpt.save(1)
        with pytest.raises(TimeoutError):
            snapshot.wait("staged", 0.2)
        daemon.cont()


def test_every_future_of_every_step_ends(stage: Stage) -> None:
    daemon = stage.tier_daemon()
    state = program()
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        due = run_steps(ckpt, state, 40)
    for snapshot in due:
        for future in (snapshot.staged, snapshot.protected, snapshot.durable):
            assert future.done()
            error = future.exception()
            assert error is None or isinstance(error, CkptdError)
        if snapshot.skipped:
            assert isinstance(snapshot.staged.exception(), CkptdError)


# --- errors ---------------------------------------------------------------------------------------------------------
def test_a_skipped_step_has_its_reason_and_training_goes_on(stage: Stage) -> None:
    daemon = stage.daemon()
    state = program()
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        ckpt.save(1).wait("staged", 10)
        daemon.kill()
        steps = itertools.count(2)  # one that was taken before the death was noticed is not saved again
        wait_until(lambda: ckpt.save(next(steps)).skipped is not None, "a save to be skipped")
        snapshot = ckpt.save(next(steps))
        assert "skipped" in str(snapshot.skipped)
        assert isinstance(snapshot.staged.exception(5), DaemonUnreachable)
        train(state)
        daemon.restart()
        wait_until(lambda: ckpt.save(next(steps)).skipped is None, "saves to go on")


def test_on_error_raise_raises_what_a_save_ran_into(stage: Stage) -> None:
    daemon = stage.daemon()
    with checkpointer(daemon, program(), on_error="raise") as ckpt:
        daemon.kill()
        steps = itertools.count(1)  # one that was taken before the death was noticed is not saved again

        def is_raised() -> bool:
            try:
                ckpt.step(next(steps))
            except DaemonUnreachable:
                return True
            return False

        wait_until(is_raised, "the error to be raised")


def test_a_bad_step_number_is_refused(daemon: DaemonProcess) -> None:
    with checkpointer(daemon, program()) as ckpt:
        for step in (-1, 1.5, "3"):
            with pytest.raises(InvalidRequest):
                ckpt.save(step)  # type: ignore[arg-type]


def test_without_a_daemon_training_goes_on_and_restore_does_not_guess(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ckptd_client.checkpointer.JOIN_S", 0.3)
    state = program()
    with Checkpointer(state, run=RUN, daemon="unix:///nowhere/d.sock", every=1) as ckpt:
        with pytest.raises(RestoreUndecided):
            ckpt.restore()
        assert ckpt.save(1).skipped


@pytest.mark.slow
def test_a_stopped_daemon_stalls_training_for_moments_only(stage: Stage) -> None:
    daemon = stage.daemon()
    state = program()
    with checkpointer(daemon, state, on_error="warn") as ckpt:
        run_steps(ckpt, state, 5)
        daemon.stop()
        slowest, started = 0.0, time.monotonic()
        for step in range(6, 106):
            before = time.monotonic()
            train(state)
            ckpt.step(step)
            slowest = max(slowest, time.monotonic() - before)
            time.sleep(0.02)
        took_s = time.monotonic() - started
        daemon.cont()
        assert slowest < 3.0
        assert took_s < 2.0 + 8.0  # 100 steps of 20 ms, and what was lost
        wait_until(lambda: ckpt.save(1000).skipped is None, "saves to go on")


# --- the end --------------------------------------------------------------------------------------------------------
def test_close_may_be_called_twice_and_what_was_staged_stays(daemon: DaemonProcess) -> None:
    state = program()
    ckpt = checkpointer(daemon, state)
    ckpt.save(1).wait("staged", 10)
    ckpt.close()
    ckpt.close()
    assert restore(daemon, program(2)).step == 1


def test_after_close_a_save_is_dead_and_training_is_not_touched(daemon: DaemonProcess) -> None:
    state = program()
    ckpt = checkpointer(daemon, state, on_error="warn")
    ckpt.save(1).wait("staged", 10)
    ckpt.close()
    snapshot = ckpt.save(2)
    assert "closed" in str(snapshot.skipped)
    assert isinstance(snapshot.staged.exception(1), StepDead)
    ckpt.fence()
    train(state)
    assert not state["optim"]._optimizer_step_pre_hooks


def test_close_finishes_the_capture_under_way(daemon: DaemonProcess) -> None:
    state = program()
    with checkpointer(daemon, state) as ckpt:
        snapshot = ckpt.save(4)
    assert snapshot.staged.done()
    assert restore(daemon, program(2)).step == 4


def test_an_exception_in_the_loop_still_leaves_the_last_snapshot(daemon: DaemonProcess) -> None:
    def crash() -> None:
        with checkpointer(daemon, program()) as ckpt:
            ckpt.save(6)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert restore(daemon, program(2)).step == 6


# --- the run's name -------------------------------------------------------------------------------------------------
def test_the_run_is_named_by_the_argument_then_ckptd_run_then_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("CKPTD_RUN", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(InvalidRequest, match="no run name"):
        resolve_run(None)
    for default in ("none", str(uuid.uuid4()), uuid.uuid4().hex):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", default)
        with pytest.raises(InvalidRequest, match="no run name"):
            resolve_run(None)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job-17")
    assert resolve_run(None) == "job-17"
    monkeypatch.setenv("CKPTD_RUN", "of-env")
    assert resolve_run(None) == "of-env"
    assert resolve_run("given") == "given"
    with pytest.raises(InvalidRequest):
        resolve_run("../etc")


def test_a_step_is_saved_once_and_never_goes_back(daemon: DaemonProcess) -> None:
    state = program()
    train(state)
    with checkpointer(daemon, state, every=10**9) as ckpt:
        first = ckpt.save(30)
        first.wait("staged", 20)
        assert ckpt.save(30) is first
        for step in (5, 29):
            with pytest.raises(StepRepeated, match="comes after step 30"):
                ckpt.save(step)
        with pytest.raises(InvalidRequest, match="after a save"):
            ckpt.restore()
        ckpt.save(31).wait("staged", 20)


def test_a_tensor_that_changes_its_form_under_the_copy_kills_the_step_and_not_the_training(
    daemon: DaemonProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = program()
    train(state)
    with checkpointer(daemon, state, every=10**9) as ckpt:
        ckpt.save(1).wait("staged", 20)
        monkeypatch.setattr(Binding, "copy_on_cpu", _no_such_form)
        lost = ckpt.save(2)
        train(state)  # the fence meets the error too
        assert isinstance(lost.staged.exception(20), StepDead)
        monkeypatch.undo()
        ckpt.save(3).wait("staged", 20)


def _no_such_form(*_: object) -> None:
    raise ValueError("could not broadcast")
