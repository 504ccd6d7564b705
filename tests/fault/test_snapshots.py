"""Where a worker's state ends with it, all start again from a snapshot in memory, and end with the same digest."""

import itertools
import json
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.fault.test_recovery import struck
from unisono.comm.arena import Arena, Region
from unisono.errors import WorkerFailed
from unisono.launch.local import LocalLauncher
from unisono.launch.worker_set import WorkerSet
from unisono.state.portions import Portion
from unisono.state.snapshots import Images, Snapshots, part_of

WHOLE = [Region(0, 1012)]


def state(step: int) -> list[torch.Tensor]:
    """A state of 1,000 bytes that tells its step, and 12 bytes that lie elsewhere."""
    return [torch.full((125,), step, dtype=torch.int64), torch.full((3,), float(step))]


def divide(hosts: int) -> list[list[Region]]:
    assert hosts == 1
    return [WHOLE]


def memory(workers: int) -> Arena:
    return Arena(None, Images.size_bytes(Portion(), divide, workers))


def begun(arena: Arena, parts: list[torch.Tensor], rank: int, workers: int, **options: Any) -> Snapshots:
    """A worker that has looked what there is."""
    images = Images(arena, Portion(), divide, workers)
    one = Snapshots(images, parts, rank, workers, options.pop("every", 1), **options)
    one.look(0, 1, lambda payload, operation: [payload])
    return one


@given(st.integers(1, 4), st.integers(1, 5), st.data())
def test_whoever_ends_while_an_image_is_written_leaves_the_last_one_whole(
    workers: int, taken: int, data: st.DataObject
) -> None:
    parts, arena = [state(0) for _ in range(workers)], memory(workers)
    all_of_them = [begun(arena, part, rank, workers) for rank, part in enumerate(parts)]
    assert all(one.found is None and one.is_needed(1) for one in all_of_them)
    for step in range(1, taken + 1):
        done = data.draw(st.integers(0, workers - 1)) if step == taken else workers  # who still copied the last
        for rank in data.draw(st.permutations(range(workers)))[:done]:
            parts[rank][0].fill_(step)
            parts[rank][1].fill_(step)
            all_of_them[rank].take(step, f"known {step}".encode())
    again = [begun(arena, state(-1), rank, workers) for rank in range(workers)]
    if taken == 1:
        assert all(one.found is None for one in again)
        return
    fresh = state(-1)
    one = begun(arena, fresh, 0, workers)
    assert one.found is not None and one.found.step == taken - 1 and not one.is_needed(1)
    assert one.found.known == f"known {taken - 1}".encode()
    one.restore([WHOLE], 0)
    assert torch.equal(fresh[0], state(taken - 1)[0]) and fresh[1].tolist() == [taken - 1] * 3
    for rank, other in enumerate(again):  # and the next one does not overwrite it before it is whole
        other.take(taken + 5, b"later")
        found = begun(arena, fresh, 0, workers).found
        assert found is not None and found.step == (taken + 5 if rank == workers - 1 else taken - 1)


@given(st.integers(0, 10_000), st.integers(1, 9))
def test_parts_cover_the_state_once(size_bytes: int, workers: int) -> None:
    parts = [part_of(size_bytes, rank, workers) for rank in range(workers)]
    assert parts[0].start == 0 and parts[-1].stop == size_bytes
    assert all(a.stop == b.start for a, b in itertools.pairwise(parts))


def test_automatic_snapshots_take_a_hundredth_of_the_time() -> None:
    now = [0.0]
    arena = memory(1)

    def clock() -> float:
        now[0] += 0.5  # each look at it takes half a second
        return now[0]

    one = begun(arena, state(0), 0, 1, every="auto", clock=clock)
    assert one.is_due(1)
    one.take(1, b"")
    now[0] += 40.0
    assert not one.is_due(2)
    now[0] += 9.5
    assert one.is_due(3)


@pytest.mark.parametrize("moment", ["data", "forward", "backward", "mid-update", "wait"])
def test_one_worker_alone_is_lost_and_its_run_goes_on(pool: LocalLauncher, moment: str, tmp_path: Path) -> None:
    struck(pool, 1, (0, 4, moment), (0, 9, moment), model="mlp", run_dir=str(tmp_path), fault={"snapshot_every": 3})
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    back = [(r["step"], r["lost_steps"]) for r in records if r["event"] == "RolledBack"]
    assert len(back) == 2 and all(step % 3 == 0 and lost < 3 for step, lost in back)
    losses: dict[int, set[float]] = {}
    for record in (r for r in records if r["event"] == "StepFinished"):
        losses.setdefault(record["step"], set()).add(record["loss"])
    assert sorted(losses) == list(range(1, 13)) and all(len(values) == 1 for values in losses.values())


