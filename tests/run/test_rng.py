"""Random state belongs to names, not to the order in which things run."""

import random

import numpy as np
import torch
from torch import nn

from tests.toys import Checkpointed
from unisono.run.rng import Isolation, ModuleRandom, derive, mix


def test_derived_seeds_are_apart() -> None:
    seeds = {derive(a, b, c) for a in range(10) for b in range(10) for c in ("x", "y")}
    assert len(seeds) == 200
    assert derive("1") != derive(1)


def test_mixed_numbers_are_apart() -> None:
    assert len({mix(a, b) for a in range(200) for b in range(200)}) == 40_000


def test_isolation_gives_all_state_back() -> None:
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(1).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    isolation = Isolation()
    for number in (5, 6):
        with isolation:
            isolation.seed(number)
            random.random(), np.random.rand(), torch.rand(1)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def test_isolated_draws_depend_on_the_number_alone() -> None:
    isolation = Isolation()
    drawn = []
    for number in (5, 6, 5):
        with isolation:
            isolation.seed(number)
            drawn.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert drawn[0] == drawn[2] != drawn[1]


def test_a_module_draws_the_same_whatever_ran_before() -> None:
    whole = nn.Sequential(nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.5))
    keyed = ModuleRandom(whole, 3, torch.device("cpu"))
    x = torch.ones(4, 8)
    keyed.enter(0, 0)
    first = whole(x)
    keyed.enter(0, 0)
    torch.rand(100)
    whole[0](x)  # a second call, numbered 1 when the whole runs
    keyed.enter(0, 0)
    assert torch.equal(whole(x), first)
    keyed.enter(0, 1)
    assert not torch.equal(whole(x), first)


def test_recomputation_draws_what_the_forward_drew() -> None:
    """A module called twice inside checkpointed regions, recomputed in reverse order: same gradients as without."""
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(on)
        keyed = ModuleRandom(model, 3, torch.device("cpu"))
        keyed.enter(1, 2)
        model(torch.ones(5, 6)).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
        keyed.close()
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
