"""The yardstick for what moves between daemons: bare gRPC streams of the same bytes between as many processes.

``BarePeers`` starts processes that each serve a buffer of memory in messages of 1 MiB, with the options and the thread
pool of a daemon's server, and read from one another by raw calls with the options of a daemon's channels, a thread a
stream (on this machine no slower than fewer threads); what is read is dropped. Start, connections and first calls are
outside of what is timed. No torch in these processes. ``python -m bench.grpc_limit`` times one stream between two.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import grpc
import numpy as np

from ckptd.peers.channels import _OPTIONS as CHANNEL_OPTIONS
from ckptd.peers.transport import MESSAGE_BYTES
from ckptd.serve.server import _OPTIONS as SERVER_OPTIONS
from ckptd.serve.server import _STREAMS

_METHOD = "/bare.Stream/Give"


class Stream(NamedTuple):
    """A part of the buffer of one process, to be read by another."""

    server: int
    offset: int
    size_bytes: int


class BarePeers:
    """``processes`` processes with a buffer of ``size_bytes`` each, connected to one another. A context manager."""

    def __init__(self, processes: int, size_bytes: int) -> None:
        command = [sys.executable, "-m", "bench.grpc_limit", "--serve", str(size_bytes)]
        self._processes = [
            subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[1]
            )
            for _ in range(processes)
        ]
        self._ports: list[int] = []

    def __enter__(self) -> BarePeers:
        try:
            self._ports = [self._answer(process) for process in self._processes]
            everybody = range(len(self._ports))
            self.seconds({reader: [Stream(server, 0, 1) for server in everybody] for reader in everybody})
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
            process.wait()

    def seconds(self, plan: Mapping[int, Sequence[Stream]]) -> float:
        """Seconds until every reader (by its number) has all of its streams."""
        orders = {
            reader: json.dumps([(self._ports[s.server], s.offset, s.size_bytes) for s in streams])
            for reader, streams in plan.items()
        }
        started = time.perf_counter()
        for reader, order in orders.items():
            stdin = self._processes[reader].stdin
            assert stdin is not None
            stdin.write(order + "\n")
            stdin.flush()
        for reader in orders:
            self._answer(self._processes[reader])
        return time.perf_counter() - started

    @staticmethod
    def _answer(process: subprocess.Popen[str]) -> int:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise RuntimeError("a process of the bare gRPC limit ended")
        return int(line)


# --- in the processes ---------------------------------------------------------------------------------------------
def serve(size_bytes: int) -> None:
    """Serve a buffer; read the streams that each line of standard input names, answer with the bytes read."""
    server = grpc.server(ThreadPoolExecutor(_STREAMS), options=SERVER_OPTIONS)
    server.add_generic_rpc_handlers((_Handler(np.ones(size_bytes, np.uint8)),))
    print(server.add_insecure_port("127.0.0.1:0"), flush=True)
    server.start()
    channels: dict[int, grpc.Channel] = {}
    readers = ThreadPoolExecutor(_STREAMS)
    for line in sys.stdin:
        streams = json.loads(line)
        for port in {port for port, _, _ in streams} - channels.keys():
            channels[port] = grpc.insecure_channel(f"127.0.0.1:{port}", CHANNEL_OPTIONS)
        taken = sum(readers.map(lambda s: _read(channels[s[0]], s[1], s[2]), streams))
        wanted = sum(size for _, _, size in streams)
        if taken != wanted:
            raise SystemExit(f"{taken} of {wanted} bytes came")
        print(taken, flush=True)


class _Handler(grpc.GenericRpcHandler):
    """Gives slices of ``memory``; a request is "offset size"."""

    def __init__(self, memory: np.ndarray) -> None:
        self._view = memory.data

    def service(self, details: grpc.HandlerCallDetails) -> object:
        return grpc.unary_stream_rpc_method_handler(self._give)

    def _give(self, request: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        offset, size = map(int, request.split())
        for at in range(offset, offset + size, MESSAGE_BYTES):
            yield bytes(self._view[at : min(at + MESSAGE_BYTES, offset + size)])


def _read(channel: grpc.Channel, offset: int, size: int) -> int:
    return sum(len(message) for message in channel.unary_stream(_METHOD)(b"%d %d" % (offset, size)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments.serve)
        return
    size = arguments.size_mib << 20
    with BarePeers(2, size) as bare:
        taken = statistics.median(bare.seconds({1: [Stream(0, 0, size)]}) for _ in range(arguments.rounds))
    print(json.dumps({"bench": "grpc_limit", "bytes": size, "gb_s": size / taken / 1e9}))


if __name__ == "__main__":
    main()
