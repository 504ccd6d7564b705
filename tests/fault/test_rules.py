"""What follows from an end or a silence: decided from numbers, with a clock of the test's own."""

from dataclasses import replace
from pathlib import Path

import pytest

from unisono.comm.descriptor import create_descriptor
from unisono.comm.header import OPERATIONS_KEPT, Agreement, Cause, Course, Header, header_bytes
from unisono.fault.notice import Notices
from unisono.fault.rules import Death, Rules, Verdict, decide, poisoned
from unisono.fault.slowness import Slowness
from unisono.fault.watch import Watch

RULES = Rules("replace", 2.0, 4)
DEATH = Death(1, 100, "compute", 7, 3, True)


@pytest.mark.parametrize(
    ("rules", "course", "expected"),
    [
        (RULES, Course.TRAINING, Verdict.REPLACE),
        (replace(RULES, on_loss="shrink"), Course.TRAINING, Verdict.SHRINK),
        (replace(RULES, on_loss="wait"), Course.TRAINING, Verdict.REPLACE),
        (replace(RULES, on_loss="stop"), Course.TRAINING, Verdict.FAIL),
        (None, Course.TRAINING, Verdict.FAIL),
        (RULES, Course.STARTING, Verdict.RESTART),
        (RULES, Course.OVER, Verdict.FAIL),
    ],
)
def test_what_follows_from_a_death(rules: Rules | None, course: Course, expected: Verdict) -> None:
    assert decide(rules, course, DEATH, [], 0) is expected


def test_all_are_started_again_twice() -> None:
    verdicts = [decide(RULES, Course.STARTING, DEATH, [], restarts) for restarts in range(3)]
    assert verdicts == [Verdict.RESTART, Verdict.RESTART, Verdict.FAIL]


def test_two_deaths_at_one_micro_batch_end_the_run() -> None:
    again = replace(DEATH, slot=2, process=101)
    assert poisoned(again, [DEATH], 1) is DEATH
    assert poisoned(again, [DEATH], 2) is None and poisoned(again, [DEATH, DEATH], 2) is DEATH
    assert decide(RULES, Course.TRAINING, again, [DEATH], 0) is Verdict.FAIL
    for other in (replace(again, micro_batch=4), replace(again, step=8), replace(again, activity="wait")):
        assert decide(RULES, Course.TRAINING, other, [DEATH], 0) is Verdict.REPLACE


def test_a_place_whose_workers_end_before_they_join_stays_empty() -> None:
    early = [replace(DEATH, process=p, activity="start", step=0, micro_batch=None, trained=False) for p in range(4)]
    assert decide(RULES, Course.TRAINING, early[1], [DEATH, early[0]], 0) is Verdict.REPLACE
    assert decide(RULES, Course.TRAINING, early[2], [DEATH, *early[:2]], 0) is Verdict.SHRINK
    assert decide(replace(RULES, on_loss="wait"), Course.TRAINING, early[2], [DEATH, *early[:2]], 0) is Verdict.FAIL
    assert decide(RULES, Course.OVER, early[0], [], 0) is Verdict.SHRINK
    waited = [replace(death, waited=True) for death in early]
    assert decide(RULES, Course.TRAINING, waited[2], [DEATH, *waited[:2]], 0) is Verdict.REPLACE


def test_where_all_start_again_they_do_so_until_they_get_nowhere() -> None:
    rules = replace(RULES, rolls_back=True)
    assert decide(rules, Course.STARTING, DEATH, [], 0) is Verdict.RESTART
    assert decide(rules, Course.TRAINING, DEATH, [], 0) is Verdict.ROLL_BACK
    assert decide(rules, Course.TRAINING, DEATH, [replace(DEATH, process=99)], 0) is Verdict.FAIL  # it is poisoned
    updating = [replace(DEATH, slot=slot, activity="update", micro_batch=None) for slot in range(3)]
    assert decide(rules, Course.TRAINING, updating[1], updating[:1], 0) is Verdict.ROLL_BACK
    assert decide(rules, Course.TRAINING, updating[2], updating[:2], 0) is Verdict.FAIL
    farther = replace(updating[2], step=8)
    assert decide(rules, Course.TRAINING, farther, updating[:2], 0) is Verdict.ROLL_BACK
    assert decide(rules, Course.OVER, DEATH, [], 0) is Verdict.FAIL


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def watched(clock: Clock, rules: Rules = RULES) -> tuple[Watch, Header]:
    watch = Watch(create_descriptor(header_bytes(rules.slots)), rules, clock)
    header = Header(watch._memory, rules.slots, clock)
    header.course = Course.TRAINING
    for step in (1, 2):
        for slot in range(2):
            header.set_activity(slot, "compute", step, 0)
        assert watch.silent([0, 1]) == []
    return watch, header


def test_who_gets_on_or_waits_is_not_silent() -> None:
    clock = Clock()
    watch, header = watched(clock)
    for second in range(20):
        clock.now += 1
        header.beat(0)
        found = watch.silent([0, 1])
        assert [silence.slot for silence in found] == ([1] if second >= 2 else [])
    assert found[0].seconds == 20 and (found[0].activity, found[0].step, found[0].micro_batch) == ("compute", 2, 0)


