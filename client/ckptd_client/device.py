"""Copies from devices: enqueued on a side stream behind the compute stream, awaited piece by piece.

The side stream waits, by event, for what the compute stream had enqueued at save(); the fence is a wait of the compute
stream, not of the host. Events and streams belong to the device of the tensors, and the worker thread sets it before
use.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ckptd_client.binding import Binding
from ckptd_client.plan import Plan
from ckptd_client.state import Leaf

_streams: dict[torch.device, torch.cuda.Stream] = {}


class DeviceCopies:
    """The device part of one capture; on a host without tensors on devices every method is a no-op.

    Made on the training thread, in save(), so that its events mark that point of the compute stream.
    """

    def __init__(self, plan: Plan, leaves: list[Leaf]) -> None:
        self._device_of = {
            number: leaves[piece.items[0].leaf].tensor.device
            for number, piece in enumerate(plan.pieces)
            if leaves[piece.items[0].leaf].tensor.is_cuda
        }
        self.pieces = sorted(self._device_of)
        self._plan = plan
        self._started: dict[torch.device, torch.cuda.Event] = {}
        for device in set(self._device_of.values()):
            with torch.cuda.device(device):
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(torch.cuda.current_stream(device))
                self._started[device] = event
        self._copied: dict[int, torch.cuda.Event] = {}
        self._last_of: dict[torch.device, dict[int, torch.cuda.Event]] = {}

    def has(self, number: int) -> bool:
        """Whether piece ``number`` lies on a device."""
        return number in self._device_of

    def enqueue(self, binding: Binding, sources: list[torch.Tensor], is_done: Sequence[bool]) -> None:
        """Enqueue the copy of every piece that is not done already; returns without waiting for any."""
        self.pieces = [number for number in self.pieces if not is_done[number]]
        for number in self.pieces:
            device = self._device_of[number]
            with torch.cuda.device(device), torch.no_grad():
                stream = _stream_of(device)
                with torch.cuda.stream(stream):
                    if device not in self._last_of:
                        stream.wait_event(self._started[device])
                        self._last_of[device] = {}
                    binding.copy_from_device(self._plan.pieces[number], sources)
                    # Blocking: whoever waits for it sleeps; the default spins, on a core that the trainer may need.
                    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
                    event.record(stream)
            self._copied[number] = event
            self._last_of[device][self._plan.pieces[number].group] = event

    def wait(self, number: int) -> None:
        """Block the calling thread until piece ``number`` is in host memory; releases the GIL."""
        self._copied[number].synchronize()

    def wait_all(self) -> None:
        """Block until every copy that was enqueued has ended."""
        for event in self._copied.values():
            event.synchronize()

    def fence(self, group: int) -> None:
        """Make the current compute streams wait until the group's copies have read their sources. Copies of a device
        are done in order, so its last one speaks for all."""
        for device, last in self._last_of.items():
            if event := last.get(group):
                torch.cuda.current_stream(device).wait_event(event)


def _stream_of(device: torch.device) -> torch.cuda.Stream:
    """The side stream of ``device``: one for the process, since streams come from a small pool that others use too."""
    stream = _streams.get(device)
    if stream is None:
        stream = _streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    return stream
