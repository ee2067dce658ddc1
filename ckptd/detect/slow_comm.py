"""Which communication is slow for no fault of who takes part in it: communicators, and nodes by tomography.

Layer: inside ``detect``, above ``baseline`` and ``links``. Invariants: what is judged is the time of the last member to
arrive, so waiting for a slow rank is never a slow network; rooted operations do not synchronise and are left out; a
fault names a node only where communicators that are not slow clear all others.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from ckptd.detect.baseline import (
    BUCKETS,
    CLEAR_RATIO,
    SLOW_RATIO,
    Assembly,
    Bools,
    Columns,
    Floats,
    Ints,
    Numbering,
    Tracks,
    no_columns,
)
from ckptd.detect.kernel_links import PeerLink
from ckptd.detect.link_judge import LinkJudge
from ckptd.detect.links import LinkMatrix
from ckptd.detect.records import Communicator, Confidence, Fault, Kind, Timings
from ckptd.format.timings import SAMPLE, SYNCHRONISING, Op

_OPS: Final = 16
_COMMUNICATORS_MOST: Final = 1 << 16
_TRACKS_MOST: Final = 1 << 18
_FAULTS_MOST: Final = 8
_NAMES_MOST: Final = 16  # in the evidence
_MEMBERS_MOST: Final = 64  # in the evidence
_DIFFERING: Final = 2  # sets of places
_SLOW_SHARE: Final = 0.75  # of a node's communicators
_COMMON_LEAST: Final = 4  # communicators: when most of so many are slow, it is none of their nodes
_IS_SYNCHRONISING: Final = np.isin(np.arange(256), [int(op) for op in SYNCHRONISING])


class CommJudge:
    """Faults of communication. State: the known communicators, samples that wait for others, windows of each
    communicator, operation and size; beyond the bounds all of it is forgotten, and learnt again."""

    def __init__(self, nodes: Sequence[str]) -> None:
        """``nodes``: of each rank, as in ``Timings``; an unknown one counts as the rank's own."""
        names = [node or f"rank {rank}" for rank, node in enumerate(nodes)]
        self._places = tuple(sorted(set(names)))
        index = {name: at for at, name in enumerate(self._places)}
        self._place_of = np.array([index[name] for name in names], np.int64)
        self._reset()

    def _reset(self) -> None:
        self._known = _Known(self._place_of)
        self._collectives, self._pairs = Assembly(), Assembly()
        self._pair_numbers = Numbering()
        self._tracks = Tracks()
        self._links = LinkJudge(self._places, self._place_of)

    @property
    def matrices(self) -> tuple[LinkMatrix, ...]:
        """The link matrices of the last judgement."""
        return self._links.matrices

    def take(self, timings: Timings) -> None:
        """Adds samples. Hand over what is new; what was handed over before counts no second time. A rank's samples may
        come some steps after another's."""
        is_full = len(self._known.all) > _COMMUNICATORS_MOST
        if is_full or max(self._tracks.state.size, self._links.tracks.state.size) > _TRACKS_MOST:
            self._reset()
        rows, op, peer = _columns(timings, self._known)
        is_synchronising = _IS_SYNCHRONISING[op]
        if is_synchronising.any():
            own = rows.pick(is_synchronising)
            self._take_collectives(replace(own, channel=own.channel * _OPS + op[is_synchronising]))
        is_sent = op == int(Op.SEND)
        is_pair = (is_sent | (op == int(Op.RECV))) & (peer >= 0) & (peer < self._place_of.size)
        if is_pair.any():
            own, peer, is_sent = rows.pick(is_pair), peer[is_pair], is_sent[is_pair]
            self._take_pairs(own, np.where(is_sent, own.rank, peer), np.where(is_sent, peer, own.rank))

    def _take_collectives(self, samples: Columns) -> None:
        transfers = self._collectives.take(samples, np.repeat(self._known.sizes, _OPS))
        communicator, op = np.divmod(transfers.channel, _OPS)
        self._tracks.take(transfers, self._known.kinds[communicator] * _OPS + op)

    def _take_pairs(self, samples: Columns, src: Ints, dst: Ints) -> None:
        world = self._place_of.size
        pairs = self._pair_numbers.of((samples.channel * world + src) * world + dst)
        ends = np.zeros((len(self._pair_numbers), 2), np.int64)
        ends[pairs, 0], ends[pairs, 1] = src, dst
        transfers = self._pairs.take(replace(samples, channel=pairs), np.full(len(ends), 2))
        if transfers.seq.size:
            self._links.take(transfers, ends[transfers.channel, 0], ends[transfers.channel, 1])

    def judge(self, peers: Sequence[PeerLink] | None = None, excused: Collection[int] = ()) -> list[Fault]:
        """The faults as they are now. ``peers``: a new answer of the nodes' kernels. ``excused``: ranks that are slow
        by themselves; what they take part in is not held against the network unless it is narrowed to others."""
        slow = _slow_communicators(self._tracks, self._known)
        links = self._links.judge(peers, *(self._places_where(which) for which in (slow.is_slow, slow.is_firm)))
        barred = frozenset(excused)
        is_barred = np.array([not barred.isdisjoint(c.members) for c in self._known.all], np.bool_)
        is_wide = self._known.spans > 1
        faults = [fault for fault in links if barred.isdisjoint(fault.ranks)]
        faults += _inside_nodes(slow.is_slow & ~is_wide & ~is_barred, slow, self._known, self._places)
        is_left = slow.is_slow & is_wide & ~self._explained(links)
        for place, covered in tomography(self._known.places, is_left, slow.is_witness & is_wide, slow.ratio):
            fault = _node_fault(place, covered, slow, self._known, self._places)
            faults += [fault] if barred.isdisjoint(fault.ranks) else []
            is_left[covered] = False
        return faults + _unnarrowed(is_left & ~is_barred, slow, self._known, self._places)

    def _explained(self, links: Sequence[Fault]) -> Bools:
        """Communicators that run over a link or node that is named for sure."""
        explained = np.zeros(len(self._known.all), np.bool_)
        for fault in links:
            if fault.confidence is not Confidence.SUSPECT:
                explained |= self._holding(fault)
        return explained

    def _holding(self, fault: Fault) -> Bools:
        at = [self._places.index(node) for node in fault.nodes]
        return np.array([np.isin(at, places).all() for places in self._known.places], np.bool_)

    def _places_where(self, which: Bools) -> list[Ints]:
        return [self._known.places[at] for at in np.flatnonzero(which).tolist()]


