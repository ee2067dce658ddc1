"""Shared memory, a stream, TCP: the same bytes come to lie in the same places, and whoever vanishes leaves nothing."""

from __future__ import annotations

import shutil

import pytest
from harness import DaemonProcess, Stage, free_port, wait_until

from ckptd.format.blocks import HEADER_BYTES
from ckptd.format.slot import decode_header

STREAM = {"CKPTD_HANDOVER": "grpc"}


def payload_of(daemon: DaemonProcess, run: str, step: int) -> bytes:
    for path in daemon.arena.glob(f"{run}.*.slot"):
        data = path.read_bytes()
        if data[:8] == b"CKPTSLOT":
            header, _ = decode_header(memoryview(data), path.name)
            if header.snapshot.step == step:
                return data[HEADER_BYTES : HEADER_BYTES + header.layout.payload_bytes]
    raise AssertionError(f"step {step} of {run} is in no slot")


def test_shared_memory_and_a_stream_leave_the_same_bytes(stage: Stage, daemon: DaemonProcess) -> None:
    shared = stage.trainer(daemon, "--run", "shared", "--steps", 3, "--half", "--wait", "staged")
    stream = stage.trainer(daemon, "--run", "stream", "--steps", 3, "--half", "--wait", "staged", env=STREAM)
    shared.finish()
    stream.finish()
    assert payload_of(daemon, "shared", 3) == payload_of(daemon, "stream", 3)
    for run in ("shared", "stream"):
        for env in ({}, STREAM):
            again = stage.trainer(daemon, "--run", run, "--steps", 0, "--half", env=env)
            assert again.wait_event("ready")["hash"] == shared.hashes()[3]
            again.finish()


def test_a_client_that_vanishes_amid_a_stream_costs_its_step_only(stage: Stage, daemon: DaemonProcess) -> None:
    victim = stage.trainer(daemon, "--half", "--wait", "staged", env=STREAM, failpoints="copy.piece=kill@10")
    assert victim.wait() == -9
    wait_until(lambda: all(s["state"] != "writing" for s in daemon.status()["slots"]), "its slot to be free again")
    again = stage.trainer(daemon, "--half", "--wait", "staged", env=STREAM)
    ready = again.wait_event("ready")
    assert (ready["restored"], ready["hash"]) == (max(victim.hashes()), victim.hashes()[max(victim.hashes())])
    assert again.finish()["staged"] == 8


@pytest.mark.parametrize(
    "phase", ["write.chunk=kill@3", pytest.param("seal.before_flip=kill@3", marks=pytest.mark.slow)]
)
def test_training_over_a_stream_goes_on_through_the_death_of_the_daemon(stage: Stage, phase: str) -> None:
    daemon = stage.daemon(failpoints=phase)
    trainer = stage.trainer(daemon, "--free", "--step-s", 0.01, "--wait", "staged", env=STREAM)
    assert daemon.wait_exit() == -9
    trainer.wait_step(max(trainer.hashes(), default=0) + 20)
    daemon.restart()
    daemon.wait_mark("tiny", "staged", max(trainer.hashes()) + 1)
    trainer.release("end")
    assert trainer.finish()["staged"] == max(trainer.hashes())
    assert max(e["seconds"] for e in trainer.of("step")) < 6
    assert daemon.findings("tiny") == []


def test_a_trainer_over_tcp_saves_and_restores(stage: Stage) -> None:
    address = f"127.0.0.1:{free_port()}"
    daemon = stage.tier_daemon("--listen", address, "--insecure")
    tcp = {"CKPTD_DAEMON": address}
    saved = stage.trainer(daemon, "--steps", 3, "--half", "--wait", "durable", env=tcp)
    assert saved.finish()["durable"] == 3
    for env in (tcp, {}):
        again = stage.trainer(daemon, "--steps", 0, "--half", env=env)
        assert again.wait_event("ready")["hash"] == saved.hashes()[3]
        again.finish()
    local = stage.trainer(daemon, "--steps", 5, "--half", "--wait", "durable")
    assert local.wait_event("ready")["restored"] == 3
    local.finish()
    daemon.kill()
    shutil.rmtree(daemon.arena)
    daemon.restart()
    again = stage.trainer(daemon, "--steps", 0, "--half", env=tcp)
    assert again.wait_event("ready")["hash"] == local.hashes()[5]


def test_a_unix_socket_gives_no_session_by_grpc_alone(stage: Stage, daemon: DaemonProcess) -> None:
    import grpc

    from ckptd_api.v1 import node_pb2, node_pb2_grpc

    with grpc.insecure_channel(f"unix:{daemon.socket}") as channel:
        stub = node_pb2_grpc.NodeServiceStub(channel)
        with pytest.raises(grpc.RpcError) as refusal:
            stub.OpenSession(node_pb2.OpenSessionRequest(), timeout=5)
        assert refusal.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        with pytest.raises(grpc.RpcError) as refusal:
            stub.Describe(node_pb2.DescribeRequest(), timeout=5)
        assert refusal.value.code() is grpc.StatusCode.UNAUTHENTICATED
