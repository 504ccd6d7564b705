"""What replicas tell each other at an agreement: how far each has moved, as few bytes; between hosts, as messages."""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unisono.comm.compression import Codec
from unisono.optim.blockwise import Unit
from unisono.run.rng import mix

Gather = Callable[[bytes, str], Sequence[bytes]]
"""(payload, operation) -> everyone's payload, of all workers of all hosts."""
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
    gather: Gather | None = None
    _heard: Mapping[tuple[int, int], Tensor] = field(default_factory=dict)

    def exchange(self, step: int, columns: Sequence[Column]) -> None:
        """Tell the others what this host's replicas have to tell after a step, and hear theirs; all workers call it.

        Arguments:
            columns: that this worker brings to an agreement.
        """
        if self.gather is not None:
            told = {(c.block, r): self._encoded(step, c, r) for c in columns for r in self._own}
            self._heard = self._exchanged(self.gather, told, columns, f"words of replicas after step {step}")

    def exchange_again(self, step: int, columns: Sequence[Column], key: str) -> None:
        """For whoever was not there when it was told: what replicas keep of it under a key of their state."""
        if self.gather is None:
            return
        told = {(c.block, r): _as_bytes(c.replicas[r].state[key]) for c in columns for r in self._own}
        heard = self._exchanged(self.gather, told, columns, f"words that count after step {step}")
        for column in columns:
            for r, replica in enumerate(column.replicas):
                if not self.here[r]:
                    replica.state[key].copy_(_from_bytes(heard[column.block, r], replica.state[key]))

    def words(self, step: int, column: Column) -> list[Tensor]:
        """What each replica has told of a unit after a step."""
        replicas = range(len(column.replicas))
        if self.gather is None:
            return [self._decoded(self._encoded(step, column, r), column) for r in replicas]
        return [self._decoded(self._heard[column.block, r], column) for r in replicas]

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
            return _from_bytes(data, like)
        return self.codec.decode(data, like.numel()).to(like.dtype).view_as(like)

    @staticmethod
    def _exchanged(
        gather: Gather, told: Mapping[tuple[int, int], Tensor], columns: Sequence[Column], operation: str
    ) -> dict[tuple[int, int], Tensor]:
        """What all have told of these columns."""
        wanted = {column.block for column in columns}
        everyone = gather(b"".join(packed(told)), operation)
        return {key: data for payload in everyone for key, data in unpacked(payload) if key[0] in wanted}


def packed(told: Mapping[tuple[int, int], Tensor]) -> Iterator[bytes]:
    """Bytes by block and replica, for a message."""
    for (block, replica), data in told.items():
        yield _HEAD.pack(block, replica, data.numel())
        yield data.numpy().tobytes()


def unpacked(payload: bytes) -> Iterator[tuple[tuple[int, int], Tensor]]:
    """What was `packed`."""
    at = 0
    while at < len(payload):
        block, replica, size_bytes = _HEAD.unpack_from(payload, at)
        at += _HEAD.size
        yield (block, replica), torch.frombuffer(bytearray(payload[at : at + size_bytes]), dtype=torch.uint8)
        at += size_bytes


def _as_bytes(values: Tensor) -> Tensor:
    return values.contiguous().view(-1).view(torch.uint8)


def _from_bytes(data: Tensor, like: Tensor) -> Tensor:
    return data.view(like.dtype).view(like.shape)
