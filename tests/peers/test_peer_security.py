"""TLS between daemons: who may speak as a peer, what is refused, and bounds on what peers may ask."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import grpc
import pytest
import trustme
from harness import DaemonProcess, Stage, free_port, run_cli
from shard_ranks import ShardJob

from ckptd.errors import CkptdError, DaemonUnreachable, InvalidRequest, NotPermitted, UnknownStep
from ckptd.model import Incarnation, SnapshotId
from ckptd.peers.channels import Channels, Peer
from ckptd.serve.sessions import Identity, Sessions
from ckptd_api.convert import snapshot_to_pb
from ckptd_api.v1 import coordinator_pb2, peers_pb2

NOTHING = snapshot_to_pb(SnapshotId(Incarnation(1, 1), 1))


class Authority(NamedTuple):
    """A certificate authority, and what it gave the daemons of one cluster."""

    ca: Path
    cert: Path
    key: Path

    @property
    def flags(self) -> list[object]:
        return ["--tls-cert", self.cert, "--tls-key", self.key, "--tls-ca", self.ca]

    @property
    def credentials(self) -> grpc.ChannelCredentials:
        return grpc.ssl_channel_credentials(self.ca.read_bytes(), self.key.read_bytes(), self.cert.read_bytes())


def authority(folder: Path) -> Authority:
    folder.mkdir()
    ca = trustme.CA()
    issued = ca.issue_cert("127.0.0.1", common_name="node")
    paths = Authority(folder / "ca.pem", folder / "cert.pem", folder / "key.pem")
    ca.cert_pem.write_to_path(str(paths.ca))
    issued.cert_chain_pems[0].write_to_path(str(paths.cert))
    issued.private_key_pem.write_to_path(str(paths.key))
    return paths


@pytest.fixture
def trusted(tmp_path: Path) -> Authority:
    return authority(tmp_path / "trusted")


def tls_daemon(stage: Stage, of: Authority) -> DaemonProcess:
    address = f"127.0.0.1:{free_port()}"
    daemon = stage.daemon("--listen", address, *of.flags, memory="32MiB")
    daemon.listen = address
    return daemon


def inventory(peer: Peer) -> Any:
    return peer.call(peer.peers.Inventory, peers_pb2.InventoryRequest(run="shards"))


def test_daemons_with_certificates_of_one_authority_protect_and_reconstruct(stage: Stage, trusted: Authority) -> None:
    nodes = [tls_daemon(stage, trusted) for _ in range(3)]
    job = ShardJob(nodes, protect="2+1", credentials=trusted.credentials)
    job.save(1)
    job.wait_protected(1)
    nodes[1].close()
    nodes[1] = tls_daemon(stage, trusted)
    _, sources = ShardJob(nodes, protect="2+1", credentials=trusted.credentials).restore()
    assert sources == {0: "memory", 1: "reconstruction", 2: "memory"}


@pytest.mark.parametrize("shown", ["none", "of another authority"])
def test_a_caller_without_a_certificate_of_the_authority_is_not_heard(
    stage: Stage, trusted: Authority, tmp_path: Path, shown: str
) -> None:
    daemon = tls_daemon(stage, trusted)
    if shown == "none":
        credentials = grpc.ssl_channel_credentials(trusted.ca.read_bytes())
    else:
        stranger = authority(tmp_path / "stranger")
        credentials = grpc.ssl_channel_credentials(
            trusted.ca.read_bytes(), stranger.key.read_bytes(), stranger.cert.read_bytes()
        )
    channels = Channels(credentials)
    with pytest.raises(DaemonUnreachable):
        inventory(channels.peer(daemon.listen))
    channels.close()


def test_a_daemon_does_not_speak_to_one_whose_authority_it_does_not_know(
    stage: Stage, trusted: Authority, tmp_path: Path
) -> None:
    daemon = tls_daemon(stage, authority(tmp_path / "stranger"))
    channels = Channels(trusted.credentials)
    with pytest.raises(DaemonUnreachable):
        inventory(channels.peer(daemon.listen))
    channels.close()


def test_a_plain_caller_is_not_heard_where_tls_is_asked_for(stage: Stage, trusted: Authority) -> None:
    daemon = tls_daemon(stage, trusted)
    channels = Channels(None)
    with pytest.raises(DaemonUnreachable):
        inventory(channels.peer(daemon.listen))
    channels.close()


@pytest.mark.parametrize("flags", [(), ("--insecure",)])
def test_an_open_port_beyond_loopback_is_refused(flags: tuple[str, ...]) -> None:
    refused = run_cli("serve", "--listen", "0.0.0.0:7070", *flags)
    assert refused.rc == 2
    assert "--tls-cert" in refused.stderr


@pytest.fixture
def peer(stage: Stage) -> Any:
    channels = Channels(None)
    yield channels.peer(stage.daemon(listen=True).listen)
    channels.close()


@pytest.mark.parametrize("run", ["../etc", "a/b", "", ".hidden", "x" * 200])
def test_a_run_is_a_name_and_never_a_path(peer: Peer, run: str) -> None:
    with pytest.raises(InvalidRequest):
        peer.call(peer.peers.Inventory, peers_pb2.InventoryRequest(run=run))


def test_an_image_of_too_many_ranks_is_refused(peer: Peer) -> None:
    request = peers_pb2.DescribeImageRequest(run="shards", snapshot=NOTHING, ranks=range(5000))
    with pytest.raises(InvalidRequest, match="1 to 4096 ranks"):
        peer.call(peer.peers.DescribeImage, request)


@pytest.mark.parametrize("batch", [0, 1 << 31])
def test_a_pull_of_what_is_not_held_or_cannot_be_is_refused(peer: Peer, batch: int) -> None:
    request = peers_pb2.PullRequest(run="shards", snapshot=NOTHING, first_block=0, blocks=1 << 40, batch_blocks=batch)
    request.image.ranks.append(0)
    with pytest.raises((InvalidRequest, UnknownStep)):
        list(peer.pull(request, 5.0))


def test_a_report_of_a_run_that_is_not_coordinated_here_is_refused(peer: Peer) -> None:
    request = coordinator_pb2.ReportRequest(run="shards", node_id="nobody")
    with pytest.raises(CkptdError):
        peer.call(peer.coordinator.Report, request)


def test_a_report_of_a_rank_beyond_the_roster_changes_nothing(stage: Stage) -> None:
    nodes = [stage.daemon(listen=True, memory="32MiB") for _ in range(2)]
    job = ShardJob(nodes, protect="1+1")
    channels = Channels(None)
    coordinator = channels.peer(nodes[0].listen)
    request = coordinator_pb2.ReportRequest(run="shards", node_id=nodes[1].status()["node_id"])
    request.incarnation.ordinal, request.incarnation.id = job.incarnation
    request.progress.add(rank=7, step=1, level=coordinator_pb2.LEVEL_STAGED, roster_version=1)
    with pytest.raises(InvalidRequest, match="rank 7"):
        coordinator.call(coordinator.coordinator.Report, request)
    assert nodes[0].watermark("shards", "staged") is None
    channels.close()


def test_another_user_of_the_machine_is_no_peer() -> None:
    sessions = Sessions(None)
    with pytest.raises(NotPermitted):
        sessions.check_peer(Identity("uid:12345", 12345))
    sessions.check_peer(Identity("cert:node", 65534))
