"""Tables and ages as people read them, and messages as programs do."""

from __future__ import annotations

import sys
import time

import pytest
from fake_daemon import row

from ckptd.cli import output
from ckptd.cli.messages import plain
from ckptd.cli.show import ranks_text
from ckptd_api.v1 import operator_pb2, types_pb2


def test_plain_tables_are_aligned_and_numbers_stand_right(capsys: pytest.CaptureFixture[str]) -> None:
    output.table(["NAME", "STEP"], [["a", 5], ["long name", 1200], [None, None]])
    assert capsys.readouterr().out.splitlines() == [
        "NAME       STEP",
        "a             5",
        "long name  1200",
        "-             -",
    ]


def test_on_a_terminal_a_name_that_looks_like_markup_stays_as_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    output.table(["NAME"], [["[red]x[/red]"]])
    assert "[red]x[/red]" in capsys.readouterr().out


def test_progress_is_silent_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with output.progress("verify") as advance:
        advance(1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with output.progress("verify") as advance:
        advance(0, 0)
        advance(1, 2)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(3, "3s ago"), (119, "119s ago"), (600, "10m ago"), (3 * 3600, "3h ago"), (200000, "2d ago")]
)
def test_ages(seconds: float, text: str) -> None:
    assert output.age(time.time() - seconds - 0.01) == text
    assert output.age(0) is None


@pytest.mark.parametrize(("ranks", "text"), [([], ""), ([3], "3"), ([2, 0, 1], "0-2"), ([0, 1, 5, 7, 8], "0-1,5,7-8")])
def test_ranks_are_shown_as_ranges(ranks: list[int], text: str) -> None:
    assert ranks_text(ranks) == text


def test_messages_become_plain_values() -> None:
    value = plain(row(7))
    assert value["snapshot"] == {"incarnation": "3-00000000000000ab", "step": 7}
    assert value["size_bytes"] == 3 << 29
    assert value["parent"] is None
    entry = types_pb2.RosterEntry(rank=1, domains={"rack": "r1"})
    assert plain(entry)["domains"] == {"rack": "r1"}
    assert plain(operator_pb2.GetStatusResponse())["problems"] == []
    assert plain(types_pb2.Watermarks(staged=0))["staged"] == 0
    assert plain(types_pb2.Watermarks())["staged"] is None
