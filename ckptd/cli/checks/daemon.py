"""Checks that ask the daemon, when one runs: its version against this CLI's, its problems, its tiers."""

from __future__ import annotations

import ckptd
from ckptd.cli import channel
from ckptd.cli.checks import Check
from ckptd.config import format_size
from ckptd.errors import CkptdError, DaemonUnreachable
from ckptd_api.v1 import operator_pb2


def daemon(named: str | None) -> list[Check]:
    """None running is no defect: the doctor is asked before the first start too."""
    try:
        with channel.connect(named) as session:
            answer = session.unary(session.stub.GetStatus, operator_pb2.GetStatusRequest())
    except DaemonUnreachable as error:
        return [Check("daemon", "ok", f"none to ask: {error.message}")]
    except CkptdError as error:
        return [Check("daemon", "fail", error.message, error.hint or "`ckptd status` shows more")]
    used = f"{format_size(answer.used_bytes)} of {format_size(answer.memory_bytes)} used"
    checks = [Check("daemon", "ok", f"pid {answer.pid}, node {answer.node_id}, {used} in {answer.arena}")]
    if answer.version == ckptd.__version__:
        checks.append(Check("version skew", "ok", f"daemon and CLI are {answer.version}"))
    else:
        skew = f"daemon {answer.version}, CLI {ckptd.__version__}"
        checks.append(Check("version skew", "warn", skew, "restart the daemon with the installed version"))
    checks += [Check("daemon problem", "warn", problem, "`ckptd status` shows more") for problem in answer.problems]
    checks += [
        Check(f"daemon tier {tier.url}", "fail", tier.problem or "does not answer", "mend the tier; the daemon retries")
        for tier in answer.tiers
        if not tier.is_healthy
    ]
    return checks
