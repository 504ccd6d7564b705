"""Timetables: every micro-batch once through every stage, within the memory and the bubble that theory promises."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan.schedule import SCHEDULES, Action, Kind, Timetable, draw, in_flight, placement, timetable
from unisono.plan.timing import bubble_theory, timing

workers, counts = st.integers(1, 8), st.integers(1, 33)
schedules = st.sampled_from(SCHEDULES)


def made(schedule: str, p: int, m: int) -> Timetable:
    return timetable(schedule, p, range(m), 2 if schedule == "interleaved" else 1)


@given(schedules, workers, counts)
def test_every_micro_batch_goes_once_through_every_stage(schedule: str, p: int, m: int) -> None:
    table = made(schedule, p, m)
    done = Counter((a.kind, a.micro_batch, a.stage) for actions in table.workers for a in actions if a.kind.computes)
    split = schedule.startswith("zb")
    kinds = (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT) if split else (Kind.FORWARD, Kind.BACKWARD)
    assert done == Counter({(k, i, s): 1 for k in kinds for i in range(m) for s in range(table.stages)})
    for worker, actions in enumerate(table.workers):
        assert all(table.placement[action.stage] == worker for action in actions)


@given(schedules, workers, counts)
def test_a_stage_takes_its_micro_batches_in_order(schedule: str, p: int, m: int) -> None:
    """The canonical sums are made as backwards end."""
    table = made(schedule, p, m)
    for actions in table.workers:
        for stage in range(table.stages):
            for kind in Kind:
                order = [a.micro_batch for a in actions if a.kind is kind and a.stage == stage]
                assert order == sorted(order)


@given(schedules, workers, counts)
def test_what_is_given_is_taken(schedule: str, p: int, m: int) -> None:
    table = made(schedule, p, m)
    everything = {(a.kind, a.micro_batch, a.stage) for actions in table.workers for a in actions}
    for kind, i, s in everything:
        if kind is Kind.GIVE_ACTIVATION:
            assert (Kind.TAKE_ACTIVATION, i, s + 1) in everything
        elif kind is Kind.GIVE_GRADIENT:
            assert (Kind.TAKE_GRADIENT, i, s - 1) in everything
    takes = sum(kind in (Kind.TAKE_ACTIVATION, Kind.TAKE_GRADIENT) for kind, _, _ in everything)
    assert takes == 2 * m * (table.stages - 1)


@given(schedules, workers, counts)
def test_no_timetable_waits_for_ever_and_bubbles_are_those_of_theory(schedule: str, p: int, m: int) -> None:
    bubble = timing(made(schedule, p, m)).bubble
    theory = bubble_theory(schedule, p, m, 2)
    if theory is not None and schedule != "zb_v":
        assert bubble == pytest.approx(theory, abs=1e-9)
    elif theory is not None:
        assert theory - 1e-9 <= bubble <= theory + 0.07
    assert bubble <= timing(made("gpipe", p, m)).bubble + 1e-9


@given(workers, counts)
def test_memory_is_bounded(p: int, m: int) -> None:
    assert [in_flight(actions) for actions in made("gpipe", p, m).workers] == [m] * p
    assert [in_flight(actions) for actions in made("1f1b", p, m).workers] == [min(m, p - r) for r in range(p)]
    assert max(in_flight(actions) for actions in made("zb_h1", p, m).workers) == min(m, p)
    assert max(in_flight(actions) for actions in made("zb_v", p, m).workers) <= 2 * p


@pytest.mark.parametrize("p", [2, 4, 8])
@pytest.mark.parametrize("m", [8, 32])
def test_zero_bubble_is_below_interleaved_is_below_1f1b(p: int, m: int) -> None:
    bubbles = [timing(made(schedule, p, m)).bubble for schedule in ("zb_v", "zb_h1", "interleaved", "1f1b")]
    assert bubbles == sorted(bubbles) and len(set(bubbles)) == 4


def test_messages_take_their_time() -> None:
    """Two stages and one micro-batch: there and back."""
    assert timing(made("1f1b", 2, 1), latency=0.5).total == pytest.approx(1 + 0.5 + 1 + 2 + 0.5 + 2)


def test_a_timetable_that_cannot_end_is_found() -> None:
    backward_first = Timetable(((Action(Kind.BACKWARD, 0, 0), Action(Kind.FORWARD, 0, 0)),), (0,))
    with pytest.raises(ConfigurationError, match=r"never ends: workers \[0\]"):
        timing(backward_first)


def test_micro_batches_keep_their_numbers() -> None:
    assert draw(timetable("1f1b", 2, range(4, 6))) == "F4 F5 B4 B5\nF4 B4 F5 B5"


@pytest.mark.parametrize(
    ("match", "schedule", "virtual"),
    [
        ("schedule '2f2b' is not known; choose one of gpipe, 1f1b", "2f2b", 1),
        ("virtual_stages is 3 and schedule 1f1b has 1 stage a worker", "1f1b", 3),
        ("virtual_stages is 4; zb_v has always 2", "zb_v", 4),
    ],
)
def test_wrong_schedules_are_refused(match: str, schedule: str, virtual: int) -> None:
    with pytest.raises(ConfigurationError, match=match):
        timetable(schedule, 2, range(4), virtual)


def test_the_v_goes_there_and_back() -> None:
    assert placement("zb_v", 3) == (0, 1, 2, 2, 1, 0)
