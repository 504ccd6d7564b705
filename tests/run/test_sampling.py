"""Sampling is a permutation of every epoch, in constant memory, reached at any position."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from unisono.run.sampling import Sampler, permute


@given(st.integers(1, 3000), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    images = permute(np.arange(size), size, seed, epoch)
    assert sorted(images.tolist()) == list(range(size))


@given(st.integers(1, 200), st.integers(1, 8), st.integers(1, 8), st.integers(0, 100))
def test_every_sample_of_an_epoch_is_used_exactly_once(size: int, micro: int, count: int, seed: int) -> None:
    sampler = Sampler(size, seed, micro * count, micro)
    steps = -(-size * 2 // (micro * count))
    used = [i for s in range(steps) for m in range(count) for i in sampler.indices(s, m).tolist()]
    for epoch in range(len(used) // size):
        assert sorted(used[epoch * size : (epoch + 1) * size]) == list(range(size))


@given(st.integers(0, 500), st.integers(1, 50))
def test_any_part_of_the_order_is_the_same_part(first: int, count: int) -> None:
    sampler = Sampler(37, 3, 4, 4)
    assert sampler.at(first, count).tolist() == sampler.at(0, first + count).tolist()[first:]


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permute(np.arange(50), 50, seed, epoch).tolist()) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_positions_are_spread_evenly() -> None:
    """Chi-squared over where sample 0 lands in 2,000 epochs of 20 samples: below the 0.1% limit of 43.8."""
    where = [int(np.flatnonzero(permute(np.arange(20), 20, 7, e) == 0)[0]) for e in range(2000)]
    counts = np.bincount(where, minlength=20)
    assert ((counts - 100.0) ** 2 / 100.0).sum() < 43.8


def test_a_position_in_a_huge_dataset_costs_nothing() -> None:
    assert 0 <= int(Sampler(10**15, 0, 8, 8).indices(10**12, 0)[0]) < 10**15
