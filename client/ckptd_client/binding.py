"""A plan bound to a target: the destination of every piece as views of the slot, made once per plan and slot."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from ckptd.format.blocks import BOX_ALIGN_BYTES, HEADER_BYTES, SlotLayout, align
from ckptd.memory import Bytes
from ckptd_client.mapping import REGISTERED_PIECE_BYTES
from ckptd_client.plan import Item, Piece, Plan
from ckptd_client.state import TORCH_DTYPES, Leaf
from ckptd_client.state.fill import byte_view, is_bytes_copy


class Binding:
    """Destinations in ``payload`` for ``plan`` under ``layout``. ``frozen`` remembers what of the frozen class the slot
    holds already: (use of the memory, versions)."""

    def __init__(self, plan: Plan, layout: SlotLayout, payload: Bytes, leaves: list[Leaf]) -> None:
        self.plan = plan
        self.layout = layout
        self.payload = payload
        self.frozen: tuple[int, Any] | None = None
        whole = torch.from_numpy(payload)
        self._segments = [
            whole[offset : offset + align(segment.size_bytes, BOX_ALIGN_BYTES)].view(TORCH_DTYPES[segment.dtype])
            for segment, offset in zip(layout.segments, layout.segment_offsets, strict=True)
        ]
        self._views: dict[int, torch.Tensor] = {}
        for piece in plan.pieces:
            for item in piece.items:
                if item.leaf not in self._views:
                    self._views[item.leaf] = self._view(item, leaves[item.leaf].tensor)
        # Padding is part of blocks: zeros, so that the same state has the same checksums everywhere, and nothing that
        # lay in the memory before goes along.
        for item in (item for piece in plan.pieces for item in piece.items if item.size_bytes % BOX_ALIGN_BYTES):
            end = layout.segment_offsets[item.segment] + item.position + item.size_bytes
            payload[end : align(end, BOX_ALIGN_BYTES)] = 0
        for segment, offset in zip(layout.segments, layout.segment_offsets, strict=True):
            payload[offset + segment.size_bytes : offset + align(segment.size_bytes, layout.block_bytes)] = 0

    def _view(self, item: Item, like: torch.Tensor) -> torch.Tensor:
        segment = self._segments[item.segment]
        return segment.narrow(0, item.position // like.element_size(), like.numel()).view(like.shape)

    def end_of(self, piece: Piece) -> int:
        """Payload bytes that are complete once this piece and all before it are."""
        last = piece.items[-1]
        offset = self.layout.segment_offsets[last.segment]
        if piece.stop < last.size_bytes and len(piece.items) == 1:
            return offset + last.position + piece.stop
        return offset + last.position + last.size_bytes

    def write_index(self, index: bytes) -> None:
        region = self.payload[: align(len(index), self.layout.block_bytes)]
        region[: len(index)] = np.frombuffer(index, np.uint8)
        region[len(index) :] = 0

    def copy_on_cpu(self, piece: Piece, sources: list[torch.Tensor]) -> None:
        """Copy one piece of CPU tensors; releases the GIL while bytes move."""
        first = piece.items[0]
        source = sources[first.leaf]
        if len(piece.items) == 1 and is_bytes_copy(source):
            start = self.layout.segment_offsets[first.segment] + first.position
            np.copyto(
                self.payload[start + piece.start : start + piece.stop], byte_view(source)[piece.start : piece.stop]
            )
        elif piece.start == 0:
            # A large tensor that is not one run of bytes is copied whole, with its first part.
            with torch.no_grad():
                views = [self._views[item.leaf] for item in piece.items]
                torch._foreach_copy_(views, [sources[item.leaf] for item in piece.items])

    def copy_from_device(self, piece: Piece, sources: list[torch.Tensor]) -> None:
        """Enqueue the copy of one piece of device tensors on the current stream. No copy crosses a registered piece."""
        for item in piece.items:
            source = sources[item.leaf].detach().resolve_conj().resolve_neg()
            stop = piece.stop if len(piece.items) == 1 else item.size_bytes
            start = piece.start if len(piece.items) == 1 else 0
            if not source.is_contiguous():
                # Made contiguous on the device first (of this stream, so reused only behind the copy): a strided copy
                # could not be cut at registered pieces. Whole, with its first part.
                if piece.start:
                    continue
                source, stop = source.contiguous(), item.size_bytes
            at = self.layout.segment_offsets[item.segment] + item.position
            flat, target = source.reshape(-1).view(torch.uint8), torch.from_numpy(self.payload)
            while start < stop:
                boundary = REGISTERED_PIECE_BYTES - (HEADER_BYTES + at + start) % REGISTERED_PIECE_BYTES
                end = min(stop, start + boundary)
                target[at + start : at + end].copy_(flat[start:end], non_blocking=True)
                start = end

    def differs(self, item: Item, source: torch.Tensor, window: slice) -> bool:
        """Whether the slot's bytes in ``window`` of the item are not those of ``source`` now (CPU, one run)."""
        at = self.layout.segment_offsets[item.segment] + item.position
        return not np.array_equal(self.payload[at + window.start : at + window.stop], byte_view(source)[window])

    def view(self, item: Item) -> torch.Tensor:
        return self._views[item.leaf]
