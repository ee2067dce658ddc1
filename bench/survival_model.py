"""What becomes of the newest snapshot in memory when nodes fail: parameters, failures, layouts, two estimates.

Monte Carlo, seeded, NumPy only; ``bench.survival`` prints and writes what comes of it. Failures are Poisson. Software
failures leave every node's memory as it is. A node loss takes one node's memory, a rack loss that of a rack or of a
random part of it, a row loss that of neighbouring racks on one power feed. Whatever was lost is lost together until the
run has been up for long enough to have protected a snapshot again, without another interruption: ``window_s``. A
snapshot is gone when some parity group has lost more than m members by then.

Figures and where they come from (``Parameters`` has them one by one, with what is assumed):

* Llama 3 (Grattafiori et al., "The Llama 3 Herd of Models", 2024, section 3.3.4 and table 5): 419 unexpected
  interruptions in 54 days on 16,384 GPUs, 8 a node; 98 of them software, watchdog timeouts, switches or cables.
* RSC-1 (Kokolis et al., "Revisiting Reliability in Large-Scale Machine Learning Research Clusters", HPCA 2025): 6.50
  failures in 1,000 node-days; RSC-2: 2.34. The Llama 3 figure, 3.79, lies between.
* Dean ("Designs, Lessons and Advice from Building Large Distributed Systems", LADIS 2009): the first year of a cluster
  of 1,800 machines sees about 20 rack failures of 40 to 80 machines and one power unit failure of 500 to 1,000.
* Ford et al. ("Availability in Globally Distributed Storage Systems", OSDI 2010): 37 % of node failures are part of a
  burst, large bursts are racks; mean time between failures of a rack 10.2 years. Not put in: held against the result.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ckptd.model import Geometry

Ids = npt.NDArray[np.int64]
DAY_S, YEAR_DAYS, Z95 = 86_400.0, 365.25, 1.959964
KINDS = ("node", "rack", "row")
LONGEST_CHAIN = 12  # losses before the one that is looked at; what is left out counts as lost in the upper bound
FEWEST_TRIALS = 1000  # of a stratum, however light


def _of(value: float, unit: str, meaning: str, source: str) -> Any:
    return field(default=value, metadata={"unit": unit, "meaning": meaning, "source": source})


@dataclass(frozen=True)
class Parameters:
    """Everything that the simulation is told. Each field carries its unit, its meaning and its source."""

    interruptions: float = _of(3.79, "in 1,000 node-days", "unexpected interruptions, racks and rows aside", "Llama 3")
    node_share: float = _of(
        321 / 419, "", "of these cost a node its memory; the rest is software", "Llama 3, pessimistic"
    )
    rack_losses: float = _of(
        0.67, "a year and rack", "losses of a rack or a part of it at once", "Dean: 20 in 30 racks"
    )
    row_losses: float = _of(0.42, "a year and row", "losses of a row at once", "Dean: 1 in 1,800 machines, taking 750")
    whole_rack_share: float = _of(0.5, "", "of rack losses take all of it; the others any number from 2", "assumption")
    nodes_per_rack: int = _of(16, "nodes", "a rack", "assumption; 2 to 8 is usual with air, 18 in an NVL72")
    racks_per_row: int = _of(8, "racks", "a row: what one power feed serves", "assumption; 1 to 2 MW")
    restart_s: float = _of(300, "s", "from the failure to the first new step, restored from memory", "assumption")
    tier_restart_s: float = _of(600, "s", "the same, restored from the durable tier", "assumption")
    image_gib: float = _of(32, "GiB", "image of a node", "assumption; 2 T parameters of 16 bytes on 1,000 nodes")
    protect_gib_s: float = _of(2, "GiB/s", "parity traffic of a node", "assumption; 0.5 % of eight 400 Gbit/s links")
    snapshot_s: float = _of(60, "s", "between snapshots, each of them protected", "assumption")
    stall_s: float = _of(0.02, "s", "stall of a snapshot", "upper end of 14 to 20 ms, measured on an H100")
    durable_s: float = _of(1800, "s of training", "between durable snapshots", "assumption")
    drain_s: float = _of(600, "s of training", "from a snapshot to its commit in the tier", "assumption")

    def protect_s(self, tolerance: int) -> float:
        """Seconds from a staged to a protected snapshot: m images through each node's link."""
        return tolerance * self.image_gib / self.protect_gib_s

    def window_s(self, tolerance: int) -> float:
        """Seconds after an interruption until a snapshot is protected again."""
        return self.restart_s + self.protect_s(tolerance)

    def width(self, kind: str) -> int:
        """How many nodes one loss of this kind can take."""
        return {"node": 1, "rack": self.nodes_per_rack, "row": self.nodes_per_rack * self.racks_per_row}[kind]

    def losses_a_day(self, nodes: int) -> dict[str, float]:
        """How many losses of each kind a run on ``nodes`` nodes sees in a day."""
        racks = nodes / self.nodes_per_rack
        return {
            "node": self.interruptions / 1000 * self.node_share * nodes,
            "rack": self.rack_losses * racks / YEAR_DAYS,
            "row": self.row_losses * racks / self.racks_per_row / YEAR_DAYS,
        }

    def software_a_day(self, nodes: int) -> float:
        return self.interruptions / 1000 * (1 - self.node_share) * nodes


