"""Flight Recorder dumps of a job that hung, read as the states of its ranks.

Layer: beside ``restore``. Invariants: nothing of a dump is run (``unpickle_plain``), and what is not of its type is
refused; ranks are global; a rank without a dump has no state. What the result means is judged by
``detect.hang`` with ``POST_MORTEM``, by the wavefront:

* The rank at fault is not the one with the fewest operations. Hosts run ahead of their devices, so a rank whose device
  failed may have entered as many as its peers, and keeps more of them open than any. But a collective ends on one
  member only after all took part: who keeps open what a peer finished has itself to blame.
* A rank whose host stopped finishes what it entered and keeps nothing open, while others keep open what it never
  entered. Anyone else who is late keeps something open, and so waits for somebody.
* Counters of one group are shared by collectives and point-to-point operations, which are numbered apart; where a group
  has both, only its entries are believed.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Final

from ckptd.detect.records import Communicator, Count, Pending, RankState
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.timings import POINT_TO_POINT, Op
from ckptd.replay.unpickle import unpickle_plain

# torch appends the rank to a prefix: nccl_trace_rank_ by default, else what its environment names.
_FILE: Final = re.compile(r"(?P<prefix>.*?)(?P<rank>\d{1,9})(\.(json|pkl|pickle))?", re.ASCII)
_USUAL_PREFIX: Final = re.compile(r"dump|trace_rank|flight", re.IGNORECASE)
_PEER: Final = re.compile(r"(?:send|recv) (\d+)(?:->|<-)(\d+)")
_COALESCED: Final = ":coalesced"
_DEFAULT_GROUP: Final = "default_pg"
# torch records 2,000 operations, unless its environment says otherwise.
_MOST_FILE_BYTES: Final = 64 << 20
_MOST_ENTRIES: Final = 1 << 17
_MOST_RANKS: Final = 1 << 20
_MOST_DIMENSIONS: Final = 64
_MOST_NUMBER: Final = 1 << 63
_MOST_DIGITS: Final = 20
_NO_LABEL: Final = "undefined"  # torch's description of groups that were given none

# By what a profiling name contains, the longer names first.
_OPS: Final = (
    ("barrier", Op.BARRIER),
    ("reduce_scatter", Op.REDUCE_SCATTER),
    ("all_reduce", Op.ALL_REDUCE),
    ("allreduce", Op.ALL_REDUCE),
    ("all_gather", Op.ALL_GATHER),
    ("allgather", Op.ALL_GATHER),
    ("all_to_all", Op.ALL_TO_ALL),
    ("alltoall", Op.ALL_TO_ALL),
    ("broadcast", Op.BROADCAST),
    ("gather", Op.GATHER),
    ("scatter", Op.SCATTER),
    ("reduce", Op.REDUCE),
    ("send", Op.SEND),
    ("recv", Op.RECV),
)
_DTYPE_BYTES: Final = {
    **dict.fromkeys(("Double", "Long", "ComplexFloat", "UInt64"), 8),
    **dict.fromkeys(("Float", "Int", "ComplexHalf", "UInt32"), 4),
    **dict.fromkeys(("Half", "BFloat16", "Short", "UInt16"), 2),
    "ComplexDouble": 16,
}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One recorded operation. ``group``: its name in the dump, ``pg_id``: its number in the process."""

    group: str
    label: str
    pg_id: str
    is_p2p: bool
    seq: int
    collectives: int  # entered in the group so far
    name: str
    size_bytes: int
    created_ns: int
    is_pending: bool
    where: str

    @property
    def op(self) -> Op:
        name = self.name.lower()
        return next((op for part, op in _OPS if part in name), Op.OTHER)


@dataclass(frozen=True, slots=True)
class _Dump:
    """What one rank wrote. ``groups``: label and members by name; ``status``: enqueued and completed by ``pg_id``."""

    rank: int
    groups: Mapping[str, tuple[str, tuple[int, ...]]]
    status: Mapping[str, tuple[int, int]]
    entries: tuple[_Entry, ...]


def read_dumps(folder: Path) -> tuple[list[RankState], dict[str, Communicator]]:
    """States by rank and communicators by id, of the dumps in ``folder``: pickles or JSON, one a rank, named by a
    prefix and the rank. InvalidRequest when there are none, Corrupt, naming the file, when one cannot be read."""
    dumps = [_read(path, rank) for rank, path in sorted(_files(folder).items())]
    groups = _Groups(dumps)
    latest_ns = max((entry.created_ns for dump in dumps for entry in dump.entries), default=0)
    return [_state(dump, groups, latest_ns) for dump in dumps], groups.communicators


