"""The workers that compute the same layers together, each with its part: their collectives, in one order on all."""

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import Tensor

from unisono.comm.flat import as_bytes, flattened
from unisono.comm.host import HostGroup
from unisono.comm.meeting import Meeting, MeetingError, MeetingLayout
from unisono.comm.waiting import revoked
from unisono.errors import Revoked, WaitTimeout

TRIAL_DEADLINE_S = 60.0


class TensorGroup(Protocol):
    """Collectives over equal tensors; sums are taken in order of rank, so that all get the same bits.

    ``where`` names, in an error, what they are for. Results are new tensors.
    """

    @property
    def rank(self) -> int:
        """This worker's number."""
        ...

    @property
    def size(self) -> int:
        """Number of workers."""
        ...

    def all_reduce(self, tensor: Tensor, where: str) -> Tensor:
        """The sum."""
        ...

    def all_gather(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """All behind each other along a dimension."""
        ...

    def reduce_scatter(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """This worker's part, along a dimension, of the sum."""
        ...

    def close(self) -> None:
        """Let go of what it holds."""
        ...


class ArenaTensorGroup:
    """A `TensorGroup` over the memory that a host's workers share.

    Arguments:
        group: the workers of the host.
        members: the ranks of those who compute together.
        layout: of their memory.
    """

    def __init__(self, group: HostGroup, members: Sequence[int], layout: MeetingLayout) -> None:
        self._group = group
        self._names = [group.names(rank) for rank in members]
        self.rank = members.index(group.rank)
        self.size = len(members)
        self._where = ""
        self._meeting = Meeting(group.arena, layout, self.rank, self._look, self._names.__getitem__)
        with self._told("the tensor-parallel workers' first meeting"):
            self._meeting.begin(group.waiter.deadline_s)

    def all_reduce(self, tensor: Tensor, where: str) -> Tensor:
        """The sum."""
        result = tensor.detach().clone(memory_format=torch.contiguous_format)
        with self._told(where):
            self._meeting.all_reduce(result.view(-1), _add, self._deadline())
        return result

    def all_gather(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """All behind each other along a dimension."""
        own = tensor.detach().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.size)]
        with self._told(where):
            outputs = [as_bytes(part.view(-1)) for part in parts]
            self._meeting.all_gather(outputs, as_bytes(own.view(-1)), self._deadline())
        return torch.cat(parts, dim)

    def reduce_scatter(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """This worker's part, along a dimension, of the sum."""
        parts = [part.contiguous() for part in tensor.detach().chunk(self.size, dim)]
        result = torch.empty_like(parts[self.rank])
        with self._told(where):
            self._meeting.reduce_scatter(result.view(-1), [flattened(part) for part in parts], _add, self._deadline())
        return result

    def close(self) -> None:
        """Let go of the others' processes."""
        self._meeting.close()

    def _deadline(self) -> float:
        return time.monotonic() + self._group.waiter.deadline_s

    def _look(self) -> None:
        """Called while waiting."""
        if self._group.is_revoked():
            raise Revoked(revoked(self._where, self._group.cause()))

    @contextmanager
    def _told(self, where: str) -> Iterator[None]:
        self._where = where
        try:
            yield
        except MeetingError as error:
            raise WaitTimeout(f"{where}: {error}; {self._group.doing()}") from error


class ThreadTensorGroup:
    """One of several threads that stand for the workers of a group: what a trial in one process needs.

    Arguments:
        slots: a place for each thread's tensor, which they share.
    """

    def __init__(self, rank: int, slots: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank = rank
        self.size = len(slots)
        self._slots = slots
        self._barrier = barrier

    @staticmethod
    def several(size: int) -> "list[ThreadTensorGroup]":
        """The members of a group."""
        slots: list[Tensor | None] = [None] * size
        barrier = threading.Barrier(size, timeout=TRIAL_DEADLINE_S)
        return [ThreadTensorGroup(rank, slots, barrier) for rank in range(size)]

    def all_reduce(self, tensor: Tensor, where: str) -> Tensor:
        """The sum."""
        total, *others = self._everyone(tensor)
        for other in others:
            total = total + other
        return total

    def all_gather(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """All behind each other along a dimension."""
        return torch.cat(self._everyone(tensor), dim)

    def reduce_scatter(self, tensor: Tensor, dim: int, where: str) -> Tensor:
        """This worker's part, along a dimension, of the sum."""
        return self.all_reduce(tensor, where).chunk(self.size, dim)[self.rank].contiguous()

    def close(self) -> None:
        """Wait for nobody any more: the others' collectives fail."""
        self._barrier.abort()

    def _everyone(self, tensor: Tensor) -> list[Tensor]:
        self._slots[self.rank] = tensor.detach().clone()
        self._barrier.wait()
        found = [slot for slot in self._slots if slot is not None]
        self._barrier.wait()
        return found


def _add(a: Tensor, b: Tensor, out: Tensor) -> None:
    torch.add(a, b, out=out)
