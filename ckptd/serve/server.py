"""`ckptd serve`: sockets, services and signals round a node; returns when the daemon was asked to stop."""

from __future__ import annotations

import faulthandler
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, cast

import grpc
import structlog
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from ckptd.config import Settings, fd_socket_path, parse_host_port
from ckptd.errors import InvalidRequest, NotPermitted
from ckptd.model import Incarnation
from ckptd.serve.diagnosis.pictures import pictures_here
from ckptd.serve.fd_socket import FdSocket
from ckptd.serve.http import Page, serve_http
from ckptd.serve.logs import configure_logging
from ckptd.serve.node import Node
from ckptd.serve.node_service import NodeService
from ckptd.serve.operator_service import OperatorService
from ckptd.serve.peer_service import PeerService
from ckptd.serve.rpc import Boundary, caller
from ckptd.serve.sessions import Identity
from ckptd.serve.systemd import Pulse, Systemd, call_check, describe, upkeep_check
from ckptd.serve.tier_watch import TierWatch
from ckptd.serve.upkeep import Upkeep
from ckptd.tiers.tier import Tier
from ckptd_api.convert import incarnation_from_pb
from ckptd_api.v1 import (
    coordinator_pb2,
    coordinator_pb2_grpc,
    node_pb2,
    node_pb2_grpc,
    operator_pb2_grpc,
    peers_pb2,
    peers_pb2_grpc,
)

# Every rank holds one thread for its watch stream; threads are made as they are needed.
_STREAMS: Final = 512
_CALLS: Final = 128
_OPTIONS: Final = [
    ("grpc.max_receive_message_length", 64 * 1024 * 1024),
    ("grpc.max_send_message_length", 64 * 1024 * 1024),
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
]
log = structlog.get_logger()


