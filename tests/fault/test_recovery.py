"""Workers are lost at (rank, step, phase); the others go on in their processes, to the digest of an undisturbed run."""

import json
import os
import random
import re
import signal
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from unisono.comm.header import Course
from unisono.errors import UnisonoError, WorkerFailed
from unisono.launch.local import LocalLauncher
from unisono.launch.task import Elastic, Ending
from unisono.launch.worker_set import WorkerSet

STEPS = 12


@pytest.fixture
def turn(pool: LocalLauncher) -> Iterator[Callable[[Callable[[WorkerSet], None]], None]]:
    """Sets what the pool does at each turn of its loop, every 2 ms."""

    def install(look: Callable[[WorkerSet], None]) -> None:
        pool.each_turn, pool.turn_s = look, 0.002

    before = pool.turn_s
    yield install
    pool.each_turn, pool.turn_s = None, before


@cache
def undisturbed(pool: LocalLauncher, options: str, steps: int = STEPS) -> str:
    """The digest of one worker."""
    arguments = {"steps": steps, **json.loads(options)}
    result: str = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 1).result["digest"]
    return result


def struck(pool: LocalLauncher, workers: int, *strikes: tuple[int, int, str], **options: Any) -> Ending:
    """Train with faults at (rank, step, moment), and compare with the digest of one worker."""
    layout, elastic = options.pop("layout", {}), options.pop("elastic", None)
    how, steps = options.pop("how", "kill"), options.pop("steps", STEPS)
    pace_s = options.pop("pace_s", 0.0)  # that each micro-batch takes more: those who join come within a step or two
    faults = [{"rank": rank, "step": step, "moment": moment, "how": how} for rank, step, moment in strikes]
    if pace_s:
        slow = {"step": 0, "moment": "data", "how": "slow", "seconds": pace_s}
        faults += [{"rank": rank, **slow} for rank in range(workers)]
    arguments = {"strikes": faults, "steps": steps, "layout": layout, "deadline_s": 20.0, **options}
    ending = pool.run({"call": "tests.jobs:struck", "arguments": arguments}, workers, elastic=elastic)
    pure = {key: value for key, value in options.items() if key not in ("fault", "run_dir", "checkpoint", "deadline_s")}
    assert ending.result["digest"] == undisturbed(pool, json.dumps(pure), steps)
    return ending


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]


MOMENTS = ["data", "forward", "backward", "wait", "reduce", "mid-reduce", "update", "mid-update", "mid-commit"]


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_is_killed_at_any_moment(pool: LocalLauncher, rank: int, moment: str) -> None:
    """(rank 0 or 2 of 4, step 5, every moment): SIGKILL; clipping needs all norms, BatchNorm all buffers."""
    ending = struck(pool, 4, (rank, 5, moment), model="norm", optimizer="momentum", clip=0.5)
    others = [result for r, result in enumerate(ending.results) if r != rank]
    assert all(result["reason"] == "finished" for result in others)
    assert len({result["process"] for result in others}) == 3


@pytest.mark.parametrize(
    ("first", "second"), [("forward", "forward"), ("forward", "rescue"), ("mid-update", "mid-update")]
)
def test_two_of_four_are_killed(pool: LocalLauncher, first: str, second: str) -> None:
    """(ranks 1 and 3, step 4): the second one too while it computes in the first one's place."""
    struck(pool, 4, (1, 4, first), (3, 4, second), model="mlp", clip=0.5)


def test_a_worker_that_joins_is_killed_as_it_enters(pool: LocalLauncher) -> None:
    """(rank 1, step 3, forward), then its successor at its entry: another one comes."""
    ending = struck(pool, 3, (1, 3, "forward"), (1, 0, "entry"), model="mlp", steps=60)
    assert ending.results[0]["reason"] == ending.results[2]["reason"] == "finished"


@pytest.mark.parametrize(
    ("options", "workers", "layout"),
    [
        ({"model": "tied", "clip": 0.1}, 3, {"zero": 1}),
        ({"model": "norm", "optimizer": "momentum"}, 3, {"zero": 0}),
        ({"model": "mlp", "optimizer": "adafactor"}, 3, {}),
        ({"model": "mlp", "optimizer": "coupled"}, 3, {}),
        ({"model": "untouched", "optimizer": "adagrad"}, 3, {}),
        ({"model": "mlp", "micro_batch_size": 1, "global_batch_size": 5}, 4, {}),
    ],
    ids=["tied", "zero 0", "per parameter", "coupled", "sparse state", "rows"],
)
def test_any_optimizer_survives(
    pool: LocalLauncher, options: dict[str, Any], workers: int, layout: dict[str, Any]
) -> None:
    struck(pool, workers, (0, 4, "mid-update"), (1, 7, "backward"), layout=layout, **options)


