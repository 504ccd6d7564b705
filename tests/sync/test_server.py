"""A parameter server whose workers wait for nobody: a plain loop with one worker, replays, bounds, and faults."""

import contextlib
import copy
import itertools
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import toys
from unisono.comm.journal import Image, Journal
from unisono.config import TrainingConfig, validate
from unisono.errors import CheckpointError, ConfigurationError, TrainingError, UnisonoError
from unisono.events import StepFinished
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import refuse_impossible, refuse_inelastic, refuse_to_compare
from unisono.launch.task import Elastic
from unisono.optim.blockwise import BlockOptimizer, Unit
from unisono.optim.classes import pin_variant
from unisono.plan.assignment import UpdateClass
from unisono.plan.homes import Homes
from unisono.plan.hosts import Hosts, evenly
from unisono.plan.pool import Entry, Pool, PoolLayout, may_begin, staleness
from unisono.plan.replay import Apply, Read, replayed
from unisono.plan.rounds import Arrival, RoundsLayout, RoundsPool
from unisono.run.sampling import Sampler
from unisono.state.checkpoint import newest_intact
from unisono.state.export import state_dict
from unisono.state.order import path_of, read_order, read_rounds, write_order
from unisono.sync.damping import DampedRates
from unisono.sync.pulled import PulledValues
from unisono.sync.tables import Table, keep_rows, put_back_rows, rows_bytes
from unisono.trainer import Trainer


def run(
    pool: LocalLauncher, workers: int, strikes: list[dict[str, Any]] | None = None, hosts: int = 1, **options: Any
) -> Any:
    arguments = {"strikes": strikes or [], "deadline_s": 20.0, "global_batch_size": 160, "steps": 6, **options}
    return pool.run({"call": "tests.jobs:struck", "arguments": arguments}, workers, hosts=hosts)


def digest_of(ending: Any) -> str:
    found: str = next(result for result in ending.results if result)["digest"]
    return found.rpartition(": ")[2]


def replayed_digest(pool: LocalLauncher, directory: Path, sync: dict[str, Any], **options: Any) -> str:
    kept = {key: value for key, value in options.items() if key != "run_dir"}
    return digest_of(run(pool, 1, sync={"mode": "server", "replay": str(directory), **sync}, **kept))


@pytest.mark.parametrize("name", ["momentum", "adamw", "lamb"])
def test_one_worker_does_what_a_plain_loop_does(name: str) -> None:
    """An update after each micro-batch, in order: nothing is stale."""
    plain, make = toys.MODELS["plain"]().double(), toys.OPTIMIZERS[name]
    data = [(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))]
    trainer = Trainer(
        model=lambda: copy.deepcopy(plain),
        loss=toys.LOSSES["mse"],
        data=data,
        optimizer=make,
        sync={"mode": "server"},
        global_batch_size=24,
        micro_batch_size=4,
        clip=0.5,
        observe={"progress": False},
    )
    trainer.fit(2)
    sampler = Sampler(toys.SAMPLES, 0, 24, 4)
    optimizer = make(plain.parameters())
    pin_variant(optimizer, torch.device("cpu"))
    for step, m in itertools.product(range(2), range(6)):
        rows = [data[i] for i in sampler.indices(step, m).tolist()]
        optimizer.zero_grad()
        toys.LOSSES["mse"](plain(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows])).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        optimizer.step()
    assert trainer.model is not None
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-10)


WAYS: dict[str, dict[str, Any]] = {
    "asynchronous": {"model": "mlp", "sync": {"servers": 3}},
    "one server, BatchNorm, clipped": {"model": "norm", "clip": 0.1, "sync": {"servers": 1}},
    "bounded": {"model": "mlp", "optimizer": "sgd", "sync": {"staleness": 1, "servers": 2}},
    "damped, several at once, by LAMB": {"model": "mlp", "optimizer": "lamb", "sync": {"damping": "rate", "push": 2}},
    "momentum damped": {"model": "mlp", "optimizer": "momentum", "sync": {"damping": "both", "servers": 2}},
    "some weigh nothing": {"model": "mlp", "loss": "sometimes", "sync": {"servers": 2}},
    "tied": {"model": "tied", "sync": {"servers": 2}},
    "untouched parameters": {"model": "untouched", "optimizer": "adam", "sync": {}},
    "rows of a table": {"model": "embedded", "optimizer": "sgd", "sync": {"servers": 2}},
    "rows, some of which weigh nothing": {
        "model": "embedded",
        "optimizer": "sgd",
        "loss": "sometimes",
        "sync": {"servers": 2},
    },
    "rows, clipped and damped": {
        "model": "embedded",
        "optimizer": "sgd",
        "clip": 0.05,
        "sync": {"damping": "rate", "push": 2},
    },
}


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("workers", [2, 4])
def test_a_recorded_run_is_replayed_bit_for_bit(pool: LocalLauncher, name: str, workers: int, tmp_path: Path) -> None:
    way = WAYS[name]
    options = {key: value for key, value in way.items() if key != "sync"}
    sync = way["sync"]
    live = run(pool, workers, run_dir=str(tmp_path), sync={"mode": "server", "record": True, **sync}, **options)
    assert live.result["digest"].startswith("not exact (workers push in whatever order they come)")
    assert replayed_digest(pool, tmp_path, sync, **options) == digest_of(live)


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(("workers", "hosts", "serving"), [(2, 2, 0), (5, 3, 0), (3, 1, 1), (6, 2, 1)])
def test_a_recorded_run_of_several_hosts_is_replayed(
    pool: LocalLauncher, name: str, workers: int, hosts: int, serving: int, tmp_path: Path
) -> None:
    """Or with processes that only serve: bit for bit by one worker that has all servers in its memory."""
    way = WAYS[name]
    options = {key: value for key, value in way.items() if key != "sync"}
    sync = {**way["sync"], "servers": max(hosts, way["sync"].get("servers", 4))}
    spread = {"mode": "server", "record": True, "serving": serving, **sync}
    live = run(pool, workers, hosts=hosts, run_dir=str(tmp_path), sync=spread, **options)
    assert len({result["loss"] for result in live.results}) == 1
    assert replayed_digest(pool, tmp_path, sync, **options) == digest_of(live)
    units = 160 // 4 // sync.get("push", 1)
    for step in range(1, 7):
        order, _ = read_order(tmp_path, step)
        assert hosts <= len(order) <= sync["servers"]
        assert all(sorted(entry.unit for entry in entries) == list(range(units)) for entries in order)
        computing = Homes(Hosts(evenly(workers, hosts)), hosts, serving).computing
        assert {entry.worker for entries in order for entry in entries} <= set(computing)


