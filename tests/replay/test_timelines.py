"""Public timelines: what they become, and what is found in them."""

from __future__ import annotations

import builtins
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from timeline_files import MICROBATCHES, SHARED, STEPS, timeline, write_layout, write_timeline

from ckptd.detect.positions import position
from ckptd.detect.records import Confidence, Kind
from ckptd.errors import Corrupt, InvalidRequest
from ckptd.format.timings import Mask
from ckptd.replay import timelines
from ckptd.replay.judging import judge_file, judge_timings
from ckptd.replay.timelines import read_timelines

DP, PP, TP = 4, 4, 2
needs_public_data = pytest.mark.skipif(not SHARED.is_dir(), reason="the public timelines are not on this machine")


def workers(dp: int = DP, pp: int = PP, inner: int = TP) -> list[tuple[int, int, int]]:
    """One for each stage and data-parallel index, in Megatron's order: the first of its tensor-parallel ranks."""
    return [((stage * dp + replica) * inner, stage, replica) for stage in range(pp) for replica in range(dp)]


class Case:
    """A timeline and its layout, as files."""

    def __init__(self, folder: Path, columns: Mapping[str, list], **sizes: int) -> None:
        self.path = write_timeline(folder / "trace.parquet", columns)
        named = {"dp_size": DP, "pp_size": PP, "tp_size": TP, **sizes}
        self.layout = write_layout(folder / "meta.yaml", **named)

    def read(self) -> Any:
        return read_timelines(self.path, self.layout)

    def confirmed(self) -> list[tuple[int, ...]]:
        found = judge_file(self.path, self.layout)
        return [fault.ranks for fault in found if fault.confidence is not Confidence.SUSPECT]


# --- the public ones ----------------------------------------------------------------------------------------------
@needs_public_data
def test_the_injected_slow_worker_is_named_and_nobody_else() -> None:
    found = judge_file(SHARED / "trace-AR.parquet", SHARED / "meta-AR.yaml")
    assert [(fault.kind, fault.ranks, fault.confidence) for fault in found] == [
        (Kind.SLOW_COMPUTE, (0,), Confidence.CONFIRMED)
    ]
    assert found[0].evidence["stands_for_ranks"] == [1, 2, 3]
    assert found[0].evidence["class"] == "slow device"


@needs_public_data
def test_the_named_worker_is_the_one_that_the_authors_of_the_data_found() -> None:
    result = json.loads((SHARED / "result-AR.json").read_text())
    worst = {
        axis: max(result[f"blocking_decompose_by_{axis}"].items(), key=lambda i: i[1])[0]
        for axis in ("dp_rank", "stage")
    }
    timings, layout = read_timelines(SHARED / "trace-AR.parquet", SHARED / "meta-AR.yaml")
    rank = judge_timings(timings, layout)[0].ranks[0]
    sizes = dict(layout.dims)
    assert int(worst["stage"]) == layout.stage[rank]
    assert int(worst["dp_rank"]) == rank // sizes["tp"] % sizes["dp"]


@needs_public_data
def test_unequal_stages_are_no_fault() -> None:
    assert judge_file(SHARED / "trace-ST.parquet", SHARED / "meta-ST.yaml") == []


@needs_public_data
@pytest.mark.parametrize("name", ["AR", "ST"])
def test_self_time_tells_the_slow_worker_apart_by_far_and_the_others_not_at_all(name: str) -> None:
    timings, layout = read_timelines(SHARED / f"trace-{name}.parquet", SHARED / f"meta-{name}.yaml")
    typical = {rank: float(np.median(rows["self_s"])) for rank, rows in timings.steps.items()}
    for rank, self_s in typical.items():
        peers = [typical[other] for other in typical if layout.program[other] == layout.program[rank]]
        ratio = self_s / float(np.median(peers))
        assert ratio > 2.0 if (name, rank) == ("AR", 0) else 0.98 < ratio < 1.02


# --- who is who ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("slow", [0, 6, 16, 30])
def test_a_slow_worker_of_any_stage_is_named(tmp_path: Path, slow: int) -> None:
    assert Case(tmp_path, timeline(workers(), {slow: 1.3})).confirmed() == [(slow,)]


def test_evidence_names_what_was_slow(tmp_path: Path) -> None:
    case = Case(tmp_path, timeline(workers(), {6: 1.3}))
    places = judge_file(case.path, case.layout)[0].evidence["worst_positions"]
    assert [place["name"] for place in places[:2]] == ["backward-compute", "forward-compute"]
    assert all(place["self_s"] > place["expected_s"] for place in places[:2])


def test_two_slow_workers_are_both_named(tmp_path: Path) -> None:
    found = Case(tmp_path, timeline(workers(), {4: 1.5, 26: 1.4})).confirmed()
    assert sorted(rank for ranks in found for rank in ranks) == [4, 26]


@pytest.mark.parametrize("seed", range(5))
def test_a_healthy_job_has_no_fault(tmp_path: Path, seed: int) -> None:
    case = Case(tmp_path, timeline(workers(), seed=seed))
    assert judge_file(case.path, case.layout) == []


