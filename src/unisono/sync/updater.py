"""One run's update: its mean gradient, clipped, and the optimizer's step."""

from collections.abc import Callable
from fnmatch import fnmatchcase

from unisono.config import ClipConfig
from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.clipping import clip_units
from unisono.plan.blocks import FlatLayout, split_name
from unisono.sync.ownership import OwnedBuffers, OwnedRun
from unisono.sync.sums import Gradient


class Updater:
    """Updates runs of one state.

    Arguments:
        flat: where gradients lie.
        optimizer: how runs are updated.
        limits: of gradients.
    """

    def __init__(self, flat: FlatLayout, optimizer: BlockOptimizer, limits: ClipConfig | None) -> None:
        self._flat = flat
        self._optimizer = optimizer
        self._limits = limits
        self._uses_of = [flat.uses_of(p) for p in range(len(flat.parameters))]

    def reduce(self, owned: OwnedRun, sums: Gradient) -> None:
        """The mean of the run's gradient, into its scratch memory."""
        blocks = self._flat.blocks[owned.run.first : owned.run.stop]
        parts = zip(blocks, owned.gradients, strict=True)
        sums.mean(owned.spans, owned.team, [(block, self._uses_of[block.parameter], part) for block, part in parts])

    def is_touched(self, owned: OwnedRun, sums: Gradient) -> bool:
        """Whether any of a run has a gradient."""
        parameters = {block.parameter for block in self._flat.blocks[owned.run.first : owned.run.stop]}
        return any(sums.touched[self._uses_of[parameter]].any() for parameter in parameters)

    def clip(self, owned: OwnedRun, factor: float) -> None:
        """Make a run's gradients smaller: all by one factor, each value, or each unit by its own."""
        limits = self._limits
        if factor != 1.0:
            for span in owned.spans:
                span.scratch.mul_(factor)
        if limits is not None and limits.value is not None:
            for span in owned.spans:
                span.scratch.clamp_(-limits.value, limits.value)
        if limits is not None and limits.agc is not None:
            for unit in owned.units:
                if not any(fnmatchcase(split_name(unit.name)[1], pattern) for pattern in limits.agc_exclude):
                    clip_units(unit.values, self._optimizer.gradient(unit), limits.agc, limits.agc_eps)

    def update(self, owned: OwnedRun, sums: Gradient) -> Callable[[], None]:
        """What changes the run, by the gradient in its scratch memory."""
        units, stretch = owned.units, owned.stretch
        if not sums.complete:  # like grad=None: what no micro-batch touched is skipped
            units = [unit for unit in units if sums.touched[self._uses_of[unit.parameter]].any()]

        def change() -> None:
            if stretch is not None and len(units) == len(owned.units) and stretch.uniform:
                self._optimizer.step_stretch(stretch)
            elif units:
                self._optimizer.step(units)

        return change

    def update_buffers(self, buffers: OwnedBuffers, sums: Gradient) -> None:
        """The mean of those that micro-batches wrote."""
        uses = len(self._flat.uses)
        for b, values in enumerate(buffers.values):
            if sums.touched[uses + b]:
                sums.mean_buffer(uses + b, values)
