"""Timings of collectives: a tap on every c10d operation, step marks, and a heartbeat to the node's daemon.

From bottom to top: ``ring``, ``communicators``, ``recorder`` (what is noted); ``waits``, ``cuda``, ``endings`` (when an
operation is over); ``dispatcher`` or, from torch 2.14 on, ``group_hooks`` (the tap); ``steps``; ``collection`` (one a
process); ``heartbeat``; ``watching``. Not seen: what a CUDA graph replays, and what other libraries send past c10d.
"""

from ckptd_client.timing.watching import Timing, Watch, checkpointer_timing, watch

__all__ = ["Timing", "Watch", "checkpointer_timing", "watch"]