@pytest.mark.parametrize(
    ("dp", "pp", "tp", "more"),
    [(8, 1, 1, {}), (4, 2, 8, {"vpp_size": 2}), (4, 2, 2, {"dsp_size": 2, "world_size": 32}), (5, 3, 1, {})],
    ids=["data only", "chunks", "sequence", "odd"],
)
def test_jobs_of_any_shape_are_read(tmp_path: Path, dp: int, pp: int, tp: int, more: dict[str, int]) -> None:
    inner = tp * more.get("dsp_size", 1)
    slow = inner * (dp + 1) if pp > 1 else 3
    case = Case(tmp_path, timeline(workers(dp, pp, inner), {slow: 1.4}), dp_size=dp, pp_size=pp, tp_size=tp, **more)
    timings, layout = case.read()
    assert timings.world_size == dp * pp * inner
    assert len(timings.steps) == dp * pp
    peers = {rank for rank in timings.steps if layout.program[rank] == layout.program[slow]}
    assert peers == {rank for rank, stage, _ in workers(dp, pp, inner) if stage == layout.stage[slow]}
    assert case.confirmed() == [(slow,)]


def test_ranks_in_another_order_have_the_peers_that_the_file_gives_them(tmp_path: Path) -> None:
    """Replica by replica, the stages of each together."""
    every = [((replica * PP + stage) * TP, stage, replica) for replica in range(DP) for stage in range(PP)]
    case = Case(tmp_path, timeline(every, {10: 1.4}))
    _, layout = case.read()
    assert layout.dims == (("dp", DP), ("pp", PP), ("tp", TP))
    assert case.confirmed() == [(10,)]


def test_ranks_without_any_order_have_peers_among_the_recorded_ones(tmp_path: Path) -> None:
    numbers = np.random.default_rng(2).permutation(DP * PP * TP)[: DP * PP].tolist()
    every = [(rank, stage, replica) for rank, (_, stage, replica) in zip(numbers, workers(), strict=True)]
    slow, stage, _ = every[5]
    case = Case(tmp_path, timeline(every, {slow: 1.4}))
    _, layout = case.read()
    same = {rank for rank in range(DP * PP * TP) if layout.program[rank] == layout.program[slow]}
    assert same == {rank for rank, other, _ in every if other == stage}
    assert case.confirmed() == [(slow,)]


def test_tensor_parallel_ranks_that_are_recorded_one_by_one_are_judged_one_by_one(tmp_path: Path) -> None:
    every = [(rank + inner, stage, replica) for rank, stage, replica in workers() for inner in range(TP)]
    case = Case(tmp_path, timeline(every, {9: 1.4}))
    timings, layout = case.read()
    assert sorted(timings.steps) == list(range(DP * PP * TP))
    assert layout.data[8] == layout.data[9] != layout.data[10]
    found = judge_file(case.path, case.layout)
    assert [fault.ranks for fault in found] == [(9,)]
    assert "stands_for_ranks" not in found[0].evidence


# --- steps --------------------------------------------------------------------------------------------------------
def one_worker(*operations: tuple[str, float, float]) -> dict[str, list]:
    count = len(operations)
    constant = {"rank": 0, "stage": 0, "dp_rank": 0, "step": 7}
    return {
        **{name: [value] * count for name, value in constant.items()},
        "optype": [name for name, _, _ in operations],
        "start_ts": [start for _, start, _ in operations],
        "duration": [end - start for _, start, end in operations],
    }


def test_self_time_is_computation_and_waits_go_by_kind(tmp_path: Path) -> None:
    columns = one_worker(
        ("params-all-gather", 1.0, 2.0),
        ("forward-recv", 2.0, 3.0),
        ("forward-compute", 2.5, 4.0),
        ("forward-compute", 3.5, 5.0),
        ("backward-send", 6.0, 6.5),
        ("loss-broadcast", 6.5, 6.75),
        ("optimizer-clip-main-grad", 7.0, 8.0),
        ("optimizer", 8.0, 9.0),
    )
    timings, _ = Case(tmp_path, columns, dp_size=1, pp_size=1, tp_size=1).read()
    (row,) = timings.steps[0]
    assert (row["step"], row["length_s"], row["self_s"]) == (7, 8.0, 3.5)
    assert row["waits_s"].tolist() == [2.0, 0.25, 1.5]
    assert row["gaps_s"][position("optimizer")] == pytest.approx(3.5 * 1 / 4)
    assert row["gaps_s"].sum() == pytest.approx(3.5)


def test_steps_that_a_worker_lacks_are_just_not_there(tmp_path: Path) -> None:
    columns = timeline(workers())
    kept = [
        i for i in range(len(columns["rank"])) if not (columns["rank"][i] == 6 and columns["step"][i] in STEPS[3:6])
    ]
    case = Case(tmp_path, {name: [values[i] for i in kept] for name, values in columns.items()})
    timings, _ = case.read()
    assert timings.steps[6]["step"].tolist() == [step for step in STEPS if step not in STEPS[3:6]]
    assert timings.steps[4]["step"].tolist() == list(STEPS)
    assert case.confirmed() == []