MOMENTS = [("compute", 3), ("update", 3), ("mid-reduce", 3), ("mid-update", 60), ("mid-commit", 60), ("wait", 3)]


@pytest.mark.parametrize(("moment", "at"), MOMENTS)
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_is_killed_at_any_moment(pool: LocalLauncher, moment: str, at: int, rank: int, tmp_path: Path) -> None:
    """(rank, step 3; or at a server's version 60): every unit counts once, and the run can be replayed all the same."""
    sync = {"servers": 2}
    strikes = [{"rank": rank, "step": at, "moment": moment, "how": "kill"}]
    live = run(pool, 3, strikes, model="mlp", run_dir=str(tmp_path), sync={"mode": "server", "record": True, **sync})
    assert {result["reason"] for result in live.results if result} == {"finished"}
    for step in range(1, 7):
        for entries in read_order(tmp_path, step)[0]:
            runs = max(entry.stop for entry in entries)
            pushed = dict.fromkeys(range(40), 0)
            for entry in entries:
                assert pushed[entry.unit] == entry.first
                pushed[entry.unit] = entry.stop
            assert set(pushed.values()) == {runs}
    assert replayed_digest(pool, tmp_path, sync, model="mlp") == digest_of(live)


SPREAD = [(3, 2, 0), (3, 1, 1), (4, 2, 1)]
"""Workers, hosts, and workers of each that only serve: the last ones."""


@pytest.mark.parametrize(("moment", "step"), [("compute", 4), ("update", 5), ("mid-reduce", 5), ("wait", 3)])
@pytest.mark.parametrize(("workers", "hosts", "serving"), SPREAD)
@pytest.mark.parametrize("rank", [0, -1])
def test_where_servers_are_spread_all_start_again(
    pool: LocalLauncher, moment: str, step: int, workers: int, hosts: int, serving: int, rank: int, tmp_path: Path
) -> None:
    """(the first or the last rank, step): from what each host and its neighbour have kept; no unit counts twice."""
    if serving and rank == -1 and moment in ("compute", "update"):
        pytest.skip("it computes nothing")
    sync = {"servers": 3}
    live = run(
        pool,
        workers,
        [{"rank": rank % workers, "step": step, "moment": moment, "how": "kill"}],
        hosts=hosts,
        model="norm",
        run_dir=str(tmp_path),
        fault={"snapshot_every": 2},
        sync={"mode": "server", "record": True, "serving": serving, **sync},
    )
    assert {result["reason"] for result in live.results} == {"finished"}
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("RolledBack") == 1
    for number in range(1, 7):
        order = read_order(tmp_path, number)[0]
        assert all(sorted(entry.unit for entry in entries) == list(range(40)) for entries in order)
    assert replayed_digest(pool, tmp_path, sync, model="norm") == digest_of(live)


def test_where_servers_are_spread_it_is_resumed_anywhere(pool: LocalLauncher, tmp_path: Path) -> None:
    """On two hosts, then on three, on one, and on one with a process that serves; evaluated alike; replayed whole."""
    sync = {"mode": "server", "record": True, "servers": 3}
    arguments: dict[str, Any] = {"model": "norm", "clip": 0.1, "global_batch_size": 160, "deadline_s": 20.0}
    arguments |= {"run_dir": str(tmp_path), "validated": True, "validate": {"every": 2}}
    for number, (workers, hosts, serving) in enumerate(((3, 2, 0), (3, 3, 0), (2, 1, 0), (3, 1, 1), (4, 2, 1)), 1):
        given = {**arguments, "steps": 2 * number, "resume": number > 1, "sync": {**sync, "serving": serving}}
        live = pool.run({"call": "tests.jobs:train", "arguments": given}, workers, hosts=hosts)
        assert len({json.dumps(result["validations"]) for result in live.results if result["validations"]}) == 1
    replay = {"mode": "server", "servers": 3, "replay": str(tmp_path)}
    kept = {key: value for key, value in arguments.items() if key not in ("run_dir", "validated", "validate")}
    again = pool.run({"call": "tests.jobs:train", "arguments": {**kept, "steps": 10, "sync": replay}}, 1)
    assert digest_of(again) == digest_of(live)


def test_between_hosts_rows_of_a_table_travel_alone(pool: LocalLauncher, tmp_path: Path) -> None:
    """Bytes that left the first host in a step of 40 pushes, beside those with dense gradients of the same table."""
    sent = {}
    for name in ("embedded", "embedded_dense"):
        directory = tmp_path / name
        run(pool, 2, hosts=2, model=name, optimizer="sgd", run_dir=str(directory), sync={"mode": "server"})
        records = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
        sent[name] = [r["wire"]["sent_bytes"] for r in records if r["event"] == "StepFinished"][1:]
    assert max(sent["embedded"]) < min(sent["embedded_dense"]) / 5


@pytest.mark.parametrize("staleness", [None, 0, 1])
def test_a_worker_that_hangs_is_found_though_its_threads_wait(
    pool: LocalLauncher, staleness: int | None, tmp_path: Path
) -> None:
    """(rank 0 of 2 hosts, step 3): which hands out units, and answers others meanwhile."""
    strikes = [{"rank": 0, "step": 3, "moment": "compute", "how": "sleep"}]
    sync = {"mode": "server", "staleness": staleness}
    live = run(pool, 2, strikes, hosts=2, model="mlp", run_dir=str(tmp_path), deadline_s=1.0, sync=sync)
    assert {result["reason"] for result in live.results} == {"finished"}
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("RolledBack") == 1


