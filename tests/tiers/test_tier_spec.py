"""What ``--tier`` accepts, and what it says of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest

from ckptd.errors import EXIT_USAGE, InvalidRequest
from ckptd.tiers import TierSpec
from ckptd.tiers.spec import tiers_for


def test_a_bare_url_takes_the_defaults() -> None:
    spec = TierSpec.parse("file:///ckpt")
    assert spec == TierSpec("file:///ckpt", "shared", 1, None, 3, "none")
    assert spec.path == Path("/ckpt")


@pytest.mark.parametrize(
    ("every", "steps", "seconds"), [("100", 100, None), ("30s", None, 30), ("10m", None, 600), ("2h", None, 7200)]
)
def test_an_interval_is_steps_or_a_time(every: str, steps: int | None, seconds: float | None) -> None:
    spec = TierSpec.parse(f"file:///a/b,scope=node,every={every},keep=5,codec=zstd")
    assert spec == TierSpec("file:///a/b", "node", steps, seconds, 5, "zstd")


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("s3://bucket/x", "object stores are not supported yet; use file://"),
        ("gs://bucket", "object stores are not supported yet; use file://"),
        ("/ckpt", "not a file:// URL"),
        ("", "not a file:// URL"),
        ("file://ckpt", "the path 'ckpt' is not absolute"),
        ("file:///c,scope=all", "'scope=all'"),
        ("file:///c,every=0", "'every=0'"),
        ("file:///c,every=0s", "'every=0s'"),
        ("file:///c,every=5 m", "'every=5 m'"),
        ("file:///c,keep=0", "'keep=0'"),
        ("file:///c,keep=many", "'keep=many'"),
        ("file:///c,codec=gzip", "'codec=gzip'"),
        ("file:///c,size=3", "'size' is unknown"),
        ("file:///c,keep", "'keep' is not an option"),
        ("file:///c,", "'' is not an option"),
        ("file:///c,keep=2,keep=3", "'keep' is given twice"),
    ],
)
def test_what_is_wrong_is_named_in_one_line(text: str, part: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        TierSpec.parse(text)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE


def test_a_step_goes_to_the_tiers_whose_interval_it_meets() -> None:
    often, rare, timed = (TierSpec.parse(f"file:///t,every={every}") for every in ("10", "100", "30s"))
    assert tiers_for(20, [often, rare, timed]) == [often, timed]
    assert tiers_for(100, [often, rare, timed]) == [often, rare, timed]
    assert tiers_for(7, [often, rare]) == [often]
    assert tiers_for(7, []) == []
