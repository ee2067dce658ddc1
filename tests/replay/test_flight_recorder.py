"""Flight Recorder dumps: what is read of them, what is refused, and that the injected ranks are found."""

from __future__ import annotations

import pickle
import re
import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptd.detect.hang import POST_MORTEM, judge_hang
from ckptd.detect.records import Count, Fault, Pending
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.timings import Op
from ckptd.replay.flight_recorder import read_dumps
from tests.detect.stalled_job import Job
from tests.replay.dump_files import dump, entry, write, write_job

PUBLIC = Path(__file__).parents[2].parent / "shared" / "data" / "fr_dumps"
PAIR = {"0": [0, 1]}


def judged(folder: Path) -> list[Fault]:
    return judge_hang(*read_dumps(folder), POST_MORTEM)


def named(folder: Path) -> set[int]:
    return {rank for fault in judged(folder) for rank in fault.ranks}


def two(folder: Path, *entries: dict[str, object], status: tuple[int, int] = (5, 4)) -> None:
    write(folder, "_dump_0", dump(list(entries), PAIR, {"0": status}))
    write(folder, "_dump_1", dump([], PAIR, {"0": (4, 4)}))


# --- public dumps -------------------------------------------------------------------------------------------------
def public_cases() -> list[Path]:
    return sorted(PUBLIC.iterdir()) if PUBLIC.is_dir() else []


@pytest.mark.skipif(not public_cases(), reason="the public dumps are not beside this repository")
@pytest.mark.parametrize("folder", public_cases(), ids=lambda folder: folder.name)
def test_in_public_dumps_exactly_the_injected_ranks_are_named(folder: Path) -> None:
    injected = re.search(r"Fault ranks: \[(.*)\]", (folder / "fault_injection.log").read_text())
    assert injected is not None
    assert named(folder) == {int(rank) for rank in injected[1].split(",")}


@pytest.mark.skipif(not public_cases(), reason="the public dumps are not beside this repository")
def test_in_public_dumps_a_rank_with_the_most_operations_open_is_at_fault() -> None:
    states, _ = read_dumps(PUBLIC / "gpu_error_1st")
    assert max(states, key=lambda state: len(state.pending)).rank == 14


# --- synthetic dumps ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 1, 4), (4, 1, 1), (3, 2, 1), (2, 3, 2)])
@pytest.mark.parametrize("roots", [{0: 4}, {1: 4, 2: 4}, {0: 6, 1: 6, 3: 6}])
def test_hosts_that_stopped_are_named(tmp_path: Path, layout: tuple[int, int, int], roots: dict[int, int]) -> None:
    job = Job(*layout, stops={rank: at for rank, at in roots.items() if rank < layout[0] * layout[1] * layout[2]})
    assert job.waited_for()
    write_job(tmp_path, job)
    assert named(tmp_path) == {rank for rank in job.waited_for() if not job.open_calls(rank)}


