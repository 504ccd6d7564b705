"""Where every part of a training state lies: values, optimizer state, buffers, as byte ranges of one region.

Element-wise state mirrors the values, segment by segment, so that a run of blocks is one range of each. State of
the other optimizer classes lies parameter by parameter.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unisono.comm.arena import Region, Regions
from unisono.comm.partial import item_size
from unisono.optim.state_spec import OptimizerSpec
from unisono.plan.assignment import Run, UpdateClass
from unisono.plan.blocks import FlatLayout, TensorSpec

PYTHON_STATE_BYTES = 1 << 16
CELL = 8


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Byte ranges of a training state.

    Attributes:
        flat, optimizer, buffers: what it is made of.
        regions: by name: ``values S``, ``state KEY S``, ``scalars``, ``state of P KEY``, ``buffer B``, ``python``.
        scalar_keys: the cells of a block's row in ``scalars``; the first cell, unnamed, tells whether it has state.
    """

    flat: FlatLayout
    optimizer: OptimizerSpec
    buffers: tuple[TensorSpec, ...]
    regions: Regions
    scalar_keys: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of one replica's state."""
        return self.regions.size_bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a block's row of scalars."""
        return CELL * (1 + len(self.scalar_keys))

    @property
    def blocks(self) -> int:
        """Blocks of parameters, and one more that stands for all buffers."""
        return len(self.flat.blocks) + 1

    @property
    def buffer_run(self) -> Run:
        """The run that is the buffers."""
        return Run(len(self.flat.blocks), len(self.flat.blocks) + 1)

    def spans(self, run: Run) -> list[tuple[int, int, int]]:
        """(segment, start, stop) in elements that a run covers, padding included, adjacent blocks joined."""
        spans: list[tuple[int, int, int]] = []
        for block in self.flat.blocks[run.first : run.stop]:
            place = self.flat.padded_place(block)
            previous = self.flat.parameters[block.parameter - 1] if block.parameter else None
            joined = (
                spans
                and spans[-1][0] == place.segment
                and (block.index > 0 or (previous and previous.group is not None))
            )
            if joined:
                spans[-1] = (place.segment, spans[-1][1], place.offset + place.numel)
            else:
                spans.append((place.segment, place.offset, place.offset + place.numel))
        return spans

    def column(self, run: Run) -> list[Region]:
        """Every byte range that an agreement on a run of the model itself may change: the same run of every replica."""
        return [region for part in self.flat.column(run.first, run.stop) for region in self.image(Run(*part))]

    def image(self, run: Run) -> list[Region]:
        """Every byte range that an update of the run may change."""
        named = self.regions.named
        if run == self.buffer_run:
            return [named[f"buffer {b}"] for b in range(len(self.buffers))]
        ranges: list[Region] = []
        for segment, start, stop in self.spans(run):
            keys = self.optimizer.element_keys(self.flat.segment_dtypes[segment], self.flat.segment_replicas[segment])
            for name in (f"values {segment}", *(f"state {key} {segment}" for key, _ in keys)):
                region = named[name]
                size = region.size_bytes // max(1, self.flat.segment_elements[segment])
                ranges.append(region.part(start * size, (stop - start) * size))
        row = self.row_bytes
        ranges.append(named["scalars"].part(run.first * row, (run.stop - run.first) * row))
        if self.optimizer.update is not UpdateClass.ELEMENT:
            for parameter in sorted({b.parameter for b in self.flat.blocks[run.first : run.stop]}):
                for spec in self.optimizer.tensors[parameter]:
                    ranges.append(named[f"state of {parameter} {spec.name}"])
        if self.optimizer.update is UpdateClass.COUPLED:
            ranges.append(named["python"])
        return ranges


def state_layout(flat: FlatLayout, optimizer: OptimizerSpec, buffers: Sequence[TensorSpec]) -> StateLayout:
    """Divide the region of one replica's state."""
    regions = Regions()
    kinds = zip(flat.segment_dtypes, flat.segment_replicas, flat.segment_elements, strict=True)
    for segment, (dtype, replica, elements) in enumerate(kinds):
        regions.add(f"values {segment}", elements * item_size(dtype), 4096)
        for key, key_dtype in optimizer.element_keys(dtype, replica):
            regions.add(f"state {key} {segment}", elements * item_size(key_dtype), 4096)
    scalars = optimizer.scalar_keys()
    regions.add("scalars", CELL * (1 + len(scalars)) * max(1, len(flat.blocks)))
    for parameter, specs in enumerate(optimizer.tensors):
        for spec in specs:
            regions.add(f"state of {parameter} {spec.name}", spec.numel * item_size(spec.dtype))
    for b, spec in enumerate(buffers):
        regions.add(f"buffer {b}", spec.numel * item_size(spec.dtype))
    if optimizer.update is UpdateClass.COUPLED:
        regions.add("python", PYTHON_STATE_BYTES)
    return StateLayout(flat, optimizer, tuple(buffers), regions, scalars)
