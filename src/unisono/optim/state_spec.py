"""What state an optimizer keeps, found by letting a copy of it take one step on a small tensor.

The arena has to be divided before the first step, and an optimizer makes its state during it.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.errors import ConfigurationError
from unisono.optim.eager import stepper
from unisono.plan.assignment import UpdateClass
from unisono.plan.blocks import FlatLayout, TensorSpec

PROBE_ELEMENTS = 8


Keys = tuple[tuple[str, str], ...]
"""State by key and dtype."""


@dataclass(frozen=True, slots=True)
class ElementState:
    """What an element-wise optimizer keeps for the parameters of one group and dtype.

    Attributes:
        replica: whose parameters they are (see `ParameterSpec`).
        elements: state with a value for each element.
        scalars: state with one value a parameter.
    """

    group: int
    dtype: str
    elements: Keys
    scalars: Keys
    replica: int = 0


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """The state that an optimizer keeps.

    Attributes:
        update: its class.
        element_states: for the element-wise class.
        tensors: for the other classes: state by parameter, in flat order.
    """

    update: UpdateClass
    element_states: tuple[ElementState, ...] = ()
    tensors: tuple[tuple[TensorSpec, ...], ...] = ()

    def state_of(self, group: int, dtype: str) -> ElementState:
        """What is kept for the parameters of a group and dtype."""
        return next(state for state in self.element_states if (state.group, state.dtype) == (group, dtype))

    def element_keys(self, dtype: str, replica: int = 0) -> Keys:
        """What is kept for each element of any parameter of a dtype, in order of key."""
        states = (state for state in self.element_states if (state.dtype, state.replica) == (dtype, replica))
        return tuple(sorted({item for state in states for item in state.elements}))

    def scalar_keys(self) -> tuple[str, ...]:
        """All keys with one value a parameter, in order."""
        return tuple(sorted({key for state in self.element_states for key, _ in state.scalars}))


def clone(optimizer: Optimizer, groups: Sequence[Sequence[nn.Parameter]]) -> Optimizer:
    """An optimizer with the same class and settings, over other parameters, one list for each group; no state."""
    copy = object.__new__(type(optimizer))
    copy.__dict__.update(optimizer.__dict__)
    copy.state = defaultdict(dict)
    copy.param_groups = [
        {**group, "params": list(members)} for group, members in zip(optimizer.param_groups, groups, strict=True)
    ]
    return copy


def initial_state(optimizer: Optimizer, parameter: nn.Parameter) -> dict[str, Any]:
    """State that an optimizer made in its constructor (Adagrad does)."""
    state = optimizer.state
    return dict(state[parameter]) if parameter in state else {}


def state_spec(
    optimizer: Optimizer, update: UpdateClass, flat: FlatLayout, parameters: Sequence[nn.Parameter]
) -> OptimizerSpec:
    """Find the state; ``parameters`` are in flat order, with or without values.

    Raises:
        ConfigurationError: for state that cannot be kept, or cannot be made without values.
    """
    if any(p.is_meta for p in parameters):
        _refuse_what_needs_values(optimizer, update, parameters)
    if update is UpdateClass.ELEMENT:
        kinds: dict[tuple[int, str, int], nn.Parameter] = {}
        for spec, parameter in zip(flat.parameters, parameters, strict=True):
            if spec.group is not None:
                kinds.setdefault((spec.group, spec.tensor.dtype, spec.replica), parameter)
        return OptimizerSpec(update, tuple(_element_state(optimizer, *kind, first) for kind, first in kinds.items()))
    groups = [spec.group for spec in flat.parameters]
    if update is UpdateClass.PARAMETER:
        found = [
            _alone(optimizer, group, p) if group is not None else {}
            for group, p in zip(groups, parameters, strict=True)
        ]
    else:
        found = _together(optimizer, groups, parameters)
    for state in found:
        _refuse_what_cannot_be_kept(optimizer, state, numbers=update is UpdateClass.COUPLED)
    return OptimizerSpec(update, tensors=tuple(tuple(_specs(state)) for state in found))


def with_further(
    spec: OptimizerSpec, flat: FlatLayout, keys: Sequence[str], of_replicas: Sequence[str]
) -> OptimizerSpec:
    """What an optimizer keeps, and what agreements between replicas do besides, in the parameters' own dtype and shape.

    Arguments:
        keys: of the model itself.
        of_replicas: of each replica.
    """
    states = []
    for state in spec.element_states:
        further = tuple((key, state.dtype) for key in (of_replicas if state.replica else keys))
        states.append(replace(state, elements=(*state.elements, *further)))
    tensors = []
    for parameter, specs in zip(flat.parameters, spec.tensors, strict=False):
        further_keys = () if parameter.group is None else of_replicas if parameter.replica else keys
        tensors.append((*specs, *(replace(parameter.tensor, name=key) for key in further_keys)))
    return replace(spec, element_states=tuple(states), tensors=tuple(tensors))


def _refuse_what_needs_values(optimizer: Optimizer, update: UpdateClass, parameters: Sequence[nn.Parameter]) -> None:
    early = any(initial_state(optimizer, parameter) for parameter in parameters)
    if early or update is UpdateClass.COUPLED:
        why = "makes its state in its constructor" if early else "is of no known class"
        raise ConfigurationError(
            f"init is by_name, but optimizer {type(optimizer).__name__} {why}, from values that are not there yet; "
            "use init=stream, or another optimizer"
        )


def _refuse_what_cannot_be_kept(optimizer: Optimizer, state: dict[str, Any], *, numbers: bool) -> None:
    allowed = (Tensor, int, float) if numbers else (Tensor,)
    for key, value in state.items():
        if value is not None and not isinstance(value, allowed):
            remedy = "keep tensors" if numbers else "make it a tensor, or leave update_class out"
            raise ConfigurationError(
                f"optimizer {type(optimizer).__name__} keeps state {key!r} of type {type(value).__name__}, "
                f"which cannot be shared and saved; {remedy}"
            )


def _step(optimizer: Optimizer, *, coupled: bool = False) -> None:
    before = [_settings(group) for group in optimizer.param_groups]
    attributes, tensors = _attributes(optimizer), _tensors(optimizer)
    _take_step(optimizer)
    after = [_settings(group) for group in optimizer.param_groups]
    name = type(optimizer).__name__
    if type(optimizer).__module__.startswith("torch.optim"):
        return
    if changed := [key for key, value in _attributes(optimizer).items() if attributes.get(key) != value]:
        raise ConfigurationError(
            f"optimizer {name} keeps {changed[0]!r} as an attribute of its own, which would be lost on resume; "
            "keep it in the state of a parameter, or in a parameter group"
        )
    if _tensors(optimizer) != tensors:
        raise ConfigurationError(
            f"optimizer {name} keeps tensors in its parameter groups, which would be lost on resume; "
            "keep them in the state of a parameter"
        )
    known = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if foreign := [key for key in optimizer.state if id(key) not in known]:
        raise ConfigurationError(
            f"optimizer {name} keeps state of no parameter ({str(foreign[0])[:40]!r}), which would be lost on resume; "
            "keep it in the state of a parameter, or in a parameter group"
        )
    if not coupled and after != before:
        raise ConfigurationError(
            f"optimizer {name} counts in its parameter groups, which each owner would do at "
            "its own pace; leave its update_class out, and one owner will update everything"
        )


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """An optimizer's own numbers and tensors, as plain data."""
    return {
        key: value.tolist() if isinstance(value, Tensor) else value
        for key, value in vars(optimizer).items()
        if isinstance(value, int | float | Tensor)
    }


