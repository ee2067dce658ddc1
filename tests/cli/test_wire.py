"""Values survive the wire."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ckptd.model import Incarnation, Roster, RosterEntry, ScheduleEntry, SnapshotId
from ckptd_api import convert as wire

u32, u64 = st.integers(0, (1 << 32) - 1), st.integers(0, (1 << 64) - 1)
incarnations = st.builds(Incarnation, u64, u64)
domains = st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3).map(lambda d: tuple(sorted(d.items())))
entries = st.builds(RosterEntry, u32, st.text(max_size=5), st.text(max_size=5), u64, domains, st.just("4+2"), u32, u64)
rosters = st.builds(Roster, u64, u64, u64, st.lists(entries, max_size=3).map(tuple))


@given(incarnations, u64)
def test_snapshots_and_incarnations_survive(incarnation: Incarnation, step: int) -> None:
    snapshot = SnapshotId(incarnation, step)
    assert wire.snapshot_from_pb(wire.snapshot_to_pb(snapshot)) == snapshot
    assert wire.incarnation_from_pb(wire.incarnation_to_pb(incarnation)) == incarnation


@given(rosters)
def test_rosters_survive_their_bytes(roster: Roster) -> None:
    message = wire.roster_to_pb(roster)
    assert wire.roster_from_pb(type(message).FromString(message.SerializeToString())) == roster


@given(st.builds(ScheduleEntry, u64, u64, u64))
def test_schedule_entries_survive(entry: ScheduleEntry) -> None:
    assert wire.schedule_entry_from_pb(wire.schedule_entry_to_pb(entry)) == entry
