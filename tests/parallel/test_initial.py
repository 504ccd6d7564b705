"""Initial values by name: the same values in whatever parts they are made, and none before."""

import pytest
import torch
from torch import Tensor, nn

from unisono.errors import ConfigurationError
from unisono.parallel.initial import initialise, initialisers, shares, without_values
from unisono.tasks.lm import GPT


def build() -> GPT:
    return GPT(4, 16, 2, 16, 0.0, tied=True)


def filled(parts: int, further: frozenset[str] = frozenset({"head.weight"})) -> dict[str, Tensor]:
    """A model's values, made in so many parts, the last part first."""
    with without_values():
        model = build()
    for name, parameter in list(model.named_parameters()):
        path, _, key = name.rpartition(".")
        model.get_submodule(path)._parameters[key] = nn.Parameter(torch.full(parameter.shape, float("nan")))
    model.head.weight = model.tokens.weight
    apart, holding = shares(initialisers(model), model, parts)
    for part in reversed(apart):
        initialise(7, part, further)
    initialise(7, holding, further)
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_nothing_has_values_but_buffers() -> None:
    with without_values():
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
    assert not nn.Linear(2, 2).weight.is_meta


@pytest.mark.parametrize("parts", [2, 3, 7])
def test_values_do_not_depend_on_the_parts(parts: int) -> None:
    whole = filled(1)
    assert not any(value.isnan().any() for value in whole.values())
    for name, value in filled(parts).items():
        assert torch.equal(value, whole[name]), name


def test_layers_differ_and_are_spread_as_the_model_says() -> None:
    values = filled(1)
    assert not torch.equal(values["blocks.0.mlp.0.weight"], values["blocks.1.mlp.0.weight"])
    assert float(values["blocks.0.mlp.0.weight"].std()) == pytest.approx(0.02, rel=0.1)
    assert float(values["blocks.0.mlp.2.weight"].std()) == pytest.approx(0.02 / 8**0.5, rel=0.1)


def test_modules_that_cannot_are_named() -> None:
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(3))

    with pytest.raises(ConfigurationError, match=r"1 module with parameters cannot initialise themselves: 1 \(Scale\)"):
        initialisers(nn.Sequential(nn.Linear(3, 3), Scale()))
