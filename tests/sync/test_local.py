"""Replicas that train apart: the papers' algorithms as plain loops, one result on any workers, and faults."""

import copy
import itertools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import toys
from unisono.config import SyncConfig, TrainingConfig, validate
from unisono.errors import ConfigurationError
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import refuse_impossible
from unisono.optim.classes import pin_variant
from unisono.plan.agreement import Agreements, fragments
from unisono.plan.hosts import Hosts
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.sync.local import told_of
from unisono.trainer import Trainer

BATCH, REPLICAS = 8, 4
LOCAL: dict[str, dict[str, Any]] = {
    "local SGD": {"optimizer": "momentum", "sync": {"mode": "local", "period": 2}},
    "post-local": {"optimizer": "momentum", "sync": {"mode": "local", "period": 2, "after": 3}},
    "FedProx": {"optimizer": "sgd", "sync": {"mode": "local", "period": 3, "proximal": 0.3}},
    "DiLoCo": {"optimizer": "adamw", "sync": {"mode": "diloco", "period": 3}},
    "DiLoCo after some steps": {"optimizer": "adamw", "sync": {"mode": "diloco", "period": 2, "after": 2}},
    "streaming DiLoCo": {
        "optimizer": "adamw",
        "sync": {"mode": "diloco", "period": 4, "fragments": 3, "delay": 1, "mix": 0.5},
    },
    "streaming, all at once": {"optimizer": "adamw", "sync": {"mode": "diloco", "period": 3, "fragments": 3}},
    "by LAMB": {"optimizer": "lamb", "sync": {"mode": "diloco", "period": 3, "delay": 1, "after": 2}},
}


def plain() -> nn.Module:
    """In double precision: Adam makes much of a last bit."""
    return toys.MODELS["plain"]().double()


SAMPLES = [(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))]


