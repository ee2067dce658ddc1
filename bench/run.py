"""Runs every measurement and writes bench/RESULTS.md: ``python -m bench.run [--write] [NAME ...]``.

Each figure is a ratio to a limit measured in the same run. Nothing is asserted: a row that misses its aim says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).with_name("RESULTS.md")


class Figure(NamedTuple):
    """One row: what is measured, what it should reach, how it is read from a script's JSON, whether that is enough."""

    name: str
    aim: str
    bench: str
    show: Callable[[dict[str, Any]], str]
    is_met: Callable[[dict[str, Any]], bool]


FIGURES = [
    Figure(
        "save() + next fence, 1 GiB of CPU state, step longer than the copy, against what dcp.async_save blocks",
        ">= 50 times shorter, < 5 ms",
        "stall",
        lambda r: (
            f"{r['times_shorter']:.0f} times ({r['lost_ms']:.2f} ms; dcp {r['dcp_async_save_blocked_ms']:.0f} ms)"
        ),
        lambda r: r["times_shorter"] >= 50 and r["lost_ms"] < 5,
    ),
    Figure(
        "the same with a step of 10 ms, against max(0, memcpy - step)",
        "<= 1.1",
        "stall",
        lambda r: f"{r['ratio_at_10ms_step']:.2f} ({r['lost_at_10ms_step_ms']:.0f} ms)",
        lambda r: r["ratio_at_10ms_step"] <= 1.1,
    ),
    Figure(
        "training loop with a snapshot every step against without, ranks = cores",
        ">= 0.95",
        "loop",
        lambda r: f"{r['ratio']:.3f} ({r['snapshots_staged']} staged)",
        lambda r: r["ratio"] >= 0.95,
    ),
    Figure(
        "plain memcpy against save to staged, checksums included",
        ">= 0.7",
        "stage",
        lambda r: f"{r['ratio']:.2f}",
        lambda r: r["ratio"] >= 0.7,
    ),
    Figure(
        "bare gRPC byte stream against the gRPC handover, same message size",
        ">= 0.8",
        "handover",
        lambda r: f"{r['ratio']:.2f}",
        lambda r: r["ratio"] >= 0.8,
    ),
    Figure(
        "plain memcpy against restore from daemon memory, checksums included",
        ">= 0.5",
        "restore",
        lambda r: f"{r['ratio_to_memcpy']:.2f}",
        lambda r: r["ratio_to_memcpy"] >= 0.5,
    ),
    Figure(
        "the same against dcp.load from page cache",
        ">= 5 times faster",
        "restore",
        lambda r: f"{r['times_faster_than_dcp_load']:.1f} times",
        lambda r: r["times_faster_than_dcp_load"] >= 5,
    ),
    Figure(
        "one flat file, written and synced, against drain and commit",
        ">= 0.6",
        "drain",
        lambda r: f"{r['drain_vs_flat']:.2f}",
        lambda r: r["drain_vs_flat"] >= 0.6,
    ),
    Figure(
        "dcp.save against drain and commit",
        "> 1 (faster)",
        "drain",
        lambda r: f"{r['drain_vs_dcp']:.1f} times",
        lambda r: r["drain_vs_dcp"] > 1,
    ),
    Figure(
        "daemon memory beyond its slots, at 4 GiB of slots",
        "< 300 MiB",
        "memory",
        lambda r: f"{r['beyond_mib']:.0f} MiB ({r['slots_mib']:.0f} MiB of slots)",
        lambda r: r["beyond_mib"] < 300,
    ),
]


def measure(bench: str) -> dict[str, Any]:
    """The JSON that ``python -m bench.NAME`` prints."""
    command = [sys.executable, "-m", f"bench.{bench}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800, cwd=RESULTS.parents[1])
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not lines:
        raise SystemExit(f"bench.{bench} failed:\n{done.stderr[-3000:]}")
    result: dict[str, Any] = json.loads(lines[-1])
    return result


def table(results: dict[str, dict[str, Any]]) -> str:
    rows = ["| figure | aim | measured | |", "| --- | --- | --- | --- |"]
    for figure in FIGURES:
        if result := results.get(figure.bench):
            verdict = "met" if figure.is_met(result) else "missed"
            rows.append(f"| {figure.name} | {figure.aim} | {figure.show(result)} | {verdict} |")
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="stall loop stage handover restore drain memory; default: all")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    arguments = parser.parse_args()
    names = arguments.names or list(dict.fromkeys(figure.bench for figure in FIGURES))
    results = {}
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results[name] = measure(name)
    print(table(results))
    if arguments.write:
        before, mark, _ = RESULTS.read_text().partition("<!-- table -->\n")
        machine = (
            f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
        )
        raw = "\n".join(json.dumps(results[name]) for name in names)
        RESULTS.write_text(f"{before}{mark}\nMachine: {machine}.\n\n{table(results)}\n\n```json\n{raw}\n```\n")


if __name__ == "__main__":
    main()
