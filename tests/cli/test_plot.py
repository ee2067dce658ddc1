"""``ckptd faults --plot``: a picture that names what is wrong, whole or not at all, and says why when there is none."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_daemon import FakeDaemon, FakeOperator
from PIL import Image

from ckptd.cli import plot
from ckptd.cli.main import run
from ckptd.cli.plot import caption_of, draw, render, title_of
from ckptd.cli.plot_waits import REASONS
from ckptd.detect.hang_report import Reason
from ckptd.detect.layout import Layout
from ckptd.detect.records import Communicator, Count, Pending, RankState, Timings
from ckptd.errors import UnknownRun
from ckptd.format.timings import POSITIONS, SELF, Mask, Op, Rows
from ckptd.replay.judging import examine_recording
from ckptd.replay.recording import Recording, write_recording
from ckptd_api.v1 import faults_pb2, operator_pb2

SEED = 5
PNG = b"\x89PNG\r\n"


def steps_of(self_s: Any, masked: Sequence[int] = ()) -> dict[int, Rows]:
    """SELF rows by rank of seconds, ranks x steps."""
    steps = {}
    for rank, seconds in enumerate(self_s):
        rows = np.zeros(len(seconds), SELF)
        rows["step"] = np.arange(len(seconds))
        rows["length_s"], rows["self_s"] = 2.0, seconds
        rows["gaps_s"] = seconds[:, None] / POSITIONS
        rows["mask"][list(masked)] = Mask.CHECKPOINT
        steps[rank] = rows
    return steps


def nodes_of(ranks: int) -> tuple[str, ...]:
    return tuple(f"n{rank // 8}" for rank in range(ranks))


def slow_rank(ranks: int, slow: int | None, masked: Sequence[int] = ()) -> Recording:
    self_s = np.random.default_rng(SEED).normal(1.0, 0.01, (ranks, 60))
    if slow is not None:
        self_s[slow, 20:] *= 1.3
    timings = Timings(ranks, nodes_of(ranks), steps_of(self_s, masked))
    return Recording(timings, Layout.from_sizes(ranks, 1, 1), run="gpt", incarnation="2-00ab")


def hang(ranks: int, absent: int) -> Recording:
    """All but one wait for it in an operation of the world."""
    world = Communicator("w0", tuple(range(ranks)), "world")
    pending = (Pending("w0", 41, Op.ALL_REDUCE, 1 << 20, for_s=60.0),)
    states = [RankState(rank, nodes_of(ranks)[rank], {"w0": Count(41, 40)}, pending, step=9) for rank in range(ranks)]
    states[absent] = RankState(
        absent, nodes_of(ranks)[absent], {"w0": Count(40, 40)}, step=9, stack="train.py:3 main\ndata.py:7 next_batch"
    )
    return Recording(Timings(ranks, nodes_of(ranks)), None, tuple(states), {"w0": world}, "gpt")


def document_of(recording: Recording) -> dict[str, Any]:
    from ckptd.detect.pictures import pictures

    return pictures(examine_recording(recording).scene, recording.run, recording.incarnation)


def links(places: int, slow: tuple[int, int]) -> dict[str, Any]:
    from ckptd.detect.links import Layer, link_matrix
    from ckptd.detect.pictures import picture_of_links

    src, dst = np.nonzero(~np.eye(places, dtype=bool))
    values = np.where((src == slow[0]) & (dst == slow[1]), 4e-3, 1e-3)
    return picture_of_links(
        link_matrix(Layer("transfer", "s", tuple(f"n{at}" for at in range(places)), src, dst, values))
    )


def texts(document: dict[str, Any]) -> list[str]:
    """All that can be read in a picture."""
    import matplotlib.text

    figure = draw(document)
    figure.canvas.draw()  # ticks are made when they are drawn
    return [str(each.get_text()) for each in figure.findobj(matplotlib.text.Text) if each.get_text()]


def size_of(png: bytes) -> tuple[int, int]:
    assert png.startswith(PNG)
    with Image.open(BytesIO(png)) as image:
        image.load()
        return image.size


# --- what is in a picture -----------------------------------------------------------------------------------------
def test_a_slow_rank_of_eight_is_named_with_what_it_is_compared_with() -> None:
    document = document_of(slow_rank(8, 5, masked=[30]))
    read = texts(document)
    assert title_of(document) == "gpt (2-00ab), 8 ranks on 1 node"
    assert title_of(document) in read
    assert {f"rank {rank}  n0" for rank in range(8)} <= set(read)
    assert title_of(document | {"run": "", "incarnation": "", "nodes_total": 0}) == "recording, 8 ranks"
    assert any("slow_compute (confirmed), rank 5, since step" in text for text in read)
    assert any("% above the median of ranks that run the same program" in text for text in read)
    assert any("steps 0 to 59" in text and "masked on most ranks (checkpoint)" in text for text in read)


@pytest.mark.parametrize("ranks", [1024, 2048])
def test_a_slow_rank_of_thousands_is_named_and_marked(ranks: int) -> None:
    document = document_of(slow_rank(ranks, 517))
    read = texts(document)
    assert "rank 517  n64" in read
    assert "\u25c4 517" in read
    assert any(f"the same of all {ranks:,} ranks" in text for text in read)
    width, height = size_of(render(document))
    assert width < 2000
    assert height < 2000


def test_a_line_of_a_thousand_ranks_shows_the_slow_one_in_its_colour() -> None:
    """Not only its name: its row must not be lost where four rows are one line of pixels."""
    slow, healthy = (np.asarray(_last_image(document_of(slow_rank(1024, rank)))) for rank in (517, None))
    assert slow.shape == healthy.shape == (256, 60)
    assert (slow[517 // 4, 20:] > 20).all()
    assert healthy.max() < 20


def _last_image(document: dict[str, Any]) -> Any:
    return [axes.get_images()[0].get_array() for axes in draw(document).axes if axes.get_images()][-1]


def test_a_hang_shows_the_root_where_it_is_and_who_waits_for_it() -> None:
    read = texts(document_of(hang(8, 3)))
    assert {"rank 3", "7 ranks: 0, 1, 2, 4, 5, 6, \u2026", "n0, in step 10", "world"} <= set(read)
    assert {REASONS["absent"], "in all_reduce 41 of world, 60 s", "data.py:7 next_batch"} <= set(read)


def test_of_a_label_what_all_labels_have_in_common_is_left_out() -> None:
    document = document_of(hang(8, 3))
    document["waits"]["edges"][0]["label"] = "PIPELINE_MODEL_PARALLEL_GROUP"
    assert "PIPELINE" in texts(document)
    document["waits"]["edges"][0]["label"] = "MODEL_PARALLEL_GROUP"
    assert "MODEL_PAR\u2026" in texts(document)


def test_a_hang_of_a_thousand_ranks_is_a_small_picture() -> None:
    _, height = size_of(render(document_of(hang(1024, 517))))
    assert height < 500


def test_every_reason_of_a_hang_has_words() -> None:
    assert {reason.value for reason in Reason} <= REASONS.keys()


@pytest.mark.parametrize("places", [2, 6, 100])
def test_a_slow_link_is_among_the_places_drawn(places: int) -> None:
    src, dst = places - 1, 0
    document = document_of(slow_rank(8, None)) | {"links": [links(places, (src, dst))]}
    read = texts(document)
    assert {f"n{src}", f"n{dst}"} <= set(read)
    size_of(render(document))


def test_a_link_fault_is_drawn_first() -> None:
    fault = {"kind": "slow_link", "ranks": [], "ranks_total": 0, "nodes": ["n1", "n3"], "nodes_total": 2}
    fault |= {"confidence": "confirmed", "since_step": 4, "summary": "slow"}
    document = document_of(slow_rank(8, None)) | {"links": [links(6, (1, 3))]}
    assert draw(document).axes[0].get_ylabel() == ""
    named = document | {"faults": [fault], "faults_total": 1}
    assert draw(named).axes[0].get_ylabel() == "from"
    assert caption_of(named) == [("slow_link (confirmed), nodes n1, n3, since step 4: slow", True)]


def test_more_faults_than_can_be_read_are_counted() -> None:
    fault = document_of(slow_rank(8, 5))["faults"][0]
    caption = caption_of({"faults": [fault] * 32, "faults_total": 40})
    assert caption[-1] == ("and 35 more: `ckptd faults` lists them", False)
    assert sum(line.startswith("slow_compute") for line, _ in caption) == 5


def test_names_that_look_like_formulas_are_shown_as_they_are() -> None:
    document = document_of(slow_rank(8, 5)) | {"run": "a$b_{c}$ \\frac"}
    assert title_of(document) in texts(document)
    size_of(render(document))


def test_a_healthy_job_has_a_picture_that_says_so() -> None:
    document = document_of(slow_rank(8, None))
    assert "no faults" in texts(document)


# --- the verb, live -----------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def _fault_verbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake daemon answers these too."""
    for method in ("ListFaults", "GetPictures"):

        def answer(self: Any, request: Any, context: Any, method: str = method) -> Any:
            return self._answer(method, request, context)

        monkeypatch.setattr(FakeOperator, method, answer)


