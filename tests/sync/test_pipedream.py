"""PipeDream and 2BW: delayed SGD as a plain loop, one result on one worker and in pipelines, faults, memory."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from tests import toys
from tests.test_parity import train
from unisono.config import TrainingConfig, validate
from unisono.errors import ConfigurationError, UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import refuse_impossible, refuse_inelastic, refuse_to_compare, with_replicas
from unisono.launch.task import Elastic
from unisono.plan.hosts import Hosts
from unisono.plan.schedule import timetable
from unisono.plan.stash import Stashing, place, stage_delay, used
from unisono.plan.timing import timing
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer

STAGES = 4


def model() -> nn.Module:
    """Four layers, of which each is a stage."""
    layers: list[nn.Module] = []
    for n, m in ((6, 8), (8, 8), (8, 8), (8, 4)):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1]).double()


SAMPLES = [(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))]


def delayed_sgd(delays: list[int], unit: int, units: int, steps: int, momentum: float) -> dict[str, Tensor]:
    """The algorithm from its papers: after unit j, the newest weights move by the gradient that older ones have."""
    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        net = model()
    names = [name for name, _ in net.named_parameters()]
    delay = {name: delays[int(name.split(".")[0]) // 2] for name in names}
    newest = {name: p.detach().clone() for name, p in net.named_parameters()}
    moving: dict[str, Tensor] = {}
    sampler = Sampler(toys.SAMPLES, 0, 2 * unit * units, 2)
    for step in range(steps):
        versions = [newest]
        for j in range(units):
            old = {n: versions[max(0, j - delay[n])][n].clone().requires_grad_() for n in names}
            gradients = dict.fromkeys(names, torch.zeros(()).double())
            for m in range(j * unit, (j + 1) * unit):
                rows = [SAMPLES[i] for i in sampler.indices(step, m).tolist()]
                inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
                found = torch.autograd.grad(
                    F.mse_loss(functional_call(net, old, (inputs,)), targets), list(old.values())
                )
                gradients = {n: gradients[n] + g / unit for n, g in zip(names, found, strict=True)}
            moving = {n: momentum * moving[n] + gradients[n] if moving else gradients[n] for n in names}
            versions.append({n: versions[-1][n] - 0.1 * moving[n] for n in names})
        newest = versions[-1]
    return newest


@pytest.mark.parametrize("units", [1, 2, 3, 4, 5, 7, 9])
@pytest.mark.parametrize(("mode", "unit"), [("pipedream", 1), ("pipedream", 2), ("pipedream_2bw", 3)])
def test_it_is_delayed_sgd(mode: str, unit: int, units: int) -> None:
    """After every number of updates, and over a meeting."""
    delays = [stage_delay(s, STAGES) for s in range(STAGES)] if mode == "pipedream" else [1] * STAGES
    sync = {"mode": mode, "push": unit, **({"stages": STAGES} if mode == "pipedream" else {})}
    for steps in (1, 2):
        trainer = Trainer(
            model=model,
            loss=F.mse_loss,
            data=SAMPLES,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
            sync=sync,
            global_batch_size=2 * unit * units,
            micro_batch_size=2,
            observe={"progress": False},
        )
        trainer.fit(steps)
        assert trainer.model is not None
        expected = delayed_sgd(delays, unit, units, steps, 0.9)
        for name, parameter in trainer.model.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-9, atol=1e-12)


PIPED: dict[str, dict[str, Any]] = {
    "PipeDream, an update a micro-batch": {"sync": {"mode": "pipedream", "stages": 3}},
    "PipeDream": {"sync": {"mode": "pipedream", "stages": 2, "push": 2}, "model": "norm", "optimizer": "momentum"},
    "2BW": {"sync": {"mode": "pipedream_2bw", "push": 3}, "model": "norm", "clip": {"value": 0.01}},
    "2BW, LAMB, weighted": {"sync": {"mode": "pipedream_2bw", "push": 2}, "optimizer": "lamb", "loss": "weighted"},
    "PipeDream, bf16, recomputed": {"sync": {"mode": "pipedream", "stages": 2, "push": 4}, "precision": "bf16"},
    "PipeDream, two dtypes, clipped by unit": {
        "sync": {"mode": "pipedream", "stages": 2},
        "model": "double",
        "clip": {"agc": 0.01},
    },
    "2BW, untouched parameters": {"sync": {"mode": "pipedream_2bw", "push": 2}, "model": "untouched", "stages": 1},
}


def settings(name: str) -> tuple[int, dict[str, Any]]:
    """The workers of a pipeline, and what is trained."""
    given: dict[str, Any] = {"model": "mlp", "global_batch_size": 48, "steps": 4, "deadline_s": 20.0, **PIPED[name]}
    workers = given.pop("stages", given["sync"].get("stages", 3))
    return workers, given


@pytest.mark.parametrize("name", PIPED)
def test_one_result_on_one_worker_and_in_a_pipeline(pool: LocalLauncher, name: str, tmp_path: Path) -> None:
    """Also stopped in one of them, and resumed in the other; with validation in between."""
    workers, given = settings(name)
    given |= {"validated": True, "validate": {"every": 2}}
    layout = {"pipeline": workers, "recompute": "full" if "recomputed" in name else "none"}
    expected = train(pool, 1, **given)
    found = train(pool, workers, layout=layout, **given)
    keys = ("digest", "losses", "validations")
    assert [found[key] for key in keys] == [expected[key] for key in keys]
    for first, second in {(1, workers), (workers, 1)}:
        directory = str(tmp_path / f"{first}")
        of = {1: {}, workers: layout}
        train(pool, first, run_dir=directory, layout=of[first], **{**given, "steps": 3})
        again = train(pool, second, run_dir=directory, layout=of[second], resume=True, **given)
        assert again["digest"] == expected["digest"] and again["losses"] == expected["losses"][3:]


@pytest.mark.parametrize("moment", ["forward", "backward", "mid-reduce", "update", "wait"])
@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_stage_is_killed(pool: LocalLauncher, rank: int, moment: str, tmp_path: Path) -> None:
    """(each stage of three, step 6): all start again from a snapshot, with the same bits."""
    options: dict[str, Any] = {"model": "norm", "sync": {"mode": "pipedream", "stages": 3}, "global_batch_size": 48}
    options |= {"steps": 9, "optimizer": "momentum"}
    expected = train(pool, 1, **options)["digest"]
    strikes = [{"rank": rank, "step": 6, "moment": moment, "how": "kill"}]
    further = {"fault": {"snapshot_every": 2}, "run_dir": str(tmp_path), "deadline_s": 20.0, "layout": {"pipeline": 3}}
    target = {"call": "tests.jobs:struck", "arguments": {"strikes": strikes, **further, **options}}
    assert pool.run(target, 3).result["digest"] == expected
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("RolledBack") == 1


def test_a_stage_that_hangs_is_ended(pool: LocalLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    """(stage 1 of 3, step 5, backward): SIGSTOP; all start again, with the same bits."""
    options: dict[str, Any] = {"model": "norm", "sync": {"mode": "pipedream", "stages": 3}, "global_batch_size": 48}
    options |= {"steps": 8}
    expected = train(pool, 1, **options)["digest"]
    strikes = [{"rank": 1, "step": 5, "moment": "backward", "how": "stop"}]
    target = {"call": "tests.jobs:struck", "arguments": {"strikes": strikes, "layout": {"pipeline": 3}, **options}}
    target["arguments"] |= {"deadline_s": 1.0}  # type: ignore[operator]
    assert pool.run(target, 3).result["digest"] == expected
    assert "worker 1" in (said := capfd.readouterr().err) and "has made no progress" in said


def test_checkpoints_in_between_are_of_the_state_at_a_meeting(pool: LocalLauncher, tmp_path: Path) -> None:
    """A run goes on from one as if it had not been stopped."""
    given: dict[str, Any] = {"model": "norm", "sync": {"mode": "pipedream_2bw", "push": 4}, "global_batch_size": 48}
    given |= {"run_dir": str(tmp_path), "checkpoint": {"every": 2, "keep": 5}, "layout": {"pipeline": 3}}
    expected = train(pool, 3, steps=6, **given)
    shutil.rmtree(tmp_path / "checkpoints" / "step-00000006")
    newest = max(
        int(path.name[-8:]) for path in (tmp_path / "checkpoints").glob("step-*")
    )  # one may have been too late
    again = train(pool, 3, steps=6, resume=True, **given)
    assert 0 < newest < 6
    assert again["digest"] == expected["digest"] and again["losses"] == expected["losses"][newest:]


@pytest.mark.parametrize("mode", ["pipedream", "pipedream_2bw"])
def test_each_stage_keeps_as_many_versions_as_the_paper_says(pool: LocalLauncher, mode: str) -> None:
    """PipeDream: stage s of p has p - s; 2BW: two. Memory that is touched, in bytes."""
    sync = {"mode": mode, "push": 3, **({"stages": 4} if mode == "pipedream" else {})}
    target = {"call": "tests.jobs:touched_versions", "arguments": {"sync": sync, "layout": {"pipeline": 4}}}
    for stage, found in enumerate(pool.run(target, 4).results):
        assert found["versions"] == (4 - stage if mode == "pipedream" else 2)
        assert found["touched_bytes"] == (found["versions"] - 1) * found["stage_bytes"]


@given(st.integers(0, 6), st.integers(1, 30))
def test_a_version_stays_where_it_is_while_it_is_used(delay: int, units: int) -> None:
    """The version after a unit is made where the one lay that this unit was the last to use."""
    where = {0: 0}
    for unit in range(units):
        needed = {used(later, delay) for later in range(unit + 1, unit + 2 + delay) if used(later, delay) <= unit}
        at = place(unit + 1, delay)
        assert all(where[version] != at for version in needed)
        assert at == place(used(unit, delay), delay) or unit < delay
        where[unit + 1] = at
    assert set(where.values()) <= set(range(1 + delay))


@given(st.integers(2, 5), st.integers(1, 6), st.integers(2, 8))
def test_it_waits_once_a_step_and_not_once_an_update(workers: int, unit: int, units: int) -> None:
    """The bubble of 1F1B over all units of a step: (p - 1) / (units + p - 1) of them, p - 1 micro-batches once."""
    found = timing(timetable("1f1b", workers, range(unit * units))).bubble
    assert found == pytest.approx((workers - 1) / (unit * units + workers - 1))
    drained = timing(timetable("1f1b", workers, range(unit))).bubble
    assert found < drained


def test_staleness_is_told() -> None:
    """Of each stage's updates: how many others its gradient does not know of."""
    assert Stashing(1, 4, (2, 1, 0), (2, 1, 0)).staleness() == {0: 1 + 1 + 4, 1: 1 + 3, 2: 2}
    assert Stashing(2, 5, (1, 1), (1,)).staleness() == {0: 1, 1: 4}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"sync": {"mode": "pipedream"}}, "mode is pipedream and its stages are missing: set layout.pipeline"),
        (
            {"sync": {"mode": "pipedream_2bw", "stages": 2}},
            "stages is given and mode is pipedream_2bw",
        ),
        ({"sync": {"mode": "local", "period": 2, "stages": 2}}, "stages is given and mode is local"),
        ({"layout": {"pipeline": 3}}, "sync.stages is 2 and layout.pipeline is 3; leave one out"),
        ({"layout": {"pipeline": 2, "cuts": ["a"]}}, "the result depends on where stages begin: leave layout.cuts out"),
        ({"layout": {"pipeline": 2, "schedule": "zb_h1"}}, "has a schedule of its own: leave layout.schedule out"),
        ({"layout": {"tensor": 2}}, "trains one pipeline of whole layers: leave out layout.data, tensor"),
        ({"layout": {"data": 2}}, "trains one pipeline of whole layers: leave out layout.data, tensor"),
        ({"layout": {"zero": 1}}, "keeps all that it trains in one state; leave layout.zero out"),
        ({"clip": 1.0}, "clip.norm needs the gradients of all stages at once"),
        ({"sync": {"mode": "pipedream_2bw"}, "layout": {"pipeline": 4}}, "would drain; use 3 or more"),
        ({"sync": {"mode": "pipedream", "stages": 2, "push": 3}}, "8 micro-batches cannot be pushed 3 at a time"),
        ({"init": "by_name"}, "use init: stream"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, Any], said: str) -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "pipedream", "stages": 2}}
    with pytest.raises(ConfigurationError, match=said):
        validate(TrainingConfig, {**given, **changes}, "test")