class _Known:
    """The communicators seen, numbered; by number: ``sizes`` in members, ``places`` and ``spans`` (how many places),
    ``kinds``: equal for those that may be compared."""

    def __init__(self, place_of: Ints) -> None:
        self.all: list[Communicator] = []
        self.places: list[Ints] = []
        self.place_of = place_of
        self._numbers: dict[str, int] = {}
        self._kind_numbers: dict[tuple[int, int, str], int] = {}
        self._kinds: list[int] = []

    @property
    def sizes(self) -> Ints:
        return np.array([len(communicator.members) for communicator in self.all], np.int64)

    @property
    def spans(self) -> Ints:
        return np.array([places.size for places in self.places], np.int64)

    @property
    def kinds(self) -> Ints:
        return np.array(self._kinds, np.int64)

    def number(self, communicator: Communicator) -> int:
        """Its number; -1 when it has members outside the world."""
        number = self._numbers.get(communicator.id)
        if number is not None:
            return number
        members = np.array(communicator.members, np.int64)
        is_sound = members.size > 0 and members.min() >= 0 and members.max() < self.place_of.size
        self._numbers[communicator.id] = len(self.all) if is_sound else -1
        if is_sound:
            self._add(communicator, np.unique(self.place_of[members]))
        return self._numbers[communicator.id]

    def _add(self, communicator: Communicator, places: Ints) -> None:
        self.all.append(communicator)
        self.places.append(places)
        kind = (len(communicator.members), places.size, communicator.label)
        self._kinds.append(self._kind_numbers.setdefault(kind, len(self._kind_numbers)))


def _columns(timings: Timings, known: _Known) -> tuple[Columns, Ints, Ints]:
    """All ranks' samples with ``channel`` the communicator's number; their operations and peers."""
    ranks = [rank for rank, rows in timings.samples.items() if len(rows) and timings.tables.get(rank)]
    parts = [timings.samples[rank] for rank in ranks]
    if not parts:
        return no_columns(), np.empty(0, np.int64), np.empty(0, np.int64)
    rows = np.frombuffer(b"".join(part.tobytes() for part in parts), SAMPLE)  # concatenate promotes field by field
    lengths = [len(part) for part in parts]
    width = max(max(timings.tables[rank]) for rank in ranks) + 1
    table = np.full((len(ranks), width), -1, np.int64)
    for at, rank in enumerate(ranks):
        for entry, communicator in timings.tables[rank].items():
            table[at, entry] = known.number(communicator)
    row = rows["communicator"].astype(np.int64)
    number = table[np.repeat(np.arange(len(ranks)), lengths), np.minimum(row, width - 1)]
    is_known = (number >= 0) & (row < width) & (rows["duration_s"] > 0)
    columns = Columns(
        number,
        rows["seq"].astype(np.int64),
        rows["step"],
        rows["size_bytes"].astype(np.int64),
        rows["duration_s"].astype(np.float64),
        np.repeat(np.array(ranks, np.int64), lengths),
    )
    op, peer = rows["op"].astype(np.int64), rows["peer"].astype(np.int64)
    if is_known.all():
        return columns, op, peer
    return columns.pick(is_known), op[is_known], peer[is_known]


