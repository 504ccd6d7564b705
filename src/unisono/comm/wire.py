"""Messages between workers of different hosts, point to point: the contract that algorithms and groups stand on."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

Addressed = tuple[Tensor, int]
"""A contiguous tensor and the member that it goes to, or comes from."""


class Pending(Protocol):
    """Messages that are on their way; tensors that are sent or received must not be touched before `wait` returns."""

    def wait(self, operation: str) -> None:
        """Return once all have arrived.

        Arguments:
            operation: what they are for; goes into the error.

        Raises:
            WaitTimeout: a member's message did not come before the deadline.
            PeerLost: a member is gone.
            Revoked: the group's generation ended.
        """


class Wire(Protocol):
    """Members numbered 0 to ``size - 1`` that can send each other tensors.

    Attributes:
        rank, size: this member's number, and how many there are.
        ordered: both ends must post their messages in the same order (NCCL); else tags tell them apart.
    """

    rank: int
    size: int
    ordered: bool

    def post(self, sends: Sequence[Addressed], receives: Sequence[Addressed], tag: int) -> Pending:
        """Start sending and receiving; several messages between the same two members arrive in order.

        Where the wire is not ordered, a message may be shorter than the tensor that it arrives in.

        Arguments:
            tag: tells this exchange from others that are under way, from 0.
        """
