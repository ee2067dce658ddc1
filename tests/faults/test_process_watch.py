"""A process that ends is noticed, also when a child of it keeps what it had open."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading

from ckptd.serve.processes import ProcessWatch


def test_the_end_of_a_process_is_told_once_though_a_child_lives_on() -> None:
    watch = ProcessWatch()
    watch.start()
    child = subprocess.Popen(
        [sys.executable, "-c", "import os, time; os.fork() and time.sleep(60); time.sleep(5)"], stdin=subprocess.DEVNULL
    )
    told, signals = threading.Semaphore(0), []
    assert watch.watch(child.pid, lambda number: (signals.append(number), told.release()))
    assert not told.acquire(timeout=0.2)
    child.kill()
    assert told.acquire(timeout=10)
    assert not told.acquire(timeout=0.2)
    assert signals == [signal.SIGKILL]
    child.wait()
    watch.close()


def test_a_process_that_is_gone_already_is_no_error() -> None:
    watch = ProcessWatch()
    watch.start()
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    assert not watch.watch(child.pid, lambda _number: None)
    watch.close()
