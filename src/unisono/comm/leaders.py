"""What the first workers of all hosts say to each other between steps: payloads, tensors, parts of a state."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeVar

from torch import Tensor

from unisono.comm.algorithms import AllReduce, broadcast, drive, gather_bytes, ring
from unisono.comm.exchange import TAGS_A_BUCKET
from unisono.comm.wire import Wire

T = TypeVar("T")

PAYLOADS, COLLECTIVES, PARTS = (TAGS_A_BUCKET * kind for kind in range(3))
"""Where the tags of each kind begin."""


class Call(Protocol):
    """Does something with a wire where this worker can be freed, and waits for it: (work, operation)."""

    def __call__(self, work: Callable[[], T], operation: str) -> T:
        """Do it."""


class Leaders:
    """One host's first worker, among those of all hosts.

    Arguments:
        wire: between them.
        call: see there.
        first_tag: of those that are kept for this.
    """

    def __init__(self, wire: Wire, call: Call, first_tag: int) -> None:
        self._wire = wire
        self._call = call
        self._first_tag = first_tag

    def gather(self, payload: bytes, operation: str) -> list[bytes]:
        """Everyone's payload, in order of host."""
        tag = self._first_tag + PAYLOADS
        return self._call(lambda: gather_bytes(self._wire, payload, tag, operation), operation)

    def broadcast(self, tensor: Tensor, operation: str) -> None:
        """The first host's values, for all."""
        whole = tensor.detach().cpu() if tensor.device.type != "cpu" else tensor
        self._collective(broadcast, whole.view(-1), operation)
        if whole is not tensor:
            tensor.copy_(whole)

    def add_up(self, tensor: Tensor, operation: str) -> None:
        """The sum of all hosts' tensors, for all."""
        self._collective(ring, tensor, operation)

    def gather_to_first(self, parts: Mapping[int, Sequence[Tensor]], operation: str) -> None:
        """What hosts have in parts of the state, to the first one's same parts.

        Arguments:
            parts: flat tensors, by host.
        """
        if not any(parts.values()):
            return
        wire = self._wire

        def work() -> bool:
            sends = [(part, 0) for part in parts.get(wire.rank, ())] if wire.rank else []
            receives = [(part, h) for h, several in parts.items() if h for part in several] if not wire.rank else []
            wire.post(sends, receives, self._first_tag + PARTS).wait(operation)
            return True

        self._call(work, operation)

    def shift(self, own: Tensor, before: Tensor, operation: str) -> None:
        """Give the next host a flat tensor, and take that of the one before."""
        wire = self._wire

        def work() -> bool:
            sends, receives = [(own, (wire.rank + 1) % wire.size)], [(before, (wire.rank - 1) % wire.size)]
            wire.post(sends, receives, self._first_tag + PARTS).wait(operation)
            return True

        self._call(work, operation)

    def transfer(self, tensors: Sequence[Tensor], source: int, targets: Sequence[int], operation: str) -> None:
        """What one host has in tensors, into those of others.

        Arguments:
            tensors: flat, of this host; those of others are alike.
        """
        wire = self._wire

        def work() -> bool:
            sends = [(part, h) for h in targets for part in tensors] if wire.rank == source else []
            receives = [(part, source) for part in tensors] if wire.rank in targets else []
            wire.post(sends, receives, self._first_tag + PARTS).wait(operation)
            return True

        if wire.rank == source or wire.rank in targets:
            self._call(work, operation)

    def _collective(self, collective: AllReduce, tensor: Tensor, operation: str) -> None:
        def work() -> bool:
            drive(collective(self._wire, tensor, self._first_tag + COLLECTIVES), operation)
            return True

        self._call(work, operation)