# --- files --------------------------------------------------------------------------------------------------------
def _files(folder: Path) -> dict[int, Path]:
    if not folder.is_dir():
        raise InvalidRequest(f"{folder} is not a folder", "give the folder that holds the dumps of all ranks")
    found: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in sorted(folder.iterdir()):
        match = _FILE.fullmatch(path.name)
        if match and path.is_file():
            rank = int(match["rank"])
            if rank >= _MOST_RANKS:
                raise InvalidRequest(f"{path}: rank {rank} is not below {_MOST_RANKS}")
            if rank in found[match["prefix"]]:
                raise InvalidRequest(f"{folder} has two dumps of rank {rank}: {path.name} is the second")
            found[match["prefix"]][rank] = path
    usual = {prefix: paths for prefix, paths in found.items() if _USUAL_PREFIX.search(prefix)}
    chosen = list((usual or found).values())
    if not chosen:
        raise InvalidRequest(
            f"{folder} holds no Flight Recorder dumps", "their names end in the rank: nccl_trace_rank_0"
        )
    if len(chosen) > 1:
        names = ", ".join(sorted(usual or found))
        raise InvalidRequest(f"{folder} holds dumps under several names: {names}", "keep those of one hang")
    return chosen[0]


def _read(path: Path, rank: int) -> _Dump:
    try:
        if (size_bytes := path.stat().st_size) > _MOST_FILE_BYTES:
            raise Corrupt(f"{path} has {size_bytes} bytes, and no dump has more than {_MOST_FILE_BYTES}", "")
        data = path.read_bytes()
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be read: {error.strerror}") from error
    raw = _from_json(data, path) if data.lstrip()[:1] == b"{" else unpickle_plain(data, str(path))
    try:
        return _Dump(
            rank,
            # gloo writes one group without a name in place of those that there are.
            {_name(name): _group(config) for name, config in raw["pg_config"].items() if name},
            {_name(pg_id): _status(status) for pg_id, status in raw.get("pg_status", {}).items()},
            tuple(_entry(entry) for entry in _list(raw["entries"], _MOST_ENTRIES)),
        )
    except (AttributeError, IndexError, KeyError, RecursionError, TypeError, ValueError) as error:
        what = f"{type(error).__name__}: {error}"
        raise Corrupt(f"{path} is not a Flight Recorder dump of a known form: {what}", "") from error


def _from_json(data: bytes, path: Path) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise Corrupt(f"{path} is no JSON: {error}", "") from error


def _number(value: Any) -> int:
    """gloo writes some numbers as texts."""
    if isinstance(value, str) and len(value) <= _MOST_DIGITS:
        value = int(value)
    if type(value) is not int or not -_MOST_NUMBER <= value < _MOST_NUMBER:
        raise TypeError(f"a {type(value).__name__} in place of a number of 64 bits")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"a {type(value).__name__} in place of a text")
    return value


def _name(value: Any) -> str:
    """Numbers of groups are texts as keys and numbers elsewhere."""
    return value if isinstance(value, str) else str(_number(value))


def _list(value: Any, most: int = _MOST_RANKS) -> Sequence[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"a {type(value).__name__} in place of a list")
    if len(value) > most:
        raise ValueError(f"a list of {len(value)}, more than {most}")
    return value


def _flag(value: Any) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"a {type(value).__name__} in place of true or false")
    return bool(value)


