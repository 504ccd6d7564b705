"""K-FAC at every step: first what is learned of the curvature, then the weights of its layers.

Each matrix of the curvature has one owner, which averages and decomposes it; work is shared out by its cost. Once all
are at the step, the owner of a layer's weights turns their gradient by what the owners of its matrices have found, and
all together limit how far the model moves.
"""

import math
from collections.abc import Sequence

from torch import Tensor

from unisono.errors import TrainingError
from unisono.optim.kfac import KFAC
from unisono.optim.kronecker import limited, natural_gradient, not_finite
from unisono.plan.assignment import Run
from unisono.plan.blocks import home_of
from unisono.plan.curvature import CurvedLayer, curved_layers
from unisono.state.training_state import TrainingState
from unisono.sync.every_step import BlockNumbers, EveryStep, Versions
from unisono.sync.ownership import OwnedRun
from unisono.sync.phases import Phases
from unisono.sync.sums import StepSums


class CurvedSteps(EveryStep):
    """The exact policy, with an optimizer that learns the curvature.

    Arguments:
        kfac: its settings.
        state: the training state.
        versions: how far all blocks are.
        changes: for each layer, at the first block of its weights, how far its direction alone would move the model.
        arguments: as of `EveryStep`.
    """

    def __init__(
        self, kfac: KFAC, state: TrainingState, versions: Versions, changes: BlockNumbers, *arguments: object
    ) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self._kfac = kfac
        self._state = state
        self._all_versions = versions
        self._changes = changes
        self._layers = {layer.weight: layer for layer in curved_layers(self._flat)}
        self._factors = [
            i for i, block in enumerate(self._flat.blocks) if self._flat.parameters[block.parameter].is_factor
        ]
        self._uses_of = {
            parameter: use
            for use, (_, parameter) in enumerate(self._flat.uses)
            if self._flat.parameters[parameter].is_factor
        }
        self._directions: dict[Run, list[Tensor]] = {}
        self._limit = 1.0

    def _bring(self, runs: Sequence[OwnedRun], step: int, phases: Phases) -> None:
        """First the curvature, then what is turned by it."""
        under_way = self._under_way
        assert under_way is not None
        if under_way.sums.weight == 0:
            super()._bring(runs, step, phases)
            return
        mine = list(runs)

        def learn(further: Sequence[OwnedRun]) -> None:
            self._learn(further, step, phases)

        def learn_and_turn(further: Sequence[OwnedRun]) -> None:
            learn(further)
            self._turn(further, step)

        learn(mine)
        mine += self._await(lambda: self._all_versions.await_all(step, self._factors), phases, "update", learn)
        phases.enter("update")
        self._turn(mine, step)
        mine += self._await(lambda: self._changes.await_all(step), phases, "update", learn_and_turn)
        phases.enter("update")
        change = sum(self._changes.all(step))
        if not math.isfinite(change):
            raise TrainingError(
                f"the natural gradient is not finite at step {step} though the loss is; lower the learning rate, or "
                "look at the model's numerics"
            )
        self._limit = limited(change, self._kfac.kl_clip)
        super()._bring([owned for owned in mine if not self._is_factor(owned)], step, phases)
        self._directions.clear()

    def _learn(self, runs: Sequence[OwnedRun], step: int, phases: Phases) -> None:
        super()._bring([owned for owned in runs if self._is_factor(owned)], step, phases)

    def _turn(self, runs: Sequence[OwnedRun], step: int) -> None:
        """Find the directions of layers, and leave how far they would move the model."""
        for owned in runs:
            over = self._is_factor(owned) or self._holdings.is_done(owned.run, step)
            change = 0.0 if over else self._direction(owned)
            if not self._changes.has(step, owned.run):
                self._changes.put(step, owned.run, [change] + [0.0] * (len(owned.gradients) - 1))

    def _direction(self, owned: OwnedRun) -> float:
        """The natural gradient of a layer, kept until the others have theirs; how far it would move the model."""
        assert self._under_way is not None
        layer = self._layers.get(owned.units[0].parameter)
        if layer is None or not self._is_known(layer, self._under_way.sums):
            return 0.0
        self._reduce(owned, self._under_way.sums)
        self._clip(owned)
        weight, *bias = (self._optimizer.gradient(unit) for unit in owned.units)
        inputs, outputs = (self._state.parameter_state(p) for p in (layer.inputs, layer.outputs))
        of_bias = bias[0] if bias else None
        direction, column, change = natural_gradient(weight, of_bias, inputs, outputs, self._kfac.damping)
        self._directions[owned.run] = [direction] if column is None else [direction, column]
        return self._optimizer.rate_of(owned.units[0].group) ** 2 * change

    def _is_known(self, layer: CurvedLayer, sums: StepSums) -> bool:
        """Whether a layer's curvature has been decomposed, and micro-batches have come by it."""
        first = [self._flat.blocks_of(parameter)[0] for parameter in (layer.inputs, layer.outputs)]
        return all(self._state.present(block)[0] for block in first) and bool(
            sums.touched[self._flat.uses_of(layer.weight)].any()
        )

    def _gradient(self, owned: OwnedRun, sums: StepSums) -> None:
        """What the optimizer is given: the direction, where there is one."""
        directions = self._directions.get(owned.run)
        if directions is None:
            super()._gradient(owned, sums)
            return
        for unit, direction in zip(owned.units, directions, strict=True):
            self._optimizer.gradient(unit).copy_(direction * self._limit)

    def _clip(self, owned: OwnedRun) -> None:
        """What is told of the curvature is not limited."""
        if not self._is_factor(owned):
            super()._clip(owned)

    def _squares_of(self, owned: OwnedRun, sums: StepSums) -> list[float]:
        """Nor does it count for the norm."""
        return [0.0] * len(owned.gradients) if self._is_factor(owned) else super()._squares_of(owned, sums)

    def _reduce(self, owned: OwnedRun, sums: StepSums) -> None:
        """What is told of the curvature is the mean over the micro-batches that came by the layer.

        Raises:
            TrainingError: where it is not finite.
        """
        super()._reduce(owned, sums)
        if not self._is_factor(owned):
            return
        use, parameter = self._uses_of[owned.units[0].parameter], self._flat.parameters[owned.units[0].parameter]
        came, all_that_told = sums.count_of(use), max(map(sums.count_of, self._uses_of.values()))
        for span in owned.spans:
            if 0 < came < all_that_told:
                span.scratch.mul_(all_that_told / came)
            if not bool(span.scratch.isfinite().all()):
                raise TrainingError(not_finite(home_of(parameter.tensor.name).rpartition(".")[0]))

    def _is_factor(self, owned: OwnedRun) -> bool:
        return self._flat.parameters[owned.units[0].parameter].is_factor