@pytest.mark.parametrize("staleness", [None, 0])
def test_who_only_serves_waits_as_long_as_something_comes(pool: LocalLauncher, staleness: int | None) -> None:
    """A step takes several times the deadline, and a unit does not."""
    arguments = {"model": "mlp", "loss": "slow", "deadline_s": 0.4, "global_batch_size": 100, "steps": 1}
    sync = {"mode": "server", "serving": 1, "staleness": staleness, **({"accepted": 25} if staleness == 0 else {})}
    began = time.monotonic()
    ending = pool.run({"call": "tests.jobs:train_with_little_patience", "arguments": {**arguments, "sync": sync}}, 2)
    assert ending.results[0]["reason"] == "finished" and time.monotonic() - began > 1.0


def test_what_is_kept_for_a_checkpoint_is_the_state_before_a_step(pool: LocalLauncher, tmp_path: Path) -> None:
    """In rounds, beside a process that only serves: nobody goes on before the state is copied."""
    sync = {"mode": "server", "staleness": 0, "accepted": 2}
    options = {"model": "norm", "global_batch_size": 80, "steps": 4, "checkpoint": {"every": 2, "keep": 9}}
    for name, workers, serving in (("late", 3, 1), ("alone", 1, 0)):
        given = {**options, "seconds": 0.3, "run_dir": str(tmp_path / name), "sync": {**sync, "serving": serving}}
        pool.run({"call": "tests.jobs:train_and_copy_late", "arguments": given}, workers)
    late, alone = (state_dict(tmp_path / name / "checkpoints" / "step-00000002") for name in ("late", "alone"))
    assert all(torch.equal(late[key], alone[key]) for key in alone)


@pytest.mark.parametrize(("workers", "hosts", "serving"), [(2, 1, 0), (3, 1, 1), (2, 2, 0)])
@pytest.mark.parametrize("staleness", [None, 0])
def test_a_gradient_that_is_no_number_is_said_in_a_sentence(
    pool: LocalLauncher, workers: int, hosts: int, serving: int, staleness: int | None
) -> None:
    """Though it may be found on a thread that answers others."""
    sync = {"mode": "server", "serving": serving, "staleness": staleness}
    with pytest.raises(UnisonoError, match=r"^the gradient's norm is nan in step 1 though the loss is finite") as error:
        run(pool, workers, hosts=hosts, model="mlp", loss="not_smooth", clip=1.0, sync=sync)
    assert error.value.exit_code == TrainingError.exit_code


@pytest.mark.parametrize(
    ("rank", "workers", "sync", "said"),
    [
        (1, 2, {}, r"units of step 3 waited .*not done: unit \d+ by rank 1 \(host 1\)"),
        (0, 2, {}, r"units of step 3 waited .*not done: unit \d+ by rank 0 \(host 0\)"),
        (1, 2, {"staleness": 2}, r"rank 1 \(host 1\) has done \d+ units only"),
        (1, 2, {"staleness": 0}, r"under way: unit \d+ of rank 1 \(host 1\)"),
        (2, 4, {"staleness": 0, "serving": 1}, r"under way: unit \d+ of rank 2 \(host 1\)"),
    ],
)
def test_whoever_holds_up_others_is_named(
    pool: LocalLauncher, rank: int, workers: int, sync: dict[str, Any], said: str
) -> None:
    """(a rank of 2 hosts, step 3): where nobody ends those who hang."""
    strikes = [{"rank": rank, "step": 3, "moment": "compute", "how": "sleep"}]
    given = {"mode": "server", **sync}
    with pytest.raises(UnisonoError, match=said):
        run(pool, workers, strikes, hosts=2, model="mlp", deadline_s=1.0, fault={"on_loss": "stop"}, sync=given)


def test_clipping_is_a_little_more_to_say(pool: LocalLauncher, tmp_path: Path) -> None:
    """In rounds on two hosts: the norms of blocks besides gradients and values."""
    sent = {}
    for name, clip in (("clipped", 0.5), ("not", None)):
        sync = {"mode": "server", "staleness": 0}
        run(pool, 2, hosts=2, model="wide", clip=clip, run_dir=str(tmp_path / name), sync=sync, steps=9)
        records = [json.loads(line) for line in (tmp_path / name / "events.jsonl").read_text().splitlines()]
        sent[name] = sum(r["wire"]["sent_bytes"] for r in records if r["event"] == "StepFinished")
    assert 0.9 * sent["not"] < sent["clipped"] < 1.1 * sent["not"]  # a pull may count with the step after the last