def plain_loop(optimizer_name: str, sync: dict[str, Any], steps: int) -> list[list[Tensor]]:
    """The algorithm from its papers, in one process: the model's parameters after every step."""
    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        model = plain()
    make = toys.OPTIMIZERS[optimizer_name]
    period, after, delay = sync["period"], sync.get("after", 0), sync.get("delay", 0)
    count, keep, pull = sync.get("fragments", 1), sync.get("mix", 0.5) if delay else 0.0, sync.get("proximal", 0.0)
    part_of = fragments([p.numel() for p in model.parameters()], count)
    diloco = sync["mode"] == "diloco"
    replicas, optimizers = [model], [optimizer(make, model)]
    momentum = [torch.zeros_like(p) for p in model.parameters()]
    told: dict[int, list[Tensor]] = {}
    history = []
    for step in range(1, steps + 1):
        if step == after + 1:
            replicas = [copy.deepcopy(model) for _ in range(REPLICAS)]
            apart = [optimizer(make, replica) for replica in replicas]
            for made in apart:
                made.load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
            optimizers = apart
        for number, (replica, own_optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            take_step(replica, own_optimizer, step, number, len(replicas), None if step <= after else model, pull)
        for part in range(count) if step > after else ():
            own = [i for i, p in enumerate(part_of) if p == part]
            if (step - after) % period == part * period // count % period:
                for i in own:
                    told[i] = [at(model, i) - at(one, i) for one in replicas]
            since = step - after - delay
            if since > 0 and since % period == part * period // count % period:
                for i in own:
                    mean = sum(told[i], torch.zeros(())) / REPLICAS
                    if diloco:
                        momentum[i] = 0.9 * momentum[i] + mean
                        mean = 0.7 * (mean + 0.9 * momentum[i])
                    with torch.no_grad():
                        at(model, i).sub_(mean)
                        for one in replicas:
                            list(one.parameters())[i].copy_(keep * at(one, i) + (1 - keep) * at(model, i))
        history.append([p.detach().clone() for p in model.parameters()])
    return history


def optimizer(make: Callable[..., torch.optim.Optimizer], model: nn.Module) -> torch.optim.Optimizer:
    made = make(model.parameters())
    pin_variant(made, torch.device("cpu"))
    return made


def at(model: nn.Module, index: int) -> Tensor:
    return list(model.parameters())[index].detach()


def take_step(
    replica: nn.Module,
    optimizer: torch.optim.Optimizer,
    step: int,
    number: int,
    replicas: int,
    model: nn.Module | None,
    pull: float,
) -> None:
    """With a replica's own part of the step's samples."""
    indices = Sampler(toys.SAMPLES, 0, BATCH, BATCH).indices(step - 1, 0).tolist()
    rows = [SAMPLES[i] for i in indices[number * BATCH // replicas : (number + 1) * BATCH // replicas]]
    optimizer.zero_grad()
    toys.LOSSES["mse"](replica(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows])).backward()
    if model is not None:
        for own, common in zip(replica.parameters(), model.parameters(), strict=True):
            assert own.grad is not None
            own.grad += pull * (own.detach() - common.detach())
    optimizer.step()


@pytest.mark.parametrize("name", LOCAL)
def test_it_is_the_algorithm_of_the_paper(name: str) -> None:
    """Parameter for parameter, over three agreements of each fragment."""
    case = LOCAL[name]
    steps = case["sync"].get("after", 0) + 3 * case["sync"]["period"] + case["sync"].get("delay", 0)
    expected = plain_loop(case["optimizer"], case["sync"], steps)
    for until in range(1, steps + 1):
        trainer = Trainer(
            model=plain,
            loss=toys.LOSSES["mse"],
            data=SAMPLES,
            optimizer=toys.OPTIMIZERS[case["optimizer"]],
            sync={"replicas": REPLICAS, **case["sync"]},
            global_batch_size=BATCH,
            micro_batch_size=1,
            observe={"progress": False},
        )
        trainer.fit(until)
        assert trainer.model is not None
        for ours, theirs in zip(trainer.model.parameters(), expected[until - 1], strict=True):
            torch.testing.assert_close(ours.detach(), theirs, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize("after", [0, 4])
def test_it_is_torchs_averager(pool: LocalLauncher, after: int) -> None:
    """Two workers, a replica on each; post-local where some steps are trained together first."""
    arguments = {"period": 3, "after": after, "steps": after + 9}
    ours = pool.run({"call": "tests.jobs:averaged_by_ours", "arguments": arguments}, 2).results
    theirs = pool.run({"call": "tests.jobs:averaged_by_torch", "arguments": arguments}, 2).results
    assert ours[0] == ours[1]
    for own, other in zip(ours[0], theirs[0], strict=True):
        assert own == pytest.approx(other, rel=1e-9, abs=1e-12)


WAYS: dict[str, dict[str, Any]] = {
    "local SGD": {"model": "mlp", "optimizer": "momentum", "sync": {"mode": "local", "period": 2}},
    "BatchNorm": {"model": "norm", "optimizer": "adamw", "sync": {"mode": "local", "period": 2, "after": 2}},
    "tied, embedded": {"model": "tied", "sync": {"mode": "diloco", "period": 2}},
    "weighted": {"model": "mlp", "loss": "weighted", "sync": {"mode": "diloco", "period": 2}},
    "clipped": {"model": "mlp", "clip": 0.05, "sync": {"mode": "local", "period": 3}},
    "by LAMB": {"model": "mlp", "optimizer": "lamb", "sync": {"mode": "diloco", "period": 2, "after": 2}},
    "streaming int8": {
        "model": "mlp",
        "sync": {"mode": "diloco", "period": 3, "fragments": 2, "delay": 1, "compression": "int8"},
    },
    "bf16 and momentum": {
        "model": "mlp",
        "optimizer": "momentum",
        "sync": {"mode": "local", "period": 2, "compression": "bf16", "proximal": 0.1},
    },
}


def settings_of(name: str) -> dict[str, Any]:
    """Six micro-batches, two for each of three replicas."""
    way = WAYS[name]
    return {"global_batch_size": 24, "steps": 7, **way, "sync": {"replicas": 3, **way["sync"]}}


def train(pool: LocalLauncher, workers: int, hosts: int = 1, **arguments: Any) -> dict[str, Any]:
    target = {"call": "tests.jobs:train", "arguments": {"deadline_s": 20.0, **arguments}}
    result: dict[str, Any] = pool.run(target, workers, hosts=hosts).results[0]
    return result


@pytest.mark.parametrize("name", WAYS)
def test_one_result_on_any_workers(pool: LocalLauncher, name: str) -> None:
    expected = train(pool, 1, validated=True, validate={"every": 2}, **settings_of(name))
    for workers in (2, 3, 4):
        found = train(pool, workers, validated=True, validate={"every": 2}, **settings_of(name))
        assert found["digest"] == expected["digest"]
        assert found["losses"] == expected["losses"] and found["validations"] == expected["validations"]


@pytest.mark.parametrize("name", WAYS)
def test_one_result_across_a_resume(pool: LocalLauncher, name: str, tmp_path: Path) -> None:
    """Stopped after step 4 on 3 workers, in the middle of a period or of an exchange, resumed on 2."""
    settings = settings_of(name)
    expected = train(pool, 1, **settings)
    train(pool, 3, run_dir=str(tmp_path), **{**settings, "steps": 4})
    found = train(pool, 2, run_dir=str(tmp_path), resume=True, **settings)
    assert found["digest"] == expected["digest"] and found["losses"] == expected["losses"][4:]


@pytest.mark.parametrize("name", WAYS)
def test_one_result_on_any_hosts(pool: LocalLauncher, name: str, tmp_path: Path) -> None:
    """Three of one worker, and one of two beside one of one; stopped in the middle of a period or of an exchange on
    three, resumed on one, and the other way round."""
    settings = settings_of(name)
    expected = train(pool, 1, validated=True, validate={"every": 2}, **settings)
    for workers, hosts in ((3, 3), (3, 2), (2, 2)):
        found = train(pool, workers, hosts, validated=True, validate={"every": 2}, **settings)
        assert found["digest"] == expected["digest"]
        assert found["losses"] == expected["losses"] and found["validations"] == expected["validations"]
    for first, second in ((3, 1), (1, 3)):
        directory = str(tmp_path / str(first))
        train(pool, first, first, run_dir=directory, **{**settings, "steps": 4})
        again = train(pool, second, second, run_dir=directory, resume=True, **settings)
        assert again["digest"] == expected["digest"] and again["losses"] == expected["losses"][4:]


@pytest.mark.parametrize(("moment", "step"), [("backward", 3), ("mid-update", 6), ("wait", 6)])
def test_a_worker_of_two_hosts_is_killed(pool: LocalLauncher, moment: str, step: int, tmp_path: Path) -> None:
    """(rank 1 of 2 hosts): all start again from what each host and its neighbour have kept, with the same bits."""
    options: dict[str, Any] = {"model": "norm", "global_batch_size": 24, "clip": 0.1, "steps": 8}
    options["sync"] = {"mode": "diloco", "replicas": 2, "period": 2, "fragments": 2, "delay": 1, "after": 1}
    expected = train(pool, 1, **options)["digest"]
    arguments = {
        "strikes": [{"rank": 1, "step": step, "moment": moment, "how": "kill"}],
        "fault": {"snapshot_every": 2},
        "run_dir": str(tmp_path),
        "deadline_s": 20.0,
    }
    ending = pool.run({"call": "tests.jobs:struck", "arguments": {**arguments, **options}}, 2, hosts=2)
    assert ending.result["digest"] == expected
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("RolledBack") == 1


def test_between_agreements_hosts_tell_each_other_next_to_nothing(pool: LocalLauncher, tmp_path: Path) -> None:
    """Bytes that left the first host: all gradients until replicas part; then a few numbers a step, and words."""
    sync = {"mode": "diloco", "replicas": 2, "period": 4, "after": 4, "compression": "bf16"}
    settings = {"model": "wide", "global_batch_size": 16, "fault": {"on_loss": "stop"}}  # without snapshots
    train(pool, 2, 2, steps=12, sync=sync, run_dir=str(tmp_path), **settings)
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    sent = [r["wire"]["sent_bytes"] for r in records if r["event"] == "StepFinished"]
    size_bytes = 4 * sum(p.numel() for p in toys.MODELS["wide"]().parameters())
    assert all(0.8 * size_bytes < n < 1.1 * size_bytes for n in sent[1:4])  # the first brings the initial state besides
    assert all(n < 0.005 * size_bytes for n in (*sent[4:8], *sent[9:12]))
    assert size_bytes / 2 < sent[8] < 0.55 * size_bytes  # what is told after step 8 is counted with the next


@pytest.mark.parametrize("workers", [2, 4])
def test_what_replicas_tell_may_take_longer_than_a_deadline(pool: LocalLauncher, workers: int) -> None:
    """As long as something arrives; on two hosts."""
    sync = {"mode": "diloco", "replicas": 4, "period": 4}
    options: dict[str, Any] = {"model": "wide", "global_batch_size": 32, "steps": 4, "sync": sync}
    arguments = {"pause_s": 0.08, "deadline_s": 1.0, **options}
    began = time.monotonic()
    slow = pool.run({"call": "tests.jobs:train_over_a_slow_link", "arguments": arguments}, workers, hosts=2).results[0]
    assert time.monotonic() - began > 1.5  # 75 KB in pieces of 4 KiB
    assert slow["digest"] == train(pool, 1, **options)["digest"]


@pytest.mark.parametrize("after", [0, 3, 6])
def test_until_replicas_part_it_is_the_exact_run(pool: LocalLauncher, after: int) -> None:
    """Bit for bit; and one replica that agrees with itself after every step is, too."""
    exact = train(pool, 2, model="norm", steps=6, global_batch_size=24)["losses"]
    sync = {"mode": "local", "replicas": 3, "period": 3, "after": after}
    assert train(pool, 2, model="norm", steps=6, global_batch_size=24, sync=sync)["losses"][:after] == exact[:after]
    alone = {"mode": "local", "replicas": 1, "period": 1}
    assert train(pool, 2, model="norm", steps=6, global_batch_size=24, sync=alone)["losses"] == exact


@pytest.mark.parametrize("moment", ["forward", "backward", "mid-reduce", "update", "mid-update", "mid-commit", "wait"])
@pytest.mark.parametrize("step", [3, 4])
def test_a_worker_is_killed_between_agreements_and_in_one(pool: LocalLauncher, moment: str, step: int) -> None:
    """(rank 1 of 3, a step without an agreement and one with it): the bits of the undisturbed run."""
    sync = {"mode": "diloco", "replicas": 3, "period": 2, "fragments": 2, "delay": 1}
    options: dict[str, Any] = {"model": "mlp", "global_batch_size": 24, "clip": 0.1, "steps": 8, "sync": sync}
    expected = train(pool, 1, **options)["digest"]
    strikes = [{"rank": 1, "step": step, "moment": moment, "how": "kill"}]
    ending = pool.run(
        {"call": "tests.jobs:struck", "arguments": {"strikes": strikes, "deadline_s": 20.0, **options}}, 3
    )
    assert ending.result["digest"] == expected


@given(st.integers(1, 9), st.integers(0, 5), st.integers(1, 5), st.integers(0, 5))
def test_every_fragment_agrees_once_in_a_period(period: int, after: int, count: int, delay: int) -> None:
    count, delay = min(count, period), min(delay, period - 1)
    when = Agreements(period, after, count, delay)
    for fragment in range(count):
        sent = [step for step in range(1, 60) if when.sends(step, fragment)]
        applied = [step for step in range(1, 60) if when.applies(step, fragment)]
        assert all(b - a == period for a, b in itertools.pairwise(sent)) and sent[0] <= after + period
        assert applied == [step + delay for step in sent if step + delay < 60]
        assert all(when.apart(step) and when.due(step) for step in {*sent, *applied})


def test_fragments_share_the_model_evenly() -> None:
    assert fragments([10] * 12, 4) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert fragments([5, 100, 5], 2) == [0, 1, 1] or fragments([5, 100, 5], 2) == [0, 0, 1]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sync": {"mode": "local"}}, "mode is local and period is missing"),
        ({"sync": {"period": 3}}, "period is given and mode is every_step; it is for local or diloco"),
        ({"sync": {"mode": "local", "period": 4, "outer": {"lr": 1.0}}}, "outer is for mode diloco, not local"),
        ({"sync": {"mode": "diloco", "period": 2, "fragments": 3}}, "3 fragments cannot agree in turn within 2 steps"),
        ({"sync": {"mode": "diloco", "period": 2, "delay": 2}}, "delay is 2; an agreement comes before the next"),
        (
            {"sync": {"mode": "local", "period": 2, "replicas": 3}},
            "8 micro-batches cannot be shared evenly by sync.repl",
        ),
        ({"layout": {"pipeline": 2}}, "sync.mode local has whole models"),
        ({"layout": {"zero": 0}}, "sync.mode local keeps all that it trains in one state; leave layout.zero out"),
        ({"layout": {"zero": 1}}, "sync.mode local keeps all that it trains in one state; leave layout.zero out"),
        ({"sync": {"mode": "local", "period": 2, "mix": 0.1}}, "mix is given, and an agreement counts at once"),
        ({"init": "by_name"}, "use init: stream"),
        ({"wire": {"compression": "bf16"}}, "with sync.mode local use sync.compression"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "local", "period": 2, "replicas": 2}}
    with pytest.raises(ConfigurationError, match=said):
        validate(TrainingConfig, {**given, **changes}, "test")


def test_a_run_goes_on_with_the_replicas_it_has(tmp_path: Path) -> None:
    def fit(replicas: int, resume: bool, **sync: Any) -> None:
        Trainer(
            model=lambda: nn.Linear(6, 4),
            loss=nn.functional.mse_loss,
            data=toys.Samples(),
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
            sync={"mode": "local", "period": 2, "replicas": replicas, **sync},
            global_batch_size=8,
            micro_batch_size=1,
            run_dir=str(tmp_path),
            observe={"progress": False},
        ).fit(4, resume=resume)

    fit(2, False)
    with pytest.raises(ConfigurationError, match=r"sync.replicas is 4, but the run in .* has 2"):
        fit(4, True)
    fit(2, True)
    for key, value in (("period", 3), ("after", 3), ("fragments", 2), ("delay", 1), ("mode", "diloco")):
        with pytest.raises(ConfigurationError, match=f"sync.{key} is {value}, but .* in the middle of what they agree"):
            fit(2, True, **{key: value})


def test_every_worker_of_several_hosts_has_work() -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "local", "period": 2, "replicas": 4}}
    config = validate(TrainingConfig, given, "test")
    for sizes in ((2, 2), (1, 1, 1), (4, 1)):
        refuse_impossible(config, Hosts(sizes))
    with pytest.raises(ConfigurationError, match=r"sync\.replicas is 4, and there are 5 hosts"):
        refuse_impossible(config, Hosts((1,) * 5))
    with pytest.raises(ConfigurationError, match="host 0 has 5 workers and 4 micro-batches for its part of 4"):
        refuse_impossible(config, Hosts((5, 1)))
    saved = validate(TrainingConfig, {**given, "checkpoint": {"every": "auto"}}, "test")
    refuse_impossible(saved, Hosts((4,)))
    with pytest.raises(ConfigurationError, match=r"checkpoint\.every is auto, which the chief decides alone"):
        refuse_impossible(saved, Hosts((2, 2)))


