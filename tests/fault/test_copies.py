"""Micro-batches that two workers compute, one of them late, the other idle: the bits stay, unequal ones are found."""

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.errors import SilentCorruption, UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.plan.copies import copied_next
from unisono.plan.roster import Lot
from unisono.run.summation import Node, accumulation, subtrees

BATCHES = {"global_batch_size": 64, "model": "norm", "optimizer": "momentum", "clip": 0.5}


@given(st.integers(1, 70), st.data())
def test_what_a_worker_holds_before_a_micro_batch_are_the_subtrees_up_to_it(count: int, data: st.DataObject) -> None:
    """In order of its buffers: so they can be published before their range is over."""
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    held: dict[int, list[int]] = {}  # buffer -> micro-batches in it
    for leaf in accumulation(start, stop, count)[0]:
        expected = [list(range(n.start, min(n.stop, count))) for n in subtrees(start, leaf.micro_batch, count)]
        assert [held[buffer] for buffer in range(len(expected))] == expected
        if leaf.opens:
            held[leaf.chain[0]] = []
        held[leaf.chain[0]] = [*held[leaf.chain[0]], leaf.micro_batch]
        for inner, outer in zip(leaf.chain, leaf.chain[1:], strict=False):
            held[outer] = held[outer] + held.pop(inner)


@given(
    st.lists(st.integers(0, 6), min_size=2, max_size=6),
    st.dictionaries(st.integers(0, 5), st.integers(0, 30)),
    st.sets(st.integers(0, 30)),
    st.sets(st.integers(0, 30)),
)
def test_a_copy_is_of_something_that_nobody_has_begun(
    sizes: list[int], begun: dict[int, int], there: set[int], copied: set[int]
) -> None:
    stops = [sum(sizes[: n + 1]) for n in range(len(sizes))]
    lots = [Lot((n,), tuple(range(stop - sizes[n], stop))) for n, stop in enumerate(stops)]
    chosen = copied_next(lots, 0, begun, there, copied)
    free = {m for lot in lots[1:] for m in lot.micro_batches if m > begun.get(lot.holders[0], -1)} - there - copied
    assert chosen in free if free else chosen is None


def test_workers_of_one_replica_are_left_alone() -> None:
    assert copied_next([Lot((0, 1), (0, 1)), Lot((2,), ())], 2, {}, (), ()) is None
    assert subtrees(4, 5, 6) == (Node(0, 4),)


def late(pool: LocalLauncher, workers: int, **options: Any) -> dict[str, Any]:
    arguments = {"late": 1, "late_steps": [5], "seconds": 0.2, "deadline_s": 20.0, **BATCHES, **options}
    result: dict[str, Any] = pool.run({"call": "tests.jobs:train_late", "arguments": arguments}, workers).result
    return result


@pytest.fixture(scope="module")
def expected(pool: LocalLauncher) -> str:
    """The digest of one worker."""
    arguments = {"steps": 12, **BATCHES}
    digest: str = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 1).result["digest"]
    return digest


@pytest.mark.parametrize(
    ("workers", "layout"), [(2, {}), (3, {}), (4, {}), (3, {"zero": 0}), (2, {"schedule": "gpipe"})]
)
def test_what_a_late_worker_has_not_begun_is_computed_by_those_who_idle(
    pool: LocalLauncher, expected: str, workers: int, layout: dict[str, Any]
) -> None:
    """(rank 1, step 5): 0.2 s more for each of its micro-batches."""
    result = late(pool, workers, layout=layout)
    assert result["digest"] == expected
    (copied,) = [event for event in result["copied"] if event["step"] == 5]
    assert 1 not in copied["by"] and sum(map(len, copied["by"].values())) >= 2


def test_copies_that_both_come_are_alike(pool: LocalLauncher, expected: str) -> None:
    """(rank 1, step 5): the copy takes as long as all that the late worker has."""
    result = late(pool, 2, seconds=0.1, beside_s=1.0)
    assert result["digest"] == expected


@pytest.mark.parametrize("corrupt", [0, 1])
def test_copies_that_differ_end_the_run_and_name_who_computes_wrongly(pool: LocalLauncher, corrupt: int) -> None:
    """(rank 0 or 1, step 5): what it computes beside the other is wrong."""
    with pytest.raises(UnisonoError) as caught:
        late(pool, 2, seconds=0.1, beside_s=1.0, corrupt=corrupt)
    text = str(caught.value)
    assert re.search(r"rank \d and rank \d have both computed micro-batch \d+ of step \d+", text), text
    assert "different gradients of 0.weight" in text and "look at" in text, text
    assert caught.value.exit_code == SilentCorruption.exit_code


@pytest.mark.parametrize("rank", [0, 1])
def test_who_is_killed_beside_another_leaves_nothing_undone(pool: LocalLauncher, expected: str, rank: int) -> None:
    """(rank 0 or 1, step 5, while it computes a copy)"""
    strikes = [{"rank": rank, "step": 5, "moment": "rescue"}]
    result = late(pool, 3, seconds=0.2, beside_s=0.7, strikes=strikes)
    assert result["digest"] == expected


def test_nobody_is_copied_where_that_is_not_wanted(pool: LocalLauncher, expected: str) -> None:
    arguments = {"steps": 12, "fault": {"copies": "never"}, **BATCHES}
    result = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 3).result
    assert result["digest"] == expected