@pytest.mark.parametrize("layout", [(2, 2, 2), (1, 1, 4), (4, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("roots", [(2,), (0, 3), (1, 2, 3)])
def test_devices_that_failed_are_named(tmp_path: Path, layout: tuple[int, int, int], roots: tuple[int, ...]) -> None:
    job = Job(*layout, ahead=3, stops=dict.fromkeys(roots, 9))
    write_job(tmp_path, job, stuck=dict.fromkeys(roots, 4))
    faults = judged(tmp_path)
    assert {rank for fault in faults for rank in fault.ranks} == set(roots)
    assert {fault.evidence["reason"] for fault in faults} == {"stuck"}


@settings(max_examples=40)
@given(
    layout=st.sampled_from([(1, 1, 2), (4, 1, 2), (1, 4, 1), (2, 2, 2), (2, 3, 2)]),
    root=st.integers(0, 11),
    at=st.integers(0, 12),
    ahead=st.integers(1, 4),
    as_json=st.booleans(),
)
def test_one_stopped_host_is_named_wherever_it_stops(
    tmp_path_factory: pytest.TempPathFactory,
    layout: tuple[int, int, int],
    root: int,
    at: int,
    ahead: int,
    as_json: bool,
) -> None:
    root %= layout[0] * layout[1] * layout[2]
    job = Job(*layout, ahead=ahead, stops={root: at})
    folder = tmp_path_factory.mktemp("dumps")
    write_job(folder, job, as_json=as_json)
    assert named(folder) == ({root} if job.waited_for() else set())


def test_ranks_without_a_dump_are_told_as_never_heard_of(tmp_path: Path) -> None:
    write_job(tmp_path, Job(stops={1: 4, 6: 4}), without=(1, 6))
    (fault,) = judged(tmp_path)
    assert (fault.ranks, fault.evidence["reason"]) == ((1, 6), "unheard")
    assert "dead, stopped, or never started" in fault.evidence["summary"]


def test_a_lost_dump_of_a_victim_accuses_nobody_else_than_the_root(tmp_path: Path) -> None:
    write_job(tmp_path, Job(stops={1: 4}), without=(7,))
    (fault,) = judged(tmp_path)
    assert fault.ranks == (1,)
    assert fault.evidence["unheard"] == {"ranks": [7], "ranks_total": 1}


def test_a_stopped_host_that_was_a_little_ahead_of_another_is_told_from_its_peers(tmp_path: Path) -> None:
    job = Job(1, 1, 4, ahead=3, stops={1: 8, 3: 9})
    assert [len(job.open_calls(rank)) for rank in range(4)] == [3, 0, 3, 1]
    write_job(tmp_path, job)
    assert named(tmp_path) == {1, 3}


@pytest.mark.parametrize("prefix", ["_dump_", "nccl_trace_rank_", "comm_lib_trace_rank_", "my-own-"])
def test_files_may_have_any_one_prefix(tmp_path: Path, prefix: str) -> None:
    write_job(tmp_path, Job(stops={3: 4}), prefix=prefix)
    (tmp_path / "fault_injection.log").write_text("Fault ranks: [3]")
    assert named(tmp_path) == {3}


def test_the_usual_names_win_over_other_files_that_end_in_a_number(tmp_path: Path) -> None:
    write_job(tmp_path, Job(stops={3: 4}))
    (tmp_path / "stderr.1").write_text("not a dump")
    assert named(tmp_path) == {3}


# --- what is read -------------------------------------------------------------------------------------------------
def test_an_entry_becomes_a_pending_operation(tmp_path: Path) -> None:
    frames = [
        {"name": "f", "filename": "/x/torch/d.py", "line": 1},
        {"name": "g", "filename": "/x/train.py", "line": 7},
    ]
    two(tmp_path, entry(frames=frames), entry(time_created_ns=3_000_000_000, collective_seq_id=6), status=(6, 4))
    states, communicators = read_dumps(tmp_path)
    assert states[0].pending[0] == Pending("0", 5, Op.ALL_REDUCE, 64, -1, 2.0, "/x/train.py:7")
    assert states[0].counts == {"0": Count(6, 4)}
    assert states[1].counts == {"0": Count(4, 4)}
    assert states[0].signatures["0", 5] == (Op.ALL_REDUCE, 64)
    assert (communicators["0"].members, communicators["0"].label) == ((0, 1), "default_pg")


@pytest.mark.parametrize("done", [{"state": "completed"}, {"retired": True}])
def test_what_completed_or_retired_does_not_pend(tmp_path: Path, done: dict[str, object]) -> None:
    two(tmp_path, entry(**done), status=(5, 5))
    states, _ = read_dumps(tmp_path)
    assert states[0].pending == ()
    assert states[0].signatures == {("0", 5): (Op.ALL_REDUCE, 64)}


def test_peers_are_global_ranks(tmp_path: Path) -> None:
    groups = {"0": list(range(8)), "7": [3, 5, 1]}
    sent = entry(pg_id=1, process_group=("7", "PIPE"), profiling_name="nccl:send 1->2", is_p2p=True, p2p_seq_id=9)
    write(tmp_path, "_dump_5", dump([sent], groups, {"0": (1, 1), "1": (9, 8)}))
    states, _ = read_dumps(tmp_path)
    assert [(p.op, p.peer, p.seq) for p in states[0].pending] == [(Op.SEND, 1, 9)]


@pytest.mark.parametrize(
    ("name", "op"),
    [
        ("nccl:_all_gather_base", Op.ALL_GATHER),
        ("nccl:all_gather_into_tensor_coalesced", Op.ALL_GATHER),
        ("nccl:_reduce_scatter_base", Op.REDUCE_SCATTER),
        ("nccl:all_reduce_barrier", Op.BARRIER),
        ("nccl:all_to_all", Op.ALL_TO_ALL),
        ("nccl:_broadcast_oop", Op.BROADCAST),
        ("nccl:_reduce_oop", Op.REDUCE),
        ("nccl:gather", Op.GATHER),
        ("nccl:scatter", Op.SCATTER),
        ("gloo:all_reduce", Op.ALL_REDUCE),
        ("nccl:new_thing", Op.OTHER),
    ],
)
def test_profiling_names_are_operations(tmp_path: Path, name: str, op: Op) -> None:
    two(tmp_path, entry(profiling_name=name))
    states, _ = read_dumps(tmp_path)
    assert states[0].pending[0].op is op


def test_counters_shared_with_point_to_point_are_not_believed(tmp_path: Path) -> None:
    groups = {"0": [0, 1, 2]}
    waiting = entry(collective_seq_id=5)
    send = entry(profiling_name="nccl:send 0->1", is_p2p=True, p2p_seq_id=900)
    write(tmp_path, "_dump_0", dump([send, waiting], groups, {"0": (5, 899)}))
    write(tmp_path, "_dump_1", dump([], groups, {"0": (901, 901)}))  # of point-to-point, far beyond 5
    write(tmp_path, "_dump_2", dump([waiting], groups, {"0": (5, 4)}))
    states, _ = read_dumps(tmp_path)
    assert [state.counts for state in states] == [{"0": Count(5, 4)}, {}, {"0": Count(5, 4)}]
    assert named(tmp_path) == {1}


def test_one_name_for_different_groups_gives_different_communicators(tmp_path: Path) -> None:
    for rank in range(4):
        mine = [0, 1] if rank < 2 else [2, 3]
        own = [entry(pg_id=1, process_group=("9", "TENSOR"))] if rank in (0, 2, 3) else []
        write(tmp_path, f"_dump_{rank}", dump(own, {"9": mine}, {"1": (5 if own else 4, 4)}))
    _, communicators = read_dumps(tmp_path)
    assert {group.members for group in communicators.values()} == {(0, 1), (2, 3)}
    assert 1 in named(tmp_path)


def test_a_group_without_recorded_members_has_those_who_used_it(tmp_path: Path) -> None:
    for rank in range(3):
        write(tmp_path, f"_dump_{rank}", dump([entry(process_group=("mesh_tp", ""))] if rank else [], {"0": []}, {}))
    _, communicators = read_dumps(tmp_path)
    assert communicators["mesh_tp"].members == (1, 2)
    assert communicators["0"].members == (0, 1, 2)


def test_the_json_form_of_gloo_is_read(tmp_path: Path) -> None:
    for rank in range(3):
        counted = {"last_enqueued_collective": "4", "last_started_collective": "-1", "last_completed_collective": "3"}
        own = [entry(process_group=["0", "default_pg"], collective_seq_id=4, profiling_name="gloo:all_reduce")]
        if rank == 2:
            counted["last_enqueued_collective"] = "3"
            own = [entry(process_group=["7", "undefined"], pg_id=1, collective_seq_id=1, retired=True)]
        value = {
            "version": "2.10",
            "comm_lib_version": "",
            "pg_config": {"": {"desc": "", "name": "", "ranks": "[]"}},
            "pg_status": {"0": counted},
            "entries": own,
        }
        write(tmp_path, f"nccl_trace_rank_{rank}.json", value, as_json=True)
    _, communicators = read_dumps(tmp_path)
    assert {(group.id, group.members, group.label) for group in communicators.values()} == {
        ("0", (0, 1, 2), "default_pg"),
        ("7", (2,), ""),
    }
    assert named(tmp_path) == {2}


def test_parts_of_a_coalesced_operation_pend_only_while_the_whole_does(tmp_path: Path) -> None:
    def part(peer: int, seq: int) -> dict[str, object]:
        return entry(profiling_name=f"nccl:recv 0<-{peer}", is_p2p=True, p2p_seq_id=seq)

    whole = entry(profiling_name="nccl:coalesced", is_p2p=True, p2p_seq_id=8)
    groups = {"0": [0, 1, 2]}
    write(tmp_path, "_dump_0", dump([part(1, 7), part(2, 7), part(1, 8), whole], groups, {}))
    states, _ = read_dumps(tmp_path)
    assert [(p.op, p.peer, p.seq) for p in states[0].pending] == [(Op.RECV, 1, 8)]


def test_coalesced_collectives_are_one_operation(tmp_path: Path) -> None:
    two(tmp_path, entry(), entry(input_sizes=[[100]], input_dtypes=["Float"]))
    states, _ = read_dumps(tmp_path)
    assert [(p.seq, p.size_bytes) for p in states[0].pending] == [(5, 464)]


def test_older_entries_without_the_later_fields_are_read(tmp_path: Path) -> None:
    old = entry(seq_id=5)
    for missing in ("collective_seq_id", "p2p_seq_id", "is_p2p", "retired", "input_dtypes", "timeout_ms"):
        del old[missing]
    value = dump([old], PAIR, {})
    del value["pg_status"]
    write(tmp_path, "_dump_0", value)
    states, _ = read_dumps(tmp_path)
    assert [(p.seq, p.op) for p in states[0].pending] == [(5, Op.ALL_REDUCE)]


# --- what is refused ----------------------------------------------------------------------------------------------
class Exploit:
    def __init__(self, target: str) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (Path(self.target),)


def test_nothing_of_a_pickle_is_run(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    (tmp_path / "_dump_0").write_bytes(pickle.dumps({"entries": [Exploit(str(target))]}))
    with pytest.raises(Corrupt, match=r"_dump_0.*only plain values"):
        read_dumps(tmp_path)
    assert not target.exists()


@pytest.mark.parametrize("value", [{"pg_config": {1, 2}}, {"entries": b"bytes"}, Path("x"), 1j])
def test_a_pickle_of_more_than_plain_values_is_refused(tmp_path: Path, value: object) -> None:
    (tmp_path / "_dump_0").write_bytes(pickle.dumps(value))
    with pytest.raises(Corrupt, match="_dump_0"):
        read_dumps(tmp_path)


def test_every_truncation_of_a_dump_is_refused_by_name(tmp_path: Path) -> None:
    whole = pickle.dumps(dump([entry()], PAIR, {"0": (5, 4)}), protocol=2)
    for size in range(0, len(whole), 7):
        (tmp_path / "_dump_0").write_bytes(whole[:size])
        with pytest.raises(Corrupt, match="_dump_0"):
            read_dumps(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"entries": []}', '{"pg_config": {}, "entries": [{}]}', '{"pg_config": 3, "entries": []}']
)
def test_json_of_another_form_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "nccl_trace_rank_4.json").write_text(text)
    with pytest.raises(Corrupt, match="nccl_trace_rank_4"):
        read_dumps(tmp_path)


def test_a_folder_must_be_one_and_hold_the_dumps_of_one_hang(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="not a folder"):
        read_dumps(tmp_path / "missing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(InvalidRequest, match="no Flight Recorder dumps"):
        read_dumps(tmp_path)
    two(tmp_path, entry())
    write(tmp_path, "old_dump_0", dump([], PAIR, {}))
    with pytest.raises(InvalidRequest, match="several names: _dump_, old_dump_"):
        read_dumps(tmp_path)
    (tmp_path / "old_dump_0").rename(tmp_path / "_dump_0.json")
    with pytest.raises(InvalidRequest, match="two dumps of rank 0"):
        read_dumps(tmp_path)


# --- files that ask for more than they hold ---------------------------------------------------------------------------
def shared_lists(depth: int) -> list[object]:
    """Few bytes as a pickle, 2**depth values when written out."""
    value: list[object] = []
    for _ in range(depth):
        value = [value, value]
    return value


def itself() -> list[object]:
    value: list[object] = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "changed",
    [
        {"profiling_name": shared_lists(200)},
        {"process_group": (shared_lists(200), "")},
        {"pg_id": shared_lists(200)},
        {"pg_id": itself()},
        {"frames": [{"filename": shared_lists(200), "line": 1}]},
        {"frames": [{"filename": "x" * 10**6, "line": 1}] * 1000},
        {"input_sizes": [["a", 10**10]]},
        {"input_sizes": [[10**18] * 64]},
        {"input_sizes": [[2] * 10**6]},
        {"input_sizes": ["a" * 100]},
        {"input_sizes": [[-1, 4]]},
        {"input_sizes": [[1.5]]},
        {"input_dtypes": [shared_lists(3)]},
        {"collective_seq_id": 1 << 100},
        {"collective_seq_id": [1]},
        {"time_created_ns": None},
        {"state": shared_lists(2)},
        {"process_group": "ab" * 40},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_field_that_is_not_of_its_type_is_refused_by_name(tmp_path: Path, changed: dict[str, object]) -> None:
    two(tmp_path, entry(**changed))
    with pytest.raises(Corrupt, match="_dump_0"):
        read_dumps(tmp_path)


@pytest.mark.parametrize(
    "ranks",
    [["0", [1]], [1 << 20], [-1], "[" * 5000, {"a": 1}, shared_lists(60), "[" + "9" * 5000 + "]"],
    ids=list(map(str, range(7))),
)
def test_members_that_are_no_ranks_are_refused_by_name(tmp_path: Path, ranks: object) -> None:
    value = dump([], PAIR, {"0": (1, 1)})
    value["pg_config"]["0"]["ranks"] = ranks
    write(tmp_path, "_dump_0", value)
    with pytest.raises(Corrupt, match="_dump_0"):
        read_dumps(tmp_path)


def test_a_pickle_that_says_it_remembers_much_takes_no_memory(tmp_path: Path) -> None:
    (tmp_path / "_dump_0").write_bytes(b"\x80\x02}r" + (2**31 - 1).to_bytes(4, "little") + b".")
    tracemalloc.start()
    try:
        with pytest.raises(Corrupt, match="_dump_0"):
            read_dumps(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 10 << 20
    finally:
        tracemalloc.stop()


def test_many_entries_that_are_one_are_refused_by_name(tmp_path: Path) -> None:
    two(tmp_path, *[entry()] * (1 << 18))
    with pytest.raises(Corrupt, match="_dump_0"):
        read_dumps(tmp_path)


def test_a_file_that_is_far_too_large_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "_dump_0").open("wb") as file:
        file.truncate(10 << 30)
    with pytest.raises(Corrupt, match="_dump_0 has 10737418240 bytes"):
        read_dumps(tmp_path)


def test_a_rank_beyond_all_jobs_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, "_dump_999999999", dump([], PAIR, {"0": (1, 1)}))
    with pytest.raises(InvalidRequest, match="rank 999999999"):
        read_dumps(tmp_path)
