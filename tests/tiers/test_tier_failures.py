"""What the file system and the Zarr libraries say becomes one line with a hint, and nothing is swallowed."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ckptd.errors import CkptdError, Corrupt, TierFailed
from ckptd.tiers import TierSpec, ZarrTier
from ckptd.tiers.failures import file_errors, zarr_errors

PATH = Path("/ckpt/run")


@pytest.mark.parametrize(
    ("code", "hint"),
    [
        (errno.ENOSPC, "free space on it"),
        (errno.EDQUOT, "quota"),
        (errno.EACCES, "let the daemon's user"),
        (errno.EROFS, "mounted read-only"),
        (errno.ENOENT, "is the file system mounted?"),
        (errno.ESTALE, "mount it again"),
    ],
)
def test_an_error_of_the_system_is_one_line_with_its_hint(code: int, hint: str) -> None:
    with pytest.raises(TierFailed) as caught, file_errors(PATH, "write"):
        raise OSError(code, os.strerror(code))
    text = str(caught.value)
    assert text.startswith(f"/ckpt/run: cannot write: {os.strerror(code)} (")
    assert hint in text
    assert "\n" not in text
    assert isinstance(caught.value.__cause__, OSError)


@pytest.mark.parametrize("is_read", [True, False])
def test_an_errno_inside_an_error_of_zarrs_is_understood(is_read: bool) -> None:
    with pytest.raises(TierFailed, match="No space left on device"), zarr_errors(PATH, "write", is_read=is_read):
        raise RuntimeError("store error:\n No space left on device (os error 28)")


def test_what_cannot_be_decoded_is_corrupt_and_what_cannot_be_written_is_a_failure() -> None:
    for is_read, kind in ((True, Corrupt), (False, TierFailed)):
        with pytest.raises(kind, match="cannot do it: odd chunk"), zarr_errors(PATH, "do it", is_read=is_read):
            raise RuntimeError("odd\n chunk")


def test_our_own_errors_pass_unchanged() -> None:
    error = CkptdError("mine")
    with pytest.raises(CkptdError) as caught, zarr_errors(PATH, "x", is_read=True):
        raise error
    assert caught.value is error


def test_a_disk_that_is_really_full_gives_one_line_and_no_checkpoint(tmp_path: Path) -> None:
    child = f"{sys.executable} {Path(__file__).with_name('tier_shards.py')} file://{tmp_path}"
    script = f"mount -t tmpfs -o size=512k none {tmp_path} || exit 77; {child}; code=$?; find {tmp_path}; exit $code"
    try:
        done = subprocess.run(
            ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", script],
            env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    except FileNotFoundError:
        pytest.skip("no unshare here")
    if done.returncode in (1, 77):
        pytest.skip(f"no private mounts here: {done.stderr.strip()}")
    first, *files = done.stdout.splitlines()
    assert done.returncode == 9, done.stdout + done.stderr
    assert first.startswith("TierFailed")
    assert "No space left on device" in first
    assert "free space on it" in first
    assert not [name for name in files if "manifest" in name or "rank-00001" in name]


def test_the_empty_mount_point_of_an_unmounted_tier_is_no_empty_tier(tmp_path: Path) -> None:
    root = tmp_path / "tier"
    tier = ZarrTier(TierSpec.parse(f"file://{root}"))
    tier.open()
    root.rename(tmp_path / "away")
    root.mkdir()
    for ask in (tier.runs, lambda: tier.snapshots("run"), tier.probe):
        with pytest.raises(TierFailed, match="recognise"):
            ask()
    root.rmdir()
    (tmp_path / "away").rename(root)
    assert tier.runs() == []