@pytest.mark.parametrize("moment", ["forward", "backward", "wait", "mid-update"])
@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize(
    ("workers", "layout"),
    [
        (4, {"data": 2, "pipeline": 2}),
        (4, {"data": 2, "pipeline": 2, "schedule": "zb_v", "recompute": "full"}),
        (4, {"pipeline": 4, "schedule": "gpipe"}),
    ],
    ids=["1f1b", "zb_v", "one replica"],
)
def test_a_stage_is_killed(pool: LocalLauncher, workers: int, layout: dict[str, Any], rank: int, moment: str) -> None:
    """(first or last stage, step 4): what it has not published is computed whole by those that are left."""
    struck(pool, workers, (rank, 4, moment), model="mlp", clip=0.5, layout=layout)


@pytest.mark.parametrize(("how", "moment"), [("stop", "backward"), ("hang", "backward"), ("sleep", "data")])
def test_a_worker_that_makes_no_progress_is_told_of_and_replaced(
    pool: LocalLauncher, how: str, moment: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """(rank 1, step 4): SIGSTOP, an endless loop in the backward, data that do not come; deadline 0.5 s.

    Steps take a few milliseconds: where the launcher has not looked before step 4, that is the worker's first one
    to it, which may take twice as long.
    """
    phase = "data" if moment == "data" else "compute"
    started = time.monotonic()
    struck(pool, 3, (1, 4, moment), how=how, model="mlp", deadline_s=0.5, run_dir=str(tmp_path))
    assert time.monotonic() - started < 5
    told = capfd.readouterr().err
    assert re.search(
        rf"worker 1 \(process \d+\) has made no progress for [01]\.\d s .*{phase} of step 4, micro-batch", told
    )
    where = "its process is stopped" if how == "stop" else "check/strike.py"
    assert where in told and "stacks of worker 0" in told and "stacks of worker 2" in told
    report = (tmp_path / "hang-001.txt").read_text()
    assert "last operations of worker 1:" in report and f"{phase} of step 4, micro-batch" in report


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_shares_that_follow_what_samples_cost_change_no_bit(pool: LocalLauncher, workers: int) -> None:
    """(rank 1, step 5, forward): and whoever takes its place comes to the same shares as the others."""
    expected = undisturbed(pool, json.dumps({"model": "norm", "augment": True}), 16)
    ending = struck(pool, workers, (1, 5, "forward"), model="norm", augment=True, skewed=True, steps=16)
    assert ending.result["digest"] == expected


def test_shrink_goes_on_without(pool: LocalLauncher) -> None:
    ending = struck(pool, 3, (2, 4, "forward"), model="mlp", fault={"on_loss": "shrink"}, steps=30)
    assert [result and result["reason"] for result in ending.results] == ["finished", "finished", None]


def test_wait_goes_on_with_all(pool: LocalLauncher, tmp_path: Path) -> None:
    """After the step of the loss, and the one in which the new worker is let in, all train again."""
    struck(pool, 3, (2, 4, "forward"), model="mlp", fault={"on_loss": "wait"}, run_dir=str(tmp_path))
    records = records_of(tmp_path)
    changes = [r for r in records if r["event"] == "MembersChanged"]
    assert changes[-1]["joined"] == [2] and changes[-1]["members"] == [0, 1, 2] and changes[-1]["step"] <= 7


def test_a_spare_takes_the_place(pool: LocalLauncher, tmp_path: Path) -> None:
    struck(pool, 2, (1, 400, "forward"), model="mlp", steps=430, elastic=Elastic(2, 2, 1), run_dir=str(tmp_path))
    records = records_of(tmp_path)
    assert next(r["joined"] for r in records if r["event"] == "MembersChanged") == [2]


def test_the_records_go_on_when_the_chief_is_killed(pool: LocalLauncher, tmp_path: Path) -> None:
    """(rank 0, step 7): every step is told once, checkpoints are written, and the newest is intact."""
    options: dict[str, Any] = {
        "checkpoint": {"every": 3},
        "run_dir": str(tmp_path),
        "validated": True,
        "validate": {"every": 4},
    }
    ending = struck(pool, 3, (0, 7, "wait"), model="mlp", **options)
    records = records_of(tmp_path)
    assert [r["step"] for r in records if r["event"] == "StepFinished"] == list(range(1, STEPS + 1))
    assert [r["step"] for r in records if r["event"] == "ValidationFinished"] == [4, 8, 12]
    assert [r["step"] for r in records if r["event"] == "RunFinished"] == [STEPS]
    losses = {r["number"]: r for r in records if r["event"] == "WorkerLost"}
    assert [(r["rank"], r["how"]) for r in losses.values()] == [(0, "was killed by SIGKILL")]
    assert [r["rank"] for r in records if r["event"] == "ChiefChanged"] == [1]
    saved = [r["step"] for r in records if r["event"] == "CheckpointSaved"]
    assert saved[-1] == STEPS and saved == sorted(saved)
    again = pool.run(
        {"call": "tests.jobs:train", "arguments": {"steps": STEPS, "resume": True, "model": "mlp", **options}}, 2
    )
    assert again.result["digest"] == ending.result["digest"]


@pytest.mark.parametrize("first", [5, 6])
@pytest.mark.parametrize("second", [1, 2])
def test_two_chiefs_are_killed_before_they_record_a_step(
    pool: LocalLauncher, tmp_path: Path, first: int, second: int
) -> None:
    """(rank 0, step 5 or 6, mid-commit), (rank 1, one or two steps later, mid-commit): no step is left out.

    By then rank 0 is there anew, and knows nothing of the steps that the two have taken with them; ranks 2 and 3 do.
    """
    struck(pool, 4, (0, first, "mid-commit"), (1, first + second, "mid-commit"), pace_s=0.1, run_dir=str(tmp_path))
    assert [r["step"] for r in records_of(tmp_path) if r["event"] == "StepFinished"] == list(range(1, STEPS + 1))


def test_a_worker_is_killed_in_an_evaluation(pool: LocalLauncher) -> None:
    """(rank 1, after step 4): its batches are evaluated by the others, each once."""
    options: dict[str, Any] = {"model": "norm", "validated": True, "validate": {"every": 4}}
    ending = struck(pool, 3, (1, 4, "validation"), **options)
    plain = pool.run({"call": "tests.jobs:train", "arguments": {"steps": STEPS, **options}}, 1).result
    assert ending.result["validation"] == plain["validation"]


def test_a_micro_batch_that_kills_is_not_given_to_a_third(pool: LocalLauncher) -> None:
    """Whoever loads sample 17 ends: two workers do, and the run stops with how to see it alone."""
    arguments = {"deadly": 17, "deadline_s": 20.0}
    with pytest.raises(WorkerFailed, match=r"two workers died in data of step 1, micro-batch \d.*\(-n 1\).*steps=1;"):
        pool.run({"call": "tests.jobs:train_on_a_deadly_sample", "arguments": arguments}, 4)


def test_an_exception_of_the_users_is_not_tried_again(pool: LocalLauncher) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match="struck on purpose"):
        pool.run({"call": "tests.jobs:fail", "arguments": {"rank": 1, "how": "raise"}}, 3)
    assert time.monotonic() - started < 3


