"""Probes: checksums of windows of the sources, taken at ``save()``, that the slot must match before it is sealed.

Writes through ``.data`` and by foreign kernels raise no version, and one that comes before its tensor is copied leaves
source and slot equal: only what was seen at ``save()`` tells. Host memory only; a sample, or everything when asked.
"""

from __future__ import annotations

import random
from collections import defaultdict
from dataclasses import dataclass
from typing import Final

import torch
from crc32c import crc32c

from ckptd_client.binding import Binding
from ckptd_client.plan import Item, Plan
from ckptd_client.state.fill import byte_view

_WINDOWS: Final = 16
_WINDOW_BYTES: Final = 4096
# Of our own: the global generator is the user's, and drawing from it would change the data order.
_chance = random.Random()  # noqa: S311  a sample, not a secret


@dataclass(frozen=True, slots=True)
class Probe:
    """The checksum of bytes ``start`` to ``stop`` of an item as they were at save()."""

    item: Item
    start: int
    stop: int
    crc: int

    def matches(self, binding: Binding) -> bool:
        at = binding.layout.segment_offsets[self.item.segment] + self.item.position
        return bool(crc32c(binding.payload[at + self.start : at + self.stop].data) == self.crc)


def take_probes(plan: Plan, sources: list[torch.Tensor], *, is_whole: bool) -> dict[int, list[Probe]]:
    """Probes by group, of tensors that are copied lazily; ``is_whole``: of every byte of all of them."""
    probes: dict[int, list[Probe]] = defaultdict(list)
    count = len(plan.lazy) if is_whole else min(_WINDOWS, len(plan.lazy))
    for group, item in _chance.sample(plan.lazy, count):
        source = sources[item.leaf]
        if not source.is_cpu or not source.is_contiguous():
            if not (is_whole and source.is_cpu):
                continue
            source = source.contiguous()
        start = 0 if is_whole else _chance.randrange(max(1, item.size_bytes - _WINDOW_BYTES))
        stop = item.size_bytes if is_whole else min(item.size_bytes, start + _WINDOW_BYTES)
        probes[group].append(Probe(item, start, stop, crc32c(byte_view(source)[start:stop].data)))
    return probes
