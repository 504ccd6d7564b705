"""Lots of a step: whatever is lost, in whatever order, every micro-batch is somebody's, and all decide alike."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.roster import Lot, StepRoster, consecutive, divided, first_lots, next_members


@st.composite
def courses(draw: st.DrawFn) -> tuple[list[tuple[int, ...]], list[int], int, list[tuple[int, float]]]:
    """Replicas, members, micro-batches, and losses, each with the part of the lost lot that was published."""
    each, count = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    replicas = [tuple(range(r * each, (r + 1) * each)) for r in range(count)]
    slots = [slot for replica in replicas for slot in replica]
    members = sorted(draw(st.sets(st.sampled_from(slots), min_size=1)))
    lost = draw(st.permutations(members))[: draw(st.integers(0, len(members) - 1))]
    published = draw(st.lists(st.floats(0, 1), min_size=len(lost), max_size=len(lost)))
    return replicas, members, draw(st.integers(1, 20)), list(zip(lost, published, strict=True))


@given(courses())
def test_every_micro_batch_is_published_or_somebodys(
    course: tuple[list[tuple[int, ...]], list[int], int, list[tuple[int, float]]],
) -> None:
    replicas, members, count, losses = course
    roster, published = StepRoster(replicas, members, count), set[int]()
    for slot, part in losses:

        def of(lot: Lot, part: float = part) -> set[int]:
            return set(lot.micro_batches[: int(part * len(lot.micro_batches))])

        for lot in roster.lots_of(slot):
            published |= of(lot)
        taken = roster.lose(slot, of)
        assert set(taken) <= set(roster.living) and slot not in roster.living
    held = [m for lot in roster.lots for m in lot.micro_batches]
    assert sorted(set(held) | published) == list(range(count))
    assert len(held) == len(set(held))
    assert all(set(lot.holders) <= set(roster.living) for lot in roster.lots if lot.micro_batches)
    assert [loss.slot for loss in roster.losses] == [slot for slot, _ in losses]


@given(st.integers(1, 30), st.sets(st.integers(0, 9), min_size=1))
def test_members_share_evenly(count: int, slots: set[int]) -> None:
    members = sorted(slots)
    lots = first_lots([(slot,) for slot in range(10)], members, count)
    sizes = [len(lot.micro_batches) for lot in lots]
    assert sum(sizes) == count and max(sizes) - min(sizes) <= 1
    assert [m for lot in lots for m in lot.micro_batches] == list(range(count))
    assert [slot for lot in lots for slot in lot.holders] == members


@given(st.sets(st.integers(0, 40)))
def test_ranges_hold_the_same_numbers(numbers: set[int]) -> None:
    found = list(consecutive(sorted(numbers)))
    assert [n for run in found for n in run] == sorted(numbers)
    assert all(a.stop < b.start for a, b in itertools.pairwise(found))


@given(st.lists(st.integers()), st.lists(st.integers(0, 9), min_size=1, unique=True))
def test_parts_are_everything_once(things: list[int], among: list[int]) -> None:
    parts = divided(things, among)
    assert [thing for slot in among for thing in parts[slot]] == things


def test_a_worker_that_died_before_it_was_let_in_is_not() -> None:
    assert next_members([0, 1, 2], [2], [2], []) == (0, 1, 2)  # lost, and replaced
    assert next_members([0, 1], [2], [2], []) == (0, 1)  # one that waited is lost too
    assert next_members([0, 1, 2], [2, 2], [2], []) == (0, 1)
    assert next_members([0, 1, 2], [], [], [1]) == (0, 2)
    assert next_members([0, 1, 2], [0], [], [1, 2]) == (1, 2)  # somebody has to go on


def test_shares_follow_what_micro_batches_cost_and_the_workers_paces() -> None:
    costs = [1.0, 1.0, 1.0, 1.0, 1.0, 7.0]
    alike = first_lots([(0,), (1,)], [0, 1], 6, costs=costs)
    assert [lot.micro_batches for lot in alike] == [(0, 1, 2, 3, 4), (5,)]
    slower = first_lots([(0,), (1,)], [0, 1], 6, {0: 3.0, 1: 1.0}, before=alike, costs=costs)
    assert [lot.micro_batches for lot in slower] == [(0, 1, 2), (3, 4, 5)]
