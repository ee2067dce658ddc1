"""Ranks that are gone, and which of them were first: the others went because of those.

A rank whose process was killed is found out within milliseconds, by its pidfd or the end of its control stream. Its
peers follow: their collective fails and they leave with an error, or the launcher ends them. So the first to go are the
roots; an error of communication is nobody's own, and who was told to end (SIGTERM, SIGINT) did not fail.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Final

from ckptd.detect.records import Confidence, Fault, Kind, RankState

# Two processes of one node killed together are found out this far apart; launchers look less often than that.
TOGETHER_S: Final = 0.02
# A rank that went so long after the first that its communication failed for went because of something else.
FOLLOWS_S: Final = 0.1
_MOST_NAMED: Final = 64
_TOLD_TO_END: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})
# Of the process itself: an assertion, or the watchdog of a backend that gave up waiting for others.
_OWN_SIGNALS: Final = frozenset({signal.SIGABRT})
_COMMUNICATION: Final = re.compile(
    r"connection (closed|reset|refused)|broken pipe|timed? ?out|nccl|gloo|dist(backend|network|store)error|socket",
    re.IGNORECASE,
)


def judge_departures(states: Sequence[RankState], step: int = -1) -> list[Fault]:
    """The deaths that began it; [] when nobody is gone of itself, or all went together: then the job was ended from
    outside. One fault a node. ``step``: the one that does not end.

    Verified when the system ended the process by a signal other than those that ask it to end; confirmed when how it
    ended is not known, or the program failed with an exception of its own or aborted.
    """
    gone = [(state.gone_s, state) for state in states if state.gone_s is not None]
    victims_s = [gone_s for gone_s, state in gone if _is_victim(state)]
    until_s = min(victims_s, default=float("inf")) + FOLLOWS_S
    own = [(gone_s, state) for gone_s, state in gone if not _is_victim(state) and gone_s <= until_s]
    if not own:
        return []
    first_s = min(gone_s for gone_s, _ in own)
    roots = [state for gone_s, state in own if gone_s - first_s <= TOGETHER_S]
    if any(map(_was_killed, roots)):  # who aborted beside it may have done so because of it
        roots = [state for state in roots if state.signal not in _OWN_SIGNALS]
    if len(roots) == len(states) > 2:
        return []
    nodes = sorted({state.node for state in roots})
    return [_death([state for state in roots if state.node == node], states, step) for node in nodes]


def was_ended_first(states: Sequence[RankState]) -> bool:
    """The first to go was ended by a signal other than its own: nothing that the program did is why."""
    gone = [(state.gone_s, state.rank, state) for state in states if state.gone_s is not None]
    first = min(gone)[2] if gone else None
    return first is not None and first.signal not in {0, *_OWN_SIGNALS}


def _is_victim(state: RankState) -> bool:
    """Its communication failed, or somebody ended it: another rank, or a person, is why."""
    return state.signal in _TOLD_TO_END or (bool(state.error) and bool(_COMMUNICATION.search(state.error)))


def _was_killed(state: RankState) -> bool:
    """By the system, with a signal that neither asks it to end nor is its own."""
    return bool(state.signal) and state.signal not in _TOLD_TO_END | _OWN_SIGNALS


def _name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # of real time, which have no names
        return f"signal {number}"


def _death(roots: Sequence[RankState], states: Sequence[RankState], step: int) -> Fault:
    ranks = tuple(sorted(state.rank for state in roots))
    node = roots[0].node
    on_node = [state for state in states if state.node == node]
    is_whole = bool(node) and len(on_node) == len(roots) < len(states)
    errors = {str(state.rank): state.error for state in roots if state.error}
    followers = sorted(state.rank for state in states if state.gone_s is not None and state.rank not in ranks)
    named = ", ".join(map(str, ranks[:_MOST_NAMED]))
    signals = {str(state.rank): _name(state.signal) for state in roots if state.signal}
    how = "ended with an exception" if errors else "died without a goodbye"
    where = f" of node {node}" if node else ""
    return Fault(
        Kind.DEATH,
        ranks,
        (node,) if is_whole else (),
        Confidence.VERIFIED if all(map(_was_killed, roots)) else Confidence.CONFIRMED,
        step,
        {
            "summary": f"rank {named}{where} {how}",
            "errors": errors,
            "signals": signals,
            "ranks_that_followed": followers[:_MOST_NAMED],
            "ranks_that_followed_count": len(followers),
        },
    )
