"""Attaching a model's parameters to memory: the only place where that happens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from unisono.errors import ConfigurationError
from unisono.plan.blocks import FlatLayout, ParameterSpec, TensorSpec, split_name


@dataclass(frozen=True, slots=True)
class ModelTensors:
    """A model's parameters, each once, with all names it is used under, and its buffers.

    Attributes:
        plain_buffers: names of those that belong to a plain ``state_dict``.
        ties: further names of parameters, and of buffers in a plain ``state_dict`` -> the first.
    """

    parameters: tuple[tuple[nn.Parameter, tuple[str, ...]], ...]
    buffers: tuple[tuple[str, Tensor], ...]
    plain_buffers: tuple[str, ...]
    ties: Mapping[str, str]

    def parameter_specs(self, optimizer: Optimizer) -> list[ParameterSpec]:
        """The parameters as data; what the optimizer does not hold, or what needs no gradient, is not trained.

        Raises:
            ConfigurationError: where the optimizer holds none of the model's parameters, or foreign ones.
        """
        groups = {id(p): g for g, group in enumerate(optimizer.param_groups) for p in group["params"]}
        known = {id(p) for p, _ in self.parameters}
        if foreign := [key for key in groups if key not in known]:
            raise ConfigurationError(
                f"the optimizer holds {len(foreign)} tensors that are not parameters of the model; "
                "make it from the parameters it is given"
            )
        specs = []
        for p, uses in self.parameters:
            group = groups.get(id(p)) if p.requires_grad else None
            specs.append(ParameterSpec(tensor_spec(uses[0], p), uses, group, split_name(uses[0])[0]))
        if not any(spec.group is not None for spec in specs):
            raise ConfigurationError("the optimizer trains no parameter of the model; nothing would be learned")
        return specs

    def buffer_specs(self) -> list[TensorSpec]:
        """The buffers as data."""
        return [tensor_spec(name, tensor) for name, tensor in self.buffers]


def tensor_spec(name: str, tensor: Tensor) -> TensorSpec:
    """A tensor as data."""
    return TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))


def model_tensors(model: nn.Module) -> ModelTensors:
    """Find a model's parameters and buffers.

    Raises:
        ConfigurationError: for lazy modules, whose shapes are not known yet.
    """
    uses: dict[int, list[str]] = {}
    objects: dict[int, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ConfigurationError(
                f"parameter {name} has no shape yet; run the model once on a sample inside its factory"
            )
        uses.setdefault(id(parameter), []).append(name)
        objects[id(parameter)] = parameter
    plain = set(model.state_dict(keep_vars=True))
    ties = {name: names[0] for names in uses.values() for name in names[1:]}
    first = {id(buffer): name for name, buffer in model.named_buffers()}
    for name, buffer in model.named_buffers(remove_duplicate=False):
        if name in plain and first[id(buffer)] != name:
            ties[name] = first[id(buffer)]
    return ModelTensors(
        parameters=tuple((objects[key], tuple(names)) for key, names in uses.items()),
        buffers=tuple(model.named_buffers()),
        plain_buffers=tuple(name for name, _ in model.named_buffers() if name in plain),
        ties=ties,
    )


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, last = name.rpartition(".")
    return model.get_submodule(path), last


def bind(model: nn.Module, flat: FlatLayout, values: Sequence[Tensor]) -> list[nn.Parameter]:
    """Let the model's parameters be ``values`` (in flat order); the parameter of every trained use, in flat order.

    Every further use of a tied weight becomes a parameter of its own over the same memory: each use's gradient is a
    leaf of the canonical sum. No graph may be alive: it would use the new values in silence.
    """
    by_name: dict[str, nn.Parameter] = {}
    for spec, value in zip(flat.parameters, values, strict=True):
        for i, name in enumerate(spec.uses):
            module, attribute = _owner(model, name)
            parameter = getattr(module, attribute)
            if i > 0 or parameter.is_meta:
                parameter = nn.Parameter(value.new_empty(0), requires_grad=parameter.requires_grad)
                setattr(module, attribute, parameter)  # a recurrent module keeps a list of its own
            parameter.data = value  # and not Parameter(value), which would share the arena's version counter
            by_name[name] = parameter
    return [by_name[name] for name, _ in flat.uses]


def unbind(model: nn.Module, flat: FlatLayout, *, copies: bool = True) -> None:
    """Give the model memory of its own again, unless ``copies`` are not wanted, and tie what was tied."""
    for spec in flat.parameters:
        module, attribute = _owner(model, spec.uses[0])
        first = getattr(module, attribute)
        if copies:
            first.data = first.detach().clone()
        first.grad = None
        for name in spec.uses[1:]:
            module, attribute = _owner(model, name)
            module.register_parameter(attribute, first)
