"""How far a node is from its own normal, and what that says of a fault on it.

Layer: pure, beside ``records``. The idea is that of Borghesi et al. ("Anomaly detection using autoencoders in high
performance computing systems", AAAI 2019): learn what a node is like while it is well and score the distance from it,
since failures are too rare to learn from. The model is simpler: a robust location and spread of each figure, learned
from samples that are not out of line. A joint model (an autoencoder, the residual of a PCA) is left out: each figure
here has a bad direction that is known, a residual has none and cannot be named to a person, and the correlations that
it would learn are those of one job. Works without any job. Invariants: no verdict on a figure before its warm-up; one
soft figure alone, whatever it does, never makes a node unwell; health alone never verifies a fault.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from statistics import median
from typing import Final

from ckptd.detect.records import Confidence, Fault, Kind

UNWELL: Final = 0.5
THRESHOLD: Final = 6.0  # spreads above normal; as the other verdicts have it
MOST_FIGURES: Final = 1024
MOST_SIGNS: Final = 16

# Counts of samples. A figure is what its last SUSTAINED are in the median: one or two odd ones are nothing.
SUSTAINED: Final = 5
WARM_UP: Final = 60
BLOCK: Final = 30
RELEARN: Final = 360  # in a row out of line: this is how the node is now
HELD: Final = 720  # an event (an Xid) counts so long
FORGOTTEN: Final = 720

_WEIGHT_OF_BLOCK: Final = 0.1
_ALONE: Final = 1 / 3  # the most that one soft figure can score
_MAD_TO_SIGMA: Final = 1.4826


class Resource(StrEnum):
    CPU = "cpu"
    MEMORY = "memory"
    DISK = "disk"
    NETWORK = "network"
    GPU = "gpu"


@dataclass(frozen=True, slots=True)
class Figure:
    """A family of figures: what it is and when it is bad.

    ``title`` may hold ``{}`` for the label. ``floor``: the least spread, on the scale of ``level``, so that six of them
    are a change which matters. ``reference``: 0 for a linear scale, else the value from which on it is logarithmic.
    ``ceiling``: no value above it is ever learned as normal. ``factor`` and ``unit`` are for people.
    ``is_hard``: any value above 0 counts by itself, no normal is learned; ``is_event``: and goes on to count.
    ``is_of_peer``: the label is another node, which may be the cause.
    """

    title: str
    resource: Resource
    floor: float = 1.0
    reference: float = 0.0
    ceiling: float | None = None
    factor: float = 1.0
    unit: str = ""
    is_low_bad: bool = False
    is_hard: bool = False
    is_event: bool = False
    is_of_peer: bool = False

    def level(self, value: float) -> float:
        """``value`` on a scale on which higher is worse and noise is about even."""
        if not self.reference:
            return -value if self.is_low_bad else value
        ratio = max(value, 0.0) / self.reference
        return math.log1p(1 / max(ratio, 1e-15) if self.is_low_bad else ratio)

    def value(self, level: float) -> float:
        """The inverse of ``level``."""
        if not self.reference:
            return -level if self.is_low_bad else level
        ratio = math.expm1(max(level, 1e-15))
        return self.reference * (1 / ratio if self.is_low_bad else ratio)

    def text(self, level: float) -> str:
        return f"{self.value(level) * self.factor:.3g} {self.unit}"


def _share(title: str, resource: Resource, floor: float, ceiling: float | None = None) -> Figure:
    return Figure(title, resource, floor, ceiling=ceiling, factor=100, unit="%")


def _hard(title: str, *, is_event: bool = False) -> Figure:
    return Figure(title, Resource.GPU, is_hard=True, is_event=is_event)


# Every figure that is judged, by the part of its name before the label; values in SI units, shares from 0 to 1.
FIGURES: Final[Mapping[str, Figure]] = {
    "cpu_steal_share": _share("cpu steal", Resource.CPU, 0.01, ceiling=0.1),
    "cpu_pressure_share": _share("time tasks wait for a cpu", Resource.CPU, 0.05),
    "memory_available_share": Figure(
        "memory available", Resource.MEMORY, 0.08, reference=0.02, factor=100, unit="%", is_low_bad=True
    ),
    "memory_pressure_share": _share("time tasks wait for memory", Resource.MEMORY, 0.01, ceiling=0.1),
    "memory_major_faults_per_s": Figure("major page faults", Resource.MEMORY, 0.4, reference=10, unit="/s"),
    "disk_latency_s": Figure("latency of disk {}", Resource.DISK, 0.25, reference=1e-3, factor=1e3, unit="ms"),
    "io_pressure_share": _share("time tasks wait for disks", Resource.DISK, 0.03),
    "tcp_retransmit_share": Figure(
        "TCP segments sent again", Resource.NETWORK, 0.3, reference=1e-3, ceiling=0.02, factor=100, unit="%"
    ),
    "tcp_peer_retransmit_share": Figure(
        "TCP segments sent again to {}",
        Resource.NETWORK,
        0.3,
        reference=1e-3,
        ceiling=0.02,
        factor=100,
        unit="%",
        is_of_peer=True,
    ),
    "tcp_peer_rtt_s": Figure(
        "round trip to {}", Resource.NETWORK, 0.3, reference=1e-4, factor=1e3, unit="ms", is_of_peer=True
    ),
    "tcp_peer_delivery_bytes_s": Figure(
        "delivery rate to {}",
        Resource.NETWORK,
        0.4,
        reference=1e12,
        factor=1e-6,
        unit="MB/s",
        is_low_bad=True,
        is_of_peer=True,
    ),
    "gpu_temperature_c": Figure("temperature of GPU {}", Resource.GPU, 2.0, unit="°C"),
    "gpu_clock_hz": Figure(
        "clock of GPU {}", Resource.GPU, 0.03, reference=1e13, factor=1e-6, unit="MHz", is_low_bad=True
    ),
    "gpu_pcie_replays_per_s": Figure("PCIe replays of GPU {}", Resource.GPU, 0.3, reference=1.0, unit="/s"),
    "gpu_nvlink_errors_per_s": Figure("NVLink errors of GPU {}", Resource.GPU, 0.3, reference=1.0, unit="/s"),
    "gpu_thermal_throttle": _hard("thermal throttling of GPU {}"),
    "gpu_ecc_uncorrected_per_s": _hard("uncorrected ECC error of GPU {}", is_event=True),
    "gpu_lost": _hard("GPU {} does not answer", is_event=True),
    "gpu_xid": _hard("Xid {}", is_event=True),
}

# Whose figures speak to a fault of the kind. A desync is a bug of the program: no node's health bears on it.
RELEVANT: Final[Mapping[Kind, frozenset[Resource]]] = {
    Kind.SLOW_COMPUTE: frozenset({Resource.CPU, Resource.MEMORY, Resource.DISK, Resource.GPU}),
    Kind.SLOW_LINK: frozenset({Resource.NETWORK, Resource.CPU, Resource.GPU}),
    Kind.SLOW_COMM: frozenset({Resource.NETWORK, Resource.CPU, Resource.GPU}),
    Kind.COMM_HANG: frozenset({Resource.NETWORK, Resource.GPU}),
    Kind.HANG: frozenset(Resource),
    Kind.DEATH: frozenset(Resource),
    Kind.DESYNC: frozenset(),
}


def name_of(family: str, label: str = "") -> str:
    return f"{family}{{{label}}}" if label else family


def split_name(name: str) -> tuple[str, str]:
    """Family and label of the name of a figure: ``disk_latency_s{vda}``."""
    family, _, label = name.partition("{")
    return family, label.removesuffix("}")


@dataclass(frozen=True, slots=True)
class Health:
    """How a node is. ``score``: 0 well, from ``UNWELL`` on unwell, 1 at most. ``signs``: what is out of line, worst
    first, for people. ``severities``: from 0 to 1 by family, 0.5 at the threshold. ``is_learned``: enough samples
    were seen to say that no sign means well; before, only hard signs say anything."""

    score: float = 0.0
    signs: tuple[str, ...] = ()
    severities: Mapping[str, float] = field(default_factory=dict)
    is_learned: bool = False

    def is_unwell(self, resources: Collection[Resource] = frozenset(Resource)) -> bool:
        return score_of(self.severities, resources) >= UNWELL


def score_of(severities: Mapping[str, float], resources: Collection[Resource] = frozenset(Resource)) -> float:
    """A hard sign: 1. Else the second worst severity: the worst alone counts for a third, so that one noisy figure
    cannot swing it."""
    known = {family: value for family, value in severities.items() if FIGURES[family].resource in resources}
    if any(value > 0 for family, value in known.items() if FIGURES[family].is_hard):
        return 1.0
    worst, second = sorted([*known.values(), 0.0, 0.0], reverse=True)[:2]
    return max(second, worst * _ALONE)


class _Normal:
    """What one figure is on this node while that is well, and how far the figure is from it."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.location = self.spread = math.nan
        self.recent: deque[float] = deque(maxlen=SUSTAINED)
        self._block: list[float] = []
        self._foreign: list[float] = []

    @property
    def is_learned(self) -> bool:
        return not math.isnan(self.location)

    @property
    def level(self) -> float:
        return median(self.recent)

    @property
    def excess(self) -> float:
        """Spreads above normal, sustained; 0 while that cannot be said."""
        if not self.is_learned or len(self.recent) < SUSTAINED:
            return 0.0
        return (self.level - self.location) / self.spread

    def observe(self, value: float) -> None:
        level = self.figure.level(value)
        self.recent.append(level)
        if self.excess > THRESHOLD:
            self._foreign.append(level)
            if len(self._foreign) == RELEARN:
                self._learn(self._foreign, 1.0)
                self._foreign = []
            return
        self._foreign = []
        self._block.append(level)
        if len(self._block) == (BLOCK if self.is_learned else WARM_UP):
            self._learn(self._block, _WEIGHT_OF_BLOCK if self.is_learned else 1.0)
            self._block = []

    def _learn(self, levels: list[float], weight: float) -> None:
        """Move location and spread towards the median and MAD of ``levels``."""
        middle = median(levels)
        spread = max(_MAD_TO_SIGMA * median(abs(level - middle) for level in levels), self.figure.floor)
        if weight < 1.0:
            middle = self.location + weight * (middle - self.location)
            spread = self.spread + weight * (spread - self.spread)
        ceiling = self.figure.ceiling
        self.location = middle if ceiling is None else min(middle, self.figure.level(ceiling))
        self.spread = spread