def _tensors(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The tensors that lie in parameter groups, as plain data."""
    return [{k: v.tolist() for k, v in group.items() if isinstance(v, Tensor)} for group in optimizer.param_groups]


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if isinstance(value, int | float)}


def _take_step(optimizer: Optimizer) -> None:
    try:
        stepper(optimizer)()
    except TypeError as error:
        raise ConfigurationError(
            f"optimizer {type(optimizer).__name__} cannot take a step without a closure ({error}); use one that can"
        ) from error


def _element_state(optimizer: Optimizer, group: int, dtype: str, replica: int, first: nn.Parameter) -> ElementState:
    state = initial_state(optimizer, first)
    numel = first.numel()
    if not state:
        device = "cpu" if first.is_meta else first.device
        probe = nn.Parameter(torch.zeros(PROBE_ELEMENTS, dtype=first.dtype, device=device))
        probe.grad = torch.zeros_like(probe)
        numel = PROBE_ELEMENTS
        trial = clone(optimizer, [[probe] if g == group else [] for g in range(len(optimizer.param_groups))])
        _step(trial)
        state = dict(trial.state.get(probe, {}))
    made = bool(initial_state(optimizer, first))  # in the constructor, of the parameter's shape
    elements, scalars = [], []
    for key, value in sorted(state.items()):
        alike = isinstance(value, Tensor) and value.numel() == numel
        if isinstance(value, Tensor) and alike and (value.dim() > 0 or (made and key != "step")):
            elements.append((key, str(value.dtype).removeprefix("torch.")))
        elif isinstance(value, Tensor) and value.numel() == 1:
            scalars.append((key, str(value.dtype).removeprefix("torch.")))
        elif value is not None:
            raise ConfigurationError(
                f"optimizer {type(optimizer).__name__} keeps state {key!r} of type {type(value).__name__}, "
                "which is not element-wise; leave its update_class out, and one owner will update everything"
            )
    return ElementState(group, dtype, tuple(elements), tuple(scalars), replica)


def _alone(optimizer: Optimizer, group: int, parameter: nn.Parameter) -> dict[str, Any]:
    probe = nn.Parameter(torch.zeros_like(parameter))
    probe.grad = torch.zeros_like(probe)
    trial = clone(optimizer, [[probe] if g == group else [] for g in range(len(optimizer.param_groups))])
    _step(trial)
    return dict(trial.state.get(probe, {}))


def _together(
    optimizer: Optimizer, groups: Sequence[int | None], parameters: Sequence[nn.Parameter]
) -> list[dict[str, Any]]:
    probes = [nn.Parameter(p.detach().clone()) for p in parameters]
    members: list[list[nn.Parameter]] = [[] for _ in optimizer.param_groups]
    for group, probe in zip(groups, probes, strict=True):
        if group is not None:
            probe.grad = torch.zeros_like(probe)
            members[group].append(probe)
    trial = clone(optimizer, members)
    _step(trial, coupled=True)
    return [dict(trial.state.get(probe, {})) for probe in probes]


def _specs(state: dict[str, Any]) -> list[TensorSpec]:
    return [
        TensorSpec(key, str(value.dtype).removeprefix("torch."), tuple(value.shape))
        for key, value in sorted(state.items())
        if isinstance(value, Tensor)
    ]
