"""Forks daemons that have everything imported already: real processes of `ckptd serve`, up in a tenth of the time.

Run as a program it is the process they are forked from: a child becomes `ckptd ARGV`.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.fork_server import ForkServer, serve


class DaemonNursery:
    """The process that daemons are forked from, as tests see it. Safe to call from any thread."""

    def __init__(self) -> None:
        from processes import clean_environment

        self._server = ForkServer([sys.executable, __file__], clean_environment(GRPC_ENABLE_FORK_SUPPORT="0"))
        self.close = self._server.close

    def spawn(self, command: Sequence[str], env: Mapping[str, str], log_path: Path) -> ForkedDaemon:
        """`ckptd` with the arguments ``command[1:]``."""
        return ForkedDaemon(self._server, self._server.fork(command[1:], env, str(log_path)))


class ForkedDaemon:
    """A child of the nursery, with as much of ``subprocess.Popen`` as the harness asks of it."""

    def __init__(self, server: ForkServer, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.poll(self.pid)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        from processes import wait_until

        wait_until(lambda: self.poll() is not None, f"daemon {self.pid} to end", timeout or 30.0)
        assert self.returncode is not None
        return self.returncode


def become(argv: list[str]) -> int:
    """In the child: be the daemon; its exit code."""
    from ckptd import failpoints
    from ckptd.cli.main import main as ckptd

    importlib.reload(failpoints)  # it reads the environment when imported
    sys.argv = ["ckptd", *argv]
    return ckptd()


if __name__ == "__main__":
    import ckptd.cli.main
    import ckptd.serve.server  # noqa: F401  what daemons import, imported once for all of them

    serve(become)
