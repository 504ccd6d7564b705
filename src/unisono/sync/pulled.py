"""Parameters and buffers that a worker computes with, copied from what all workers have in common."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from unisono.plan.assignment import Run
from unisono.state.training_state import TrainingState
from unisono.sync.tables import Table


class PulledValues:
    """A worker's own copy of parameters and buffers, which its model computes with.

    Attributes:
        values: of the parameters, in flat order.
        buffers: of the buffers.
    """

    def __init__(self, state: TrainingState) -> None:
        own_state = state.apart()
        self.values = own_state.values
        self.buffers = [torch.empty_like(buffer) for buffer in state.buffers]
        self._state = state
        elements = enumerate(state.layout.flat.segment_elements)
        self._segments = [own_state.span(segment, 0, number) for segment, number in elements]
        self.pull_everything()

    def pull_everything(self) -> None:
        """Copy the whole state."""
        for segment, own in enumerate(self._segments):
            own.copy_(self._state.span(segment, 0, own.numel()))
        for buffer, common in zip(self.buffers, self._state.buffers, strict=True):
            buffer.copy_(common)

    def push_everything(self) -> None:
        """Let the state's parameters be these."""
        for segment, own in enumerate(self._segments):
            self._state.span(segment, 0, own.numel()).copy_(own)

    def pull_rows(self, table: Table, rows: Tensor) -> None:
        """Copy some rows of a table from the state."""
        self.values[table.parameter][rows] = self._state.values[table.parameter][rows]

    def pull(self, runs: Sequence[Run]) -> None:
        """Copy some runs from the state."""
        for own, common in self._parts(runs):
            own.copy_(common)

    def common(self, runs: Sequence[Run]) -> list[Tensor]:
        """What the state has of some runs, for a message."""
        return [common.clone() for _, common in self._parts(runs)]

    def put(self, runs: Sequence[Run], data: Tensor) -> int:
        """Take some runs from a message that begins with them (see `common`); how many bytes they are."""
        at = 0
        for own, _ in self._parts(runs):
            stop = at + own.nbytes
            own.view(-1).view(torch.uint8).copy_(data[at:stop])
            at = stop
        return at

    def take(self, other: "PulledValues") -> None:
        """Have the values of others."""
        for own, theirs in zip([*self._segments, *self.buffers], [*other._segments, *other.buffers], strict=True):
            own.copy_(theirs)

    def _parts(self, runs: Sequence[Run]) -> Iterator[tuple[Tensor, Tensor]]:
        """Of some runs, each part here, and where it is in the state."""
        state = self._state
        for run in runs:
            if run == state.layout.buffer_run:
                yield from zip(self.buffers, state.buffers, strict=True)
                continue
            for segment, start, stop in state.layout.spans(run):
                yield self._segments[segment][start:stop], state.span(segment, start, stop)