def test_there_are_as_many_workers_as_stages_or_one() -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "pipedream"}, "layout": {"pipeline": 2}}
    config = with_replicas(validate(TrainingConfig, given, "test"), Hosts((2,)))
    assert config.sync.stages == 2
    refuse_impossible(config, Hosts((2,)))
    for hosts in ((4,), (2, 2)):
        with pytest.raises(ConfigurationError, match="trains one pipeline on one host so far, and there are 4 workers"):
            refuse_impossible(config, Hosts(hosts))


def test_other_numbers_of_workers_are_refused_with_the_reason() -> None:
    given = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {"mode": "pipedream"}, "layout": {"pipeline": 2}}
    config = validate(TrainingConfig, given, "test")
    with pytest.raises(ConfigurationError, match=r"--workers is 1:2, and sync\.mode pipedream has a worker"):
        refuse_inelastic(config, Elastic(1, 2))
    with pytest.raises(ConfigurationError, match="compare the digests of unisono train -n 1 and of"):
        refuse_to_compare(config)


def test_a_weight_in_two_stages_is_refused(pool: LocalLauncher) -> None:
    with pytest.raises(UnisonoError, match=r"embedding\.weight is used in stages 0 and 1, which sync\.mode"):
        train(pool, 2, model="tied", sync={"mode": "pipedream"}, layout={"pipeline": 2}, global_batch_size=24)
