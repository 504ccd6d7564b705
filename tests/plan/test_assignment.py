"""Assignments are balanced, contiguous and complete."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan.assignment import (
    RUN_ELEMENTS,
    UpdateClass,
    contiguous_shares,
    micro_batches,
    one_team,
    owners,
    paced_micro_batches,
    runs,
    shares_by_cost,
)
from unisono.plan.blocks import ALIGNMENT_ELEMENTS, BLOCK_ELEMENTS, FlatLayout, ParameterSpec, TensorSpec, flat_layout
from unisono.plan.mesh import Mesh


def layout(sizes: list[int], groups: list[int | None] | None = None) -> FlatLayout:
    chosen = groups or [0] * len(sizes)
    return flat_layout(
        [
            ParameterSpec(TensorSpec(f"p{i}", "float64" if i % 5 == 4 else "float32", (size,)), (f"p{i}",), group)
            for i, (size, group) in enumerate(zip(sizes, chosen, strict=True))
        ]
    )


sizes = st.lists(st.integers(0, 3 * BLOCK_ELEMENTS), min_size=1, max_size=12)


@given(st.integers(1, 500), st.integers(1, 40))
def test_micro_batches_are_balanced(count: int, workers: int) -> None:
    shares = micro_batches(count, workers)
    assert [m for share in shares for m in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@given(st.lists(st.integers(0, 50), min_size=1, max_size=9), st.integers(1, 4))
def test_contiguous_shares_are_the_best_there_are(costs: list[int], workers: int) -> None:
    shares = contiguous_shares(costs, workers)
    assert len(shares) == workers
    assert [i for share in shares for i in share] == list(range(len(costs)))

    def best(start: int, left: int) -> int:
        if left == 1:
            return sum(costs[start:])
        return min(max(sum(costs[start:cut]), best(cut, left - 1)) for cut in range(start, len(costs) + 1))

    assert max(sum(costs[i] for i in share) for share in shares) == best(0, workers)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=9), st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_shares_by_cost_are_the_best_there_are(costs: list[int], paces: list[int]) -> None:
    shares = shares_by_cost(costs, paces)
    assert len(shares) == len(paces) and [i for share in shares for i in share] == list(range(len(costs)))

    def best(start: int, worker: int) -> float:
        if worker == len(paces) - 1:
            return sum(costs[start:]) * paces[worker]
        cuts = range(start, len(costs) + 1)
        return min(max(sum(costs[start:cut]) * paces[worker], best(cut, worker + 1)) for cut in cuts)

    latest = max(sum(costs[i] for i in share) * pace for share, pace in zip(shares, paces, strict=True))
    assert latest <= best(0, 0) * (1 + 1e-6)
    if len(costs) >= len(paces) and len({*costs}) == len({*paces}) == 1:
        assert all(shares)


@given(sizes, st.integers(1, 5), st.sampled_from(list(UpdateClass)))
def test_every_block_has_one_owner(sizes: list[int], workers: int, update: UpdateClass) -> None:
    flat = layout(sizes)
    shares = owners(flat, update, [range(workers)], one_team(flat, 0))
    assert [b for share in shares for b in share] == list(range(len(flat.blocks)))
    if update is UpdateClass.PARAMETER:
        for share in shares:
            if share:
                assert flat.blocks[share[0]].index == 0
    for share in shares:
        assert [b for run in runs(flat, update, share) for b in range(run.first, run.stop)] == list(share)


@given(sizes)
def test_blocks_and_runs_stay_inside_their_bounds(sizes: list[int]) -> None:
    flat = layout(sizes, [i % 2 for i in range(len(sizes))])
    for block in flat.blocks:
        assert 0 < block.stop - block.start <= BLOCK_ELEMENTS
    for place in flat.places:
        assert place.offset % ALIGNMENT_ELEMENTS == 0
    for run in runs(flat, UpdateClass.ELEMENT, range(len(flat.blocks))):
        members = flat.blocks[run.first : run.stop]
        assert len({flat.parameters[b.parameter].group for b in members}) == 1
        assert len({flat.parameters[b.parameter].tensor.dtype for b in members}) == 1
        assert sum(b.stop - b.start for b in members) <= RUN_ELEMENTS


def test_further_uses_of_tied_weights_have_gradients_of_their_own() -> None:
    tied = ParameterSpec(TensorSpec("z.weight", "float32", (100,)), ("z.weight", "a.weight"), 0)
    plain = ParameterSpec(TensorSpec("m.weight", "float32", (70,)), ("m.weight",), 0)
    flat = flat_layout([tied, plain])
    assert [name for name, _ in flat.uses] == ["z.weight", "m.weight", "a.weight"]
    assert flat.segment_elements == (256,)
    assert flat.gradient_elements == (384,)
    assert [flat.uses[u][0] for u in flat.uses_of(0)] == ["a.weight", "z.weight"]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 4))
def test_mesh_ranks_and_coordinates_are_one_to_one(data: int, pipeline: int, tensor: int) -> None:
    mesh = Mesh(data=data, pipeline=pipeline, tensor=tensor)
    assert [mesh.rank(**mesh.coordinates(r)) for r in range(mesh.size)] == list(range(mesh.size))


def test_an_empty_axis_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="data is 0"):
        Mesh(data=0)


@given(st.integers(1, 60), st.lists(st.floats(0.01, 10), min_size=1, max_size=6))
def test_paced_shares_are_as_early_as_any(count: int, paces: list[float]) -> None:
    """Giving one after another to whoever is done first is the best there is for equal micro-batches."""
    shares = paced_micro_batches(count, paces)
    assert [m for share in shares for m in share] == list(range(count))
    least = min(1, count // len(paces))
    sizes = [least] * len(paces)
    for _ in range(count - sum(sizes)):
        sizes[min(range(len(paces)), key=lambda w: (sizes[w] + 1) * paces[w])] += 1
    best = max(n * pace for n, pace in zip(sizes, paces, strict=True))
    found = max(len(share) * pace for share, pace in zip(shares, paces, strict=True))
    assert found <= max(best * 1.1 + 1e-9, 0)
    assert all(len(share) >= least for share in shares)


def test_shares_stay_unless_others_are_worth_it() -> None:
    even = micro_batches(16, 4)
    assert paced_micro_batches(16, [1.0, 1.05, 0.98, 1.0], even) == even
    assert paced_micro_batches(16, [1.0, 0.0, 1.0, 1.0], even) == even
    assert [len(s) for s in paced_micro_batches(16, [1.0, 1.0, 5.0, 1.0], even)] == [5, 5, 1, 5]