@pytest.mark.parametrize("moment", ["mid-update", "mid-commit"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_is_killed_as_it_changes_rows(pool: LocalLauncher, moment: str, rank: int, tmp_path: Path) -> None:
    """(rank, the first of a server's versions from 60 that it makes): they are put back, its unit is another's."""
    options: dict[str, Any] = {"model": "embedded", "optimizer": "sgd"}
    strikes = [{"rank": rank, "step": version, "moment": moment, "how": "kill"} for version in range(60, 68)]
    sync = {"mode": "server", "record": True, "servers": 2}
    live = run(pool, 3, strikes, run_dir=str(tmp_path), sync=sync, **options)
    assert replayed_digest(pool, tmp_path, {"servers": 2}, **options) == digest_of(live)


@pytest.mark.parametrize("until", [0, 1, 2])
def test_a_change_of_rows_that_was_cut_short_is_undone(until: int) -> None:
    """Killed before the rows were kept, in the middle of their change, or after it; put back twice."""
    values, undo = torch.arange(12.0).view(6, 2), torch.zeros(rows_bytes(6, 8), dtype=torch.uint8)
    before, rows = values.clone(), torch.tensor([4, 1])
    row, versions = memoryview(bytearray(8 * 64)).cast("Q"), memoryview(bytearray(8 * 4)).cast("Q")
    versions[1] = versions[2] = 5
    journal = Journal(row, versions)

    class Killed(Exception):
        pass

    def keep() -> None:
        if until == 0:
            raise Killed
        keep_rows(undo, rows, values)

    def update() -> None:
        values[4] = -1.0
        if until == 1:
            raise Killed
        values[1] = -1.0

    with contextlib.suppress(Killed):
        journal.commit_rows(Image(1, 2, (), (), ()), 6, keep, update)
    found = [journal.recover(lambda *_: Image(1, 2, (), (), ()), put_back_rows=lambda _: put_back_rows(undo, values))]
    found.append(journal.recover(lambda *_: Image(1, 2, (), (), ())))
    assert [image is None for image in found] == [until != 1, True]
    assert torch.equal(values, before) == (until < 2) and versions[1] == versions[2] == (6 if until == 2 else 5)


def test_a_table_is_pushed_and_pulled_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its gradient is never made dense; after the first pull only rows that were changed since come."""
    pulled: list[list[int]] = []
    pull_rows, pull = PulledValues.pull_rows, PulledValues.pull

    def note(values: PulledValues, table: Table, rows: Tensor) -> None:
        pulled.append(rows.tolist())
        pull_rows(values, table, rows)

    whole: list[int] = []

    def note_whole(values: PulledValues, runs: Any) -> None:
        whole.extend(run.first for run in runs)
        pull(values, runs)

    def refuse(gradient: Tensor, *_: Any) -> Tensor:
        raise AssertionError("the whole gradient was made")

    monkeypatch.setattr(PulledValues, "pull_rows", note)
    monkeypatch.setattr(PulledValues, "pull", note_whole)
    monkeypatch.setattr(Tensor, "to_dense", refuse)
    torch.manual_seed(0)
    model = toys.Embedded()
    trainer = Trainer(
        model=lambda: copy.deepcopy(model),
        loss=nn.functional.mse_loss,
        data=toys.Samples(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
        sync={"mode": "server", "servers": 1},
        global_batch_size=24,
        micro_batch_size=4,
        observe={"progress": False},
    )
    trainer.fit(2)
    data, sampler = toys.Samples(), Sampler(toys.SAMPLES, 0, 24, 4)
    used = [
        {row for i in sampler.indices(0, m).tolist() for row in ((data[i][0] * 1e4).long() % 1000).tolist()}
        for m in range(5)
    ]
    assert [set(rows) for rows in pulled[:5]] == used
    assert whole.count(0) == 1  # its first block's run


@pytest.mark.parametrize("mode", ["server", "hogwild"])
@pytest.mark.parametrize("push", [1, 3])
def test_a_table_that_is_used_in_other_ways_too_is_trained(mode: str, push: int) -> None:
    """Its gradient is dense then; one worker does what it does with a table that is none."""
    torch.manual_seed(0)
    models = [toys.EmbeddedAndTied(sparse) for sparse in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    found = []
    for model in models:
        trainer = Trainer(
            model=lambda model=model: copy.deepcopy(model),  # type: ignore[misc]
            loss=nn.functional.mse_loss,
            data=toys.Samples(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
            sync={"mode": mode, "push": push},
            global_batch_size=24,
            micro_batch_size=4,
            observe={"progress": False},
        )
        trainer.fit(3)
        assert trainer.model is not None
        found.append(list(trainer.model.parameters()))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@given(st.lists(st.integers(0, 11), unique=True, max_size=12), st.integers(1, 5), st.integers(0, 9))
def test_rows_are_put_back(rows: list[int], width: int, seed: int) -> None:
    torch.manual_seed(seed)
    values = torch.randn(12, width)
    before, memory = values.clone(), torch.zeros(rows_bytes(12, 4 * width), dtype=torch.uint8)
    keep_rows(memory, torch.tensor(rows, dtype=torch.int64), values)
    values[rows] = 7.0
    put_back_rows(memory, values)
    assert torch.equal(values, before)


def test_it_is_resumed_and_the_resumed_part_is_replayed(pool: LocalLauncher, tmp_path: Path) -> None:
    """Stopped after step 3 on 3 workers, resumed on 2; what was recorded before and after is one run."""
    options: dict[str, Any] = {"model": "norm", "run_dir": str(tmp_path)}
    sync = {"mode": "server", "record": True, "servers": 2}
    arguments = {"deadline_s": 20.0, "global_batch_size": 160, "sync": sync, **options}
    pool.run({"call": "tests.jobs:train", "arguments": {**arguments, "steps": 3}}, 3)
    live = pool.run({"call": "tests.jobs:train", "arguments": {**arguments, "steps": 6, "resume": True}}, 2)
    assert sorted(path.name for path in (tmp_path / "order").iterdir())[-1] == "step-00000006.npz"
    assert replayed_digest(pool, tmp_path, {"servers": 2}, model="norm") == digest_of(live)


@pytest.mark.parametrize("bound", [1, 3])
def test_nobody_is_further_ahead_than_the_bound(pool: LocalLauncher, bound: int, tmp_path: Path) -> None:
    """One of three takes longer for each micro-batch; a fast one has to wait for it."""
    sync = {"mode": "server", "staleness": bound, "servers": 2, "record": True}
    slow = {"rank": 1, "step": 0, "moment": "data", "how": "slow", "seconds": 0.02}
    run(pool, 3, [slow], model="mlp", run_dir=str(tmp_path), steps=2, sync=sync)
    clocks = [0, 0, 0]
    order, _ = read_order(tmp_path, 2)
    for entry in order[-1]:  # the last server: with its push a unit is done
        clocks[entry.worker] += 1
        assert clocks[entry.worker] <= min(clocks) + bound + 1
    assert max(clocks) - min(clocks) <= bound + 1


def test_a_fast_worker_does_more_where_nothing_binds_it(pool: LocalLauncher, tmp_path: Path) -> None:
    sync = {"mode": "server", "servers": 1, "record": True}
    slow = {"rank": 1, "step": 0, "moment": "data", "how": "slow", "seconds": 0.03}
    run(pool, 2, [slow], model="mlp", run_dir=str(tmp_path), steps=2, sync=sync)
    order, _ = read_order(tmp_path, 2)
    units = [sum(entry.worker == slot for entry in order[0]) for slot in range(2)]
    assert units[0] > 3 * units[1] and sum(units) == 40
    found = staleness(order, [0])
    assert sum(found.values()) == 40 and max(found) > 3  # the slow one's


def test_staleness_is_on_record(tmp_path: Path) -> None:
    """In the events of a run; with one worker nothing is stale."""
    Trainer(
        model=lambda: nn.Linear(6, 4),
        loss=nn.functional.mse_loss,
        data=toys.Samples(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        sync={"mode": "server"},
        global_batch_size=12,
        micro_batch_size=4,
        run_dir=str(tmp_path),
        observe={"progress": False},
    ).fit(2)
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["staleness"] for r in records if r["event"] == "StepFinished"] == [{"0": 6}] * 2  # 3 pushes to 2 servers
    assert "12 pushes; on average 0.00 others came between, 0 at the most" in ((tmp_path / "report.html").read_text())


@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 12), st.randoms(use_true_random=False))
def test_any_order_that_can_happen_can_be_replayed(workers: int, servers: int, units: int, random: Any) -> None:
    """Workers that read and push, server by server, in any interleaving: every attempt reads what it read."""
    base = [random.randrange(5) for _ in range(servers)]
    versions, order = list(base), [[] for _ in range(servers)]  # type: ignore[var-annotated]
    waiting = list(range(units))
    workers_at: list[dict[str, Any]] = [{"unit": None} for _ in range(workers)]
    while waiting or any(worker["unit"] is not None for worker in workers_at):
        slot = random.randrange(workers)
        worker = workers_at[slot]
        if worker["unit"] is None:
            if waiting:
                worker.update(unit=waiting.pop(0), read=[], pushed=0)
        elif len(worker["read"]) < servers:
            worker["read"].append(versions[len(worker["read"])])
        else:
            server = worker["pushed"]
            order[server].append(Entry(worker["unit"], slot, 0, 1, tuple(worker["read"])))
            versions[server] += 1
            worker["pushed"] += 1
            if worker["pushed"] == servers:
                worker["unit"] = None
    at, read, applied = list(base), {}, 0
    for action in replayed(order, base):
        if isinstance(action, Read):
            read[action.attempt, action.server] = at[action.server]
        else:
            assert isinstance(action, Apply)
            assert [read[action.attempt, server] for server in range(servers)] == list(action.entry.read)
            assert action.late == at[action.server] - action.entry.read[action.server]
            at[action.server] += 1
            applied += 1
    assert applied == units * servers and at == versions


def test_an_order_that_contradicts_itself_is_refused() -> None:
    order = [
        [Entry(0, 0, 0, 1, (0, 1)), Entry(1, 1, 0, 1, (1, 0))],
        [Entry(1, 1, 0, 1, (1, 0)), Entry(0, 0, 0, 1, (0, 1))],
    ]
    with pytest.raises(CheckpointError, match="contradicts itself"):
        list(replayed(order, [0, 0]))


@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 3))
def test_whoever_has_done_least_may_always_begin(clocks: list[int], bound: int) -> None:
    assert may_begin(clocks, min(clocks), bound)
    assert may_begin(clocks, max(clocks), bound) == (max(clocks) - min(clocks) <= bound)
    assert may_begin(clocks, max(clocks), None)


def test_a_pool_gives_each_unit_once_and_again_where_its_worker_is_lost() -> None:
    layout = PoolLayout(workers=2, units=3, runs=(5, 3))
    pool = Pool(layout, memoryview(bytearray(layout.size_bytes)))
    pool.begin(1, [4, 4])
    assert [pool.take(0), pool.take(1), pool.take(0), pool.take(1)] == [0, 1, 2, None]
    entry = Entry(1, 1, 0, 5, (4, 4))
    pool.open_entry(0, entry)
    assert pool.opened(0) == entry and pool.opened(1) is None
    pool.close_entry(0, entry, 2)  # it died after two of five runs
    assert pool.order()[0] == [Entry(1, 1, 0, 2, (4, 4))] and pool.version[0] == 5 and pool.done[1, 0] == 2
    assert pool.inherit(0, 1) == 1 and pool.inherit(0, 1) is None
    pool.begin(2, [5, 4])
    assert pool.take(1) == 0 and pool.order() == [[], []] and not pool.all_done


def test_orders_on_disk(tmp_path: Path) -> None:
    order = [[Entry(0, 1, 0, 3, (7, 8))], [Entry(0, 1, 0, 2, (7, 8)), Entry(1, 0, 0, 2, (7, 9))]]
    sums = np.array([[0.1, 1.0], [0.3, 2.0]])
    write_order(tmp_path, 3, order, [7, 8], sums)
    found, kept = read_order(tmp_path, 3)
    assert found == [[replace(e, read=(e.read[0] - 7, e.read[1] - 8)) for e in entries] for entries in order]
    assert kept.tolist() == sums.tolist()
    with pytest.raises(CheckpointError, match=r"step-00000004\.npz is not there: the run was not recorded at step 4"):
        read_order(tmp_path, 4)
    path_of(tmp_path, 3).write_bytes(b"torn")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_order(tmp_path, 3)


def test_a_replay_of_another_run_is_refused(pool: LocalLauncher, tmp_path: Path) -> None:
    run(pool, 2, model="mlp", run_dir=str(tmp_path), sync={"mode": "server", "record": True, "servers": 2})
    first = path_of(tmp_path, 1).read_bytes()
    path_of(tmp_path, 1).write_bytes(path_of(tmp_path, 2).read_bytes())
    with pytest.raises(UnisonoError, match=r"the loss of push \d+ in step 1 is .* this is another run"):
        replayed_digest(pool, tmp_path, {"servers": 2}, model="mlp")
    path_of(tmp_path, 1).write_bytes(first)
    with pytest.raises(UnisonoError, match=r"had 2 servers in step 1, and here are 1; set sync\.servers as it was"):
        replayed_digest(pool, tmp_path, {"servers": 1}, model="mlp")
    with pytest.raises(UnisonoError, match=r"sync\.replay is done by one worker, and there are 2"):
        run(pool, 2, model="mlp", sync={"mode": "server", "replay": str(tmp_path), "servers": 2})


@pytest.mark.parametrize(
    ("sync", "said"),
    [
        ({"mode": "server", "period": 3}, "period is given and mode is server; it is for local or diloco"),
        ({"mode": "local", "period": 3, "staleness": 2}, "staleness is given and mode is local; it is for server"),
        ({"mode": "server", "push": 3}, "8 micro-batches cannot be pushed 3 at a time"),
        ({"mode": "server", "staleness": -1}, "sync.staleness"),
        ({"mode": "server", "staleness": 2, "backup": 1}, "backup is for rounds, in which nobody is ahead"),
        ({"mode": "server", "accepted": 2}, "accepted is for rounds; set staleness to 0, or backup"),
        (
            {"mode": "server", "staleness": 0, "push": 4, "accepted": 3},
            "accepted is 3, and a step has 2 pushes",
        ),
        ({"mode": "server", "backup": 1, "damping": "rate"}, "damping is for pushes that are stale"),
    ],
)
def test_what_makes_no_sense_is_refused(sync: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        validate(TrainingConfig, {"global_batch_size": 8, "micro_batch_size": 1, "sync": sync}, "test")


@pytest.mark.parametrize(
    ("sync", "sizes", "said"),
    [
        ({"push": 4}, (3,), "3 workers, and a step has 2 pushes of 4 micro-batches"),
        ({"push": 4, "serving": 1}, (2, 3), "3 workers, and a step has 2 pushes"),
        ({"serving": 2}, (3, 2), r"sync\.serving is 2, and host 1 has 2 workers, of which none would compute"),
        ({"servers": 2}, (1, 1, 1), r"sync\.servers is 2, and there are 3 hosts, each of which keeps one at least"),
        ({"mode": "hogwild"}, (1, 1), r"sync\.mode hogwild is for workers that share memory, and there are 2 hosts"),
        ({"replay": "runs/a"}, (1, 1), r"sync\.replay is done by one worker, and there are 2"),
    ],
)
def test_hosts_and_workers_that_cannot_be_are_refused(sync: dict[str, Any], sizes: tuple[int, ...], said: str) -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "server", **sync}}
    with pytest.raises(ConfigurationError, match=said):
        refuse_impossible(validate(TrainingConfig, given, "test"), Hosts(sizes))


def test_processes_that_only_serve_cannot_join_or_leave() -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "server", "serving": 1}}
    with pytest.raises(ConfigurationError, match=r"--workers is 2:4, and sync\.serving is 1: a server's place"):
        refuse_inelastic(validate(TrainingConfig, given, "test"), Elastic(2, 4))


def test_checkpoints_of_spread_servers_have_a_number_of_steps() -> None:
    given = {"global_batch_size": 8, "sync": {"mode": "server"}, "checkpoint": {"every": "auto"}}
    config = validate(TrainingConfig, {**given, "micro_batch_size": 1}, "test")
    refuse_impossible(config, Hosts((2,)))
    with pytest.raises(ConfigurationError, match=r"checkpoint\.every is auto, which the chief decides alone"):
        refuse_impossible(config, Hosts((1, 1)))


def test_every_host_keeps_a_server(pool: LocalLauncher) -> None:
    """A table, and a layer's weight and bias."""
    with pytest.raises(UnisonoError, match="the model makes 3 servers, and there are 4 hosts"):
        run(pool, 4, hosts=4, model="embedded", optimizer="sgd", sync={"mode": "server", "servers": 8}, steps=1)


def test_without_staleness_it_is_the_exact_mode_bit_for_bit() -> None:
    """Rounds of four pushes, and steps of four micro-batches: the same parameters, and the same losses."""

    def fit(steps: int, batch: int, sync: dict[str, Any]) -> tuple[Trainer, list[float]]:
        losses: list[float] = []
        trainer = Trainer(
            model=toys.MODELS["plain"],
            loss=toys.LOSSES["weighted"],
            data=toys.Samples(),
            optimizer=toys.OPTIMIZERS["momentum"],
            sync=sync,
            global_batch_size=batch,
            micro_batch_size=3,
            clip=0.1,
            callbacks=[lambda event: losses.append(event.loss) if isinstance(event, StepFinished) else None],
            observe={"progress": False},
        )
        trainer.fit(steps)
        return trainer, losses

    exact, _ = fit(12, 12, {})
    rounds, _ = fit(2, 72, {"mode": "server", "staleness": 0, "accepted": 4, "servers": 3})
    assert exact.model is not None and rounds.model is not None
    for a, b in zip(exact.model.parameters(), rounds.model.parameters(), strict=True):
        assert torch.equal(a, b)


ROUNDS: dict[str, dict[str, Any]] = {
    "plain": {"model": "plain", "optimizer": "momentum", "sync": {"servers": 3}},
    "BatchNorm, clipped": {"model": "norm", "clip": 0.1, "sync": {"servers": 2}},
    "several at once, by LAMB": {"model": "mlp", "optimizer": "lamb", "sync": {"push": 2}},
    "some weigh nothing": {"model": "mlp", "loss": "sometimes", "sync": {}},
}


def in_rounds(pool: LocalLauncher, name: str, workers: int, sync: dict[str, Any], **further: Any) -> Any:
    case = ROUNDS[name]
    options = {key: value for key, value in case.items() if key != "sync"}
    return run(pool, workers, sync={"mode": "server", **case["sync"], **sync}, **options, **further)


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_have_one_result_on_any_workers(pool: LocalLauncher, name: str) -> None:
    expected = in_rounds(pool, name, 1, {"staleness": 0, "accepted": 4}).result["digest"]
    for workers in (2, 3, 4):
        assert in_rounds(pool, name, workers, {"staleness": 0, "accepted": 4}).result["digest"] == expected


@pytest.mark.parametrize("name", ROUNDS)
def test_rounds_have_one_result_on_any_hosts(pool: LocalLauncher, name: str) -> None:
    """Also with processes that only serve; accepted gradients do not divide a step's."""
    sync = {"staleness": 0, "accepted": 3}
    expected = in_rounds(pool, name, 1, sync)
    for workers, hosts, serving in ((2, 2, 0), (5, 2, 0), (3, 3, 0), (2, 1, 1), (4, 1, 2), (4, 2, 1)):
        servers = max(hosts, ROUNDS[name]["sync"].get("servers", 4))
        found = in_rounds(pool, name, workers, {**sync, "servers": servers, "serving": serving}, hosts=hosts)
        assert {result["digest"] for result in found.results} == {expected.result["digest"]}, (workers, hosts, serving)
        assert {result["loss"] for result in found.results} == {expected.result["loss"]}


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize(("workers", "hosts", "serving"), [(4, 2, 0), (4, 1, 1), (6, 2, 1)])
def test_rounds_of_several_hosts_with_backup_workers_are_replayed(
    pool: LocalLauncher, name: str, workers: int, hosts: int, serving: int, tmp_path: Path
) -> None:
    """Every unit counts once; whoever is slow comes late; nobody waits for it, though its host has servers."""
    slow = {"rank": 2, "step": 0, "moment": "data", "how": "slow", "seconds": 0.02}
    sync = {"backup": 1, "record": True, "serving": serving, "servers": max(3, ROUNDS[name]["sync"].get("servers", 4))}
    live = in_rounds(pool, name, workers, sync, strikes=[slow], run_dir=str(tmp_path), hosts=hosts)
    units, accepted = 160 // 4 // ROUNDS[name]["sync"].get("push", 1), workers - hosts * serving - 1
    for step in range(1, 7):
        rounds, _ = read_rounds(tmp_path, step)
        assert sorted(itertools.chain(*rounds)) == list(range(units))
        assert all(len(members) == accepted for members in rounds[:-1])
    replay = {"backup": 1, "replay": str(tmp_path), "accepted": accepted, "servers": sync["servers"]}
    assert digest_of(in_rounds(pool, name, 1, replay)) == digest_of(live)


@pytest.mark.parametrize(("moment", "at"), [("compute", 4), ("update", 4), ("mid-reduce", 5)])
@pytest.mark.parametrize(("workers", "hosts", "serving"), [(3, 3, 0), (4, 2, 1)])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_of_several_hosts_is_killed_in_a_round(
    pool: LocalLauncher, moment: str, at: int, workers: int, hosts: int, serving: int, rank: int
) -> None:
    """(rank, step): the bits of the undisturbed run."""
    sync = {"staleness": 0, "accepted": 3}
    expected = in_rounds(pool, "BatchNorm, clipped", 1, sync).result["digest"]
    strikes = [{"rank": rank, "step": at, "moment": moment, "how": "kill"}]
    spread = {**sync, "serving": serving, "servers": 3}
    live = in_rounds(
        pool, "BatchNorm, clipped", workers, spread, strikes=strikes, hosts=hosts, fault={"snapshot_every": 1}
    )
    assert digest_of(live) == expected


@pytest.mark.parametrize("name", ROUNDS)
@pytest.mark.parametrize("backup", [1, 2])
def test_rounds_with_backup_workers_are_replayed(pool: LocalLauncher, name: str, backup: int, tmp_path: Path) -> None:
    """Every unit counts once; whoever is slow comes late."""
    slow = {"rank": 1, "step": 0, "moment": "data", "how": "slow", "seconds": 0.01}
    live = in_rounds(pool, name, 4, {"backup": backup, "record": True}, strikes=[slow], run_dir=str(tmp_path))
    assert live.result["digest"].startswith("not exact (whoever is late does not count)")
    units = 160 // 4 // ROUNDS[name]["sync"].get("push", 1)
    for step in range(1, 7):
        rounds, _ = read_rounds(tmp_path, step)
        assert sorted(itertools.chain(*rounds)) == list(range(units))
        assert all(len(members) == 4 - backup for members in rounds[:-1])
    assert digest_of(in_rounds(pool, name, 1, {"backup": backup, "replay": str(tmp_path), "accepted": 4 - backup})) == (
        digest_of(live)
    )


@pytest.mark.parametrize(("moment", "at"), [("compute", 2), ("update", 2), ("mid-update", 20), ("mid-commit", 20)])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_is_killed_in_a_round(pool: LocalLauncher, moment: str, at: int, rank: int) -> None:
    """(rank, step 2; or at a server's version 20): the bits of the undisturbed run."""
    expected = in_rounds(pool, "plain", 1, {"staleness": 0, "accepted": 3}).result["digest"]
    strikes = [{"rank": rank, "step": at, "moment": moment, "how": "kill"}]
    live = in_rounds(pool, "plain", 3, {"staleness": 0}, strikes=strikes)
    assert digest_of(live) == expected


@pytest.mark.parametrize(
    ("sync", "said"),
    [
        ({"mode": "server"}, "no two runs are alike; record one and replay it"),
        ({"mode": "server", "staleness": 0}, "give sync.accepted"),
        ({"mode": "local", "period": 2}, "give sync.replicas"),
    ],
)
def test_what_is_another_run_on_other_workers_is_not_compared(sync: dict[str, Any], said: str) -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": sync}
    with pytest.raises(ConfigurationError, match=said):
        refuse_to_compare(validate(TrainingConfig, given, "test"))


@pytest.mark.parametrize(("momentum", "delay", "converges"), [(0.9, 3, False), (0.0, 15, True), (0.9, 0, True)])
def test_stale_gradients_of_a_quadratic_diverge_where_theory_says(
    momentum: float, delay: int, converges: bool, tmp_path: Path
) -> None:
    """Rate times curvature is 0.07: the limit is 0.0348 with momentum 0.9 and a delay of 3, 0.1013 with a delay of 15
    and none. Every push reads what was there ``delay`` pushes before; a plain loop does the same."""
    units = 600

    def model() -> nn.Module:
        made = nn.Linear(1, 64, bias=False).double()  # whole vectors of any kernel, as an owner's are
        nn.init.ones_(made.weight)
        return made

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * 0.07 * (output - target).square().sum()

    def make(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1.0, momentum=momentum)

    plain, x, y = model(), torch.ones(1, 1).double(), torch.zeros(1, 64).double()
    optimizer = make(plain.parameters())
    pin_variant(optimizer, torch.device("cpu"))
    (weight,) = plain.parameters()
    history, sums, order = [weight.detach().clone()], [], []
    for unit in range(units):
        read = max(0, unit - delay)
        now = weight.detach().clone()
        weight.data.copy_(history[read])
        optimizer.zero_grad()
        found = loss(plain(x), y)
        found.backward()  # type: ignore[no-untyped-call]
        weight.data.copy_(now)
        optimizer.step()
        history.append(weight.detach().clone())
        sums.append((float(found.detach()), 1.0))
        order.append(Entry(unit, unit % (delay + 1), 0, 2, (read,)))
    write_order(tmp_path, 1, [order], [0], np.array(sums))
    trainer = Trainer(
        model=model,
        loss=loss,
        data=[(torch.ones(1).double(), torch.zeros(64).double())] * 8,
        optimizer=make,
        sync={"mode": "server", "replay": str(tmp_path), "servers": 1},
        global_batch_size=units,
        micro_batch_size=1,
        observe={"progress": False},
    )
    trainer.fit(1)
    assert trainer.model is not None
    (ours,) = trainer.model.parameters()
    assert torch.equal(ours, weight)
    size = float(ours.detach().abs().max())
    assert size < 1e-3 if converges else size > 1e3


def small(sync: dict[str, Any], **settings: Any) -> Trainer:
    """A linear model with a buffer."""
    return Trainer(
        **{
            "model": lambda: nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)),
            "loss": nn.functional.mse_loss,
            "data": toys.Samples(),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            "validation": toys.Samples(),
            "sync": sync,
            "global_batch_size": 12,
            "micro_batch_size": 3,
            "observe": {"progress": False},
            **settings,
        }
    )