class Layout(NamedTuple):
    """Who protects whom: ``group_of[node]``; any ``tolerance`` members of a group may be lost."""

    group_of: Ids
    tolerance: int


class Effort(NamedTuple):
    """How much is simulated: node numbers drawn for a stratum of weight 1, and the lightest stratum looked at."""

    cells: float
    lightest: float


class Estimate(NamedTuple):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


FINE, COARSE = Effort(1e7, 1e-10), Effort(3e5, 1e-5)


# --- layouts ------------------------------------------------------------------------------------------------------
def layout_of(nodes: int, geometry: Geometry, labels: Sequence[str], at: Parameters, seed: int) -> Layout:
    """The groups that ``ckptd.erasure.groups.plan_groups`` makes of ``nodes`` nodes whose ranks are in any order.

    ``labels``: which of "row" and "rack" the nodes are labelled with, in this order. In a uniform cluster the planner
    comes down to this: sort by domain, deal in turn. A test holds the two against each other; this one is for sizes
    of many trials.
    """
    place = ranks(nodes, seed).argsort()
    keys = [place]
    for label in reversed(labels):
        domain = np.arange(nodes) // at.width(label)
        size, first = np.bincount(domain), np.full(domain[-1] + 1, nodes)
        np.minimum.at(first, domain, place)
        keys += [first[domain], -size[domain]]
    group_of = np.empty(nodes, np.int64)
    group_of[np.lexsort(keys)] = np.arange(nodes) % max(1, nodes // sum(geometry))
    return Layout(group_of, geometry.m)


def ranks(nodes: int, seed: int) -> Ids:
    """The node of each rank: any order, as a scheduler hands them out that does not look at racks."""
    return np.random.default_rng([seed, nodes]).permutation(nodes)


# --- failures -----------------------------------------------------------------------------------------------------
def lost_nodes(kind: str, trials: int, nodes: int, at: Parameters, rng: np.random.Generator) -> Ids:
    """``trials`` losses of one kind, a row each: the nodes that went, -1 where a loss took fewer."""
    width = at.width(kind)
    places = rng.integers(math.ceil(nodes / width), size=(trials, 1))
    lost = places * width + np.arange(width)
    if kind == "rack":
        left = rng.integers(2, width + 1, size=(trials, 1)) if width > 1 else np.ones((trials, 1), np.int64)
        left[rng.random((trials, 1)) < at.whole_rack_share] = width
        order = rng.random((trials, width)).argsort(axis=1)
        lost[order >= left] = -1
    lost[lost >= nodes] = -1
    return lost


def is_lost(lost: Ids, layout: Layout) -> npt.NDArray[np.bool_]:
    """For each row of node numbers, whether some group has more than ``tolerance`` different members in it."""
    if lost.shape[1] <= layout.tolerance:
        return np.zeros(len(lost), np.bool_)
    nodes = np.sort(lost, axis=1)
    is_new = nodes >= 0
    is_new[:, 1:] &= nodes[:, 1:] != nodes[:, :-1]
    nobody = -1 - np.arange(lost.shape[1])  # each by itself: never two of one group
    groups = np.sort(np.where(is_new, layout.group_of[nodes], nobody), axis=1)
    too_many = groups[:, layout.tolerance :] == groups[:, : groups.shape[1] - layout.tolerance]
    lost_groups: npt.NDArray[np.bool_] = too_many.any(axis=1)
    return lost_groups


def most_of_a_group(kind: str, layout: Layout, at: Parameters) -> int:
    """The most members of one group that one loss of this kind can take."""
    groups = int(layout.group_of.max()) + 1
    places = np.arange(len(layout.group_of)) // at.width(kind)
    return int(np.bincount(places * groups + layout.group_of).max())


def chains(rates: Mapping[str, float], software_a_day: float, window_s: float) -> list[tuple[tuple[int, ...], float]]:
    """What else is lost when something is lost: (losses of each of ``KINDS``, probability).

    Going back in time, interruptions belong to the chain as long as each is within the window of the next; how many
    of them cost memory is then geometric, and each is of a kind in proportion to the rates.
    """
    total = sum(rates.values())
    if not total:
        return [((0,) * len(KINDS), 1.0)]
    near = -math.expm1(-(total + software_a_day) * window_s / DAY_S)
    hard = total / (total + software_a_day)
    more = near * hard / (1 - near * (1 - hard))
    found = []
    for counts in itertools.product(range(LONGEST_CHAIN + 1), repeat=len(KINDS)):
        length = sum(counts)
        ways = math.factorial(length) / math.prod(math.factorial(count) for count in counts)
        shares = math.prod((rates[kind] / total) ** count for kind, count in zip(KINDS, counts, strict=True))
        found.append((counts, (1 - more) * more**length * ways * shares))
    return found


# --- survival -----------------------------------------------------------------------------------------------------
def wilson(hits: int, trials: int) -> Estimate:
    """Share of ``hits`` with its Wilson score interval."""
    share, z2 = hits / trials, Z95 * Z95
    middle = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    half = Z95 / (1 + z2 / trials) * math.sqrt(share * (1 - share) / trials + z2 / (4 * trials * trials))
    return Estimate(share, 0.0 if hits == 0 else middle - half, 1.0 if hits == trials else middle + half)


def weighted_sum(parts: Sequence[tuple[float, Estimate]]) -> Estimate:
    """The sum of weight x estimate; the distances to the bounds add up in squares, as the estimates are independent."""
    value = sum(weight * part.value for weight, part in parts)
    below = math.sqrt(sum((weight * (part.value - part.low)) ** 2 for weight, part in parts))
    above = math.sqrt(sum((weight * (part.high - part.value)) ** 2 for weight, part in parts))
    return Estimate(value, max(0.0, value - below), value + above)


def loss_probabilities(layout: Layout, at: Parameters, seed: int, effort: Effort = FINE) -> dict[str, Estimate]:
    """For each kind of loss, the probability that such a loss ends the newest snapshot in memory.

    Conditioned on the loss and, stratum by stratum, on what else is lost at that time: each stratum is simulated by
    itself and weighted with its exact probability, so rare ones need no luck. Strata in which no group can be over its
    tolerance count as exactly zero, those too light to be looked at as lost in the upper bound.
    """
    nodes = len(layout.group_of)
    most = {kind: most_of_a_group(kind, layout, at) for kind in KINDS}
    known = chains(at.losses_a_day(nodes), at.software_a_day(nodes), at.window_s(layout.tolerance))
    strata = [(counts, weight) for counts, weight in known if weight > effort.lightest]
    left_out = max(0.0, 1 - sum(weight for _, weight in strata))
    result = {}
    for number, kind in enumerate(KINDS):
        parts = []
        for counts, weight in strata:
            chain = [other for other, count in zip(KINDS, counts, strict=True) for _ in range(count)]
            if most[kind] + sum(most[other] for other in chain) > layout.tolerance:
                drawn = at.width(kind) + sum(at.width(other) for other in chain)
                trials = max(FEWEST_TRIALS, int(effort.cells * math.sqrt(weight) / drawn))
                rng = np.random.default_rng([seed, number, *counts])
                hits = _fatal([*chain, kind], trials, layout, at, rng)
                parts.append((weight, wilson(hits, trials)))
        total = weighted_sum(parts)
        result[kind] = Estimate(total.value, total.low, min(1.0, total.high + left_out))
    return result


def _fatal(chain: Sequence[str], trials: int, layout: Layout, at: Parameters, rng: np.random.Generator) -> int:
    """In how many of ``trials`` chains the last loss, and none before it, ends the snapshot."""
    losses = [lost_nodes(kind, trials, len(layout.group_of), at, rng) for kind in chain]
    hits = is_lost(np.hstack(losses), layout)
    if len(losses) > 1:
        hits &= ~is_lost(np.hstack(losses[:-1]), layout)
    return int(hits.sum())


def losses_of_the_snapshot(probabilities: Mapping[str, Estimate], rates: Mapping[str, float]) -> Estimate:
    """How often a day the newest snapshot in memory is lost."""
    return weighted_sum([(rates[kind], probabilities[kind]) for kind in KINDS])


# --- time ---------------------------------------------------------------------------------------------------------
def effective_time(
    nodes: int,
    tolerance: int,
    is_fatal: Mapping[str, float],
    at: Parameters,
    seed: int,
    days: float = 60.0,
    runs: int = 64,
) -> Estimate:
    """Share of wall time that ends up as training, over ``runs`` simulated runs of ``days`` days.

    ``is_fatal``: for each kind of loss, the probability that it ends the newest snapshot in memory. Then the run falls
    back to the newest durable one; otherwise to the newest protected one, and to the newest staged one when no node was
    lost.
    """
    rng = np.random.default_rng([seed, nodes])
    a_day = np.array([*at.losses_a_day(nodes).values(), at.software_a_day(nodes)])
    total, end, speed = a_day.sum(), days * DAY_S, 1 - at.stall_s / at.snapshot_s
    fatal = np.array([*(is_fatal[kind] for kind in KINDS), 0.0])
    lag = np.array([at.protect_s(tolerance)] * len(KINDS) + [0.0])
    clock, trained, durable, restart = np.zeros((4, runs))
    is_gone = np.zeros(runs, np.bool_)
    while (clock < end).any():
        gap = rng.exponential(DAY_S / total, runs) if total else np.full(runs, end)
        kind = rng.choice(len(a_day), runs, p=a_day / total if total else None)
        chance, age = rng.random(runs), rng.random(runs) * at.snapshot_s
        reached = trained + np.clip(np.minimum(gap, end - clock) - restart, 0.0, None) * speed
        durable = np.maximum(durable, np.floor((reached - at.drain_s) / at.durable_s) * at.durable_s)
        is_gone = (chance < fatal[kind]) | (is_gone & (gap < restart))  # or not yet back in memory
        kept = np.where(is_gone, durable, np.maximum(trained, reached - age - lag[kind]))
        is_last = clock + gap >= end  # the failure is beyond the end: all that was trained counts
        trained = np.where(clock >= end, trained, np.where(is_last, reached, kept))
        restart = np.where(is_gone, at.tier_restart_s, at.restart_s)
        clock = clock + gap
    share = trained / end
    half = Z95 * float(share.std(ddof=1)) / math.sqrt(runs)
    return Estimate(float(share.mean()), float(share.mean()) - half, min(1.0, float(share.mean()) + half))
