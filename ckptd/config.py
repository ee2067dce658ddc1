"""Settings of the daemon: flag > environment > TOML file > default, each defined once as a field of ``Settings``.

Layer: above ``errors``, below ``serve`` and ``cli``. The key of a field in the file, its variable and its flag follow
from its name by rule, units dropped (``memory_bytes``: ``memory``, ``CKPTD_MEMORY``, ``--memory``), and
docs/CONFIG.md is printed by ``python -m ckptd.config``. Invariants: a ``Settings`` that exists is valid and frozen;
what is not valid raises InvalidRequest with one line that names the setting, and a hint.
"""

from __future__ import annotations

import grp
import hashlib
import ipaddress
import os
import re
import socket
import sys
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ckptd.errors import InvalidRequest
from ckptd.model import Geometry

ENV_PREFIX: Final = "CKPTD_"
_UNITS: Final = {
    "": 1,
    "B": 1,
    **{f"{p}iB": 1 << 10 * n for n, p in enumerate("KMGT", 1)},
    **{f"{p}B": 1000**n for n, p in enumerate("KMGT", 1)},
}
_SUN_PATH_BYTES: Final = 107  # what a Unix socket address holds, without its terminating zero


# --- values in text -----------------------------------------------------------------------------------------------
def parse_size(text: str) -> int:
    """Bytes of ``8GiB``, ``1.5GiB``, ``16GB`` (decimal) or a plain number; InvalidRequest on anything else."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", text.strip())
    units = {unit.lower(): size for unit, size in _UNITS.items()}
    if match is None or match[2].lower() not in units:
        raise InvalidRequest(f"{text!r} is not a size", "give bytes, or a number with KiB, MiB, GiB or TiB: 8GiB")
    return (
        int(float(match[1]) * units[match[2].lower()]) if "." in match[1] else int(match[1]) * units[match[2].lower()]
    )


def format_size(size_bytes: int) -> str:
    """``size_bytes`` for people, in binary units with at most one decimal: ``8GiB``, ``1.5MiB``, ``12B``."""
    value, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if abs(value) < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + unit


def parse_host_port(text: str) -> tuple[str, int]:
    """Host and port of ``H:P`` (``[H]:P`` for IPv6); port 0 takes a free one. InvalidRequest on anything else."""
    host, separator, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not separator or not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidRequest(f"{text!r} is not HOST:PORT", "for example 0.0.0.0:7070, node3:7070 or [::1]:7070")
    return host, int(port)


def is_loopback(host: str) -> bool:
    """True when only this machine can reach ``host``. A name other than localhost is taken for reachable."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


# --- where the daemon is ------------------------------------------------------------------------------------------
def socket_candidates() -> tuple[Path, ...]:
    """Where a socket lies when nobody names one: the machine's, the login session's, the user's; in that order."""
    session = os.environ.get("XDG_RUNTIME_DIR")
    folders = [Path("/run/ckptd"), *([Path(session) / "ckptd"] if session else []), Path(f"/tmp/ckptd-{os.getuid()}")]  # noqa: S108 - serve makes it 0700
    return tuple(folder / "ckptd.sock" for folder in folders)


def default_socket() -> Path:
    """The first candidate whose folder we can write to or make. A daemon of another user may own the first."""
    machine, *others = socket_candidates()
    if os.access(machine.parent, os.W_OK) or (not machine.parent.exists() and os.access("/run", os.W_OK)):
        return machine
    return others[0]


def find_socket() -> Path:
    """The socket of a daemon that is there, for who calls one: the first candidate that exists, else the default."""
    return next((path for path in socket_candidates() if path.exists()), default_socket())


def fd_socket_path(socket: Path) -> Path:
    """The second socket, over which slots are handed as descriptors: ``X.fd.sock`` beside ``X.sock``."""
    return socket.with_name(socket.name.removesuffix(".sock") + ".fd.sock")


def default_arena(socket: Path) -> Path:
    """Two daemons with two sockets never meet in one arena, and a restarted one finds its own again."""
    return Path("/dev/shm") / f"ckptd-{hashlib.sha256(str(socket).encode()).hexdigest()[:12]}"  # noqa: S108 - the point


