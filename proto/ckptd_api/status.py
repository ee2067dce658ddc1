"""What a failed call means: the daemon's own error by the name it sent, else what the transport's code says.

Layer: above ``ckptd.errors``, used by ``ckptd.peers``, ``ckptd.cli`` and ``ckptd_client``; pure. Invariant: nothing of
gRPC leaves those layers; every failed call becomes a CkptdError here.
"""

from __future__ import annotations

from typing import Any, Final

import grpc

from ckptd.errors import CkptdError, DaemonUnreachable, error_from_wire

NAME_KEY: Final = "ckptd-error"
HINT_KEY: Final = "ckptd-hint-bin"


def error_from_rpc(error: grpc.RpcError, where: str) -> CkptdError:
    """The error that ``error``, raised by a call to the daemon at ``where``, stands for."""
    call: Any = error
    trailers = dict(call.trailing_metadata() or ()) if isinstance(error, grpc.Call) else {}
    details = str((call.details() or "") if isinstance(error, grpc.Call) else error)
    if name := trailers.get(NAME_KEY):
        hint = trailers.get(HINT_KEY, b"")
        return error_from_wire(str(name), details, bytes(hint).decode("utf-8", "replace"))
    code = call.code() if isinstance(error, grpc.Call) else None
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DaemonUnreachable(f"the daemon at {where} did not answer in time")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return DaemonUnreachable(f"no daemon answers at {where}: {details}")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return CkptdError(f"the daemon at {where} does not know this call", "`ckptd doctor` compares versions")
    return CkptdError(f"call to {where} failed: {getattr(code, 'name', code)}: {details}")