class _Alarm:
    """A hard figure: an event goes on to count, a state counts while it is sustained."""

    def __init__(self, figure: Figure) -> None:
        self.figure = figure
        self.recent: deque[bool] = deque([False] * SUSTAINED, maxlen=HELD if figure.is_event else SUSTAINED)

    @property
    def is_on(self) -> bool:
        return any(self.recent) if self.figure.is_event else 2 * sum(self.recent) > SUSTAINED


class NodeNormal:
    """Learns one node's normal from its samples, taken at even times, and judges each against it."""

    def __init__(self) -> None:
        self._soft: dict[str, _Normal] = {}
        self._hard: dict[str, _Alarm] = {}
        self._seen: dict[str, int] = {}
        self._count = 0

    def observe(self, figures: Mapping[str, float], loaded: Collection[Resource] = ()) -> Health:
        """Health after one more sample. ``figures``: by name, see ``FIGURES``; others and what is not finite are
        ignored. ``loaded``: what the daemon itself loads now (a drain): soft figures of it are not judged nor learned.
        """
        self._count += 1
        for name, value in figures.items():
            self._take(name, value, loaded)
        for alarm in (alarm for name, alarm in self._hard.items() if name not in figures):
            alarm.recent.append(False)
        for name in [name for name, seen in self._seen.items() if self._count - seen > FORGOTTEN]:
            del self._seen[name]
            self._soft.pop(name, None)
            self._hard.pop(name, None)
        return self._judge()

    def _take(self, name: str, value: float, loaded: Collection[Resource]) -> None:
        figure = FIGURES.get(split_name(name)[0])
        if figure is None or not math.isfinite(value) or (name not in self._seen and len(self._seen) >= MOST_FIGURES):
            return
        if figure.is_hard:
            self._hard.setdefault(name, _Alarm(figure)).recent.append(value > 0)
        elif figure.resource in loaded:
            return
        else:
            self._soft.setdefault(name, _Normal(figure)).observe(value)
        self._seen[name] = self._count

    def _judge(self) -> Health:
        current = {name: soft for name, soft in self._soft.items() if self._count - self._seen[name] < SUSTAINED}
        alarms = {name for name, alarm in self._hard.items() if alarm.is_on}
        severities = _severities(current) | {split_name(name)[0]: 1.0 for name in alarms}
        out = sorted((name for name, soft in current.items() if soft.excess > THRESHOLD), key=_by_excess(current))
        signs = [FIGURES[split_name(name)[0]].title.format(split_name(name)[1]) for name in sorted(alarms)]
        signs += [_sign(name, current[name]) for name in out]
        is_learned = bool(current) and 2 * sum(soft.is_learned for soft in current.values()) >= len(current)
        return Health(score_of(severities), tuple(signs[:MOST_SIGNS]), severities, is_learned)