def _group(config: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    ranks = config.get("ranks") or []
    members = tuple(map(_number, _list(json.loads(ranks) if isinstance(ranks, str) else ranks)))
    if not all(0 <= rank < _MOST_RANKS for rank in members):
        raise ValueError(f"a rank is not one of {_MOST_RANKS}")
    label = _text(config.get("desc", ""))
    return "" if label == _NO_LABEL else label, members


def _status(status: Mapping[str, Any]) -> tuple[int, int]:
    return _number(status["last_enqueued_collective"]), _number(status["last_completed_collective"])


def _entry(raw: Mapping[str, Any]) -> _Entry:
    group, label = map(_text, raw["process_group"])
    is_p2p = _flag(raw.get("is_p2p", False))
    collectives = _number(raw["collective_seq_id"] if "collective_seq_id" in raw else raw["seq_id"])
    return _Entry(
        group=group,
        label="" if label == _NO_LABEL else label,
        pg_id=_name(raw["pg_id"]),
        is_p2p=is_p2p,
        seq=_number(raw["p2p_seq_id"]) if is_p2p else collectives,
        collectives=collectives,
        name=_text(raw["profiling_name"]),
        size_bytes=_size_bytes(_list(raw.get("input_sizes") or []), _list(raw.get("input_dtypes") or [])),
        created_ns=_number(raw["time_created_ns"]),
        # gloo leaves the state at "scheduled": there only ``retired`` tells.
        is_pending=_text(raw["state"]) != "completed" and not _flag(raw.get("retired", False)),
        where=_where(_list(raw.get("frames") or [])),
    )


def _size_bytes(sizes: Sequence[Any], dtypes: Sequence[Any]) -> int:
    widths = [_DTYPE_BYTES.get(_text(dtype), 1) for dtype in dtypes] + [1] * len(sizes)
    total = sum(prod(_shape(shape)) * width for shape, width in zip(sizes, widths, strict=False))
    return _number(total)


def _shape(value: Any) -> list[int]:
    shape = [_number(size) for size in _list(value, _MOST_DIMENSIONS)]
    if min(shape, default=0) < 0:
        raise ValueError("a tensor has a size below 0")
    return shape


def _where(frames: Sequence[Any]) -> str:
    """The innermost frame outside torch, else the innermost."""
    places = [f"{_text(frame['filename'])}:{_number(frame['line'])}" for frame in frames]
    return next((place for place in places if "/torch/" not in place), places[0] if places else "")


# --- groups -------------------------------------------------------------------------------------------------------
class _Groups:
    """Process groups over all dumps. ``communicators``: by id, which is the group's name, with the members behind it
    where dumps give the name to different groups."""

    def __init__(self, dumps: Sequence[_Dump]) -> None:
        self._seen: dict[str, dict[int, set[int]]] = {}
        labels: dict[str, str] = {}
        members: dict[str, set[tuple[int, ...]]] = defaultdict(set)
        self._inferred = _inferred_members(dumps)
        self._of: dict[tuple[int, str], str] = {}
        known = [(dump.rank, name, *config) for dump in dumps for name, config in dump.groups.items()]
        known += [(d.rank, e.group, e.label, ()) for d in dumps for e in d.entries if e.group not in d.groups]
        told = [(rank, name, label, ranks or self._inferred[name]) for rank, name, label, ranks in known]
        for _, name, label, ranks in told:
            members[name].add(ranks)
            labels[name] = label or labels.get(name, "")
        self.communicators: dict[str, Communicator] = {}
        for rank, name, _, ranks in told:
            own = name if len(members[name]) == 1 else f"{name}/{','.join(map(str, ranks))}"
            self._of[rank, name] = own
            self.communicators[own] = Communicator(own, ranks, labels[name])
        self.with_p2p = {self.id(d.rank, e.group) for d in dumps for e in d.entries if e.is_p2p}
        self.with_p2p |= {self.id(d.rank, name) for d in dumps for name in _miscounted(d)}
        self.coalescing = {self.id(d.rank, e.group) for d in dumps for e in d.entries if e.name.endswith(_COALESCED)}

    def id(self, rank: int, group: str) -> str:
        return self._of[rank, group]


def _inferred_members(dumps: Sequence[_Dump]) -> Mapping[str, tuple[int, ...]]:
    """Of groups that are recorded without members: everybody for the default group, else who has entries of them."""
    users: dict[str, set[int]] = defaultdict(set)
    everybody = {dump.rank for dump in dumps}
    for dump in dumps:
        for name, (label, ranks) in dump.groups.items():
            users[name] |= {dump.rank}
            everybody |= set(ranks)
            if label == _DEFAULT_GROUP:
                users[name] |= everybody
        for group, label in {(entry.group, entry.label) for entry in dump.entries}:
            users[group] |= everybody if label == _DEFAULT_GROUP else {dump.rank}
    return {name: tuple(sorted(ranks)) for name, ranks in users.items()}


def _numbers(dump: _Dump) -> dict[str, str]:
    """Name of each group by its number in the process: as the entries say; of others by order, since both numbers and
    numeric names are given in the order of creation."""
    told = {entry.pg_id: entry.group for entry in dump.entries}
    if len(dump.groups) != len(dump.status) or not all(map(str.isdecimal, [*dump.groups, *dump.status])):
        return told
    paired = dict(zip(sorted(dump.status, key=int), sorted(dump.groups, key=int), strict=True))
    return paired if all(paired.get(pg_id) == name for pg_id, name in told.items()) else told


def _miscounted(dump: _Dump) -> Iterable[str]:
    """Groups whose status is not that of their collectives."""
    highest: dict[str, int] = {}
    for entry in dump.entries:
        if not entry.is_p2p:
            highest[entry.pg_id] = max(entry.seq, highest.get(entry.pg_id, 0))
    numbers = _numbers(dump)
    for pg_id, (enqueued, completed) in dump.status.items():
        if pg_id in numbers and (completed > enqueued or highest.get(pg_id, enqueued) != enqueued):
            yield numbers[pg_id]


# --- states -------------------------------------------------------------------------------------------------------
def _state(dump: _Dump, groups: _Groups, latest_ns: int) -> RankState:
    buckets: dict[tuple[str, bool, int], list[_Entry]] = defaultdict(list)
    for entry in dump.entries:
        buckets[groups.id(dump.rank, entry.group), entry.is_p2p, entry.seq].append(entry)
    pending: list[Pending] = []
    signatures: dict[tuple[str, int], tuple[Op, int]] = {}
    for (group, is_p2p, seq), entries in buckets.items():
        members = groups.communicators[group].members
        operations = [_pending(group, members, part, latest_ns) for part in (entries if is_p2p else [_joined(entries)])]
        if _are_pending(entries, is_p2p and group in groups.coalescing):
            pending += [operation for operation in operations if operation.op in POINT_TO_POINT or not is_p2p]
        if not is_p2p:
            signatures[group, seq] = operations[0].op, operations[0].size_bytes
    counts = _counts(dump, groups, pending)
    return RankState(dump.rank, counts=counts, pending=tuple(pending), signatures=signatures)


def _joined(entries: Sequence[_Entry]) -> _Entry:
    """Parts that were coalesced into one operation share its number."""
    first = entries[0]
    if len(entries) == 1:
        return first
    total = sum(entry.size_bytes for entry in entries)
    return _Entry(**{name: getattr(first, name) for name in first.__slots__} | {"size_bytes": total})


def _are_pending(entries: Sequence[_Entry], is_coalescing: bool) -> bool:
    """Parts of a coalesced operation are never marked as done: only the entry of the whole tells, and where that is
    gone, the whole has ended."""
    whole = [entry for entry in entries if entry.name.endswith(_COALESCED)]
    return any(entry.is_pending for entry in whole or ([] if is_coalescing else entries))


def _pending(group: str, members: Sequence[int], entry: _Entry, latest_ns: int) -> Pending:
    place = _PEER.search(entry.name)
    peer = int(place[2]) if place and entry.is_p2p else -1
    return Pending(
        communicator=group,
        seq=entry.seq,
        op=entry.op,
        size_bytes=entry.size_bytes,
        peer=members[peer] if 0 <= peer < len(members) else -1,
        for_s=(latest_ns - entry.created_ns) / 1e9,
        where=entry.where,
    )


def _counts(dump: _Dump, groups: _Groups, pending: Sequence[Pending]) -> dict[str, Count]:
    """Of each group whose collectives can be counted."""
    entered: dict[str, int] = {}
    for entry in dump.entries:
        own = groups.id(dump.rank, entry.group)
        entered[own] = max(entry.collectives, entered.get(own, 0))
    counts = {own: Count(seq, seq) for own, seq in entered.items()}
    for pg_id, name in _numbers(dump).items():
        own = groups.id(dump.rank, name)
        if own not in groups.with_p2p and pg_id in dump.status:
            enqueued, completed = dump.status[pg_id]
            counts[own] = Count(max(enqueued, entered.get(own, 0), 0), max(completed, 0))
    for operation in pending:
        if operation.op not in POINT_TO_POINT:
            count = counts[operation.communicator]
            counts[operation.communicator] = Count(count.enqueued, min(count.completed, operation.seq - 1))
    return counts
