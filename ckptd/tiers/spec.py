"""What ``--tier`` says: a URL and its options, parsed once into a frozen value.

Layer: tiers, pure. Invariants: a ``TierSpec`` that exists is valid; what is wrong is said in one line that names the
part.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, cast, get_args

from ckptd.errors import InvalidRequest

Scope = Literal["shared", "node"]
Codec = Literal["none", "zstd", "blosc"]

_SCHEME: Final = "file://"
_UNIT_S: Final = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = re.compile(r"(\d+(?:\.\d+)?)([smhd])")
_EXAMPLE: Final = "for example file:///ckpt,every=30m,keep=3"


@dataclass(frozen=True)
class TierSpec:
    """A tier and how it is used.

    Attributes:
        url: ``file://`` and an absolute path, without the options.
        scope: ``shared`` when every node sees the same files, ``node`` when each has its own.
        every_steps: every how many steps a snapshot is due here; None when ``every_s`` says.
        every_s: every how many seconds; None when ``every_steps`` says.
        keep: how many committed checkpoints retention keeps at least.
        codec: compression of the arrays.
    """

    url: str
    scope: Scope = "shared"
    every_steps: int | None = 1
    every_s: float | None = None
    keep: int = 3
    codec: Codec = "none"

    @property
    def path(self) -> Path:
        """The root folder."""
        return Path(self.url.removeprefix(_SCHEME))

    @property
    def label(self) -> str:
        """What metrics call it, scope and scheme, as "shared-file": never a path."""
        return f"{self.scope}-{self.url.partition('://')[0]}"

    @classmethod
    def parse(cls, text: str) -> TierSpec:
        """``URL[,scope=..][,every=..][,keep=..][,codec=..]`` as a value; InvalidRequest naming the part that is wrong.

        ``every`` is a number of steps or a time (``30s``, ``10m``, ``2h``). Without it every staged step is due
        whenever the drain is free. A path cannot hold a comma.
        """
        url, *options = text.strip().split(",")
        _check_url(url)
        every_steps: int | None = 1
        every_s: float | None = None
        keep, scope, codec = 3, "shared", "none"
        seen: set[str] = set()
        for option in options:
            name, is_pair, value = option.partition("=")
            if not is_pair or not value:
                raise InvalidRequest(f"tier {text!r}: {option!r} is not an option NAME=VALUE", _EXAMPLE)
            if name in seen:
                raise InvalidRequest(f"tier {text!r}: option {name!r} is given twice")
            seen.add(name)
            if name == "scope":
                scope = _one_of(text, option, value, get_args(Scope))
            elif name == "codec":
                codec = _one_of(text, option, value, get_args(Codec))
            elif name == "keep":
                keep = _positive(text, option, value)
            elif name == "every":
                every_steps, every_s = _every(text, option, value)
            else:
                raise InvalidRequest(f"tier {text!r}: option {name!r} is unknown", "use scope, every, keep or codec")
        return cls(url, cast(Scope, scope), every_steps, every_s, keep, cast(Codec, codec))


def _check_url(url: str) -> None:
    scheme, is_url, path = url.partition("://")
    if scheme in ("s3", "gs") and is_url:
        raise InvalidRequest(f"tier {url!r}: object stores are not supported yet; use file://")
    if scheme != "file" or not is_url:
        raise InvalidRequest(f"tier {url!r}: not a file:// URL", _EXAMPLE)
    if not path.startswith("/") or "\0" in path:
        raise InvalidRequest(f"tier {url!r}: the path {path!r} is not absolute", _EXAMPLE)


def _one_of(text: str, option: str, value: str, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise InvalidRequest(f"tier {text!r}: {option!r} is not valid", f"use one of {', '.join(choices)}")
    return value


def _positive(text: str, option: str, value: str) -> int:
    if not (value.isascii() and value.isdigit()) or int(value) < 1:
        raise InvalidRequest(f"tier {text!r}: {option!r} is not a whole number from 1")
    return int(value)


def _every(text: str, option: str, value: str) -> tuple[int | None, float | None]:
    if value.isascii() and value.isdigit() and int(value) > 0:
        return int(value), None
    match = _DURATION.fullmatch(value)
    if not match or float(match[1]) <= 0:
        raise InvalidRequest(
            f"tier {text!r}: {option!r} is not valid", "use steps (every=100) or a time (30s, 10m, 2h)"
        )
    return None, float(match[1]) * _UNIT_S[match[2]]


def tiers_for(step: int, specs: Iterable[TierSpec]) -> list[TierSpec]:
    """The tiers that a step due to become durable goes to: those whose ``every`` it meets, else the most frequent ones
    (it was asked for by name, or by the run's own interval)."""
    every = {spec: spec.every_steps if spec.every_s is None else None for spec in specs}
    met = [spec for spec, steps in every.items() if not steps or step % steps == 0]
    least = min((steps for steps in every.values() if steps), default=None)
    return met or [spec for spec, steps in every.items() if steps == least]