@pytest.mark.parametrize(
    ("workers", "layout"),
    [(2, {"tensor": 2}), (4, {"tensor": 2, "data": 2, "zero": 0}), (4, {"pipeline": 2, "zero": 0})],
    ids=["tensor", "tensor x data", "replicas with states of their own"],
)
@pytest.mark.parametrize("how", ["kill", "exit"])
def test_layouts_that_nobody_can_take_over_in_start_again(
    pool: LocalLauncher, workers: int, layout: dict[str, int], how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    options = {"model": "plain", "layout": layout, "deadline_s": 20.0}
    expected = pool.run({"call": "tests.jobs:train", "arguments": {**options, "steps": 12}}, workers).result["digest"]
    strikes = [
        {"rank": workers - 1, "step": 3, "moment": "backward", "how": how},
        {"rank": 0, "step": 7, "moment": "mid-update", "how": how},
    ]
    ending = pool.run({"call": "tests.jobs:struck", "arguments": {**options, "strikes": strikes}}, workers)
    assert ending.result["digest"] == expected
    assert "and its state with it; all start again, from the newest snapshot" in capfd.readouterr().err


def test_one_that_hangs_is_ended_and_all_start_again(pool: LocalLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    struck(pool, 1, (0, 5, "forward"), model="mlp", how="stop", deadline_s=1.0)
    assert "worker 0" in (said := capfd.readouterr().err) and "has made no progress" in said


def test_a_signal_holds_for_those_who_start_again(pool: LocalLauncher, tmp_path: Path) -> None:
    """Asked to stop in the step in which the worker is lost, the run saves a step and ends with exit code 0."""

    def look(workers: WorkerSet) -> None:
        header = workers.survival.header
        if header is not None and header.committed >= 4 and not told:
            told.append(header.committed)
            workers.interrupt(signal.SIGTERM)

    told: list[int] = []
    options = {"model": "mlp", "run_dir": str(tmp_path), "fault": {"snapshot_every": 3}, "checkpoint": {"every": 100}}
    slow = [{"rank": 0, "step": 0, "moment": "data", "how": "slow", "seconds": 0.05}]
    strikes = [*slow, {"rank": 0, "step": 5, "moment": "backward", "how": "kill"}]
    pool.each_turn = look
    try:
        ending = pool.run({"call": "tests.jobs:struck", "arguments": {**options, "strikes": strikes}}, 1)
    finally:
        pool.each_turn = None
    assert ending.preempted and ending.result["reason"] == "stopped" and ending.result["step"] < 12
    assert "RolledBack" in (tmp_path / "events.jsonl").read_text()
    arguments = {**options, "steps": 12, "resume": True}
    resumed = pool.run({"call": "tests.jobs:train", "arguments": arguments}, 1).result
    whole = pool.run({"call": "tests.jobs:train", "arguments": {"model": "mlp", "steps": 12}}, 1).result
    assert resumed["digest"] == whole["digest"]


def test_what_ends_every_worker_that_tries_it_ends_the_run(pool: LocalLauncher) -> None:
    arguments = {"rank": 0, "how": "kill", "model": "mlp"}
    with pytest.raises(WorkerFailed, match=r"two workers died in compute of step 2, micro-batch 0: process"):
        pool.run({"call": "tests.jobs:fail", "arguments": arguments}, 1)
    with pytest.raises(WorkerFailed, match=r"workers have ended in step 2 3 times, one after another, .* in update of"):
        pool.run({"call": "tests.jobs:fail", "arguments": {**arguments, "phase": "update"}}, 1)


def test_one_that_may_not_start_again_ends_the_run(pool: LocalLauncher) -> None:
    with pytest.raises(WorkerFailed, match=r"worker 0 of 1 .* was killed by SIGKILL; the others have been ended"):
        struck(pool, 1, (0, 5, "forward"), model="mlp", fault={"on_loss": "stop"})


def test_a_later_training_of_a_program_is_not_begun_again(pool: LocalLauncher) -> None:
    strikes = [{"rank": 0, "step": 3, "moment": "forward", "how": "kill"}]
    with pytest.raises(WorkerFailed, match="was killed by SIGKILL"):
        pool.run({"call": "tests.jobs:struck_in_the_second_of_two", "arguments": {"strikes": strikes}}, 1)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_workers_of_several_sets_under_one_launcher_start_again(pool: LocalLauncher, rank: int, tmp_path: Path) -> None:
    """As the workers of devices, each of which has a state of its own."""
    faults = [
        {"rank": rank, "step": step, "moment": "backward", "how": how} for step, how in ((3, "kill"), (8, "stop"))
    ]
    arguments = {"strikes": faults, "model": "mlp", "deadline_s": 1.0, "run_dir": str(tmp_path)}
    ending = pool.run({"call": "tests.jobs:struck", "arguments": arguments}, 4, hosts=2)
    expected = pool.run({"call": "tests.jobs:train", "arguments": {"model": "mlp", "steps": 12}}, 1).result["digest"]
    assert ending.result["digest"] == expected
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert sum(record["event"] == "RolledBack" for record in records) == 2


def test_where_memory_has_no_room_for_snapshots_that_is_said(pool: LocalLauncher, tmp_path: Path) -> None:
    arguments = {"steps": 3, "model": "mlp", "run_dir": str(tmp_path)}
    pool.run({"call": "tests.jobs:train_in_little_memory", "arguments": arguments}, 1)
    text = (tmp_path / "events.jsonl").read_text()
    assert "a lost worker ends this run: snapshots of its state would take" in text


@pytest.mark.parametrize("hosts", [1, 2])
def test_a_loss_before_training_starts_all_again_in_every_set(pool: LocalLauncher, hosts: int, tmp_path: Path) -> None:
    """Also where each set has an arena of its own, and the one that is lost had not asked for its own yet."""
    arguments = {"mark": str(tmp_path / "mark"), "model": "mlp", "layout": {"tensor": 1}}
    target = {"call": "tests.jobs:train_after_an_early_death", "arguments": arguments}
    expected = pool.run({"call": "tests.jobs:train", "arguments": {"model": "mlp"}}, 1).result["digest"]
    assert pool.run(target, 2, hosts=hosts).result["digest"] == expected