@pytest.fixture
def live(_fault_verbs: None, daemon: FakeDaemon) -> FakeDaemon:
    row = faults_pb2.FaultRow(run="gpt", kind="slow_compute", ranks=[5], confidence="confirmed", since_step=20)
    daemon.operator.answers["ListFaults"] = operator_pb2.ListFaultsResponse(faults=[row])
    data = json.dumps(document_of(slow_rank(8, 5))).encode()
    daemon.operator.answers["GetPictures"] = operator_pb2.GetPicturesResponse(pictures=data, analyst="n0")
    return daemon


def test_the_picture_is_written_and_the_faults_are_shown_as_without(
    live: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "gpt.png"
    assert run(["faults", "gpt", "--json", "--socket", str(live.socket)]) == 0
    plain = capsys.readouterr().out
    assert run(["faults", "gpt", "--json", "--plot", str(file), "--socket", str(live.socket)]) == 0
    told = capsys.readouterr()
    assert told.out == plain
    assert json.loads(told.out)["faults"][0]["ranks"] == [5]
    assert str(file) in told.err
    size_of(file.read_bytes())
    assert [request.run for request in live.operator.requests] == ["gpt"] * 3
    assert os.listdir(tmp_path) == ["gpt.png"]


def test_a_json_file_holds_the_data(live: FakeDaemon, tmp_path: Path) -> None:
    file = tmp_path / "gpt.json"
    assert run(["faults", "--plot", str(file), "--socket", str(live.socket)]) == 0
    assert json.loads(file.read_bytes()) == document_of(slow_rank(8, 5))


def test_a_run_without_a_picture_is_an_error_and_leaves_no_file(
    live: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    live.operator.answers["GetPictures"] = UnknownRun("run gpt has no picture: nobody judges it", "start it")
    assert run(["faults", "gpt", "--json", "--plot", str(tmp_path / "a.png"), "--socket", str(live.socket)]) == 5
    told = json.loads(capsys.readouterr().out)
    assert (told["error"]["message"], told["error"]["hint"]) == ("run gpt has no picture: nobody judges it", "start it")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "words"),
    [("a.pdf", ".png"), ("a", ".png"), ("none/a.png", "not a folder"), ("taken.png", "is a folder")],
)
def test_a_file_that_cannot_be_is_refused_before_anything_is_asked(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "taken.png").mkdir()
    assert run(["faults", "gpt", "--plot", str(tmp_path / name), "--socket", "/nowhere/d.sock"]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_that_cannot_be_written_is_an_error_in_words(
    monkeypatch: pytest.MonkeyPatch, live: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(plot, "write_atomic", refuse)
    assert run(["faults", "gpt", "--plot", str(tmp_path / "a.png"), "--socket", str(live.socket)]) == 2
    told = capsys.readouterr()
    assert "a.png cannot be written: Permission denied" in told.err
    assert told.out == ""


def test_watching_draws_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["faults", "--watch", "--plot", str(tmp_path / "a.png")]) == 2
    assert "--watch" in capsys.readouterr().err


def test_without_matplotlib_the_extra_is_named_and_data_can_be_had_all_the_same(
    monkeypatch: pytest.MonkeyPatch, live: FakeDaemon, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(plot, "find_spec", lambda name: None)
    assert run(["faults", "--plot", str(tmp_path / "a.png"), "--socket", str(live.socket)]) == 2
    assert 'pip install "ckptd[plot]"' in capsys.readouterr().err
    assert run(["faults", "--plot", str(tmp_path / "a.json"), "--socket", str(live.socket)]) == 0


# --- the verb, from a recording -----------------------------------------------------------------------------------
@pytest.mark.parametrize("recording", [slow_rank(8, 5), hang(8, 3)], ids=["slow", "hang"])
def test_a_recording_has_a_picture(recording: Recording, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, file = tmp_path / "a.ckptd-timings", tmp_path / "a.png"
    write_recording(source, recording)
    assert run(["faults", "--replay", str(source), "--json", "--plot", str(file)]) == 0
    told = capsys.readouterr()
    assert len(json.loads(told.out)["faults"]) == 1
    assert str(file) in told.err
    size_of(file.read_bytes())


def test_a_recording_of_nothing_has_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "a.ckptd-timings"
    write_recording(source, Recording(Timings(2, ("a", "b"))))
    assert run(["faults", "--replay", str(source), "--plot", str(tmp_path / "a.png")]) == 2
    assert "nothing to draw" in capsys.readouterr().err
    assert os.listdir(tmp_path) == [source.name]
