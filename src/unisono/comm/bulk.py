"""Large payloads between the first workers of hosts, on a wire of their own, a little at a time while training goes on.

What the link has taken it delivers in order: a small message behind a large one would wait for all of it. So there is
never more under way than the link delivers in some milliseconds.
"""

from collections import deque
from concurrent.futures import Future

import torch

from unisono.comm.algorithms import as_tensor
from unisono.comm.background import Background
from unisono.comm.wire import Pending, Wire

CHUNK_BYTES = 1 << 16
AT_ONCE = 2
"""Chunks that are under way to, and from, each host."""


class Bulk:
    """One host's; all hosts start the same exchanges in the same order.

    Arguments:
        wire: between first workers.
        thread: for this alone.

    Attributes:
        thread: see there.
        moved: how many chunks have arrived so far.
    """

    def __init__(self, wire: Wire, thread: Background) -> None:
        self._wire = wire
        self.thread = thread
        self.moved = 0

    def start(self, payload: bytes, operation: str) -> "Future[list[bytes]]":
        """Give all hosts a payload, and take theirs: in order of host, when it is over."""
        return self.thread.submit(lambda: self._gather(payload, operation))

    def _gather(self, payload: bytes, operation: str) -> list[bytes]:
        wire, data = self._wire, as_tensor(payload)
        others = [peer for peer in range(wire.size) if peer != wire.rank]
        lengths = torch.zeros(wire.size, dtype=torch.int64)
        lengths[wire.rank] = len(payload)
        own = lengths[wire.rank : wire.rank + 1].clone()
        wire.post([(own, p) for p in others], [(lengths[p : p + 1], p) for p in others], 0).wait(operation)
        contents = {p: torch.empty(int(lengths[p]), dtype=torch.uint8) for p in others}
        under_way: deque[Pending] = deque()
        for start in range(0, int(lengths.max()), CHUNK_BYTES):
            part = slice(start, start + CHUNK_BYTES)
            sends, receives = [(data[part], p) for p in others], [(contents[p][part], p) for p in others]
            under_way.append(wire.post(sends, receives, 1 + start // CHUNK_BYTES % AT_ONCE))
            while len(under_way) == AT_ONCE or (under_way and part.stop >= int(lengths.max())):
                under_way.popleft().wait(operation)
                self.moved += 1
        return [payload if p == wire.rank else contents[p].numpy().tobytes() for p in range(wire.size)]