def test_a_loss_before_training_starts_all_again(
    pool: LocalLauncher, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = {"mark": str(tmp_path / "mark"), "model": "mlp"}
    ending = pool.run({"call": "tests.jobs:train_after_an_early_death", "arguments": arguments}, 3)
    assert ending.result["digest"] == undisturbed(pool, json.dumps({"model": "mlp"}), 6)
    assert "before training began; all start again" in capfd.readouterr().err


def test_the_last_one_is_not_survived(pool: LocalLauncher) -> None:
    with pytest.raises(UnisonoError, match=r"nobody is left to take over; resume from the newest checkpoint"):
        struck(pool, 2, (0, 4, "forward"), (1, 4, "forward"), model="mlp")


def random_faults(seed: int, steps: int) -> Callable[[WorkerSet], None]:
    """Kills and stops workers at random times, never the last two, nor two at one micro-batch."""
    chance, struck, doomed = random.Random(seed), set[tuple[int, int | None]](), set[int]()
    following = [0.0]

    def look(workers: WorkerSet) -> None:
        header, now = workers.survival.header, time.monotonic()
        if header is None or header.course is not Course.TRAINING or now < following[0]:
            return
        healthy = [w for w in workers.alive if w.process not in doomed and header.doing(w.rank)[0] != "start"]
        if len(healthy) < 3:
            return
        victim = chance.choice(healthy)
        _, step, micro_batch = header.doing(victim.rank)
        if step > steps - 20 or (step, micro_batch) in struck:
            return
        struck.add((step, micro_batch))
        doomed.add(victim.process)
        os.kill(victim.process, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
        following[0] = now + chance.choice([0.0, 0.02, 0.1, 0.4])

    return look


@pytest.mark.parametrize(
    ("seed", "options", "layout"),
    [
        (1, {"model": "norm", "optimizer": "momentum", "clip": 0.5}, {}),
        (2, {"model": "mlp", "clip": 0.5}, {"data": 2, "pipeline": 2, "schedule": "zb_h1"}),
        (3, {"model": "mlp", "optimizer": "adafactor"}, {"zero": 0}),
    ],
    ids=["data", "pipelines", "own states"],
)
def test_random_faults(
    pool: LocalLauncher, turn: Callable[..., None], seed: int, options: dict[str, Any], layout: dict[str, Any]
) -> None:
    expected = undisturbed(pool, json.dumps(options), 80)
    turn(random_faults(seed, 80))
    arguments = {"steps": 80, "layout": layout, "deadline_s": 0.5, **options}
    assert pool.run({"call": "tests.jobs:train", "arguments": arguments}, 4).result["digest"] == expected


def test_workers_come_and_go(pool: LocalLauncher, turn: Callable[..., None], tmp_path: Path) -> None:
    """1 to 4 to 2 to 3, while it trains."""
    plan = iter([(5, 4), (80, 2), (110, 3)])
    following = [next(plan)]

    def look(workers: WorkerSet) -> None:
        header = workers.survival.header
        training = header is not None and header.course is Course.TRAINING
        if training and header is not None and following and header.committed >= following[0][0]:
            workers.scale(following[0][1])
            following[:] = [step] if (step := next(plan, None)) else []

    expected = undisturbed(pool, json.dumps({"model": "norm"}), 300)
    turn(look)
    arguments = {"steps": 300, "model": "norm", "run_dir": str(tmp_path)}
    ending = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 1, elastic=Elastic(1, 4))
    assert ending.result["digest"] == expected
    records = records_of(tmp_path)
    sizes = [len(r["members"]) for r in records if r["event"] == "MembersChanged"]
    assert max(sizes) == 4 and sizes[-1] == 3 and 2 in sizes


@pytest.mark.parametrize("on_loss", ["replace", "shrink"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_program_that_trains_twice_goes_on_with_those_who_are_there(
    pool: LocalLauncher, on_loss: str, rank: int
) -> None:
    """(rank 0 or 2, step 4 of the first training): the second one begins with its successor, or without."""
    fault = {"rank": rank, "step": 4, "moment": "forward"}
    arguments = {"strikes": [fault], "model": "mlp", "fault": {"on_loss": on_loss}, "deadline_s": 20.0}
    results = pool.run({"call": "tests.jobs:struck_in_the_first_of_two", "arguments": arguments}, 3).results
    expected = [
        undisturbed(pool, json.dumps({"model": "mlp"}), 60),
        undisturbed(pool, json.dumps({"model": "norm"}), 5),
    ]
    assert results.count(expected) == (3 if on_loss == "replace" else 2)


def test_a_program_that_ends_in_the_middle_is_a_loss(pool: LocalLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    """The others would wait for it."""
    arguments = {"rank": 1, "model": "mlp", "deadline_s": 20.0}
    ending = pool.run({"call": "tests.jobs:leave_the_program", "arguments": arguments}, 3)
    assert ending.result["digest"] == undisturbed(pool, json.dumps({"model": "mlp"}))
    assert "worker 1" in (told := capfd.readouterr().err) and "ended with exit code 0" in told


def test_three_of_five_are_killed_at_once(pool: LocalLauncher, turn: Callable[..., None]) -> None:
    """All three ends are heard of before anything is made of the first."""
    struck: list[int] = []

    def look(workers: WorkerSet) -> None:
        header = workers.survival.header
        if header is not None and header.course is Course.TRAINING and header.committed >= 10 and not struck:
            struck.extend(w.process for w in workers.alive[:3])
            for process in struck:
                os.kill(process, signal.SIGKILL)
            time.sleep(0.1)

    arguments = {"steps": 40, "model": "norm", "clip": 0.5, "deadline_s": 3.0}
    expected = undisturbed(pool, json.dumps({"model": "norm", "clip": 0.5}), 40)
    turn(look)
    ending = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 5)
    assert len(struck) == 3 and ending.result["digest"] == expected


@pytest.mark.parametrize("before_the_end", [0, 1, 2])
def test_workers_are_asked_to_leave_as_the_run_ends(
    pool: LocalLauncher, turn: Callable[..., None], before_the_end: int
) -> None:
    asked: list[str] = []

    def look(workers: WorkerSet) -> None:
        header = workers.survival.header
        training = header is not None and header.course is Course.TRAINING
        if training and header is not None and header.committed >= 29 - before_the_end and not asked:
            asked.append(workers.scale(1))

    expected = undisturbed(pool, json.dumps({"model": "mlp"}), 30)
    turn(look)
    arguments = {"steps": 30, "model": "mlp", "deadline_s": 3.0}
    ending = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 3, elastic=Elastic(1, 3))
    assert asked and ending.result["digest"] == expected
