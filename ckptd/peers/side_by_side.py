"""Parts of one thing made by a few threads at once, told as if they were made from the front.

One thread reads its k streams one message after the other; two keep both directions of a link and two cores busy.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Final

WORKERS: Final = 2


def side_by_side(
    parts: Sequence[Callable[[], Iterator[int]]], sizes: Sequence[int], progressed: Callable[[int], None]
) -> None:
    """Run every part to its end, the front ones first. Each yields how much of its ``sizes`` it has done;
    ``progressed`` is told, rising and one call at a time, how much is done without a hole. The first error ends all,
    and is raised once they have stopped.
    """
    done = [0] * len(parts)
    told = 0
    lock = threading.Lock()
    stop = threading.Event()

    def tell(number: int, amount: int) -> None:
        nonlocal told
        with lock:
            done[number] = amount
            whole = next((i for i, size in enumerate(sizes) if done[i] < size), len(sizes))
            reached = sum(sizes[:whole]) + (done[whole] if whole < len(sizes) else 0)
            if reached > told:
                told = reached
                progressed(reached)

    def run(number: int) -> None:
        if stop.is_set():
            return
        try:
            with closing(parts[number]()) as steps:  # type: ignore[type-var]
                for amount in steps:
                    tell(number, amount)
                    if stop.is_set():
                        return
        except BaseException:
            stop.set()
            raise

    with ThreadPoolExecutor(min(WORKERS, len(parts)) or 1, thread_name_prefix="rebuild") as pool:
        running = [pool.submit(run, number) for number in range(len(parts))]
    for future in running:
        future.result()