@dataclass(frozen=True, slots=True)
class _Slow:
    """By communicator: its worst size. ``is_witness``: it was judged at sizes at which others are slow.
    ``is_firm``: in two windows in a row, against its past or clearly against siblings."""

    is_slow: Bools
    is_witness: Bools
    is_firm: Bools
    is_above_siblings: Bools
    ratio: Floats
    since: Ints
    track: Ints
    tracks: Tracks


def _slow_communicators(tracks: Tracks, known: _Known) -> _Slow:
    state, count = tracks.state, len(known.all)
    communicator = tracks.channels // _OPS
    is_slow, ratios = tracks.is_slow, np.where(state["closed"] > 0, tracks.ratios, 0.0)
    track = np.full(count, -1, np.int64)
    order = np.lexsort((ratios, is_slow))
    track[communicator[order]] = order  # the last one stays: the worst
    has = track >= 0
    witness = (state["closed"] > 0) & (tracks.buckets >= (tracks.buckets[is_slow].min() if is_slow.any() else 0))
    is_witness = np.bincount(communicator[witness], minlength=count) > 0
    slow, above, firm = np.zeros((3, count), np.bool_)
    ratio, since = np.ones(count), np.full(count, -1)
    worst, ratio[has], since[has] = state[track[has]], ratios[track[has]], state["since"][track[has]]
    slow[has], above[has] = worst["streak"] > 0, worst["is_above_siblings"]
    firm[has] = (worst["streak"] > 1) & (worst["is_above_past"] | (ratio[has] > CLEAR_RATIO))
    return _Slow(slow, is_witness | slow, firm, above, ratio, since, track, tracks)


def tomography(
    places: Sequence[Ints], is_slow: Bools, is_judged: Bools, ratio: Floats
) -> list[tuple[int, npt.NDArray[np.intp]]]:
    """Places that explain slow communicators, each with those: nearly all communicators of the place are slow, two
    differing ones or more, and one of them has no other such place. ``places``: of each communicator, sorted.

    Communicators over the same places are one; it is slow when most of them are.
    """
    judged = np.flatnonzero(is_judged | is_slow)
    numbers: dict[bytes, int] = {}
    which = np.array([numbers.setdefault(places[at].tobytes(), len(numbers)) for at in judged.tolist()], np.int64)
    if not is_slow.any() or len(numbers) < _DIFFERING:
        return []
    sets = [np.frombuffer(key, np.int64) for key in numbers]
    of_set = np.repeat(np.arange(len(sets)), [len(members) for members in sets])
    place = np.concatenate(sets)
    slow_sets = np.bincount(which, is_slow[judged], len(sets)) >= np.bincount(which, minlength=len(sets)) / 2
    total = np.bincount(place)
    slow_of = np.bincount(place, slow_sets[of_set])
    is_candidate = (slow_of >= _DIFFERING) & (slow_of >= _SLOW_SHARE * total) & (total < len(sets))
    rivals = np.bincount(of_set, is_candidate[place], len(sets))
    is_sole = is_candidate[place] & slow_sets[of_set] & (rivals[of_set] == 1)
    named = []
    for found in np.unique(place[is_sole]).tolist():
        holds = np.isin(which, of_set[place == found])
        if np.median(ratio[judged[holds]]) - np.median(ratio[judged[~holds]]) > SLOW_RATIO - 1:
            named.append((found, judged[holds & is_slow[judged]]))
    return named


