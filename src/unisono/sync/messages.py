"""What workers that share no memory tell a parameter server, and it tells them: values that are new, and gradients.

Both ends have the servers' runs, tables and buffers in the same order, so that a message needs to say little more than
what is in it. Tensors travel as their bytes.
"""

from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.calls import Words
from unisono.sync.divided import OwnedTable, Server
from unisono.sync.pulled import PulledValues
from unisono.sync.sums import BlockOfUses, Gradient, Span
from unisono.sync.updater import Updater


@dataclass(frozen=True, slots=True)
class Copied:
    """What a server has that is new to a worker.

    Attributes:
        dense: its runs, and buffers; all of its tables too, where the worker has nothing yet.
        rows: else of each of its tables, the rows that were changed, and their values.
    """

    dense: Sequence[Tensor]
    rows: Sequence[tuple[Tensor, Tensor]]

    @property
    def words(self) -> Words:
        """What the other end has to know."""
        return {"rows": [len(rows) for rows, _ in self.rows]}

    @property
    def parts(self) -> list[Tensor]:
        """The bytes."""
        return [*self.dense, *(part for found in self.rows for part in found)]


def put_copied(server: Server, values: PulledValues, since: int, words: Words, data: Tensor) -> int:
    """Compute with what a server has, from a message that begins with it; how many bytes it is.

    Arguments:
        since: the version that was asked with.
    """
    at = values.put(server.parts if since < 0 else server.dense, data)
    for owned, count in zip(server.tables, words["rows"], strict=since >= 0):
        target = values.values[owned.table.parameter]
        rows, at = _cut(data, at, torch.int64, count)
        new, at = _cut(data, at, target.dtype, count * target[0].numel())
        target[rows] = new.view(count, *target.shape[1:])
    return at


def pushed(server: Server, updater: Updater, sums: Gradient, buffers: Sequence[int]) -> tuple[Words, list[Tensor]]:
    """A gradient for one server, as words and bytes.

    Arguments:
        buffers: the entries of the model's buffers.
    """
    parts: list[Tensor] = []
    rows: list[int] = []
    for member in server.members if sums.weight else ():
        if isinstance(member, OwnedTable):
            total = member.table.total(sums)
            rows.append(-1 if total is None else total.indices().shape[1])
            parts += [] if total is None else [total.indices()[0], total.values()]
        elif updater.is_touched(member, sums):
            updater.reduce(member, sums)
            parts += [span.scratch.clone() for span in member.spans]
    if server.buffers is not None and sums.weight:
        for entry, values in zip(buffers, server.buffers.values, strict=True):
            if sums.touched[entry]:
                mean = torch.empty_like(values)
                sums.mean_buffer(entry, mean)
                parts.append(mean)
    return {"rows": rows}, parts


def announced(sums: Gradient) -> tuple[Words, Tensor]:
    """What all servers have to know of a gradient."""
    return {"weight": sums.weight, "complete": sums.complete}, torch.from_numpy(sums.touched.view(np.uint8))


@dataclass(slots=True)
class Received:
    """A `Gradient` for one server, from a message.

    Attributes:
        size_bytes: of what it was made of.
    """

    weight: float
    complete: bool
    touched: NDArray[np.bool_]
    rows: Mapping[int, Sequence[Tensor]] = field(default_factory=dict)
    totals: MutableMapping[int, Tensor | None] = field(default_factory=dict)
    size_bytes: int = 0
    _spans: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    _buffers: dict[int, Tensor] = field(default_factory=dict)

    @classmethod
    def read(
        cls,
        server: Server,
        updater: Updater,
        general: Words,
        touched: NDArray[np.bool_],
        words: Words,
        data: Tensor,
        buffers: Sequence[int],
    ) -> "Received":
        """From what `announced` and `pushed` gave.

        Arguments:
            data: begins with the server's bytes.
        """
        found, at, counts = cls(general["weight"], general["complete"], touched), 0, iter(words["rows"])
        found.totals.update((owned.table.parameter, None) for owned in server.tables)
        for member in server.members if found.weight else ():
            if isinstance(member, OwnedTable):
                count, shape = next(counts), member.values.shape
                if count < 0:
                    continue
                rows, at = _cut(data, at, torch.int64, count)
                values, at = _cut(data, at, member.values.dtype, count * member.values[0].numel())
                total = torch.sparse_coo_tensor(rows[None], values.view(count, *shape[1:]), shape, is_coalesced=True)
                found.totals[member.table.parameter] = total
            elif updater.is_touched(member, found):
                for span in member.spans:
                    found._spans[span.segment, span.start], at = _cut(
                        data, at, span.scratch.dtype, span.scratch.numel()
                    )
        if server.buffers is not None and found.weight:
            for entry, like in zip(buffers, server.buffers.values, strict=True):
                if touched[entry]:
                    flat, at = _cut(data, at, like.dtype, like.numel())
                    found._buffers[entry] = flat.view(like.shape)
        found.size_bytes = at
        return found

    def mean(self, spans: Sequence[Span], team: int | None, blocks: Sequence[BlockOfUses]) -> None:
        """See `Gradient`."""
        for span in spans:
            came = self._spans.get((span.segment, span.start))
            if came is None:
                span.scratch.zero_()
            else:
                span.scratch.copy_(came)

    def mean_buffer(self, entry: int, out: Tensor) -> None:
        """See `Gradient`."""
        out.copy_(self._buffers[entry])


def _cut(data: Tensor, at: int, dtype: torch.dtype, count: int) -> tuple[Tensor, int]:
    """The next numbers of a message, and where they end."""
    stop = at + count * dtype.itemsize
    part = data[at:stop]
    if part.storage_offset() % dtype.itemsize:  # what came before was of another size
        part = part.clone()
    return part.view(dtype), stop
