"""Start the local stack: three daemons, Prometheus with the alerts of deploy/prometheus, and Alertmanager.

Programs that run already are left alone, so a second call starts only what has ended.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shlex
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Final

import lifetimes
from plan import NODES, STATE, Addresses, CannotStart, Layout, Program, fixed_addresses, free_addresses, programs

_PATIENCE_S: Final = 60.0
_POLL_S: Final = 0.1
_LAST_LINES: Final = 8
_DIRECT: Final = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy has our loopback behind it


def main() -> int:
    options = _parse()
    layout = Layout(options.state.absolute())
    try:
        layout.state.mkdir(parents=True, exist_ok=True)
        with (layout.state / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            at = start(layout, options.webhook, has_free_ports=options.free_ports)
    except (CannotStart, OSError) as error:  # of the folder: it is a file, somebody else's, read-only, full
        sys.stderr.write(f"deploy/local/up: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write("deploy/local/up: interrupted; what was started runs on: `deploy/local/down` ends it\n")
        return 130
    sys.stdout.write(layout.describe(at) + "\n" if options.json else _told(layout, at))
    return 0


def start(layout: Layout, webhook: str, *, has_free_ports: bool) -> Addresses:
    """All that does not run yet; returns once everything serves."""
    try:
        import configs
    except ModuleNotFoundError as error:
        raise CannotStart(f"{error}: `make demo` in the repository installs what is needed") from error
    at = _addresses(layout, webhook, has_free_ports=has_free_ports)
    wanted = programs(layout, at)
    layout.addresses.write_text(at.as_json())
    layout.config("prometheus").write_text(configs.prometheus(at))
    layout.config("alertmanager").write_text(configs.alertmanager(at))
    layout.tier.mkdir(exist_ok=True)
    for program in wanted:
        layout.data(program.name).mkdir(exist_ok=True)
        if lifetimes.living(layout.pid_file(program.name)) is None:
            log, pid_file = layout.log(program.name), layout.pid_file(program.name)
            lifetimes.start(program.command, os.environ, log, pid_file)
    until_s = time.monotonic() + _PATIENCE_S
    for program in wanted:
        _wait_ready(program, layout, until_s)
    return at


def _addresses(layout: Layout, webhook: str, *, has_free_ports: bool) -> Addresses:
    if not any(lifetimes.living(layout.pid_file(name)) for name in layout.names):
        return free_addresses(webhook) if has_free_ports else fixed_addresses(webhook)
    at = Addresses.from_json(layout.addresses.read_text())
    if webhook not in ("", at.webhook):
        raise CannotStart(f"it runs already, with webhook {at.webhook or 'none'}: `deploy/local/down` first")
    return at


def _wait_ready(program: Program, layout: Layout, until_s: float) -> None:
    while not _answers(program.ready):
        is_over = lifetimes.living(layout.pid_file(program.name)) is None
        if is_over or time.monotonic() > until_s:
            what = "has ended" if is_over else f"did not answer at {program.ready}"
            log = layout.log(program.name)
            last = "".join(f"  {line}\n" for line in log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise CannotStart(f"{program.name} {what}. The end of {log}:\n{last}`deploy/local/down` ends the others.")
        time.sleep(_POLL_S)


def _answers(url: str) -> bool:
    try:
        with _DIRECT.open(url, timeout=2) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False


# --- for people ---------------------------------------------------------------------------------------------------
def _told(layout: Layout, at: Addresses) -> str:
    sockets = [shlex.quote(f"unix://{layout.socket(node)}") for node in range(NODES)]
    rows = [
        ("alerts, queries", f"http://127.0.0.1:{at.prometheus}/alerts"),
        ("what is told", f"http://127.0.0.1:{at.alertmanager}, to {at.webhook or 'nobody (--webhook URL)'}"),
        *((f"node {n}", f"{sockets[n]}  http://127.0.0.1:{at.http[n]}/metrics") for n in range(NODES)),
        ("logs, pids, tier", str(layout.state)),
    ]
    width = max(len(name) for name, _ in rows)
    table = "".join(f"{name:{width}}  {text}\n" for name, text in rows)
    state = "" if layout.state == STATE else f" --state {shlex.quote(str(layout.state))}"
    bin_folder = Path(sys.executable).parent
    socket = shlex.quote(f"unix://{layout.state}") + "/node-$n/d.sock"
    return f"""{table}
A job, one rank on each node:
  for n in {" ".join(map(str, range(NODES)))}; do
    RANK=$n WORLD_SIZE={NODES} LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29555 OMP_NUM_THREADS=1 \\
      CKPTD_DAEMON={socket} \\
      {bin_folder}/python -m ckptd_client.examples.train_gpt gpt --steps 100000 &
  done
Then break something and look at the alerts:
  kill -STOP %2                 # a hang; kill -CONT %2 ends it
  kill -KILL $(cut -d' ' -f1 {shlex.quote(str(layout.pid_file("node-2")))})
                                # a daemon; deploy/local/up{state} brings it back
Look from a node, and end it all:
  {bin_folder}/ckptd status --socket {sockets[0]}
  deploy/local/down{state}
"""


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="deploy/local/up", description=__doc__)
    parser.add_argument("--state", type=Path, default=STATE, metavar="DIR", help="default: .local in the repository")
    parser.add_argument("--webhook", default="", metavar="URL", help="where alerts are told; default: nowhere")
    parser.add_argument("--free-ports", action="store_true", help="any free ports instead of the documented ones")
    parser.add_argument("--json", action="store_true", help="addresses as JSON, alone on standard output")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