def _inside_nodes(is_slow: Bools, slow: _Slow, known: _Known, places: tuple[str, ...]) -> list[Fault]:
    """Communicators inside a node are no network: its own fabric, or its processors. Without siblings that are fast on
    other nodes it may as well be what the job does: then it is no rank's, in a job of one node not even the node's."""
    at = np.flatnonzero(is_slow)
    place = np.array([known.places[number][0] for number in at], np.int64)
    faults = []
    for found in np.unique(place).tolist():
        own = at[place == found]
        fault = _node_fault(found, own, slow, known, places)
        if not any(slow.is_above_siblings[number] and _has_fast_sibling(number, slow, known) for number in own):
            nodes = fault.nodes if len(places) > 1 else ()
            fault = replace(fault, ranks=(), nodes=nodes, confidence=Confidence.SUSPECT)
        faults.append(fault)
    all_inside = {int(members[0]) for members in known.places if members.size == 1}
    if len(faults) >= _COMMON_LEAST and len(faults) > len(all_inside) / 2:
        return [_common(at, slow, known)]
    return faults


def _has_fast_sibling(number: int, slow: _Slow, known: _Known) -> bool:
    """On another node."""
    fast = np.flatnonzero(slow.is_witness & ~slow.is_slow & (known.kinds == known.kinds[number]))
    return any(known.places[at][0] != known.places[number][0] for at in fast)


def _node_fault(
    place: int, covered: npt.NDArray[np.intp], slow: _Slow, known: _Known, places: tuple[str, ...]
) -> Fault:
    members = {rank for number in covered.tolist() for rank in known.all[number].members}
    ranks = tuple(sorted(rank for rank in members if known.place_of[rank] == place))
    what = f"communication of {places[place]}"
    return Fault(Kind.SLOW_COMM, ranks, (places[place],), *_grounds(covered, what, slow, known))


def _unnarrowed(is_slow: Bools, slow: _Slow, known: _Known, places: tuple[str, ...]) -> list[Fault]:
    """One fault for each set of places; of two places, it is what lies between them."""
    by_places: dict[bytes, list[int]] = {}
    for number in np.flatnonzero(is_slow).tolist():
        by_places.setdefault(known.places[number].tobytes(), []).append(number)
    judged = {known.places[number].tobytes() for number in np.flatnonzero(slow.is_witness & (known.spans > 1))}
    if len(by_places) >= _COMMON_LEAST and len(by_places) > len(judged) / 2:
        return [_common(np.flatnonzero(is_slow), slow, known)]
    faults = []
    for numbers in by_places.values():
        communicator, at = known.all[numbers[0]], known.places[numbers[0]]
        named = tuple(places[place] for place in at.tolist()) if at.size == 2 else ()
        ranks = communicator.members if len(numbers) == 1 and len(communicator.members) == 2 else ()
        what = f"the link between {' and '.join(named)}" if named else f"communication of {at.size} nodes"
        kind = Kind.SLOW_LINK if named else Kind.SLOW_COMM
        faults.append(Fault(kind, tuple(sorted(ranks)), named, *_grounds(np.array(numbers), what, slow, known)))
    return sorted(faults, key=lambda fault: -fault.evidence["ratio"])[:_FAULTS_MOST]


def _common(numbers: npt.NDArray[np.intp], slow: _Slow, known: _Known) -> Fault:
    _, since, evidence = _grounds(numbers, "most communication, so a cause in common:", slow, known)
    return Fault(Kind.SLOW_COMM, (), (), Confidence.SUSPECT, since, evidence)


def _grounds(
    numbers: npt.NDArray[np.intp], what: str, slow: _Slow, known: _Known
) -> tuple[Confidence, int, dict[str, Any]]:
    """Confidence, first step and evidence of a fault of the communicators ``numbers``."""
    worst = int(numbers[np.argmax(slow.ratio[numbers])])
    track, ratio = slow.tracks.state[slow.track[worst]], float(slow.ratio[worst])
    op = Op(int(track["code"]) // BUCKETS % _OPS).label
    communicator = known.all[worst]
    name = communicator.label or communicator.id
    evidence = {
        "summary": f"{what} takes {ratio:.1f} times as long as is normal, {op} of {name} most",
        "ratio": round(ratio, 3),
        "operation": op,
        "size_bytes": 1 << (int(track["code"]) % BUCKETS),
        "transfer_s": float(track["latest_s"]),
        "normal_s": float(track["latest_s"]) / ratio,
        "against": "past" if track["is_above_past"] else "siblings",
        "windows": int(track["streak"]),
        "communicator": communicator.id,
        "members": list(communicator.members[:_MEMBERS_MOST]),
        "member_count": len(communicator.members),
        "communicators": [known.all[number].id for number in numbers[:_NAMES_MOST].tolist()],
        "communicator_count": len(numbers),
    }
    confidence = Confidence.CONFIRMED if slow.is_firm[numbers].any() else Confidence.SUSPECT
    return confidence, int(slow.since[numbers].min()), evidence