class CoordinatorService(coordinator_pb2_grpc.CoordinatorServiceServicer):
    """Reports of other daemons to the coordinators here."""

    def __init__(self, node: Node) -> None:
        self._node = node

    def Report(
        self, request: coordinator_pb2.ReportRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.ReportResponse:
        return self._node.coordinate(caller(), request)

    def ReportRanks(
        self, request: coordinator_pb2.ReportRanksRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.ReportRanksResponse:
        self._node.sessions.check_peer(caller())
        return self._node.diagnosis.take_ranks(request)

    def RecordAction(
        self, request: coordinator_pb2.RecordActionRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.RecordActionResponse:
        self._node.sessions.check_peer(caller())
        return self._node.diagnosis.record_action(request)

    def VerifyFaults(
        self, request: coordinator_pb2.VerifyFaultsRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.VerifyFaultsResponse:
        self._node.sessions.check_peer(caller())
        return self._node.diagnosis.take_findings(request)

    def GetPictures(
        self, request: coordinator_pb2.CoordinatorServiceGetPicturesRequest, context: grpc.ServicerContext
    ) -> coordinator_pb2.CoordinatorServiceGetPicturesResponse:
        self._node.sessions.check_peer(caller())
        incarnation = incarnation_from_pb(request.incarnation)
        return pictures_here(self._node, request.run, incarnation, is_recording=request.is_recording)


class _RawBulk:
    """Registers services with Write taking, and Pull giving, their messages as bytes: one copy less."""

    def __init__(self, server: grpc.Server) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """The generated code registers every method twice; the registered ones below serve."""

    def add_registered_method_handlers(self, service: str, handlers: dict[str, Any]) -> None:
        if write := handlers.get("Write"):
            handlers["Write"] = grpc.stream_unary_rpc_method_handler(
                write.stream_unary, None, node_pb2.WriteResponse.SerializeToString
            )
        if pull := handlers.get("Pull"):
            handlers["Pull"] = grpc.unary_stream_rpc_method_handler(
                pull.unary_stream, peers_pb2.PullRequest.FromString, None
            )
        self._server.add_registered_method_handlers(service, handlers)


def serve(settings: Settings) -> int:
    """Run the daemon until SIGTERM or SIGINT. Exit code 0, or 3 when drains were left to the next start."""
    configure_logging(settings.log_level, is_json=settings.log_json)
    faulthandler.enable()  # a watchdog ends what is wedged by SIGABRT: the log then says where every thread was
    systemd = Systemd.from_environment(os.environ)
    systemd.tell(STATUS="taking up what is in the arena")
    tiers = _open_tiers(settings)
    node = Node(settings, tiers)
    node.open()
    upkeep, tier_watch = Upkeep(node), TierWatch(tiers, node.metrics)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    socket_path = Path(settings.socket)
    checks = [upkeep_check(upkeep, systemd.silence_s), call_check(socket_path)]
    pulse = Pulse(systemd, checks, lambda: describe(node))
    fd_socket = FdSocket(
        fd_socket_path(socket_path), node.sessions, node.instance, _slot_opener(node), _black_box_opener(node)
    )
    server, services_up = _grpc_server(settings, node, socket_path)
    node.metrics.node.info({"node": node.node_id, "address": node.address})
    web = None
    if settings.http:
        web = serve_http(*parse_host_port(settings.http), _pages(node, tier_watch, pulse))
    fd_socket.start()
    server.start()
    upkeep.start()
    tier_watch.start()
    node.scrubber.start()
    node.diagnosis.start()
    if settings.allow_group:
        shutil.chown(socket_path, group=settings.allow_group)
    socket_path.chmod(0o660)
    services_up.set("", health_pb2.HealthCheckResponse.SERVING)
    log.info("serving", socket=str(socket_path), listen=settings.listen, http=settings.http, node=node.node_id)
    pulse.start()
    stop.wait()
    pulse.begin_stopping()
    log.info("stopping", drain_deadline_s=settings.drain_deadline_s)
    services_up.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
    is_done = node.finish_drains(settings.drain_deadline_s)
    pulse.close()
    upkeep.close()
    tier_watch.close()
    node.close()
    server.stop(grace=0.5).wait()
    fd_socket.close()
    if web:
        web.shutdown()
    log.info("stopped", drains_finished=is_done)
    if not is_done:
        # Python waits for the threads of a pool at its end: a drain that hangs in its tier would hold the process.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(3)
    return 0


def _grpc_server(settings: Settings, node: Node, socket_path: Path) -> tuple[grpc.Server, health.HealthServicer]:
    server = grpc.server(
        ThreadPoolExecutor(_CALLS, thread_name_prefix="grpc"),
        interceptors=[Boundary(node.sessions, node.metrics, ThreadPoolExecutor(_STREAMS, "stream"))],
        options=_OPTIONS,
    )
    bulk = cast(grpc.Server, _RawBulk(server))
    tcp_identity = Identity(f"uid:{os.getuid()}", os.getuid()) if settings.insecure else None
    node_pb2_grpc.add_NodeServiceServicer_to_server(NodeService(node, tcp_identity), bulk)
    peers_pb2_grpc.add_PeerServiceServicer_to_server(PeerService(node), bulk)
    operator_pb2_grpc.add_OperatorServiceServicer_to_server(OperatorService(node), server)
    coordinator_pb2_grpc.add_CoordinatorServiceServicer_to_server(CoordinatorService(node), server)
    services_up = health.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(services_up, server)
    try:
        socket_path.parent.mkdir(mode=0o755, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidRequest(f"{error.filename}: {error.strerror}", "serve with another --socket") from error
    _check_socket_is_free(socket_path)
    try:
        server.add_insecure_port(f"unix:{socket_path}")
        if settings.listen:
            port = _listen(server, settings, settings.listen)
            node.peering.cluster.address = settings.peer_address(port)
    except RuntimeError as error:
        raise InvalidRequest(f"cannot listen: {error}", "is the address free, and may this user bind it?") from error
    return server, services_up


def _check_socket_is_free(path: Path) -> None:
    """Remove a socket that a dead daemon left; InvalidRequest when one still answers there."""
    if not path.exists():
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(str(path))
        except (TimeoutError, BlockingIOError):  # somebody listens, and has no time
            pass
        except OSError:
            path.unlink(missing_ok=True)
            return
    raise InvalidRequest(f"another daemon answers at {path}", "stop it, or serve with another --socket")


def _listen(server: grpc.Server, settings: Settings, address: str) -> int:
    """The port, which was chosen here when none was named."""
    if settings.tls_cert and settings.tls_key and settings.tls_ca:
        credentials = grpc.ssl_server_credentials(
            [(settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())],
            root_certificates=settings.tls_ca.read_bytes(),
            require_client_auth=True,
        )
        return server.add_secure_port(address, credentials)
    return server.add_insecure_port(address)


def _slot_opener(node: Node) -> Callable[[Identity, str, bool], tuple[int, int]]:
    def open_slot(identity: Identity, slot_id: str, is_writable: bool) -> tuple[int, int]:
        slot = node.arena.slot(slot_id)
        run, _ = node.arena.owner_of(slot)
        node.record_for(identity, run)
        if is_writable and slot.state.name != "WRITING":
            raise NotPermitted(f"slot {slot_id} is not being written")
        # Writers get the descriptor once and keep it mapped from step to step; readers get a read-only one.
        return os.open(slot.path, os.O_RDWR if is_writable else os.O_RDONLY), slot.capacity_bytes

    return open_slot


def _black_box_opener(node: Node) -> Callable[[Identity, str, Incarnation, int], int]:
    def open_black_box(identity: Identity, run: str, incarnation: Incarnation, rank: int) -> int:
        return node.diagnosis.open_black_box(node.node_run(identity, run, incarnation), rank)

    return open_black_box


def _pages(node: Node, tier_watch: TierWatch, pulse: Pulse) -> dict[str, Page]:
    def metrics(accept: str) -> tuple[int, bytes, str]:
        return 200, *node.metrics.render(accept)

    def ready(_: str) -> tuple[int, bytes, str]:
        problems = tier_watch.problems()
        text = "\n".join(problems) or "ok"
        return (503 if problems else 200), (text + "\n").encode(), "text/plain"

    def alive(_: str) -> tuple[int, bytes, str]:
        return (503 if pulse.problem else 200), f"{pulse.problem or 'ok'}\n".encode(), "text/plain"

    return {"/metrics": metrics, "/livez": alive, "/readyz": ready}


def _open_tiers(settings: Settings) -> list[Tier]:
    """The tiers of the settings, opened; InvalidRequest or TierFailed with a hint."""
    from ckptd.tiers.spec import TierSpec
    from ckptd.tiers.zarr_tier import ZarrTier

    tiers: list[Tier] = []
    for text in settings.tiers:
        tier = ZarrTier(TierSpec.parse(text))
        tier.open()
        tiers.append(tier)
    return tiers
