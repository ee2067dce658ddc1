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
_ENCODE = ("encode_4_1", "encode_4_2", "encode_8_2", "encode_8_4")


def _is_found(case: dict[str, Any], recall: float) -> bool:
    return case["recall"] >= recall and case["precision"] >= 0.98 and case["right_rank"] >= 0.98


def _victims(result: dict[str, Any]) -> float:
    """Share of the simulated runs in which somebody innocent was confirmed."""
    cases = result["cases"].values()
    return sum(case["runs_with_victims"] for case in cases) / sum(case["runs"] for case in cases)


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
    Figure(
        "parity at 4+1, 4+2, 8+2 and 8+4 against bare ISA-L on the same buffers",
        ">= 0.9",
        "erasure",
        lambda r: ", ".join(f"{r[name]:.2f}" for name in _ENCODE),
        lambda r: min(r[name] for name in _ENCODE) >= 0.9,
    ),
    Figure(
        "reconstruction of 1 and of 2 lost nodes at 4+2 against the same",
        ">= 0.8",
        "erasure",
        lambda r: f"{r['reconstruct_1']:.2f}, {r['reconstruct_2']:.2f}",
        lambda r: min(r["reconstruct_1"], r["reconstruct_2"]) >= 0.8,
    ),
    Figure(
        "bare gRPC streams of the same bytes against protection at 4+2, from sealed to protected, 6 daemons here",
        ">= 0.8",
        "protect",
        lambda r: f"{r['ratio']:.2f} ({r['ratio_of_pulling']:.2f} without the way of the watermarks)",
        lambda r: r["ratio"] >= 0.8,
    ),
    Figure(
        "parity that a node holds of one snapshot, of the longest image; generations held",
        "m/k plus < 1 % of the image; <= 2",
        "protect",
        lambda r: f"m/k + {r['parity_beyond_percent']:.1f} %; {r['generations_held']:g}",
        lambda r: r["parity_beyond_percent"] < 1 and r["generations_held"] <= 2,
    ),
    Figure(
        "training step without protection against with it under way at 64 MiB/s, both ends on this machine",
        ">= 0.95",
        "interference",
        lambda r: f"{r['ratio']:.3f} ({r['pulled_mib_s']:.0f} MiB/s a node)",
        lambda r: r["ratio"] >= 0.95,
    ),
    Figure(
        "bare gRPC of k times the image into one process against a lost node's image back at 4+2, on a fresh daemon",
        ">= 0.6",
        "recover",
        lambda r: f"{r['ratio']:.2f} ({r['ratio_settled']:.2f} once it had made its slots)",
        lambda r: r["ratio"] >= 0.6,
    ),
    Figure(
        "simulated jobs of 64 to 1,024 ranks, a rank x1.10 slower: found within 15 steps; precision; right rank",
        ">= 0.99; >= 0.98; >= 0.98",
        "detector_sim",
        lambda r: "{recall:.3f}; {precision:.3f}; {right_rank:.3f}".format(**r["cases"]["rank x1.10"]),
        lambda r: _is_found(r["cases"]["rank x1.10"], 0.99),
    ),
    Figure(
        "the same at x1.30 within 5 steps, at x1.05 within 40",
        ">= 0.99; >= 0.95",
        "detector_sim",
        lambda r: f"{r['cases']['rank x1.30']['recall']:.3f}; {r['cases']['rank x1.05']['recall']:.3f}",
        lambda r: _is_found(r["cases"]["rank x1.30"], 0.99) and _is_found(r["cases"]["rank x1.05"], 0.95),
    ),
    Figure(
        "victims confirmed in all simulated cases; false confirmed verdicts in healthy jobs, per 10,000 rank-days",
        "<= 0.5 % of cases; <= 1",
        "detector_sim",
        lambda r: (
            f"{_victims(r):.4f} of cases; {r['healthy']['false_per_10000_rank_days']:.1f} in "
            f"{r['healthy']['rank_days']:.0f} rank-days (at most {r['healthy']['upper_bound_per_10000_rank_days']:.0f})"
        ),
        lambda r: _victims(r) <= 0.005 and r["healthy"]["upper_bound_per_10000_rank_days"] <= 1,
    ),
    Figure(
        "judging what is slow among 10,240 ranks, all windows due, one core",
        "<= 0.3 s",
        "detector_sim",
        lambda r: f"{r['judge_10240_ranks_s']:.3f} s",
        lambda r: r["judge_10240_ranks_s"] <= 0.3,
    ),
    Figure(
        "gloo jobs, 2 to 8 ranks: stopped, killed, GIL held, a collective left out or resized: right ranks only",
        ">= 0.98",
        "detector_live",
        lambda r: f"{r['stopped_right']:.3f} of {r['cases']} cases with the slow ones, {r['with_strangers']} strangers",
        lambda r: r["stopped_right"] >= 0.98 and not r["with_strangers"],
    ),
    Figure(
        "in them: a death is named after; a rank that does not run after",
        "<= 3 s; <= 15 s",
        "detector_live",
        lambda r: f"{r['kill_longest_s']:.1f} s; {max(r['stop_longest_s'], r['gil_longest_s']):.1f} s at most",
        lambda r: r["kill_longest_s"] <= 3 and max(r["stop_longest_s"], r["gil_longest_s"]) <= 15,
    ),
    Figure(
        "in them: a rank x1.30 slower, x1.10 slower (8 ranks), named within",
        "<= 5; <= 15 steps",
        "detector_live",
        lambda r: f"{r['slow_x1.3_median_steps']:g}; {r['slow_x1.1_median_steps']:g} steps (median)",
        lambda r: r["slow_x1.3_most_steps"] <= 5 and r["slow_x1.1_most_steps"] <= 15,
    ),
    Figure(
        "step time with collection against without, DDP, FSDP2: upper 95 % bound; a tapped operation, sync, async",
        "<= 1 %; <= 3 times the bare one",
        "detector_overhead",
        lambda r: (
            f"{r['ddp_upper_95_percent']:.1f} %, {r['fsdp_upper_95_percent']:.1f} %; "
            f"{r['sync_times']:.1f}, {r['async_times']:.1f} times"
        ),
        lambda r: (
            max(r["ddp_upper_95_percent"], r["fsdp_upper_95_percent"]) <= 1
            and max(r["sync_ratio"], r["async_ratio"]) <= 3
        ),
    ),
    Figure(
        "scrape of /metrics, a node with 8 ranks of 2 runs at work: median, worst; series",
        "< 50 ms in the median; < 2,000",
        "scrape",
        lambda r: (
            f"{r['scrape_median_ms']:.1f} ms, {r['scrape_worst_ms']:.0f} ms of {r['scrapes']} "
            f"(bare answer {r['livez_median_ms']:.1f}, {r['livez_worst_ms']:.0f} ms); {r['series']}"
        ),
        lambda r: r["scrape_median_ms"] < 50 and r["series"] < 2000,
    ),
    Figure(
        "5 s scrapes: from a dead rank, killed daemon, stopped rank to alert; from the 15th step of one x1.3 slower",
        "<= 20 s; <= 20 s; <= 40 s; <= 20 s",
        "alerting",
        lambda r: (
            f"{r['rank_dead_longest_s']:.1f}; {r['daemon_down_longest_s']:.1f}; {r['hang_longest_s']:.1f}; "
            f"{r['straggler_longest_s']:.1f} s at most of {r['rounds']}"
        ),
        lambda r: (
            max(r["rank_dead_longest_s"], r["daemon_down_longest_s"], r["straggler_longest_s"]) <= 20
            and r["hang_longest_s"] <= 40
        ),
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


def _written() -> dict[str, dict[str, Any]]:
    """The results that RESULTS.md holds, by script."""
    lines = [line for line in RESULTS.read_text().splitlines() if line.startswith("{")]
    return {result["bench"]: result for result in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    benches = list(dict.fromkeys(figure.bench for figure in FIGURES))
    parser.add_argument("names", nargs="*", help=f"{' '.join(benches)}; default: all")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    arguments = parser.parse_args()
    names = arguments.names or benches
    # Rows that are not measured again stay as they were.
    results = _written() if arguments.write else {}
    for name in names:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        results[name] = measure(name)
    print(table(results))
    if arguments.write:
        before, mark, _ = RESULTS.read_text().partition("<!-- table -->\n")
        machine = (
            f"{os.cpu_count()} cores, Linux {platform.release().split('-')[0]}, Python {platform.python_version()}"
        )
        raw = "\n".join(json.dumps(result) for result in results.values())
        RESULTS.write_text(f"{before}{mark}\nMachine: {machine}.\n\n{table(results)}\n\n```json\n{raw}\n```\n")


if __name__ == "__main__":
    main()
