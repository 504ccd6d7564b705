"""What one worker owns: runs of blocks with their memory, their gradients and their optimizer's view, prepared once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from unisono.comm.arena import Region
from unisono.comm.journal import Image
from unisono.optim.blockwise import BlockOptimizer, Stretch, Unit
from unisono.plan.assignment import Run, Teams, UpdateClass, runs
from unisono.plan.blocks import aligned
from unisono.state.layout import StateLayout
from unisono.state.training_state import TrainingState
from unisono.sync.sums import Span


@dataclass(frozen=True, slots=True)
class OwnedRun:
    """A run of blocks with all that its owner needs, prepared once.

    Attributes:
        run: its blocks.
        image: its memory.
        spans: its gradient.
        units: what the optimizer updates.
        stretch: all of them as one, where that can be.
        gradients: of each block of the run, in the spans' scratch memory.
        team: whose partials hold the whole of it; None where a parameter is used under several names, or by several
            teams.
        replica: whose run it is, where several train apart; 0 for the model itself.
    """

    run: Run
    image: Image
    spans: Sequence[Span]
    units: Sequence[Unit]
    stretch: Stretch | None
    gradients: Sequence[Tensor]
    team: int | None
    replica: int


@dataclass(frozen=True, slots=True)
class OwnedBuffers:
    """The buffers' committed values and their memory, where this worker commits them."""

    run: Run
    image: Image
    values: Sequence[Tensor]


class RunMemory:
    """Where the bytes of runs lie, and where their old bytes go: what the journal wants.

    Arguments:
        layout: of the training state.
        live, undo, snapshot: the state, this worker's undo area, and the snapshot, as bytes.
    """

    def __init__(self, layout: StateLayout, live: Tensor, undo: Tensor, snapshot: Tensor) -> None:
        self._layout = layout
        self._live = live
        self._undo = undo
        self._snapshot = snapshot

    @property
    def undo(self) -> Tensor:
        """Where old bytes go."""
        return self._undo

    def image(self, run: Run, *, column: bool = False) -> Image:
        """One run's memory.

        Arguments:
            column: and that of the same run of every replica.
        """
        live, undo, snapshot = [], [], []
        used = 0
        for stripes in _stripes(self._layout.column(run) if column else self._layout.image(run)):
            live.append(stripes.of(self._live))
            snapshot.append(stripes.of(self._snapshot))
            size_bytes = stripes.count * stripes.size_bytes
            undo.append(stripes.packed(self._undo[used : used + size_bytes]))
            used += aligned(size_bytes)
        return Image(run.first, run.stop - run.first, live, undo, snapshot, column)


WORD, PIECE_WORDS = 8, 512


