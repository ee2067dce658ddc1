"""Parity: the Reed-Solomon code, the kernel that computes it, and where groups and stripes put what. Pure.

Layer: beside ``arena``, above ``format``; knows nothing of slots, sockets or clocks. Invariants: the same roster gives
the same groups everywhere; any m fragments of a stripe of k + m can be lost; bytes are those of ``reedsolo``.
"""

from ckptd.erasure.code import Code
from ckptd.erasure.groups import Group, explain, group_of, losses_tolerated, plan_groups
from ckptd.erasure.kernel import Kernel, find_kernel
from ckptd.erasure.stripes import Stripes

__all__ = [
    "Code",
    "Group",
    "Kernel",
    "Stripes",
    "explain",
    "find_kernel",
    "group_of",
    "losses_tolerated",
    "plan_groups",
]
