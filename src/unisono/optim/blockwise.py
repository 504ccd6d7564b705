"""A user's optimizer, applied block by block, with its state in memory that outlives the worker."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.errors import TrainingError
from unisono.optim.eager import stepper
from unisono.optim.fused import kernel
from unisono.optim.numbers import Numbers, numbers
from unisono.optim.schedules import Schedule
from unisono.optim.state_spec import clone, initial_state
from unisono.plan.assignment import UpdateClass

NEXT_TO_NONE = 1e-30
"""A momentum that forgets all."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What the optimizer sees as one parameter: a block, or a whole parameter where its class needs that.

    Attributes:
        parameter, name: of the parameter, its place in the flat order and its name.
        group: the optimizer's parameter group.
        original: the parameter that the user's optimizer was made with.
        span: elements of the original that the unit covers.
        values: the unit's values in the arena; a block's with the padding behind it.
        state: the unit's optimizer state in the arena.
        present: one word, 1 once ``state`` holds values.
    """

    parameter: int
    name: str
    group: int
    original: nn.Parameter
    span: slice
    values: Tensor
    state: dict[str, Tensor]
    present: memoryview


@dataclass(frozen=True, slots=True)
class Stretch:
    """A run of blocks that lie behind each other, which an element-wise optimizer can update as one tensor.

    Attributes:
        unit: the whole stretch; its scalars are the first block's.
        rows: the scalars of all its blocks, (blocks, cells), as int64.
    """

    unit: Unit
    rows: Tensor
    present: Sequence[memoryview]

    @property
    def uniform(self) -> bool:
        """Whether all blocks have taken the same steps: only then one tensor stands for all."""
        first = self.present[0][0]
        return all(word[0] == first for word in self.present) and bool((self.rows == self.rows[:1]).all())


class BlockOptimizer:
    """Updates units that one worker owns.

    The optimizer's own code makes the state of a unit at its first step; it is then copied into the arena, and the
    optimizer goes on with that memory.
    """

    def __init__(self, optimizer: Optimizer, update: UpdateClass, python_state: memoryview | None) -> None:
        self._optimizer = clone(optimizer, [[] for _ in optimizer.param_groups])
        self._step = stepper(self._optimizer)
        self._constructed = optimizer
        self._coupled = update is UpdateClass.COUPLED
        self._update = update
        self._python_state = None if python_state is None else Numbers(optimizer, python_state)
        self._rates = [float(group["lr"]) if "lr" in group else None for group in optimizer.param_groups]
        self._momenta = [float(group.get("momentum", 0.0)) for group in optimizer.param_groups]
        self._parameters: dict[int, nn.Parameter] = {}
        self._gradients: dict[int, Tensor] = {}

    @property
    def learning_rate(self) -> float:
        """The rate of the first group, as last set."""
        groups = self._optimizer.param_groups
        return float(groups[0].get("lr", 0.0)) if groups else 0.0

    def lower_momentum(self, by: float) -> None:
        """Every group's momentum is lower than the user's by so much, from the next step on, but not below 0.

        In place of 0 it is a number that changes nothing: without momentum, optimizers leave its buffer as it was.
        """
        for group, momentum in zip(self._optimizer.param_groups, self._momenta, strict=True):
            if momentum:
                group["momentum"] = max(NEXT_TO_NONE, momentum - by)

    def begins_with_state(self, unit: Unit) -> bool:
        """Whether the optimizer makes a unit's state before its first step."""
        return bool(initial_state(self._constructed, unit.original))

    def rate_of(self, group: int) -> float:
        """The rate of a group, as last set."""
        return float(self._optimizer.param_groups[group]["lr"])

    def attach(self, unit: Unit, gradient: Tensor) -> None:
        """Make the optimizer's parameter for a unit; ``gradient`` is the memory that holds its gradient each step."""
        parameter = nn.Parameter(unit.values, requires_grad=True)
        parameter.grad = gradient
        self._parameters[id(unit)] = parameter
        self._gradients[id(unit)] = gradient
        if not unit.present[0] and (constructed := initial_state(self._constructed, unit.original)):
            self._optimizer.state[parameter] = {key: _part(key, value, unit) for key, value in constructed.items()}
            self._adopt(unit, parameter)

    def gradient(self, unit: Unit) -> Tensor:
        """The memory that holds a unit's gradient, in the shape of its values."""
        return self._gradients[id(unit)]

    def detach_all(self) -> None:
        """Forget all units; their state stays in the arena."""
        self._parameters.clear()
        self._gradients.clear()
        self._optimizer.state.clear()

    def set_rate(self, schedule: Schedule, scale: float, step: int) -> None:
        """Set every group's learning rate for a step (from 0)."""
        factor = schedule(step) * scale
        for group, rate in zip(self._optimizer.param_groups, self._rates, strict=True):
            if rate is not None:
                group["lr"] = rate * factor

    def step(self, units: Sequence[Unit]) -> None:
        """Update the units from the gradients in the memory they were attached with."""
        fresh = [unit for unit in units if not unit.present[0]]
        if self._update is UpdateClass.ELEMENT and fresh and len(fresh) < len(units):
            # some classes take one path for a whole list, by whether its first tensor has state
            units = [unit for unit in units if unit.present[0]]
            self._step_alike(fresh)
        self._step_alike(units)

    def _step_alike(self, units: Sequence[Unit]) -> None:
        groups = self._optimizer.param_groups
        for group in groups:
            group["params"] = []
        for unit in units:
            parameter = self._parameters[id(unit)]
            groups[unit.group]["params"].append(parameter)
            if not unit.present[0]:  # also where it begins anew
                self._optimizer.state.pop(parameter, None)
            elif parameter not in self._optimizer.state:
                self._optimizer.state[parameter] = dict(unit.state)
        if self._python_state is not None:
            stored = self._python_state.load(self._optimizer)
            for unit in units:
                self._optimizer.state[self._parameters[id(unit)]].update(stored.get(unit.name, {}))
        self._step()
        for unit in units:
            self._adopt(unit, self._parameters[id(unit)])
        if self._python_state is not None:
            of_units = {unit.name: numbers(self._optimizer.state[self._parameters[id(unit)]]) for unit in units}
            self._python_state.keep(self._optimizer, of_units)

    def step_stretch(self, stretch: Stretch) -> None:
        """Update a uniform stretch as one tensor: the same bits, at a fraction of the calls."""
        unit = stretch.unit
        group = self._optimizer.param_groups[unit.group]
        direct = kernel(self._optimizer, group) if unit.present[0] else None
        if direct is not None:
            direct(group, unit.values, self._gradients[id(unit)], unit.state)
        else:
            self.step([unit])
        if len(stretch.rows) > 1:
            stretch.rows[1:] = stretch.rows[0]
        for word in stretch.present:
            word[0] = 1

    def _adopt(self, unit: Unit, parameter: nn.Parameter) -> None:
        """Keep the unit's state in the arena; an optimizer may make new tensors, at its first step or at any."""
        state = self._optimizer.state[parameter]
        for key, view in unit.state.items():
            value = state.get(key)
            if value is not None and value is not view:
                view.copy_(value)
                state[key] = view
        if unknown := [k for k, v in state.items() if isinstance(v, Tensor) and k not in unit.state]:
            raise TrainingError(
                f"optimizer {type(self._optimizer).__name__} made the state {unknown[0]!r} after its first step, for "
                "which there is no room; make all of it at the first step"
            )
        unit.present[0] = 1


def _part(key: str, value: object, unit: Unit) -> object:
    """A unit's part of state that the optimizer's constructor made for the whole parameter."""
    if not isinstance(value, Tensor):
        return value
    kept = unit.state.get(key)
    if kept is None or kept.dim() == 0:
        return value.detach().clone()
    part = value.detach().reshape(-1)[unit.span]
    padding = torch.zeros(unit.values.numel() - part.numel(), dtype=part.dtype, device=part.device)
    return torch.cat([part, padding]).reshape(unit.values.shape)
