"""Several collectives at once, stage by stage; what is small leaves in one message a member.

Each message costs some 400 bytes of headers, requests and acknowledgements, and a wait of its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.wire import Addressed, Pending, Wire

SMALL_BYTES = 1 << 16
"""Up to which a message is copied into a common one."""


class Bundle:
    """A wire that holds messages back until they leave together.

    Every member must hold back the same for each other, in the same order.

    Arguments:
        tag: of all that leaves.
    """

    def __init__(self, wire: Wire, tag: int) -> None:
        self.rank = wire.rank
        self.size = wire.size
        self.ordered = wire.ordered
        self._wire = wire
        self._tag = tag
        self._sends: list[Addressed] = []
        self._receives: list[Addressed] = []

    def post(self, sends: Sequence[Addressed], receives: Sequence[Addressed], tag: int) -> Pending:
        """Hold messages back; only what `leave` returns knows of their arrival."""
        self._sends += sends
        self._receives += receives
        return All([])

    def leave(self) -> Pending:
        """Send and receive all that was held back."""
        sends, receives = _Joined(self._sends), _Joined(self._receives)
        for joined, parts in sends.parts:
            torch.cat(parts, out=joined)
        self._sends, self._receives = [], []
        return _Arriving(self._wire.post(sends.messages, receives.messages, self._tag), receives)


class _Joined:
    """Messages of which the small ones to or from each member lie behind each other in one.

    Attributes:
        messages: what travels.
        parts: the common messages, and as bytes what each is made of.
    """

    def __init__(self, messages: Sequence[Addressed]) -> None:
        self.parts: list[tuple[Tensor, list[Tensor]]] = []
        small: dict[int, list[Tensor]] = {}
        self.messages: list[Addressed] = []
        for tensor, member in messages:
            if 0 < tensor.nbytes <= SMALL_BYTES:
                small.setdefault(member, []).append(tensor.view(-1).view(torch.uint8))
            else:
                self.messages.append((tensor, member))
        for member, parts in small.items():
            joined = parts[0].new_empty(sum(part.numel() for part in parts))
            self.parts.append((joined, parts))
            self.messages.append((joined, member))


@dataclass(frozen=True, slots=True)
class _Arriving:
    pending: Pending
    receives: _Joined

    def wait(self, operation: str) -> None:
        self.pending.wait(operation)
        for joined, parts in self.receives.parts:
            for part, data in zip(parts, torch.split(joined, [part.numel() for part in parts]), strict=True):
                part.copy_(data)


@dataclass(frozen=True, slots=True)
class All:
    """Several messages as one."""

    parts: Sequence[Pending]

    def wait(self, operation: str) -> None:
        """Wait for all."""
        for part in self.parts:
            part.wait(operation)


def together(collectives: Sequence[Iterator[Pending]], bundles: Sequence[Bundle] = ()) -> Iterator[Pending]:
    """Several collectives, stage by stage; what they post on ``bundles`` leaves at the end of each stage."""
    running = list(collectives)
    while running:
        stage = [(collective, pending) for collective in running if (pending := next(collective, None)) is not None]
        if stage:
            yield All([*(pending for _, pending in stage), *(bundle.leave() for bundle in bundles)])
        running = [collective for collective, _ in stage]