def default_memory(arena: Path) -> int:
    """8 GiB, or half of what is free where the arena lies, whichever is less; whole MiB."""
    folder = next(path for path in (arena, *arena.parents) if path.exists())
    stat = os.statvfs(folder)
    return min(8 << 30, stat.f_bavail * stat.f_frsize // 2 >> 20 << 20)


# --- the settings -------------------------------------------------------------------------------------------------
class Settings(BaseSettings):
    """What ``ckptd serve`` was asked to do; see docs/CONFIG.md. Sizes in bytes, deadlines in seconds."""

    model_config = SettingsConfigDict(frozen=True, extra="forbid", validate_default=True)

    config: Path | None = Field(None, description="TOML file with any of these settings, by key")
    socket: Path = Field(
        default_factory=default_socket,
        description="gRPC socket; the socket that hands over slots lies beside it. `unix:///path` is taken too",
        json_schema_extra={
            "variable": "CKPTD_DAEMON",
            "default": "`/run/ckptd/ckptd.sock`, else `$XDG_RUNTIME_DIR/ckptd/ckptd.sock`, "
            "else `/tmp/ckptd-<uid>/ckptd.sock`",
        },
    )
    arena: Path = Field(
        default_factory=lambda data: default_arena(data["socket"]),
        description="folder of the slots, in a memory file system; one daemon locks it",
        json_schema_extra={"default": "`/dev/shm/ckptd-<hash of the socket path>`"},
    )
    listen: str | None = Field(None, description="HOST:PORT for peers and for trainers on TCP")
    advertise: str | None = Field(None, description="HOST:PORT at which peers reach this daemon, when not --listen")
    http: str | None = Field(None, description="HOST:PORT of /metrics, /livez and /readyz")
    memory_bytes: int = Field(
        default_factory=lambda data: default_memory(data["arena"]),
        gt=0,
        description="budget of the arena: bytes, or with KiB, MiB, GiB, TiB",
        json_schema_extra={"default": "8GiB, or half of what is free where the arena lies, whichever is less"},
    )
    tiers: tuple[str, ...] = Field(
        (), description="where snapshots become durable: URL[,scope=node|shared][,every=..][,keep=..]; repeatable"
    )
    slots: int = Field(3, ge=2, description="snapshots held for each rank; 2 are enough without protection and tiers")
    protect_max: str = Field("", description="the most parity a run may ask for, as k+m")
    protect_rate_bytes: int = Field(
        0,
        ge=0,
        description="the most that this daemon reads from its peers for protection, bytes a second, or with KiB, MiB, "
        "GiB; 0: no limit",
    )
    protect_deadline_s: float = Field(
        30.0, gt=0, description="protection is given up when nothing came from a peer for so long, seconds"
    )
    peer_silence_s: float = Field(
        5.0, gt=0, description="a stream from a peer without a message so long is cut, seconds"
    )
    scrub_every_s: float = Field(
        3600.0,
        ge=0,
        description="slots and parity are read again and checked once in so long, at 256 MiB/s at most, seconds; 0: "
        "never, but what `ckptd verify` finds is mended",
        json_schema_extra={"flag": ""},
    )
    domains: tuple[str, ...] = Field(
        (),
        description="failure domain of this node, KEY=VALUE; repeatable. Members of a parity group are spread over the "
        "values of a key, but kept within one value of `nic`",
    )
    allow_group: str | None = Field(None, description="group whose members may use runs of other users")
    tls_cert: Path | None = Field(None, description="certificate of this daemon, PEM; with --tls-key and --tls-ca")
    tls_key: Path | None = Field(None, description="private key of the certificate, PEM")
    tls_ca: Path | None = Field(None, description="authority that signs the certificates of peers and trainers, PEM")
    insecure: bool = Field(False, description="no TLS: for a --listen on a loopback address only")
    on_fault: str | None = Field(
        None,
        description="command that the analyst of a run has the shell run on a fault, the fault as JSON on its standard "
        "input; one node an hour and 2 % of a run's nodes at most",
    )
    on_fault_level: Literal["suspect", "confirmed", "verified"] = Field(
        "verified",
        description="least confidence of a fault for which --on-fault runs",
        json_schema_extra={"flag": ""},
    )
    drain_deadline_s: float = Field(60.0, ge=0, description="how long drains may take to finish after SIGTERM, seconds")
    stage_deadline_s: float = Field(60.0, gt=0, description="a begun step not staged by then is dead, seconds")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    log_json: bool = Field(False, description="log lines as JSON", json_schema_extra={"flag": "--json"})

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file that one of these two names."""
        flags = init_settings()
        variables = {variable_of(name): name for name in cls.model_fields}
        environment = {variables[v]: text for v, text in os.environ.items() if v in variables and text}
        file = flags.get("config") or environment.get("config")
        in_file = _read_file(Path(file)) if file else {}
        return init_settings, _Given(settings_cls, environment), _Given(settings_cls, in_file)

    @field_validator("tiers", "domains", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        return tuple(value.split()) if isinstance(value, str) else value

    @field_validator("memory_bytes", "protect_rate_bytes", mode="before")
    @classmethod
    def _size(cls, value: Any, info: ValidationInfo) -> Any:
        if not isinstance(value, str):
            return value
        try:
            return parse_size(value)
        except InvalidRequest as error:
            raise InvalidRequest(f"{flag_of(info.field_name or '')}: {error.message}", error.hint) from error

    @field_validator("socket", mode="before")
    @classmethod
    def _socket(cls, value: Any) -> Any:
        path = Path(str(value).removeprefix("unix://").removeprefix("unix:")).absolute()
        if "/" not in str(value) and ":" in str(value):
            raise InvalidRequest(
                f"--socket: {value!r} is not a path", "a daemon serves a Unix socket, and TCP by --listen"
            )
        if len(os.fsencode(fd_socket_path(path))) > _SUN_PATH_BYTES:
            raise InvalidRequest(
                f"--socket: {fd_socket_path(path)} is longer than {_SUN_PATH_BYTES} bytes, the most there is room for",
                "choose a shorter folder",
            )
        return path

    @field_validator("arena")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return value.absolute()

    @field_validator("listen", "advertise", "http")
    @classmethod
    def _host_port(cls, value: str | None, info: ValidationInfo) -> str | None:
        try:
            if value is not None:
                parse_host_port(value)
        except InvalidRequest as error:
            raise InvalidRequest(f"--{info.field_name}: {error.message}", error.hint) from error
        return value

    @field_validator("protect_max")
    @classmethod
    def _geometry(cls, value: str) -> str:
        try:
            return str(Geometry.parse(value)) if value else value
        except InvalidRequest as error:
            raise InvalidRequest(f"--protect-max: {error.message}", error.hint) from error

    @field_validator("allow_group")
    @classmethod
    def _group(cls, value: str | None) -> str | None:
        try:
            if value is not None:
                grp.getgrnam(value)
        except KeyError as error:
            raise InvalidRequest(f"--allow-group: this machine has no group {value!r}", "`getent group`") from error
        return value

    @field_validator("domains")
    @classmethod
    def _domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for item in value:
            if not re.fullmatch(r"[^=\s]+=[^=\s]+", item):
                raise InvalidRequest(f"--domain: {item!r} is not KEY=VALUE", "for example rack=r1")
        return value

    @field_validator("tls_cert", "tls_key", "tls_ca")
    @classmethod
    def _readable(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is not None and not os.access(value, os.R_OK):
            raise InvalidRequest(
                f"{flag_of(info.field_name or '')}: {value} cannot be read", "name a readable PEM file"
            )
        return value

    @model_validator(mode="after")
    def _transport(self) -> Settings:
        tls = [path is not None for path in (self.tls_cert, self.tls_key, self.tls_ca)]
        if any(tls) and not all(tls):
            raise InvalidRequest("TLS needs all of its files", "give --tls-cert, --tls-key and --tls-ca together")
        if all(tls) and self.insecure:
            raise InvalidRequest("--insecure contradicts --tls-cert", "give one of them")
        if self.listen is None:
            return self
        is_local = is_loopback(parse_host_port(self.listen)[0])
        if self.insecure and not is_local:
            raise InvalidRequest(
                f"--insecure is for loopback addresses only, and --listen is {self.listen}",
                "give --tls-cert, --tls-key and --tls-ca, or listen on 127.0.0.1",
            )
        if not self.insecure and not all(tls):
            raise InvalidRequest(
                f"--listen {self.listen} would take anyone's word for who they are",
                "give --tls-cert, --tls-key and --tls-ca" + ("; or --insecure, as it is loopback" if is_local else ""),
            )
        return self

    def peer_address(self, port: int) -> str:
        """HOST:PORT at which peers reach this daemon, which listens at ``port``."""
        host, separator, named = (self.advertise or self.listen or "").rpartition(":")
        if not self.advertise and host in ("0.0.0.0", "[::]", "::"):  # noqa: S104  compared
            host = socket.gethostname()
        return f"{host}{separator}{port if named == '0' else named}"


class _Given(PydanticBaseSettingsSource):
    """Values by field name, from wherever they were read."""

    def __init__(self, settings_cls: type[BaseSettings], values: Mapping[str, Any]) -> None:
        super().__init__(settings_cls)
        self._values = dict(values)

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        return self._values.get(field_name), field_name, False

    def __call__(self) -> dict[str, Any]:
        return self._values


def _read_file(path: Path) -> dict[str, Any]:
    """The settings of a TOML file, by field name."""
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"--config: {path} cannot be read: {error}", "name a TOML file") from error
    except tomllib.TOMLDecodeError as error:
        raise InvalidRequest(f"--config: {path} is not TOML: {error}", "docs/CONFIG.md has an example") from error
    names = {key_of(name): name for name in Settings.model_fields if name != "config"}
    for key in values:
        if key not in names:
            raise InvalidRequest(f"--config: {path} sets {key!r}, which is no setting", f"settings: {', '.join(names)}")
    return {names[key]: value for key, value in values.items()}


def load_settings(flags: Mapping[str, Any]) -> Settings:
    """Settings of this process: ``flags`` by field name (None: not given) over environment, file and defaults."""
    given = {name: value for name, value in flags.items() if value not in (None, (), [])}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        message = f"{flag_of(name) or variable_of(name)}: {first['msg'].lower()}, got {first['input']!r}"
        raise InvalidRequest(message, describe(name)) from error


# --- names and documentation, all from the fields -----------------------------------------------------------------
def _extra(name: str, key: str) -> str | None:
    extra = Settings.model_fields[name].json_schema_extra
    value = extra.get(key) if isinstance(extra, dict) else None
    return value if isinstance(value, str) else None


def key_of(name: str) -> str:
    """The key in a TOML file: the field's name without its unit."""
    return re.sub(r"_(bytes|s)$", "", name)


def variable_of(name: str) -> str:
    """The environment variable."""
    return _extra(name, "variable") or ENV_PREFIX + key_of(name).upper()


def flag_of(name: str) -> str:
    """The flag of ``ckptd serve``; one of a list is given once an item, so its name is singular. "": none."""
    singular = {"tiers": "tier", "domains": "domain"}.get(name, key_of(name))
    flag = _extra(name, "flag")
    return "--" + singular.replace("_", "-") if flag is None else flag


def describe(name: str) -> str:
    """One line on the setting, for help and hints."""
    return Settings.model_fields[name].description or ""


def _default_of(name: str, field: FieldInfo) -> str:
    fixed = f"`{field.default}`" if isinstance(field.default, str | int | float) and field.default != "" else "none"
    return _extra(name, "default") or fixed


def config_markdown() -> str:
    """docs/CONFIG.md."""
    rows = [
        f"| `{key_of(name)}` | {f'`{flag_of(name)}`' if flag_of(name) else 'none'} | `{variable_of(name)}` "
        f"| {_default_of(name, field)} | {describe(name).replace('|', chr(92) + '|')} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(
        [
            "<!-- Printed by `python -m ckptd.config`; change ckptd/config.py instead. -->",
            "# Settings of `ckptd serve`",
            "",
            "Flag > environment > TOML file > default. A list is split at spaces in a variable, an array in the file.",
            "",
            "| key in the file | flag | variable | default | meaning |",
            "| --- | --- | --- | --- | --- |",
            *rows,
            "",
            "```toml",
            'memory = "64GiB"',
            'tiers = ["file:///mnt/ckpt,every=200,keep=5"]',
            'http = "0.0.0.0:9464"',
            "```",
            "",
            "Other verbs of `ckptd` find the daemon by `--socket`, else `CKPTD_DAEMON` (`unix:///path` or `HOST:PORT`, "
            "with `CKPTD_TLS_CERT`, `CKPTD_TLS_KEY` and `CKPTD_TLS_CA` for TLS), else by the first default socket that "
            "exists.",
            "",
        ]
    )


if __name__ == "__main__":
    sys.stdout.write(config_markdown())
