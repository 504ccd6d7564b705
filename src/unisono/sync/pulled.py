"""Parameters and buffers that a worker computes with, copied from what all workers have in common."""

from collections.abc import Sequence

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
        state = self._state
        for run in runs:
            if run == state.layout.buffer_run:
                for own, common in zip(self.buffers, state.buffers, strict=True):
                    own.copy_(common)
                continue
            for segment, start, stop in state.layout.spans(run):
                self._segments[segment][start:stop].copy_(state.span(segment, start, stop))

    def take(self, other: "PulledValues") -> None:
        """Have the values of others."""
        for own, theirs in zip([*self._segments, *self.buffers], [*other._segments, *other.buffers], strict=True):
            own.copy_(theirs)
