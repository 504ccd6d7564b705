"""Random state of its own for each sample: given where it is used, and left out where nobody would notice."""

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset

from unisono.data.clients import Clients
from unisono.data.feed import Feed, draws
from unisono.errors import DataError
from unisono.run.rng import Isolation, derive

SIZE = 12


class Samples:
    """Numbers, to which something is added."""

    def __init__(self, further: Callable[[int], float] = lambda index: 0.0) -> None:
        self._further = further

    def __len__(self) -> int:
        return SIZE

    def __getitem__(self, index: int) -> tuple[Tensor, float]:
        return torch.tensor([index, float("nan")]), self._further(index)


def late(draw: Callable[[], float]) -> Callable[[int], float]:
    """Drawn for samples that the first batches do not have."""
    return lambda index: draw() if index > 7 else 0.0


KINDS: dict[str, Callable[[int], float]] = {
    "nothing": lambda index: 0.0,
    "python": lambda index: random.random(),
    "numpy": lambda index: float(np.random.rand()),
    "torch": lambda index: float(torch.rand(())),
    "python, late": late(random.random),
    "numpy, late": late(lambda: float(np.random.randn())),
    "torch, late": late(lambda: float(torch.rand(()))),
    "what it was seeded with": lambda index: float(torch.initial_seed() % 1000),
    "seeds of its own": lambda index: float(torch.manual_seed(index).initial_seed()) + random.random(),
}


def loaded(feed: Feed, epoch: int) -> list[Any]:
    return [feed.load(range(first, first + 4), epoch, "here") for first in range(0, SIZE, 4)]


def seeded(samples: Samples, epoch: int) -> list[Any]:
    """The definition: a seed for every sample."""
    result = []
    with Isolation() as isolation:
        for first in range(0, SIZE, 4):
            rows = []
            for index in range(first, first + 4):
                isolation.seed(derive(3, "training", epoch, index))
                rows.append(samples[index])
            result.append(
                [torch.stack([row[0] for row in rows]), torch.tensor([row[1] for row in rows], dtype=torch.float64)]
            )
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_each_sample_has_random_state_of_its_own(kind: str) -> None:
    samples = Samples(KINDS[kind])
    feed = Feed(samples, 3, "training", None, torch.device("cpu"))
    before = random.getstate(), torch.get_rng_state()
    for epoch in (0, 1):
        for ours, theirs in zip(loaded(feed, epoch), seeded(samples, epoch), strict=True):
            for a, b in zip(ours, theirs, strict=True):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        (TensorDataset(torch.arange(12.0)), False),
        (Subset(TensorDataset(torch.arange(12.0)), range(3)), False),
        ([1, 2], False),
        (Samples(), True),
        (Subset(Samples(), range(3)), True),  # type: ignore[arg-type]
        (Clients([[1, 2], [3]]), False),
        (Clients([[1, 2], Samples()]), True),
    ],
)
def test_what_is_made_of_tensors_draws_nothing(dataset: Any, expected: bool) -> None:
    assert draws(dataset) == expected


def test_a_dataset_may_have_something_else_of_that_name() -> None:
    samples = Samples(KINDS["torch"])
    samples.draws = 0  # type: ignore[attr-defined]
    assert draws(samples)
    loaded(Feed(samples, 3, "training", None, torch.device("cpu")), 0)


@pytest.mark.parametrize("collate", [None, lambda rows: torch.tensor(rows)])
def test_seeds_are_given_where_they_may_be_used(collate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a dataset that draws nothing once a batch, unless its batches are made by a function that may."""
    given = 0
    seed = Isolation.seed

    def note(isolation: Isolation, number: int) -> None:
        nonlocal given
        given += 1
        seed(isolation, number)

    monkeypatch.setattr(Isolation, "seed", note)
    feed = Feed(list(range(SIZE)), 3, "training", collate, torch.device("cpu"))
    loaded(feed, 0)
    assert given == (3 + 1 if collate is None else 3 * 5)


@pytest.mark.parametrize("kind", ["python", "numpy", "torch", "seeds of its own", "torch, late"])
def test_a_dataset_that_draws_though_it_says_otherwise_is_refused(kind: str) -> None:
    samples = Samples(KINDS[kind])
    samples.draws = False  # type: ignore[attr-defined]
    feed = Feed(samples, 3, "validation", None, torch.device("cpu"))
    with pytest.raises(DataError, match=r"the validation dataset says that its samples draw no random numbers"):
        loaded(feed, 0)


def test_a_collate_function_may_draw() -> None:
    def collate(rows: list[Any]) -> Tensor:
        return torch.stack([row[0] for row in rows]) + torch.rand(())

    feed = Feed(Samples(), 3, "training", collate, torch.device("cpu"))
    first, again = loaded(feed, 0), loaded(feed, 0)
    for a, b in zip(first, again, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(first[0][0, :1], first[1][0, :1] - 4)  # another number for every batch
