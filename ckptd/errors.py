"""Every error of ckptd, defined once: its reason, gRPC code, exit code, whether a retry may help, and a hint.

Layer: the bottom; standard library only, shared by the daemon, the CLI and the client. Invariants: a class's name is
its wire name (carried in the ``ckptd-error`` trailer), and names are unique, so an error raised in a daemon is raised
again as the same class in the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_DEGRADED = 3
EXIT_DATA_LOST = 4
EXIT_NOT_FOUND = 5
EXIT_UNREACHABLE = 6


def few(items: Sequence[object], most: int = 8) -> str:
    """The first ``most`` of ``items``, and how many more there are: for a message."""
    shown = ", ".join(map(str, items[:most]))
    return f"{shown} and {len(items) - most} more" if len(items) > most else shown


class CkptdError(Exception):
    """Base of all errors of ckptd.

    Attributes:
        grpc_code: name of the ``grpc.StatusCode`` a daemon answers with.
        exit_code: what a ``ckptd`` verb exits with.
        is_retryable: True when the same call may succeed later without a change.
        hint: what the reader can do about it; shown after the message.
    """

    grpc_code: ClassVar[str] = "INTERNAL"
    exit_code: ClassVar[int] = EXIT_ERROR
    is_retryable: ClassVar[bool] = False
    default_hint: ClassVar[str] = ""
    registry: ClassVar[dict[str, type[CkptdError]]] = {}

    def __init_subclass__(cls) -> None:
        CkptdError.registry[cls.__name__] = cls

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = self.default_hint if hint is None else hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


def error_from_wire(name: str, message: str, hint: str) -> CkptdError:
    """The error a daemon raised, from the name, message and hint that it sent."""
    return CkptdError.registry.get(name, CkptdError)(message, hint)


# --- what the caller asked for ------------------------------------------------------------------------------------
class InvalidRequest(CkptdError):
    """An argument that can never work."""

    grpc_code = "INVALID_ARGUMENT"
    exit_code = EXIT_USAGE


class UnknownRun(CkptdError):
    grpc_code = "NOT_FOUND"
    exit_code = EXIT_NOT_FOUND
    default_hint = "`ckptd ls` lists the runs this daemon and its tiers know"


class UnknownStep(CkptdError):
    grpc_code = "NOT_FOUND"
    exit_code = EXIT_NOT_FOUND
    default_hint = "`ckptd ls RUN` lists the steps"


class NotPermitted(CkptdError):
    grpc_code = "PERMISSION_DENIED"
    default_hint = "runs belong to the user that began them; serve with --allow-group to share them"


class SessionExpired(CkptdError):
    """The token is unknown to this instance of the daemon: it restarted."""

    grpc_code = "UNAUTHENTICATED"
    is_retryable = True


class InstanceChanged(CkptdError):
    """The daemon restarted since the caller joined: join again."""

    grpc_code = "ABORTED"
    is_retryable = True


class DaemonUnreachable(CkptdError):
    grpc_code = "UNAVAILABLE"
    exit_code = EXIT_UNREACHABLE
    is_retryable = True
    default_hint = "start one with `ckptd serve`, or name its socket with --socket or CKPTD_DAEMON"


class CoordinatorUnreachable(CkptdError):
    """The daemon of rank 0 does not answer: until it does, due steps are skipped."""

    grpc_code = "UNAVAILABLE"
    is_retryable = True
    default_hint = "`ckptd status` on the node of rank 0; training goes on"


# --- memory -------------------------------------------------------------------------------------------------------
class BudgetRefused(CkptdError):
    """The memory asked for does not fit this machine."""

    grpc_code = "RESOURCE_EXHAUSTED"


class ArenaLocked(CkptdError):
    grpc_code = "FAILED_PRECONDITION"
    default_hint = "another daemon serves this arena: stop it, or choose --arena"


class NoSlot(CkptdError):
    """No slot is free for this step; training goes on and the next due step tries again."""

    grpc_code = "RESOURCE_EXHAUSTED"
    is_retryable = True


class SlotNotReady(CkptdError):
    """A slot is being made; ask again shortly."""

    grpc_code = "UNAVAILABLE"
    is_retryable = True


# --- the bytes ----------------------------------------------------------------------------------------------------
class FormatTooNew(CkptdError):
    grpc_code = "FAILED_PRECONDITION"


class Corrupt(CkptdError):
    """Bytes that do not match their checksum, or cannot be decoded; the message names the region."""

    grpc_code = "DATA_LOSS"
    exit_code = EXIT_DATA_LOST
    default_hint = "`ckptd verify RUN` checks every copy"


class StateNotEncodable(CkptdError):
    """A value of the state that the typed JSON tree cannot carry; the message names its path."""

    grpc_code = "INVALID_ARGUMENT"


class StateMismatch(CkptdError):
    """The state of the program does not fit the snapshot in name, shape or dtype."""

    grpc_code = "FAILED_PRECONDITION"
    default_hint = "build the same model and optimizer as the run that saved, or restore another step"


# --- snapshots ----------------------------------------------------------------------------------------------------
class StepDead(CkptdError):
    """This step will never be staged: a rank could not take it."""

    grpc_code = "ABORTED"


class Torn(StepDead):
    """A tensor changed while it was copied: the snapshot is discarded."""

    default_hint = "change it in optimizer.step(), or list it in fenced= and call fence() before"


class CaptureBusy(StepDead):
    """The snapshot before this one was still being captured."""


class StepRepeated(StepDead):
    """A step that is not beyond the last one saved: a step number stands for one state of the run."""

    default_hint = "count optimizer steps on across epochs; to go back, restore in a new Checkpointer"


class Superseded(CkptdError):
    """The step was passed over: a newer one was staged before protection was free."""

    grpc_code = "ABORTED"


class NoProtection(CkptdError):
    grpc_code = "FAILED_PRECONDITION"


class ProtectFailed(CkptdError):
    """The parity of a step could not be made everywhere; what was protected before is protected still."""

    grpc_code = "DATA_LOSS"


class NoTier(CkptdError):
    grpc_code = "FAILED_PRECONDITION"
    default_hint = "serve with --tier URL for durable snapshots"


class NotPersisted(CkptdError):
    """The step was not due to become durable."""

    grpc_code = "FAILED_PRECONDITION"


class DrainBusy(CkptdError):
    """The step was due, but an earlier one was still being drained."""

    grpc_code = "ABORTED"


class DrainFailed(CkptdError):
    grpc_code = "DATA_LOSS"


class TierFailed(CkptdError):
    """A tier could not be read or written."""

    grpc_code = "UNAVAILABLE"
    is_retryable = True


class TierNotShared(CkptdError):
    grpc_code = "FAILED_PRECONDITION"
    default_hint = "a shared tier must show every node the same files; use scope=node for a local disk"


class CommitConflict(CkptdError):
    """Another writer committed this checkpoint first."""

    grpc_code = "ALREADY_EXISTS"


# --- the run ------------------------------------------------------------------------------------------------------
class RendezvousTimeout(CkptdError):
    """Ranks did not meet in the job's store by the deadline; the message names the missing ones."""

    grpc_code = "DEADLINE_EXCEEDED"


class RestoreUndecided(CkptdError):
    """It cannot be told whether a checkpoint exists: a daemon or tier did not answer."""

    grpc_code = "UNAVAILABLE"
    is_retryable = True
    default_hint = "a run never starts from scratch by accident: mend what did not answer, or pick another run name"


class RestoreFailed(CkptdError):
    grpc_code = "DATA_LOSS"
    exit_code = EXIT_DATA_LOST
