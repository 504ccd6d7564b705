"""What a rehearsal finds: where a model can be cut, what it costs, and where it cannot be rehearsed."""

from itertools import combinations, pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from tests.parallel.models import (
    Caching,
    Deep,
    EncoderDecoder,
    Functional,
    Passing,
    Sharing,
    Skipping,
    Twice,
    albert,
)
from unisono.errors import ConfigurationError
from unisono.plan.outline import Outline
from unisono.plan.partition import balanced, divide
from unisono.plan.rehearsal import outline
from unisono.tasks.lm import GPT

INPUT = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


def rehearsed(model: nn.Module) -> Outline:
    return outline(model, lambda: model(INPUT).pow(2).mean())


def places(model: nn.Module) -> list[str]:
    return [cut.path for cut in rehearsed(model).cuts]


def test_a_model_is_cut_between_its_blocks_and_not_inside_them() -> None:
    assert places(Deep()) == ["blocks.0", "blocks.1", "blocks.2", "blocks.3", "last"]


def test_only_what_depends_on_earlier_modules_travels() -> None:
    """The scale is computed from the input, so every stage has it."""
    assert all(len(cut.forms) == 1 for cut in rehearsed(Deep()).cuts)


def test_what_every_block_is_given_travels_along() -> None:
    cuts = {cut.path: cut for cut in rehearsed(EncoderDecoder()).cuts}
    assert list(cuts) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2", "last"]
    assert [len(cuts[path].forms) for path in ("encoder.1", "decoder.1", "last")] == [1, 2, 1]


def test_a_value_that_skips_modules_cannot_be_cut_through() -> None:
    assert places(Skipping()) == ["last"]


def test_a_module_that_is_called_twice_stays_in_one_stage() -> None:
    assert places(Twice()) == ["shared", "layers.1", "layers.2", "last"]


def test_a_parameter_that_several_modules_are_given_stays_in_one_stage() -> None:
    assert places(Passing()) == ["blocks.0", "last"]


def test_random_numbers_are_not_drawn_on_both_sides_of_a_cut_from_one_state() -> None:
    assert places(Functional()) == ["c"]


def test_a_module_under_several_names_has_one_home() -> None:
    found = rehearsed(albert())
    assert [cut.path for cut in found.cuts] == ["1", "4", "5"] and found.homes["3.weight"] == found.homes[
        "1.weight"
    ] == 1


def test_what_a_model_keeps_for_later_is_not_of_the_rehearsal() -> None:
    model = Sharing()
    rehearsed(model)
    block = model.blocks[0]
    assert isinstance(block, Caching) and block.mask is None and block.scale is None


def test_parameters_of_the_model_itself_belong_where_they_are_used() -> None:
    found = rehearsed(Deep())
    units = [unit.path for unit in found.units]
    assert units[found.homes["token"]] == "first" and units[found.homes["temperature"]] == "last"


def test_costs_are_those_of_torch() -> None:
    model = GPT(2, 32, 4, 16, 0.0, tied=True)
    tokens = torch.randint(0, 256, (3, 16))
    found = outline(model, lambda: model(tokens).mean())
    with FlopCounterMode(display=False) as counter:
        model(tokens)
    assert sum(unit.flops for unit in found.units) == counter.get_total_flops()
    saved: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = storage.nbytes()
            kept.append(tensor)
        return tensor

    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(tokens)
    assert sum(unit.saved_bytes for unit in found.units) == pytest.approx(sum(saved.values()), rel=0.05)


def test_a_rehearsal_leaves_no_trace() -> None:
    model = Deep()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    state = torch.get_rng_state()
    rehearsed(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all("forward" not in module.__dict__ for module in model.modules())
    for name, p in model.named_parameters():
        assert id(p) == before[name][0] and torch.equal(p, before[name][1])


def test_a_model_without_values_can_be_rehearsed() -> None:
    with torch.device("meta"):
        model = Deep()
    assert places(model) == places(Deep())


def test_code_that_looks_at_values_is_refused_by_the_name_of_its_module() -> None:
    class Looking(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4))

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.layers(x)
            return y if y.sum() > 0 else -y

    with pytest.raises(ConfigurationError, match=r"cannot be cut into stages: .* use layout.pipeline=1"):
        rehearsed(Looking())


def test_more_stages_than_places_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigurationError, match=r"the layout has 7 stages, but the model can be cut into 6 at most"):
        divide(rehearsed(Deep()), 7)


@pytest.mark.parametrize(
    ("match", "stages", "at"),
    [
        ("names 1 modules, but 3 stages need 2", 3, ["blocks.1"]),
        ("cannot be cut in front of 'blocks.9'; it can in front of blocks.0", 2, ["blocks.9"]),
        ("in the order in which the model calls them", 3, ["blocks.2", "blocks.1"]),
    ],
)
def test_wrong_cuts_are_refused(match: str, stages: int, at: list[str]) -> None:
    with pytest.raises(ConfigurationError, match=match):
        divide(rehearsed(Deep()), stages, at)


def test_stages_are_balanced_and_homes_follow() -> None:
    division = divide(rehearsed(Deep(blocks=8)), 4)
    costs = division.costs()
    assert max(costs) <= 1.5 * sum(costs) / 4
    assert division.stage_of("first.weight") == 0 and division.stage_of("temperature") == 3


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_the_dearest_part_is_as_cheap_as_can_be(parts: int) -> None:
    costs = [5, 1, 7, 2, 2, 9, 1]

    def dearest(cuts: tuple[int, ...]) -> int:
        edges = (0, *cuts, len(costs))
        return max(sum(costs[a:b]) for a, b in pairwise(edges))

    found = balanced(costs, parts)
    assert dearest(tuple(found)) == min(dearest(c) for c in combinations(range(1, len(costs)), parts - 1))