def _by_excess(normals: Mapping[str, _Normal]) -> Callable[[str], float]:
    return lambda name: -normals[name].excess


def _sign(name: str, soft: _Normal) -> str:
    title = soft.figure.title.format(split_name(name)[1])
    return f"{title} {soft.figure.text(soft.level)} (normal {soft.figure.text(soft.location)})"


def _severities(normals: Mapping[str, _Normal]) -> dict[str, float]:
    """By family: of its worst label; of peers the one that more than half of them reach, two at least, since what is
    wrong with one peer may be that peer's."""
    by_family: dict[str, list[float]] = {}
    for name, soft in normals.items():
        severity = min(max((soft.excess - THRESHOLD / 2) / THRESHOLD, 0.0), 1.0)
        by_family.setdefault(split_name(name)[0], []).append(severity)
    severities = {}
    for family, values in by_family.items():
        values.sort(reverse=True)
        if not FIGURES[family].is_of_peer:
            severities[family] = values[0]
        elif len(values) > 1:
            severities[family] = values[len(values) // 2]
    return severities


def adjust(fault: Fault, health: Mapping[str, Health], others: Collection[str]) -> Fault:
    """``fault`` with the confidence that the health of nodes gives it; what was used is added to its evidence.

    Raised from suspect to confirmed when every node it names is unwell in what its kind depends on: two observers that
    share no input agree. Never to verified, which takes a test. Not raised when half of the other nodes are as
    unwell: then it is the fabric, the storage or the job, and tells nodes not apart.

    Lowered from confirmed to suspect only for slow links and slow communication, which are inferred from what groups
    have in common: when the nodes named are known to be well, and some of ``others`` is unwell instead (fewer than
    half of all). Nothing else lowers it: health sees a part only, so a node without signs may well be slow, and self
    time is measured there.

    Args:
        health: by node, of as many as are known.
        others: the nodes that it might be of instead: members of the communicators in which it was found.
    """
    if not fault.nodes or fault.kind is Kind.DESYNC:
        return fault
    scores = {node: score_of(known.severities, RELEVANT[fault.kind]) for node, known in health.items()}
    least = min(scores.get(node, 0.0) for node in fault.nodes)
    if fault.confidence is Confidence.SUSPECT and least >= UNWELL and not _is_common(least, fault.nodes, scores):
        return _with(fault, Confidence.CONFIRMED, {node: health[node] for node in fault.nodes})
    instead = {node for node in set(others).difference(fault.nodes) if scores.get(node, 0.0) >= UNWELL}
    is_inferred = fault.kind in (Kind.SLOW_LINK, Kind.SLOW_COMM) and not _is_common(UNWELL, fault.nodes, scores)
    if fault.confidence is Confidence.CONFIRMED and is_inferred and instead and _are_well(fault.nodes, health):
        return _with(fault, Confidence.SUSPECT, {node: health[node] for node in sorted(instead)[:MOST_SIGNS]})
    return fault


def _is_common(score: float, named: Collection[str], scores: Mapping[str, float]) -> bool:
    elsewhere = [value for node, value in scores.items() if node not in named]
    return bool(elsewhere) and 2 * sum(value >= score for value in elsewhere) >= len(elsewhere)


def _are_well(nodes: Iterable[str], health: Mapping[str, Health]) -> bool:
    known = [health.get(node) for node in nodes]
    return all(one is not None and one.is_learned and not one.signs for one in known)


def _with(fault: Fault, confidence: Confidence, used: Mapping[str, Health]) -> Fault:
    signs = {node: list(known.signs) for node, known in used.items()}
    return replace(fault, confidence=confidence, evidence={**fault.evidence, "health": signs})