@pytest.mark.parametrize(
    "sync",
    [
        {"mode": "server"},
        {"mode": "server", "backup": 1, "accepted": 2},
        {"mode": "local", "period": 2, "replicas": 2},
        {"mode": "hogwild"},
    ],
)
def test_the_model_that_was_trained_is_evaluated_resumed_and_exported(sync: dict[str, Any], tmp_path: Path) -> None:
    """Also where no step is left to be taken; by weights of the exact mode, and to them."""
    trainer = small(sync, run_dir=str(tmp_path / "run"))
    trained = trainer.fit(4).validation
    assert trained is not None
    again = small(sync, run_dir=str(tmp_path / "run"))
    assert again.fit(4, resume=True).validation == trained
    assert again.model is not None and again.evaluate() == trained
    assert small(sync, run_dir=str(tmp_path / "run")).evaluate() == trained
    newest = newest_intact(tmp_path / "run" / "checkpoints")[0]
    weights = state_dict(newest)
    plain = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
    plain.load_state_dict(weights)
    torch.save(weights, tmp_path / "weights.pt")
    begun = small(sync, start_from=str(tmp_path / "weights.pt"), optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    begun.fit(2)
    assert begun.model is not None
    assert torch.equal(begun.model.state_dict()["0.weight"], weights["0.weight"])
    exact = small({}, start_from=str(newest))
    assert exact.fit(1).step == 1


@pytest.mark.parametrize("damping", ["none", "rate", "momentum", "both"])
def test_stale_pushes_count_less(damping: str) -> None:
    """A push onto values that 0, 1 and 3 others have changed, beside SGD by its formula with that rate and momentum.

    Where the momentum is 0, torch's SGD would leave the buffer as it was, and the next push would go on with that.
    """
    ours = nn.Parameter(torch.full((64,), 2.0))
    theirs, moving = torch.full((64,), 2.0, dtype=torch.float64), torch.zeros(64, dtype=torch.float64)
    optimizer = BlockOptimizer(torch.optim.SGD([ours], lr=0.1, momentum=0.6), UpdateClass.ELEMENT, None)
    gradient, buffer = torch.zeros(64), torch.zeros(64)
    unit = Unit(
        0, "w", 0, ours, slice(0, 64), ours.data, {"momentum_buffer": buffer}, memoryview(bytearray(8)).cast("Q")
    )
    optimizer.attach(unit, gradient)
    rates = DampedRates(optimizer, lambda step: 1.0, 1.0, damping)
    for late, rate, momentum in ((0, 0.1, 0.6), (1, 0.05, 0.1), (3, 0.025, 0.0), (0, 0.1, 0.6)):
        rates.set(1, late)
        gradient.copy_(torch.sin(ours.data))
        optimizer.step([unit])
        moving = (momentum if damping in ("momentum", "both") else 0.6) * moving + torch.sin(theirs)
        theirs = theirs - (rate if damping in ("rate", "both") else 0.1) * moving
        torch.testing.assert_close(ours.data.double(), theirs, rtol=1e-6, atol=0)


def test_momentum_that_is_not_there_is_not_lowered() -> None:
    with pytest.raises(ConfigurationError, match=r"sync\.damping is momentum, and SGD has no momentum to lower"):
        small({"mode": "server", "damping": "momentum"}).fit(1)


def test_a_record_needs_a_place() -> None:
    with pytest.raises(ConfigurationError, match="the order of pushes needs a place: give run_dir"):
        small({"mode": "server", "record": True}).fit(1)


def test_a_push_that_somebody_died_in_is_mended_once() -> None:
    """Whoever mends it may die as well; what comes along is not taken for what was changed."""
    layout = PoolLayout(workers=2, units=3, runs=(3,))
    pool = Pool(layout, memoryview(bytearray(layout.size_bytes)))
    pool.begin(1, [4])
    pool.take(0)
    entry = Entry(0, 0, 0, 3, (4,))
    pool.open_entry(0, entry)
    pool.shorten(0, 1)
    assert pool.opened(0) == replace(entry, stop=1)
    pool.close_entry(0, replace(entry, stop=1), 1)
    pool._busy[0] = 1  # killed before its last store
    assert pool.opened(0) is None and not pool._busy[0]


def test_a_unit_counts_once_where_its_worker_died_as_it_took_it() -> None:
    layout = RoundsLayout(workers=3, units=4, servers=1, accepted=2, backup=0)
    pool = RoundsPool(layout, memoryview(bytearray(layout.size_bytes)))
    pool.begin(1, [0])
    pool.under_way[0] = 1  # killed before it said that the unit is taken
    assert pool.inherit(1, 0) == 0 and pool.take(2) == 1
    assert pool.arrive(0, Arrival(0, 1, 0)) and pool.arrive(0, Arrival(0, 2, 0)) and not pool.is_closed(0)
    assert pool.arrive(0, Arrival(1, 2, 0)) and pool.is_closed(0) and not pool.arrive(0, Arrival(2, 1, 0))
    assert [arrival.unit for arrival in pool.arrivals(0)] == [0, 1]