@dataclass(frozen=True, slots=True)
class _Stripes:
    """Equal regions at equal distances, copied a piece of each in turn.

    A run's values and its optimizer's state are such regions. One core reads several streams faster than one after
    another: 21 MB in 1.2 ms instead of 1.5.
    """

    offset: int
    size_bytes: int
    count: int
    distance: int

    @property
    def _piece(self) -> int:
        """Words of a piece: the largest power of two that divides a region, up to `PIECE_WORDS`."""
        words = self.size_bytes // WORD
        return min(words & -words, PIECE_WORDS)

    def of(self, memory: Tensor) -> Tensor:
        """The regions inside ``memory``, (pieces, regions, words of a piece); a single one as it is."""
        stop = self.offset + (self.count - 1) * self.distance + self.size_bytes
        whole = memory[self.offset : stop]
        if self.count == 1:
            return whole
        words = whole.view(torch.int64)
        shape = (self.size_bytes // WORD // self._piece, self.count, self._piece)
        return words.as_strided(shape, (self._piece, self.distance // WORD, 1))

    def packed(self, memory: Tensor) -> Tensor:
        """``memory``, which holds the regions' bytes piece by piece, in the same shape."""
        return memory if self.count == 1 else memory.view(torch.int64).view(-1, self.count, self._piece)


def _stripes(regions: Sequence[Region]) -> list[_Stripes]:
    """Join neighbours of one size and distance, where their pieces are long enough to pay."""
    result: list[_Stripes] = []
    for region in regions:
        last = result[-1] if result else None
        if last is not None and region.size_bytes == last.size_bytes and region.size_bytes % (64 * WORD) == 0:
            distance = region.offset - last.offset - (last.count - 1) * last.distance
            even = last.count == 1 or distance == last.distance
            if even and distance > 0 and distance % WORD == 0 and last.offset % WORD == 0:
                result[-1] = _Stripes(last.offset, last.size_bytes, last.count + 1, distance)
                continue
        result.append(_Stripes(region.offset, region.size_bytes, 1, 0))
    return result


def undo_bytes(layout: StateLayout, most: int) -> int:
    """Bytes of an undo area that holds any run, whoever are the owners, or the buffers.

    Wherever a run begins, two neighbours of all blocks' runs hold it: a third one would be within the limit of one.

    Arguments:
        most: elements of a run.
    """
    flat, update = layout.flat, layout.optimizer.update
    everything = runs(flat, update, range(len(flat.blocks)), most)
    images = [layout.image(run) for run in everything]
    if flat.replicas:
        each = len(flat.blocks) // (1 + flat.replicas)
        images += [layout.column(run) for run in everything if run.stop <= each]
    most = max((sum(aligned(region.size_bytes) for region in image) for image in images), default=0)
    buffers = sum(aligned(region.size_bytes) for region in layout.image(layout.buffer_run))
    return max(2 * most if update is UpdateClass.ELEMENT else most, buffers)


@dataclass(frozen=True, slots=True)
class Owner:
    """Prepares the runs that a worker owns.

    Attributes:
        state: the training state.
        memory: where runs lie.
        originals: the parameters that the user's optimizer was made with, in flat order.
        teams: who computes with what.
        joinable: blocks may be updated as one tensor. With more than one thread a CPU's kernel divides a tensor by its
            size, wherever that falls, so blocks stay apart.
    """

    state: TrainingState
    memory: RunMemory
    originals: Sequence[nn.Parameter]
    teams: Teams
    joinable: bool

    @property
    def _layout(self) -> StateLayout:
        return self.state.layout

    @property
    def buffer_run(self) -> Run:
        """The run that is the buffers."""
        return self._layout.buffer_run

    @property
    def _elementwise(self) -> bool:
        return self._layout.optimizer.update is UpdateClass.ELEMENT

    def prepare(self, runs: Sequence[Run], optimizer: BlockOptimizer) -> list[OwnedRun]:
        """The runs with all that their owner needs; their units are attached to the optimizer."""
        scratch: dict[str, Tensor] = {}
        result = []
        for run in runs:
            spans = self._spans(run, scratch)
            gradients = [self._gradient(spans, block) for block in range(run.first, run.stop)]
            units = self._units(run)
            for unit, block in units:
                optimizer.attach(unit, _in_the_shape_of(unit, gradients[block - run.first]))
            stretch = None
            if self._elementwise and self.joinable and len(spans) == 1:
                stretch = self._stretch(spans[0], run, units[0][0])
                optimizer.attach(stretch.unit, spans[0].scratch)
            members, replica = [unit for unit, _ in units], self._replica(run)
            image, team = self.memory.image(run), self._team(run)
            result.append(OwnedRun(run, image, spans, members, stretch, gradients, team, replica))
        return result

    def columns(self, run: Run) -> list[tuple[int, Unit, list[Unit]]]:
        """For each unit of a run of the model itself: its first block, it, and the same of every replica."""
        parts = [self._units(Run(*part)) for part in self._layout.flat.column(run.first, run.stop)]
        return [(block, unit, [other for other, _ in others]) for (unit, block), *others in zip(*parts, strict=True)]

    def beside_the_model(self, span: Span) -> tuple[Tensor, Tensor]:
        """The values of a span of a replica, and those of the model itself."""
        flat = self._layout.flat
        own = span.segment % (len(flat.segment_dtypes) // (1 + flat.replicas))
        return self.state.span(span.segment, span.start, span.stop), self.state.span(own, span.start, span.stop)

    def _replica(self, run: Run) -> int:
        flat = self._layout.flat
        return flat.parameters[flat.blocks[run.first].parameter].replica

    def prepare_buffers(self) -> OwnedBuffers:
        """The buffers, which may be none, with all that their owner needs."""
        return OwnedBuffers(self.buffer_run, self.memory.image(self.buffer_run), self.state.buffers)

    def _team(self, run: Run) -> int | None:
        flat = self._layout.flat
        uses = [flat.uses_of(p) for p in {block.parameter for block in flat.blocks[run.first : run.stop]}]
        found = {self.teams.uses[of[0]] for of in uses}
        return found.pop() if len(found) == 1 and all(len(of) == 1 for of in uses) else None

    def _spans(self, run: Run, scratch: dict[str, Tensor]) -> list[Span]:
        """The run's gradient, and the memory for its sum: that in ``scratch`` where it is large enough."""
        spans: list[Span] = []
        for segment, start, stop in self._layout.spans(run):
            dtype: torch.dtype = getattr(torch, self._layout.flat.segment_dtypes[segment])
            key = f"{dtype} {len(spans)}"
            if key not in scratch or scratch[key].numel() < stop - start:
                scratch[key] = torch.zeros(stop - start, dtype=dtype, device=self.state.memory.device)
            spans.append(Span(segment, start, stop, scratch[key][: stop - start]))
        return spans

    def _gradient(self, spans: Sequence[Span], block: int) -> Tensor:
        place = self._layout.flat.block_place(self._layout.flat.blocks[block])
        span = next(s for s in spans if s.segment == place.segment and s.start <= place.offset < s.stop)
        return span.scratch[place.offset - span.start : place.offset - span.start + place.numel]

    def _units(self, run: Run) -> list[tuple[Unit, int]]:
        """What the optimizer sees of a run, each with its first block."""
        blocks = self._layout.flat.blocks
        first = [i for i in range(run.first, run.stop) if self._elementwise or blocks[i].index == 0]
        return [(self._unit(i), i) for i in first]

    def _unit(self, index: int) -> Unit:
        flat, block = self._layout.flat, self._layout.flat.blocks[index]
        parameter = flat.parameters[block.parameter]
        assert parameter.group is not None
        if self._elementwise:
            place = flat.padded_place(block)
            extent = (place.segment, place.offset, place.offset + place.numel)
            values, kept = self.state.span(*extent), self.state.span_state(*extent, index)
            span = slice(block.start, block.stop)
        else:
            values, kept = self.state.values[block.parameter], self.state.parameter_state(block.parameter)
            span = slice(0, parameter.tensor.numel)
        return Unit(
            parameter=block.parameter,
            name=parameter.tensor.name,
            group=parameter.group,
            original=self.originals[block.parameter],
            span=span,
            values=values,
            state=kept,
            present=self.state.present(index),
        )

    def _stretch(self, span: Span, run: Run, first: Unit) -> Stretch:
        """A whole run as one unit."""
        extent = (span.segment, span.start, span.stop)
        values, kept = self.state.span(*extent), self.state.span_state(*extent, run.first)
        words = [self.state.present(block) for block in range(run.first, run.stop)]
        return Stretch(replace(first, values=values, state=kept), self.state.rows(run.first, run.stop), words)


def _in_the_shape_of(unit: Unit, first_block: Tensor) -> Tensor:
    """The gradient of a unit: its blocks, and a last block's padding, lie behind each other in scratch memory."""
    whole = torch.as_strided(first_block, (unit.values.numel(),), (1,), first_block.storage_offset())
    return whole.view(unit.values.shape)
