"""The gRPC handover (save to staged) against a bare gRPC byte stream between two processes, same message size."""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

os.environ["CKPTD_HANDOVER"] = "grpc"

import grpc

from bench.rig import MIB, daemon, report, state_bytes, trained, warm_up
from ckptd_client import Checkpointer
from ckptd_client.handover import MESSAGE_BYTES

_METHOD = "/bare.Stream/Take"


def serve_bare(path: str) -> None:
    """A server that takes a stream of bytes and only counts them."""

    def take(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
        return str(sum(len(message) for message in messages)).encode()

    class Handler(grpc.GenericRpcHandler):
        def service(self, details: grpc.HandlerCallDetails) -> object:
            return grpc.stream_unary_rpc_method_handler(take)

    server = grpc.server(ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 64 * MIB)])
    server.add_generic_rpc_handlers((Handler(),))
    server.add_insecure_port(f"unix:{path}")
    server.start()
    print("ready", flush=True)
    server.wait_for_termination()


def bare_s(path: str, size: int) -> float:
    message = bytes(MESSAGE_BYTES)
    with grpc.insecure_channel(f"unix:{path}") as channel:
        send = channel.stream_unary(_METHOD)
        send(iter([b"x"]))
        started = time.perf_counter()
        send(message for _ in range(size // MESSAGE_BYTES))
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size-mib", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve_bare(arguments.serve)
        return
    model, optimizer = trained(arguments.size_mib * MIB)
    size = state_bytes(model, optimizer)
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/bare.sock"
        server = subprocess.Popen([sys.executable, "-m", "bench.handover", "--serve", path], stdout=subprocess.PIPE)
        assert server.stdout is not None
        server.stdout.readline()
        bare, ours = [], []
        try:
            with daemon("4GiB") as (address, _, _):
                with Checkpointer({"m": model, "o": optimizer}, "handover", address, every=10**9) as c:
                    warm_up(c)
                    for number in range(arguments.rounds):
                        bare.append(bare_s(path, size))
                        started = time.perf_counter()
                        c.save(1000 + number).wait("staged", 60)
                        ours.append(time.perf_counter() - started)
        finally:
            server.kill()
            server.wait()
    stream, handover = statistics.median(bare), statistics.median(ours)
    report(
        "handover",
        {
            "bytes": size,
            "message_bytes": MESSAGE_BYTES,
            "bare_s": stream,
            "staged_s": handover,
            "ratio": stream / handover,
        },
    )


if __name__ == "__main__":
    main()
