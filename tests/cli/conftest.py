"""The fake daemon and the real ``ckptd`` command, as fixtures."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_daemon import CKPTD, Ckptd, FakeDaemon


@pytest.fixture
def daemon() -> Iterator[FakeDaemon]:
    with tempfile.TemporaryDirectory(prefix="ckptd-") as folder:  # tmp_path is too long for a socket's name
        fake = FakeDaemon(Path(folder))
        yield fake
        fake.close()


@pytest.fixture
def ckptd(tmp_path: Path) -> Ckptd:
    """The console script itself, in an environment that names no daemon."""

    def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("CKPTD_", "GRPC_"))}
        clean |= {"XDG_RUNTIME_DIR": str(tmp_path), **environment}
        return subprocess.run(
            [CKPTD, *map(str, arguments)], env=clean, capture_output=True, text=True, timeout=60, check=False
        )

    return run
