"""How the end of an operation is found: by its future, by a wait for it, or by events of its device.

Layer: inside ``ckptd_client.timing``, between the taps and what times. Invariant: every operation that is followed ends
or is given up; nothing of it is kept afterwards.
"""

from __future__ import annotations

import torch.distributed as dist

from ckptd_client.timing.cuda import DeviceTimer, may_poll_while_others_capture
from ckptd_client.timing.recorder import Operation
from ckptd_client.timing.waits import Waits


class Endings:
    def __init__(self) -> None:
        self.waits = Waits()
        self.device = DeviceTimer()
        self._may_poll = False

    def begin(self, operation: Operation) -> None:
        """The operation, which is pending, is about to be issued to a device."""
        try:
            self.device.begin(operation)
        except Exception:
            operation.recorder.leave(operation)
            raise

    def follow(self, operation: Operation, work: dist.Work, output: int, is_async: bool, is_in_place: bool) -> None:
        """See that ``operation`` ends. ``output``: the address of the first tensor that is written."""
        if not operation.is_on_host:
            if not is_async:
                self.device.end(operation)
            elif is_in_place:
                self.device.end_by_future(operation, work)
            else:
                self.waits.hold(operation, work, output, self.device.end)
        elif not is_async:
            # Its caller waits at once: a callback, for which the thread that ends it must get the GIL, costs more.
            self.waits.hold(operation, work, 0)
        else:
            try:
                future = work.get_future()
            except RuntimeError:  # gloo's send, receive and reduce-scatter have none
                self.waits.hold(operation, work, output)
            else:
                future.add_done_callback(operation)

    def poll(self) -> None:
        """Take ends that nobody was told of. Called by one thread, not the training's."""
        if self.device.is_used and not self.device.polls_at_marks and not self._may_poll:
            self._may_poll = may_poll_while_others_capture()
            self.device.polls_at_marks = not self._may_poll
        self.waits.poll(may_query_device=self._may_poll)
        if self._may_poll:
            self.device.poll()