def test_a_step_that_is_cut_short_says_nothing(tmp_path: Path) -> None:
    columns = timeline(workers())
    cut = [
        i
        for i in range(len(columns["rank"]))
        if (columns["rank"][i], columns["step"][i], columns["optype"][i]) == (6, STEPS[2], "backward-compute")
    ]
    assert len(cut) == MICROBATCHES
    kept = sorted(set(range(len(columns["rank"]))) - {cut[0]})
    timings, _ = Case(tmp_path, {name: [values[i] for i in kept] for name, values in columns.items()}).read()
    masked = {rank: rows["step"][rows["mask"] != 0].tolist() for rank, rows in timings.steps.items()}
    assert masked == {rank: [STEPS[2]] if rank == 6 else [] for rank in timings.steps}
    assert (timings.steps[6]["mask"][2]) == Mask.INCOMPLETE


def test_a_time_that_is_none_makes_the_step_incomplete(tmp_path: Path) -> None:
    columns = timeline(workers())
    columns["duration"][0] = None
    timings, _ = Case(tmp_path, columns).read()
    assert timings.steps[0]["mask"].tolist() == [Mask.INCOMPLETE] + [0] * (len(STEPS) - 1)
    assert np.isfinite(timings.steps[0]["self_s"]).all()


def test_five_recorded_steps_are_enough_for_a_worker_that_is_slow_by_far(tmp_path: Path) -> None:
    assert Case(tmp_path, timeline(workers(), {6: 2.0}, STEPS[:5])).confirmed() == [(6,)]


# --- what a user can do wrong -------------------------------------------------------------------------------------
def test_a_layout_of_another_job_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, timeline(workers()), dp_size=2)
    with pytest.raises(InvalidRequest, match="16 ranks"):
        case.read()


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("dp_size: [1, 2]\n", "not a whole number"),
        ("dp_size: 0\n", "not a whole number"),
        ("name: x\n", "names no sizes"),
        ("- 1\n", "names no sizes"),
        ("{", "cannot be read"),
        ("dp_size: 4\ntp_size: 2\nworld_size: 9\n", "is not world_size 9"),
        ("!!python/object/apply:os.getcwd []\n", "cannot be read"),
    ],
)
def test_a_layout_that_is_none_is_refused(tmp_path: Path, text: str, what: str) -> None:
    case = Case(tmp_path, timeline(workers(), steps=STEPS[:1]))
    case.layout.write_text(text)
    with pytest.raises(InvalidRequest, match=what):
        case.read()


def test_a_file_that_is_not_there_and_one_without_a_column_are_refused(tmp_path: Path) -> None:
    columns = timeline(workers(), steps=STEPS[:1])
    case = Case(tmp_path, {name: values for name, values in columns.items() if name != "stage"})
    with pytest.raises(InvalidRequest, match="no column stage"):
        case.read()
    with pytest.raises(InvalidRequest, match="not a file"):
        read_timelines(tmp_path / "other.parquet", case.layout)


def test_a_timeline_without_operations_is_refused(tmp_path: Path) -> None:
    case = Case(tmp_path, {name: values[:0] for name, values in timeline(workers(), steps=STEPS[:1]).items()})
    with pytest.raises(InvalidRequest, match="no operations"):
        case.read()


@pytest.mark.parametrize("keep", [0, 10, 0.5, 0.99])
def test_a_damaged_file_is_named(tmp_path: Path, keep: float) -> None:
    case = Case(tmp_path, timeline(workers(), steps=STEPS[:1]))
    data = case.path.read_bytes()
    case.path.write_bytes(data[: int(keep if keep >= 1 else keep * len(data))])
    with pytest.raises(Corrupt, match=r"trace\.parquet"):
        case.read()


def test_without_pyarrow_it_is_said_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case(tmp_path, timeline(workers(), steps=STEPS[:1]))
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(InvalidRequest) as caught:
        case.read()
    assert caught.value.hint == 'pip install "ckptd[replay]"'


@pytest.mark.parametrize("name", ["MOST_STEPS", "MOST_EVENTS"])
def test_a_timeline_of_more_than_can_be_judged_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    path = write_timeline(tmp_path / "t.parquet", timeline([(0, 0, 0), (1, 0, 1)]))
    layout = write_layout(tmp_path / "m.yaml", dp_size=2, pp_size=1, tp_size=1)
    monkeypatch.setattr(timelines, name, 2 * len(STEPS) - 1)
    with pytest.raises(InvalidRequest, match=r"t\.parquet has"):
        read_timelines(path, layout)
    monkeypatch.setattr(timelines, name, 10**6)
    assert len(read_timelines(path, layout)[0].steps) == 2


def test_operations_with_endless_names_are_refused(tmp_path: Path) -> None:
    columns = timeline([(0, 0, 0), (1, 0, 1)])
    columns["optype"][5] = "x" * 10**6
    path = write_timeline(tmp_path / "t.parquet", columns)
    layout = write_layout(tmp_path / "m.yaml", dp_size=2, pp_size=1, tp_size=1)
    with pytest.raises(Corrupt, match="no name of up to"):
        read_timelines(path, layout)
