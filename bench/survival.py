"""How often the newest snapshot in memory survives, and what that is worth: ``python -m bench.survival [--write]``.

Prints Markdown tables for 1,000 and 10,000 nodes; ``--write`` puts them into docs/SURVIVAL.md and draws
docs/survival.svg. A simulation, not a measurement: its parameters, with their sources, and how it works stand in
``bench.survival_model``. The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bench.survival_model import (
    COARSE,
    KINDS,
    Estimate,
    Parameters,
    effective_time,
    layout_of,
    loss_probabilities,
    losses_of_the_snapshot,
)
from ckptd.model import Geometry

DOCUMENT = Path(__file__).parents[1] / "docs" / "SURVIVAL.md"
PLOT = DOCUMENT.with_name("survival.svg")
SIZES = (1_000, 10_000)
SCHEMES = (None, Geometry(1, 1), Geometry(4, 1), Geometry(4, 2), Geometry(8, 2), Geometry(14, 2))
LABELS = ("row", "rack")
FEWER_LABELS = {"none": (), "rack": ("rack",)}
MOST_DAYS = 36_500.0
ORDERS = 16  # orders of the ranks that a mean is taken over
CERTAIN = Estimate(1.0, 1.0, 1.0)


class Outcome(NamedTuple):
    """What one scheme comes to: probability of loss by kind, losses a day of the snapshot, share of useful time."""

    scheme: Geometry | None
    fatal: Mapping[str, Estimate]
    losses_a_day: Estimate
    effective: Estimate


def outcome(nodes: int, scheme: Geometry | None, at: Parameters, seed: int) -> Outcome:
    """``scheme`` None: no peers; every loss of a node ends the snapshot in memory."""
    fatal: Mapping[str, Estimate] = dict.fromkeys(KINDS, CERTAIN)
    if scheme is not None:
        fatal = loss_probabilities(layout_of(nodes, scheme, LABELS, at, seed), at, seed)
    effective = effective_time(nodes, scheme.m if scheme else 0, {k: fatal[k].value for k in KINDS}, at, seed)
    return Outcome(scheme, fatal, losses_of_the_snapshot(fatal, at.losses_a_day(nodes)), effective)


# --- in words -----------------------------------------------------------------------------------------------------
def name(scheme: Geometry | None) -> str:
    return {None: "no peers", Geometry(1, 1): "1+1 (mirror)"}.get(scheme, str(scheme))


def is_vague(estimate: Estimate) -> bool:
    """Whether only the bound is worth printing."""
    return estimate.high > 2 * estimate.value


def survives(fatal: Estimate) -> str:
    """Probability of survival in percent, with as many digits as its complement needs."""
    if fatal.low == 1:
        return "0 %"
    worst = fatal.high if is_vague(fatal) else fatal.value
    digits = max(1, math.ceil(-math.log10(100 * worst)) + 1) if worst else 1
    if is_vague(fatal):
        return f"> {math.floor((100 - 100 * fatal.high) * 10**digits) / 10**digits:.{digits}f} %"
    low, value, high = (f"{100 - 100 * loss:.{digits}f}" for loss in (fatal.high, fatal.value, fatal.low))
    return f"{value} % ({low} to {high})"


def rounded(number: float) -> str:
    """Two significant digits, thousands set apart."""
    return f"{float(f'{number:.2g}'):,g}"


def days_between(losses_a_day: Estimate, is_short: bool = False) -> str:
    if not losses_a_day.high or 1 / losses_a_day.high > MOST_DAYS:
        return f"> {MOST_DAYS:,.0f}"
    if is_vague(losses_a_day):
        return f"> {rounded(1 / losses_a_day.high)}"
    low, value, high = (rounded(1 / rate) for rate in (losses_a_day.high, losses_a_day.value, losses_a_day.low))
    return value if is_short or low == high else f"{value} ({low} to {high})"


def percent(share: Estimate) -> str:
    return f"{100 * share.value:.2f} % ± {50 * (share.high - share.low):.2f}"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, ["---"] * len(heads), *rows))


# --- the tables ---------------------------------------------------------------------------------------------------
def parameter_table(at: Parameters) -> str:
    rows = []
    for field in dataclasses.fields(at):
        value = getattr(at, field.name)
        meta = field.metadata
        rows.append((f"`{field.name}`", f"{value:.3g} {meta['unit']}".strip(), meta["meaning"], meta["source"]))
    return table(("parameter", "value", "meaning", "source"), rows)


def result_table(nodes: int, outcomes: Sequence[Outcome], at: Parameters) -> str:
    rates, software = at.losses_a_day(nodes), at.software_a_day(nodes)
    heads = ["scheme", "parity, of an image", "images sent", *(f"survives a {kind} loss" for kind in KINDS)]
    heads += ["days between losses of the snapshot", "effective training time"]
    rows = []
    for scheme, fatal, losses_a_day, effective in outcomes:
        cost = [f"{100 * scheme.m / scheme.k:.0f} %", str(scheme.m)] if scheme else ["0 %", "0"]
        survival = [survives(fatal[kind]) for kind in KINDS]
        rows.append([name(scheme), *cost, *survival, days_between(losses_a_day), percent(effective)])
    counts = ", ".join(f"{rates[kind]:.2g} {kind} losses" for kind in KINDS)
    head = f"**{nodes:,} nodes**, a day: {counts}, {software:.2g} software failures."
    return f"{head}\n\n{table(heads, rows)}"


def label_table(results: Mapping[int, Sequence[Outcome]], at: Parameters, seed: int) -> str:
    """Days between losses of the snapshot, by what the nodes are labelled with; a mean over orders of the ranks."""
    schemes = [scheme for scheme in SCHEMES if scheme]
    rows = []
    for nodes, outcomes in results.items():
        for label, keys in FEWER_LABELS.items():
            means = []
            for scheme in schemes:
                layouts = [layout_of(nodes, scheme, keys, at, seed + order) for order in range(ORDERS)]
                fatal = [loss_probabilities(layout, at, seed, COARSE) for layout in layouts]
                rates = [losses_of_the_snapshot(one, at.losses_a_day(nodes)).value for one in fatal]
                means.append(Estimate(*[sum(rates) / ORDERS] * 3))
            rows.append([f"{nodes:,}", label, *(days_between(mean) for mean in means)])
        known = [days_between(one.losses_a_day, is_short=True) for one in outcomes if one.scheme]
        rows.append([f"{nodes:,}", "row and rack", *known])
    return table(["nodes", "labels", *(name(scheme) for scheme in schemes)], rows)


def other_table(at: Parameters, seed: int) -> str:
    """The same for other parameters, at the largest size."""
    others: dict[str, dict[str, Any]] = {
        "as above": {},
        "as often as in RSC-1 (6.50 in 1,000 node-days)": {"interruptions": 6.5},
        "only broken hosts cost memory, broken GPUs do not": {"node_share": 53 / 419},
        "racks as in Ford et al.: one loss in 10.2 years": {"rack_losses": 1 / 10.2},
        "racks of 4 nodes, rows of 32": {"nodes_per_rack": 4},
        "restarts take twice as long": {"restart_s": 2 * at.restart_s, "tier_restart_s": 2 * at.tier_restart_s},
        "restarts take a minute, 3 from the tier": {"restart_s": 60, "tier_restart_s": 180},
        "durable every 10 minutes, committed after 3": {"durable_s": 600, "drain_s": 180},
    }
    shown = (None, Geometry(4, 1), Geometry(8, 2))
    heads = [f"{what}, {name(scheme)}" for scheme in shown for what in ("effective time", "days")]
    rows = []
    for label, changes in others.items():
        changed = dataclasses.replace(at, **changes)
        found = [outcome(SIZES[-1], scheme, changed, seed) for scheme in shown]
        cells = [(percent(one.effective), days_between(one.losses_a_day, is_short=True)) for one in found]
        rows.append([label, *(cell for pair in cells for cell in pair)])
    return table(["changed", *heads], rows)


# --- the plot -----------------------------------------------------------------------------------------------------
COLORS = {1_000: "#1b6ca8", 10_000: "#c8551b"}
ROW, TOP, PANELS = 34, 66, ((120, 360), (560, 240))


def plot(results: Mapping[int, Sequence[Outcome]]) -> str:
    """Two panels: days between losses of the snapshot (logarithmic, to 100 years), effective training time."""
    bottom = TOP + ROW * len(SCHEMES)
    parts = [text(PANELS[0][0], 20, "days between losses of the newest snapshot in memory", "start", bold=True)]
    parts.append(text(PANELS[1][0], 20, "effective training time", "start", bold=True))
    for at, (nodes, color) in enumerate(COLORS.items()):
        parts.append(f'{dot(PANELS[0][0] + 6 + 120 * at, 38)} fill="{color}"/>')
        parts.append(text(PANELS[0][0] + 17 + 120 * at, 42, f"{nodes:,} nodes", "start"))
    parts.append(f'{arrow(PANELS[0][0] + 250, 38)} fill="#222"/>')
    parts.append(text(PANELS[0][0] + 261, 42, "over 100 years", "start"))
    ticks = [(0, exponent, f"{10.0**exponent:,g}") for exponent in range(-2, 5)]
    ticks += [(1, share, f"{share} %") for share in range(40, 101, 20)]
    for panel, value, label in ticks:
        x = across(panel, value)
        parts.append(f'<path d="M{x:.1f} {TOP - 8}V{bottom - 8}" stroke="#ddd"/>')
        parts.append(text(x, bottom + 8, label, "middle"))
    for row, scheme in enumerate(SCHEMES):
        y = TOP + ROW * row + 10
        parts.append(text(PANELS[0][0] - 12, y + 4, name(scheme), "end"))
        for nodes, color in COLORS.items():
            one = results[nodes][row]
            shift = -5 if nodes == SIZES[0] else 5
            days = 1 / one.losses_a_day.value if one.losses_a_day.value else math.inf
            x = across(0, math.log10(min(days, MOST_DAYS)))
            parts.append(f'{dot(x, y + shift) if days <= MOST_DAYS else arrow(x, y + shift)} fill="{color}"/>')
            parts.append(f'{dot(across(1, 100 * one.effective.value), y + shift)} fill="{color}"/>')
    size = f'viewBox="0 0 830 {bottom + 22}" font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" {size}>',
        '<rect width="100%" height="100%" fill="#fff"/>',
        *parts,
    ]
    return "\n".join([*parts, "</svg>", ""])


def across(panel: int, value: float) -> float:
    """Where a value lies in a panel: the exponent of days in the first, percent in the second."""
    left, width = PANELS[panel]
    low, high = ((-2, math.log10(MOST_DAYS)), (40, 100))[panel]
    return left + width * (value - low) / (high - low)


def dot(x: float, y: float) -> str:
    return f'<circle cx="{x:.1f}" cy="{y}" r="5"'


def arrow(x: float, y: float) -> str:
    return f'<path d="M{x - 5:.1f} {y - 5}l10 5l-10 5z"'


def text(x: float, y: float, words: str, anchor: str, bold: bool = False) -> str:
    weight = ' font-weight="bold"' if bold else ""
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}" fill="#222"{weight}>{words}</text>'


# --- the command --------------------------------------------------------------------------------------------------
def filled(document: str, tables: Mapping[str, str]) -> str:
    """``document`` with what lies between ``<!-- NAME -->`` and ``<!-- end -->`` replaced by that table."""
    for mark, content in tables.items():
        before, start, after = document.partition(f"<!-- {mark} -->\n")
        _, end, rest = after.partition("<!-- end -->")
        if not start or not end:
            raise SystemExit(f"{DOCUMENT}: no place for {mark}")
        document = f"{before}{start}\n{content}\n\n{end}{rest}"
    return document


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--write", action="store_true", help="write docs/SURVIVAL.md and docs/survival.svg")
    arguments = parser.parse_args()
    at = Parameters()
    results = {nodes: [outcome(nodes, scheme, at, arguments.seed) for scheme in SCHEMES] for nodes in SIZES}
    tables = {
        "parameters": parameter_table(at),
        "results": "\n\n".join(result_table(nodes, outcomes, at) for nodes, outcomes in results.items()),
        "labels": label_table(results, at, arguments.seed),
        "others": other_table(at, arguments.seed),
    }
    print("\n\n".join(content for mark, content in tables.items() if mark != "parameters"))
    if arguments.write:
        DOCUMENT.write_text(filled(DOCUMENT.read_text(), tables))
        PLOT.write_text(plot(results))


if __name__ == "__main__":
    main()
