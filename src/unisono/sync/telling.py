"""What replicas tell each other at an agreement: how far each has moved, as few bytes; between hosts, as messages."""

import struct
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from unisono.comm.compression import Codec
from unisono.optim.blockwise import Unit
from unisono.run.rng import mix

StartGather = Callable[[bytes, str], Callable[[], Sequence[bytes]]]
"""(payload, operation) -> what returns everyone's payload, of all workers of all hosts, when it is called."""
_HEAD = struct.Struct("<qqq")


@dataclass(frozen=True, slots=True)
class Column:
    """A unit of the model itself, and the same of every replica.

    Attributes:
        block: the first of the unit.
    """

    block: int
    common: Unit
    replicas: Sequence[Unit]


@dataclass(slots=True)
class Telling:
    """How one worker hears what replicas have to tell.

    Attributes:
        codec: makes it short; None where it is told as it is.
        seed: of random rounding.
        values: a replica tells its values, and not how far it has moved from the model's.
        here: of each replica, whether this host keeps it.
        gather: brings together what workers of all hosts say; None where all replicas are here.
    """

    codec: Codec | None
    seed: int
    values: bool
    here: Sequence[bool]
    gather: StartGather | None = None
    _said: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _under_way: dict[int, tuple[Callable[[], Sequence[bytes]], Sequence[Column]]] = field(default_factory=dict)

    def begin(self, step: int, columns: Sequence[Column]) -> None:
        """Start to tell the others what this host's replicas have to tell after a step; all workers call it.

        Arguments:
            columns: that this worker brings to an agreement.
        """
        if self.gather is not None:
            self._said = {(c.block, r): self._encoded(step, c, r) for c in columns for r in self._own}
            told = self.gather(b"".join(packed(self._said)), f"words of replicas after step {step}")
            self._under_way[step] = told, columns

    def end(self, step: int) -> None:
        """Have what others told after a step; all workers call it."""
        if self.gather is not None:
            told, columns = self._under_way.pop(step)
            self._said |= _heard(told(), columns)

    def end_into(self, step: int, columns: Sequence[Column], key: str) -> None:
        """Keep what others told after a step under a key of their replicas' state; all workers call it.

        Who was not there as it was told asks again for what replicas keep of it.
        """
        if self.gather is None:
            return
        if step in self._under_way:
            told, columns = self._under_way.pop(step)
            heard = {k: (data, self._decoded) for k, data in _heard(told(), columns).items()}
        else:
            kept = {(c.block, r): _as_bytes(c.replicas[r].state[key]) for c in columns for r in self._own}
            again = self.gather(b"".join(packed(kept)), f"words that were told after step {step}")
            heard = {k: (data, _as_it_is) for k, data in _heard(again(), columns).items()}
        for column in columns:
            for r, replica in enumerate(column.replicas):
                if not self.here[r]:
                    data, decode = heard[column.block, r]
                    replica.state[key].copy_(decode(data, column))

    def over(self) -> None:
        """What was told in a step is in the model, or kept with replicas."""
        self._said = {}

    def words(self, step: int, column: Column) -> list[Tensor | None]:
        """What each replica has told of a unit after a step; None for what has not come yet."""
        if self.gather is None:
            said = [self._encoded(step, column, r) for r in range(len(column.replicas))]
            return [self._decoded(data, column) for data in said]
        found = [self._said.get((column.block, r)) for r in range(len(column.replicas))]
        return [None if data is None else self._decoded(data, column) for data in found]

    @property
    def _own(self) -> list[int]:
        return [r for r, here in enumerate(self.here) if here]

    def _encoded(self, step: int, column: Column, replica: int) -> Tensor:
        values = column.replicas[replica].values
        told = values if self.values else column.common.values - values
        if self.codec is None:
            return _as_bytes(told)
        key = mix(mix(mix(self.seed, step), column.block), replica)
        return self.codec.encode(told.flatten().float(), torch.Generator().manual_seed(key))

    def _decoded(self, data: Tensor, column: Column) -> Tensor:
        like = column.common.values
        if self.codec is None:
            return _as_it_is(data, column)
        return self.codec.decode(data, like.numel()).to(like.dtype).view_as(like)


def _heard(everyone: Sequence[bytes], columns: Sequence[Column]) -> dict[tuple[int, int], Tensor]:
    """What all have told of these columns."""
    wanted = {column.block for column in columns}
    return {key: data for payload in everyone for key, data in unpacked(payload, wanted)}


def packed(told: Mapping[tuple[int, int], Tensor]) -> Iterator[bytes]:
    """Bytes by block and replica, for a message."""
    for (block, replica), data in told.items():
        yield _HEAD.pack(block, replica, data.numel())
        yield data.numpy().tobytes()


def unpacked(payload: bytes, blocks: Container[int]) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What was `packed` of some blocks."""
    at = 0
    while at < len(payload):
        block, replica, size_bytes = _HEAD.unpack_from(payload, at)
        at += _HEAD.size
        if block in blocks:
            yield (block, replica), torch.from_numpy(np.frombuffer(payload, np.uint8, size_bytes, at).copy())
        at += size_bytes


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _as_it_is(data: Tensor, column: Column) -> Tensor:
    return data.view(column.common.values.dtype).view(column.common.values.shape)
