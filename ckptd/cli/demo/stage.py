"""What both plots play on: daemons, each a node's, and the training jobs beside them, in a folder that goes away.

Layer: ``cli``. Invariant: everything started is gone, and every file removed, when ``Stage.close`` returns.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ckptd.cli.demo.processes import Job, kill_at_once, start, wait_until
from ckptd.config import default_arena
from ckptd.errors import CkptdError, DaemonUnreachable

if TYPE_CHECKING:
    from ckptd_api.v1 import operator_pb2

TRAINING: Final = "ckptd_client.examples.train_gpt"
LOOPBACK: Final = "127.0.0.1"
RANKS: Final = 2
_MEMORY: Final = "256MiB"
_SMALL: Final = ("--batch", "1", "--length", "48")  # many ranks share few cores
_STATUS_S: Final = 2.0


class NodeDaemon:
    """The daemon of one node, with a socket and an arena of its own; ``start``, ``kill``, ``wipe`` in any order.
    ``address`` is what other nodes call, once it answers."""

    def __init__(self, folder: Path, name: str, flags: Sequence[str]) -> None:
        self.socket = folder / f"{name}.sock"
        self.address = ""
        self.process: subprocess.Popen[bytes] | None = None
        self._arena = default_arena(self.socket)
        self._log = folder / f"{name}.log"
        self._flags = flags

    def start(self) -> None:
        """``wait_ready`` says when it answers."""
        command = [sys.executable, "-m", "ckptd.cli.main", "serve", "--socket", str(self.socket)]
        command += ["--arena", str(self._arena), "--memory", _MEMORY, *self._flags]
        self.process = start(command, self._log, {})

    def wait_ready(self) -> None:
        wait_until(self._is_answering, "a daemon to answer")

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            kill_at_once([self.process])

    def wipe(self) -> None:
        """Remove the arena, as the loss of the node would."""
        shutil.rmtree(self._arena, ignore_errors=True)

    def status(self) -> operator_pb2.GetStatusResponse:
        """What `ckptd status` shows; CkptdError when it does not answer."""
        from ckptd.cli import channel
        from ckptd_api.v1 import operator_pb2

        with channel.connect(str(self.socket)) as daemon:
            return daemon.unary(daemon.stub.GetStatus, operator_pb2.GetStatusRequest(), _STATUS_S)

    def _is_answering(self) -> bool:
        if self.process is not None and self.process.poll() is not None:
            lines = self._log.read_text(errors="replace").splitlines()
            raise DaemonUnreachable("a daemon of the demo did not start", " | ".join(lines[-3:]))
        try:
            self.address = self.status().address
        except CkptdError:
            return False
        return True


class Stage:
    """A temporary folder with sockets, a tier, logs and journals; arenas in shared memory."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="ckptd-demo-"))
        self.tier = f"file://{self.folder}/tier"
        self._daemons: list[NodeDaemon] = []
        self._trainers: list[subprocess.Popen[bytes]] = []

    def start_daemons(self, *names: str, flags: Sequence[str]) -> list[NodeDaemon]:
        """One of each name; all answer when this returns."""
        daemons = [NodeDaemon(self.folder, name, flags) for name in names]
        self._daemons += daemons
        for daemon in daemons:
            daemon.start()
        for daemon in daemons:
            daemon.wait_ready()
        return daemons

    def start_torchrun(self, daemon: NodeDaemon, run: str, steps: int, seed: int) -> Job:
        """Start (or start again) training of ``run`` to ``steps``: torchrun with two ranks at ``daemon``."""
        torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(RANKS), "-m", TRAINING]
        return self._job([torchrun], [{"CKPTD_DAEMON": f"unix://{daemon.socket}"}], run, steps, seed)

    def start_ranks(self, daemons: Sequence[NodeDaemon], protect: str, run: str, steps: int, seed: int) -> Job:
        """The same with a rank at each of ``daemons``, started as srun does: torchrun would double the processes."""
        meeting = {"WORLD_SIZE": str(len(daemons)), "MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
        environments = [
            {**meeting, "RANK": str(rank), "LOCAL_RANK": "0", "CKPTD_DAEMON": f"unix://{daemon.socket}"}
            for rank, daemon in enumerate(daemons)
        ]
        return self._job([[TRAINING, *_SMALL, "--protect", protect]] * len(daemons), environments, run, steps, seed)

    def close(self) -> None:
        """End everything that runs and remove every file."""
        daemons = [daemon.process for daemon in self._daemons if daemon.process is not None]
        try:
            kill_at_once([*self._trainers, *daemons])
        finally:
            for daemon in self._daemons:
                daemon.wipe()
            shutil.rmtree(self.folder, ignore_errors=True)

    def _job(
        self, modules: Sequence[Sequence[str]], environments: Sequence[dict[str, str]], run: str, steps: int, seed: int
    ) -> Job:
        journal, output = self.folder / f"{run}.journal", self.folder / f"{run}.output"
        arguments = [run, "--steps", str(steps), "--seed", str(seed), "--journal", str(journal)]
        # One thread per rank: ranks share the cores, and sums must not depend on how they are split. What torch leaves
        # in the folder for temporary files goes away with ours.
        own = {"OMP_NUM_THREADS": "1", "TMPDIR": str(self.folder)}
        started = []
        for module, environment in zip(modules, environments, strict=True):
            command = [sys.executable, "-m", *module, *arguments]
            started.append(start(command, output, {**environment, **own}))
            self._trainers.append(started[-1])
        return Job(started[0], journal, output, started[1:])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