def test_what_is_learned_after_the_last_agreement_is_told_of() -> None:
    sync = SyncConfig(mode="diloco", replicas=2, period=5, after=3)
    assert len(told_of(sync, 13)) == 1
    assert "the last time after step 13 of 15" in told_of(sync, 15)[1]
    in_turn = SyncConfig(mode="diloco", replicas=2, period=6, fragments=3)
    assert "after steps 8 to 12, by fragment, of 12" in told_of(in_turn, 12)[1]
    assert "after steps 10 to 14, by fragment, of 14" in told_of(in_turn, 14)[1]


@given(st.integers(1, 7), st.integers(0, 5), st.integers(1, 5), st.integers(0, 5), st.integers(1, 40))
def test_the_last_agreement_is_found(period: int, after: int, count: int, delay: int, steps: int) -> None:
    count, delay = min(count, period), min(delay, period - 1)
    when = Agreements(period, after, count, delay)
    for fragment in range(count):
        applied = [step for step in range(1, steps + 1) if when.applies(step, fragment)]
        assert when.last(steps, fragment) == max(applied, default=min(after, steps))


def test_the_norm_that_is_shown_is_that_of_all_replicas_or_none(pool: LocalLauncher) -> None:
    """Where another host has the gradients of some, nobody here knows it."""
    options = {"steps": 3, "model": "mlp", "clip": 0.1, "global_batch_size": 24}
    sync = {"mode": "local", "period": 2, "replicas": 3, "after": 1}
    one, three = (train(pool, 3, hosts, sync=sync, **options)["norms"] for hosts in (1, 3))
    assert one[0] == three[0] and three[1:] == [None, None] and None not in one


def test_an_unknown_optimizer_would_couple_replicas() -> None:
    trainer = Trainer(
        model=toys.MODELS["mlp"],
        loss=toys.LOSSES["mse"],
        data=toys.Samples(),
        optimizer=toys.OPTIMIZERS["coupled"],
        sync={"mode": "local", "period": 2, "replicas": 2},
        global_batch_size=8,
        micro_batch_size=1,
        observe={"progress": False},
    )
    with pytest.raises(ConfigurationError, match="would couple what is apart"):
        trainer.fit(1)
