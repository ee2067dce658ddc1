"""The token bucket, with time made by hand: the rate holds, bursts are short, waiters are served in order."""

from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptd.peers import rate
from ckptd.peers.rate import TokenBucket


class Clock:
    """Time that passes when somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept_s: list[float] = []

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.slept_s.append(seconds)
        self.now_s += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(rate, "time", clock)
    return clock


def test_without_a_rate_nobody_waits(clock: Clock) -> None:
    bucket = TokenBucket(0)
    for _ in range(100):
        bucket.take(1 << 40)
    assert clock.slept_s == []


def test_bytes_move_at_the_rate_once_the_burst_is_spent(clock: Clock) -> None:
    bucket = TokenBucket(1_000_000)
    for _ in range(50):
        bucket.take(100_000)
    # The last 100 kB wait for the 4.9 MB before them, less what was saved up in a twentieth of a second.
    assert clock.now_s - 1000.0 == pytest.approx(4.9 - 0.05)


def test_a_take_larger_than_a_second_is_let_through_and_paid_for_by_the_next(clock: Clock) -> None:
    bucket = TokenBucket(1_000)
    bucket.take(10_000)
    assert clock.slept_s == []
    bucket.take(1)
    assert sum(clock.slept_s) == pytest.approx(10 - 0.05)


def test_time_that_was_not_used_is_kept_for_a_short_burst_only(clock: Clock) -> None:
    bucket = TokenBucket(1_000_000)
    bucket.take(100_000)
    clock.now_s += 3600.0
    before = clock.now_s
    for _ in range(11):
        bucket.take(100_000)
    assert clock.now_s - before == pytest.approx(1.0 - 0.05)


def test_waiters_are_given_times_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time stands still while they wait: each of many threads has its turn, at the rate."""
    clock = Clock()
    clock.sleep = clock.slept_s.append  # type: ignore[method-assign]
    monkeypatch.setattr(rate, "time", clock)
    bucket = TokenBucket(1_000)
    bucket.take(50)  # the burst
    threads = [threading.Thread(target=bucket.take, args=(100,)) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(clock.slept_s) == pytest.approx([0.1 * turn for turn in range(1, 20)])


@given(
    rate_bytes_s=st.integers(1, 10**9),
    takes=st.lists(st.tuples(st.integers(0, 10**7), st.floats(0, 0.5)), min_size=1, max_size=30),
)
def test_no_stretch_of_time_ever_sees_more_than_the_rate_and_a_burst(
    rate_bytes_s: int, takes: list[tuple[int, float]]
) -> None:
    clock = Clock()
    granted = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rate, "time", clock)
        bucket = TokenBucket(rate_bytes_s)
        for size_bytes, idle_s in takes:
            clock.now_s += idle_s
            bucket.take(size_bytes)
            granted.append((clock.now_s, size_bytes))
    for first, (began_s, _) in enumerate(granted):
        moved = 0
        for at_s, size_bytes in granted[first:]:
            # What is granted at this moment is in flight: it must be paid for before the next.
            assert moved <= rate_bytes_s * (at_s - began_s + 0.05) * (1 + 1e-9) + 1e-3
            moved += size_bytes
