"""The sizes of a job's axes, from the YAML file beside a recording (``--layout``). Layer: ``replay``.

Keys as in the meta files of public timelines: ``dp_size``, ``pp_size``, ``tp_size``, ``dsp_size``, ``vpp_size``,
``world_size``. A size that is not named is 1; other keys say nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ckptd.detect.layout import Layout
from ckptd.errors import InvalidRequest

REPLAY_HINT: Final = 'pip install "ckptd[replay]"'
_MOST_RANKS: Final = 1 << 20


@dataclass(frozen=True, slots=True)
class Sizes:
    """``inner``: ranks that share data and pipeline stage (tensor and sequence parallel), consecutive."""

    world_size: int
    dp: int
    pp: int
    inner: int

    def layout(self) -> Layout:
        """Ranks numbered as Megatron does by default: stages outermost, then data, then tensor."""
        return Layout.from_sizes(self.dp, self.pp, self.inner)


def read_sizes(path: Path) -> Sizes:
    """Raises InvalidRequest: no such file, not such YAML, or sizes that contradict each other."""
    try:
        import yaml
    except ImportError as error:
        raise InvalidRequest(f"{path}: reading a layout needs PyYAML", REPLAY_HINT) from error
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InvalidRequest(f"layout {path} cannot be read: {error}") from error
    if not isinstance(found, dict) or not {"dp_size", "pp_size", "tp_size"} & found.keys():
        raise InvalidRequest(f"layout {path} names no sizes", "write dp_size: N, pp_size: N, tp_size: N, a line each")
    dp, pp, tp, dsp = (_size(found, f"{axis}_size", 1, path) for axis in ("dp", "pp", "tp", "dsp"))
    world_size = _size(found, "world_size", dp * pp * tp * dsp, path)
    # Whether sequence parallelism is an axis of its own or a part of another differs between frameworks.
    if world_size not in (dp * pp * tp, dp * pp * tp * dsp):
        product = f"dp {dp} x pp {pp} x tp {tp}" + (f" x dsp {dsp}" if dsp > 1 else "")
        raise InvalidRequest(f"layout {path}: {product} is not world_size {world_size}")
    return Sizes(world_size, dp, pp, world_size // (dp * pp))


def _size(found: dict[str, Any], key: str, otherwise: int, path: Path) -> int:
    size = found.get(key, otherwise)
    if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= _MOST_RANKS:
        raise InvalidRequest(f"layout {path}: {key} is {size!r}, not a whole number from 1 to {_MOST_RANKS}")
    return size
