"""The layers whose curvature is learned, as data: which parameters belong together."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from unisono.errors import ConfigurationError
from unisono.plan.blocks import CURVATURE, FlatLayout, ParameterSpec


@dataclass(frozen=True, slots=True)
class CurvedLayer:
    """One layer, its parameters by their places in the flat order.

    Attributes:
        weight, bias: its own; None where it has no bias that is trained.
        inputs, outputs: of its curvature.
    """

    weight: int
    bias: int | None
    inputs: int
    outputs: int


def joined(specs: Sequence[ParameterSpec]) -> list[ParameterSpec]:
    """The bias of a layer whose curvature is learned is updated together with the weights before it.

    Raises:
        ConfigurationError: where another parameter lies between them.
    """
    result, place = list(specs), {spec.tensor.name: i for i, spec in enumerate(specs)}
    for path in _paths(specs):
        weight, bias = place[_of(path, "weight")], place.get(_of(path, "bias"))
        if bias is None or specs[bias].group is None:
            continue
        if bias != weight + 1 or specs[bias].tensor.dtype != specs[weight].tensor.dtype:
            raise ConfigurationError(
                f"the bias of {path or 'the model'} does not follow its weight as a parameter of the same dtype, so "
                "its curvature cannot be learned; register them as torch.nn.Linear does, or use another optimizer"
            )
        result[bias] = replace(specs[bias], joined=True)
    return result


def curved_layers(flat: FlatLayout) -> list[CurvedLayer]:
    """The layers, in flat order of their weights."""
    place = {spec.tensor.name: i for i, spec in enumerate(flat.parameters)}
    found = []
    for path in _paths(flat.parameters):
        bias = place.get(_of(path, "bias"))
        found.append(
            CurvedLayer(
                place[_of(path, "weight")],
                bias if bias is not None and flat.parameters[bias].joined else None,
                place[f"{CURVATURE}{path}.inputs"],
                place[f"{CURVATURE}{path}.outputs"],
            )
        )
    return sorted(found, key=lambda layer: layer.weight)


def _paths(specs: Sequence[ParameterSpec]) -> list[str]:
    """The names of the layers."""
    names = (spec.tensor.name.removeprefix(CURVATURE) for spec in specs if spec.is_factor)
    return [path for path, _, last in (name.rpartition(".") for name in names) if last == "inputs"]


def _of(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name
