"""``ckptd serve``: flags to settings, then the daemon. Imports the daemon only here, when it is about to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ckptd.config import describe, load_settings


def serve(
    socket: Annotated[str | None, typer.Option(metavar="P", help=describe("socket"))] = None,
    arena: Annotated[Path | None, typer.Option(metavar="DIR", help=describe("arena"))] = None,
    listen: Annotated[str | None, typer.Option(metavar="H:P", help=describe("listen"))] = None,
    advertise: Annotated[str | None, typer.Option(metavar="H:P", help=describe("advertise"))] = None,
    http: Annotated[str | None, typer.Option(metavar="H:P", help=describe("http"))] = None,
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help=describe("memory_bytes"))] = None,
    tier: Annotated[list[str] | None, typer.Option(metavar="URL[,...]", help=describe("tiers"))] = None,
    slots: Annotated[int | None, typer.Option(metavar="N", help=describe("slots"))] = None,
    protect_max: Annotated[str | None, typer.Option(metavar="K+M", help=describe("protect_max"))] = None,
    protect_rate: Annotated[str | None, typer.Option(metavar="SIZE", help=describe("protect_rate_bytes"))] = None,
    protect_deadline: Annotated[
        float | None, typer.Option(metavar="SECONDS", help=describe("protect_deadline_s"))
    ] = None,
    peer_silence: Annotated[float | None, typer.Option(metavar="SECONDS", help=describe("peer_silence_s"))] = None,
    domain: Annotated[list[str] | None, typer.Option(metavar="KEY=VALUE", help=describe("domains"))] = None,
    allow_group: Annotated[str | None, typer.Option(metavar="G", help=describe("allow_group"))] = None,
    tls_cert: Annotated[Path | None, typer.Option(metavar="P", help=describe("tls_cert"))] = None,
    tls_key: Annotated[Path | None, typer.Option(metavar="P", help=describe("tls_key"))] = None,
    tls_ca: Annotated[Path | None, typer.Option(metavar="P", help=describe("tls_ca"))] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help=describe("insecure"))] = False,
    on_fault: Annotated[str | None, typer.Option(metavar="CMD", help=describe("on_fault"))] = None,
    drain_deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help=describe("drain_deadline_s"))] = None,
    stage_deadline: Annotated[float | None, typer.Option(metavar="SECONDS", help=describe("stage_deadline_s"))] = None,
    log_level: Annotated[str | None, typer.Option(metavar="LEVEL", help=describe("log_level"))] = None,
    config: Annotated[Path | None, typer.Option(metavar="F", help=describe("config"))] = None,
    as_json: Annotated[bool, typer.Option("--json", help=describe("log_json"))] = False,
) -> int:
    """Run the daemon of this node.

    SIGTERM ends it, once the drains under way are finished or --drain-deadline is over.
    """
    settings = load_settings(
        {
            "socket": socket,
            "arena": arena,
            "listen": listen,
            "advertise": advertise,
            "http": http,
            "memory_bytes": memory,
            "tiers": tuple(tier or ()),
            "slots": slots,
            "protect_max": protect_max,
            "protect_rate_bytes": protect_rate,
            "protect_deadline_s": protect_deadline,
            "peer_silence_s": peer_silence,
            "domains": tuple(domain or ()),
            "allow_group": allow_group,
            "tls_cert": tls_cert,
            "tls_key": tls_key,
            "tls_ca": tls_ca,
            "insecure": insecure or None,  # absent is not "no": the environment or the file may say yes
            "on_fault": on_fault,
            "drain_deadline_s": drain_deadline,
            "stage_deadline_s": stage_deadline,
            "log_level": log_level,
            "log_json": as_json or None,
            "config": config,
        }
    )
    from ckptd.serve.server import serve as run_daemon

    return run_daemon(settings)