def test_the_first_step_may_take_twice_the_deadline() -> None:
    clock = Clock()
    watch = Watch(create_descriptor(header_bytes(4)), RULES, clock)
    header = Header(watch._memory, 4, clock)
    header.course = Course.TRAINING
    header.set_activity(0, "compute", 5, 0)
    watch.silent([0])
    clock.now += 3
    assert watch.silent([0]) == []
    clock.now += 1.5
    assert [silence.limit_s for silence in watch.silent([0])] == [4.0]


def test_an_operation_that_is_slow_by_nature_may_take_twenty_times_its_median() -> None:
    """No false alarm: uneven operations of up to ten times the deadline, as long as they are so by nature."""
    clock = Clock()
    watch, header = watched(clock)
    for number in range(30):
        header.set_activity(0, "compute", 3, number)
        clock.now += 1.0 + number % 3
        assert watch.silent([0]) == []
    clock.now += 30
    assert watch.silent([0]) == []
    clock.now += 20
    assert [silence.limit_s for silence in watch.silent([0])] == [40.0]


def test_what_a_lost_worker_took_does_not_count_for_the_one_in_its_place() -> None:
    """It had hung in the operation: its successor, which hung in the same, was given 20 times as long."""
    clock = Clock()
    watch, header = watched(clock)
    header.set_activity(1, "data", 5)
    watch.silent([1])
    clock.now += 3.0  # it hangs, and is ended
    watch.lose(1, 9, hung=True)
    clock.now += 1.0
    header.set_activity(1, "wait", 6)  # it is let in
    watch.silent([1])
    clock.now += 0.1
    header.set_activity(1, "data", 6)
    watch.silent([1])
    clock.now += 4.1
    (silence,) = watch.silent([1])
    assert silence.limit_s == 4.0  # its first step: twice the deadline


def test_a_wall_clock_is_not_read() -> None:
    """Control code goes by a monotonic clock that tests replace."""
    source = Path(__file__).parents[2] / "src" / "unisono"
    for folder in ("fault", "launch", "comm", "sync"):
        for path in (source / folder).rglob("*.py"):
            text = path.read_text()
            assert "time.time(" not in text and "datetime" not in text.replace("from datetime import timedelta", ""), (
                path
            )


def test_what_a_launcher_writes_workers_read() -> None:
    clock = Clock()
    watch, header = watched(clock)
    watch.lose(1, 9, hung=False)
    watch.lose(0, 3 << 8, hung=False)
    watch.lose(3, 9, hung=True)
    assert [(header.lost(n), header.how(n)) for n in range(header.losses)] == [
        (1, "was killed by SIGKILL"),
        (0, "ended with exit code 3"),
        (3, "made no progress, and was ended"),
    ]
    assert not watch.trains(1) and header.losses == 3
    assert [Cause(c).name for c in (1, 2, 3)] == ["SIGNAL", "EXIT", "HUNG"]


def test_the_last_two_agreements_can_be_read_and_a_half_written_one_cannot() -> None:
    header = Header(memoryview(bytearray(header_bytes(200))), 200)
    assert header.agreements() == []
    for step in (4, 5, 6):
        header.agree(Agreement(step, step // 2, 1, (0, 70, 150 + step)))
    assert [a.step for a in header.agreements()] == [6, 5]
    assert header.agreements()[0].members == (0, 70, 156)
    header._words[8] = 8  # a writer has begun with step 8, in the place of step 6
    assert [a.step for a in header.agreements()] == [5]


def test_a_flight_recorder_keeps_the_last_operations() -> None:
    clock = Clock()
    header = Header(memoryview(bytearray(header_bytes(2))), 2, clock)
    for number in range(OPERATIONS_KEPT + 10):
        clock.now += 1
        header.note(1, f"operation {number} " + "é" * 60)
    flight = header.flight(1)
    assert len(flight) == OPERATIONS_KEPT and header.flight(0) == []
    assert flight[0].text.startswith("operation 10 é") and flight[-1].at_s == clock.now


def test_notices(tmp_path: Path) -> None:
    clock = Clock()
    file = tmp_path / "going"
    notices = Notices(str(file), "test -e " + str(tmp_path / "asked"), clock)

    def later(seconds: float) -> str | None:
        clock.now += seconds
        notices.arrived()
        if notices._running is not None:
            notices._running.wait()
        return notices.arrived()

    assert later(0) is None and later(6) is None
    (tmp_path / "asked").touch()
    assert later(6) is not None
    file.touch()
    assert notices.arrived() == f"{file} has appeared"
    notices.close()


def test_a_worker_that_stays_slow_is_named_with_its_phase_once() -> None:
    slowness = Slowness()
    even = {"data": 0.01, "compute": 1.0, "reduce": 0.01, "update": 0.1, "wait": 0.0}
    said = []
    for _ in range(200):
        rows = {0: even, 1: {**even, "data": 0.9}, 2: {**even, "compute": 0.4}}
        said += slowness.look(rows, {0: 4, 1: 4, 2: 4})
    assert said == ["worker 1 stays slow at loading data: 90.0 times what the others take for the same work"]


def test_a_worker_that_still_builds_its_model_has_a_minute() -> None:
    """Nobody waits for it; under load that took 2 s with a deadline of 1 s, and it was ended."""
    clock = Clock()
    watch, header = watched(clock)
    header.set_activity(3, "start", 0)
    watch.silent([3])
    clock.now += 50
    assert watch.silent([3]) == []
    header.set_ready(3, True)
    assert [silence.slot for silence in watch.silent([3])] == [3]
