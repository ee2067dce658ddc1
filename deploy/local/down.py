"""End the local stack and remove what it wrote: processes, arenas, logs, time series and the tier.

Only processes that ``up`` started are ended, and only what it wrote is removed: the folder may hold other things.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import shutil
import sys
from pathlib import Path
from typing import Final

import lifetimes
from plan import STATE, Layout

_GRACE_S: Final = 20.0  # drains that go on have 5 s of them


def main() -> int:
    parser = argparse.ArgumentParser(prog="deploy/local/down", description=__doc__)
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help="as deploy/local/up was given")
    layout = Layout(parser.parse_args().state.absolute())
    if not layout.state.is_dir():
        sys.stdout.write(f"no stack in {layout.state}\n")
        return 0
    try:
        ended = end(layout)
    except OSError as error:  # somebody else's stack, or a read-only folder
        sys.stderr.write(f"deploy/local/down: {error}\n")
        return 1
    sys.stdout.write(f"ended: {', '.join(path.stem for path in ended) or 'nothing, all had ended'}\n")
    return 0


def end(layout: Layout) -> list[Path]:
    """The pid files of what ran; the folder is gone, unless other things lie in it."""
    lock_path = layout.state / "lock"
    with lock_path.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ended = lifetimes.end([layout.pid_file(name) for name in layout.names], _GRACE_S)
        for path in layout.written():
            _remove(path)
        lock_path.unlink()
    with contextlib.suppress(OSError):  # something else lies there
        layout.state.rmdir()
    return ended


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
