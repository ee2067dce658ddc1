"""`ckptd probe` of real daemons: a slow one is found, one that is gone is named, a fault that agrees is verified."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from harness import DaemonProcess, Nursery, Stage, wait_until
from processes import ANSWER_S
from shard_ranks import ShardJob
from timing_ranks import TimingJob

from ckptd.cli import channel
from ckptd.errors import CkptdError, InvalidRequest, UnknownRun
from ckptd.model import Incarnation
from ckptd.peers.channels import Channels, Peer
from ckptd.peers.probing import measure_way
from ckptd_api.convert import incarnation_to_pb
from ckptd_api.v1 import operator_pb2, peers_pb2

SLOW = "probe.echo=sleep:0.05;probe.compute=sleep:0.02"


def start(stage: Stage, failpoints: Sequence[str]) -> list[DaemonProcess]:
    """A daemon for each of ``failpoints``, all at once."""
    daemons = [stage.daemon(listen=True, memory="32MiB", failpoints=points, wait=False) for points in failpoints]
    for daemon in daemons:
        daemon.wait_ready()
    return daemons


def node_id(daemon: DaemonProcess) -> str:
    return str(daemon.status()["node_id"])


def probed(daemon: DaemonProcess, *arguments: object) -> tuple[int, dict[str, Any]]:
    """Exit code and document."""
    result = daemon.cli("probe", "shards", "--json", *arguments)
    return result.rc, json.loads(result.stdout)


def open_faults(daemon: DaemonProcess) -> list[tuple[str, tuple[int, ...], str]]:
    with channel.connect(daemon.address) as connected:
        found = connected.unary(connected.stub.ListFaults, operator_pb2.ListFaultsRequest(run="shards"), ANSWER_S)
    return [(fault.kind, tuple(fault.ranks), fault.confidence) for fault in found.faults]


@pytest.fixture(scope="module")
def fleet(nursery: Nursery) -> Iterator[list[DaemonProcess]]:
    """Four nodes, of which the third is slow to answer and to compute; no test changes them."""
    stage = Stage(nursery)
    daemons = start(stage, ["", "", SLOW, ""])
    job = TimingJob(daemons, protect="off")
    yield daemons
    job.close()
    stage.close()


# --- what is slow -------------------------------------------------------------------------------------------------
def test_a_slow_node_is_named_by_whichever_daemon_is_asked(fleet: list[DaemonProcess]) -> None:
    slow = node_id(fleet[2])
    for asked in (fleet[1], fleet[2]):
        code, found = probed(asked)
        assert code == 3
        worst = max(found["verdicts"], key=lambda verdict: verdict["slowdown"])
        assert (worst["blame"], worst["nodes"], worst["is_certain"]) == ("node", [slow], True)
        assert worst["slowdown"] > 10
        trips = {frozenset((pair["a"], pair["b"])): pair["round_trip_seconds"] for pair in found["pairs"]}
        assert all((trip > 0.05) == (slow in ends) for ends, trip in trips.items())
        assert found["not_measured"] == 0


def test_only_the_nodes_that_are_named_are_measured(fleet: list[DaemonProcess]) -> None:
    wanted = [node_id(fleet[0]), node_id(fleet[3])]
    code, found = probed(fleet[1], "--node", wanted[0], "--node", wanted[1])
    assert (code, found["verdicts"]) == (0, [])
    assert {pair["a"] for pair in found["pairs"]} | {pair["b"] for pair in found["pairs"]} == set(wanted)
    assert all(pair["to_a_bytes_per_second"] > 0 and pair["to_b_bytes_per_second"] > 0 for pair in found["pairs"])


def test_the_run_need_not_be_named_when_it_is_the_only_one(fleet: list[DaemonProcess]) -> None:
    result = fleet[0].cli("probe", "--node", node_id(fleet[0]), "--node", node_id(fleet[1]))
    assert result.rc == 0
    assert "all alike" in result.stdout
    assert "MB/s" in result.stdout or "GB/s" in result.stdout


@pytest.mark.slow
def test_a_fault_that_agrees_is_verified_at_the_analyst_whoever_was_asked(stage: Stage) -> None:
    daemons = start(stage, ["", "", SLOW])
    job = TimingJob(daemons, protect="off")
    job.run_steps(40)

    def is_known() -> bool:
        job.run_steps(10, {2: 0.13})
        time.sleep(0.5)
        return ("slow_compute", (2,), "confirmed") in open_faults(daemons[1])

    wait_until(is_known, "the slow rank to be found", 60)
    code, found = probed(daemons[1], "--compute")
    assert code == 3
    assert {"kind": "slow_compute", "ranks": [2], "nodes": [node_id(daemons[2])]} in found["verified"]
    for daemon in daemons:
        wait_until(lambda: ("slow_compute", (2,), "verified") in open_faults(daemon), "all to know")  # noqa: B023
    job.close()


# --- what does not answer -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("how", ["killed", pytest.param("stopped", marks=pytest.mark.slow)])
def test_a_node_that_does_not_answer_is_named_and_not_waited_for(stage: Stage, how: str) -> None:
    daemons = start(stage, [""] * 4)
    job = ShardJob(daemons, protect="off")
    lost = node_id(daemons[3])
    if how == "killed":
        daemons[3].kill()
    else:
        daemons[3].stop()
    began_s = time.monotonic()
    code, found = probed(daemons[0], "--compute")
    assert time.monotonic() - began_s < 30
    assert code == 3
    unreachable = [verdict for verdict in found["verdicts"] if verdict["slowdown"] is None]
    assert [(verdict["blame"], verdict["nodes"]) for verdict in unreachable] == [("node", [lost])]
    assert all(bool(pair["problem"]) == (lost in (pair["a"], pair["b"])) for pair in found["pairs"])
    assert [node["node_id"] for node in found["nodes"] if node["problem"]] == [lost]
    job.close()


# --- what is refused ----------------------------------------------------------------------------------------------
def test_a_run_on_one_node_has_nothing_to_probe(stage: Stage) -> None:
    (daemon,) = start(stage, [""])
    job = ShardJob([daemon, daemon], protect="off")
    code, found = probed(daemon)
    assert code == 2
    assert "on one node" in found["error"]["message"]
    job.close()


def test_a_node_of_no_such_run_and_a_run_that_is_not_here_are_refused(fleet: list[DaemonProcess]) -> None:
    code, found = probed(fleet[0], "--node", "nobody", "--node", node_id(fleet[0]))
    assert (code, found["error"]["name"]) == (2, InvalidRequest.__name__)
    result = fleet[0].cli("probe", "another", "--json")
    assert (result.rc, json.loads(result.stdout)["error"]["name"]) == (5, UnknownRun.__name__)


@pytest.fixture
def channels() -> Iterator[Channels]:
    channels = Channels(None)
    yield channels
    channels.close()


def measure_link(peer: Peer, daemon: DaemonProcess, node: str) -> peers_pb2.MeasureLinkResponse:
    """Ask ``peer``, which is ``daemon``, to measure its link to ``node``."""
    incarnation = Incarnation.parse(daemon.run_status("shards")["incarnation"])
    request = peers_pb2.MeasureLinkRequest(run="shards", incarnation=incarnation_to_pb(incarnation), node_id=node)
    answer: peers_pb2.MeasureLinkResponse = peer.call(peer.peers.MeasureLink, request, 10.0)
    return answer


def test_a_link_is_measured_to_nodes_of_the_roster_only(fleet: list[DaemonProcess], channels: Channels) -> None:
    peer = channels.peer(fleet[0].listen)
    measured = measure_link(peer, fleet[0], node_id(fleet[1]))
    assert measured.bytes_per_second > 0
    assert measured.round_trip_seconds > 0
    for stranger in ("127.0.0.1:22", node_id(fleet[0]), ""):
        with pytest.raises(InvalidRequest, match="no other node"):
            measure_link(peer, fleet[0], stranger)


def test_more_than_a_burst_is_not_echoed(fleet: list[DaemonProcess], channels: Channels) -> None:
    peer = channels.peer(fleet[0].listen)

    def read(request: peers_pb2.EchoRequest, *, timeout: float, metadata: Any) -> int:
        return sum(len(part.payload) for part in peer.peers.Echo(request, timeout=timeout, metadata=metadata))

    assert peer.call(read, peers_pb2.EchoRequest(size_bytes=1 << 20)) == 1 << 20
    with pytest.raises(InvalidRequest, match="at most"):
        peer.call(read, peers_pb2.EchoRequest(size_bytes=1 << 40))


@pytest.mark.parametrize("is_known", [True, False])
def test_a_daemon_that_is_stopped_costs_the_deadline_and_no_more(
    stage: Stage, channels: Channels, is_known: bool
) -> None:
    (daemon,) = start(stage, [""])
    if is_known:
        assert measure_way(channels, daemon.listen, 5.0).bytes_per_s > 0
    daemon.stop()
    began_s = time.monotonic()
    with pytest.raises(CkptdError):
        measure_way(channels, daemon.listen, 1.0)
    assert 0.9 < time.monotonic() - began_s < 3.0


def thin_link(address: str, rate_bytes_s: float) -> tuple[str, socket.socket]:
    """A way to ``address`` on which answers come at this rate; closing the socket ends it."""
    listener = socket.create_server(("127.0.0.1", 0))

    def carry(source: socket.socket, target: socket.socket, rate: float | None) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(16384):
                target.sendall(data)
                if rate is not None:
                    time.sleep(len(data) / rate)

    def accept() -> None:
        host, _, port = address.rpartition(":")
        with contextlib.suppress(OSError):
            while True:
                near, far = listener.accept()[0], socket.create_connection((host, int(port)))
                for ends in ((near, far, None), (far, near, rate_bytes_s)):
                    threading.Thread(target=carry, args=ends, daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}", listener


def test_a_thin_link_is_measured_as_it_is_and_in_no_more_time(fleet: list[DaemonProcess], channels: Channels) -> None:
    address, listener = thin_link(fleet[0].listen, 3e6)
    began_s = time.monotonic()
    measured = measure_way(channels, address, 2.0)
    assert time.monotonic() - began_s < 2.5
    assert 5e5 < measured.bytes_per_s < 2e7
    listener.close()
