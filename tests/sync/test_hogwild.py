"""Updates without locks: a plain loop with one worker, rows of tables, several workers, and faults."""

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests import toys
from unisono.config import TrainingConfig, validate
from unisono.errors import ConfigurationError
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import refuse_to_compare
from unisono.optim.classes import pin_variant
from unisono.plan.lock_free import LockFreeLayout, LockFreePool
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer

HOGWILD = {"mode": "hogwild"}


def run(pool: LocalLauncher, workers: int, strikes: list[dict[str, Any]] | None = None, **options: Any) -> Any:
    arguments = {"strikes": strikes or [], "deadline_s": 20.0, "global_batch_size": 160, "steps": 6, "sync": HOGWILD}
    return pool.run({"call": "tests.jobs:struck", "arguments": {**arguments, **options}}, workers)


def alone(model: nn.Module, make: Any, steps: int, **settings: Any) -> nn.Module:
    """The model that one worker trains."""
    trainer = Trainer(
        **{
            "model": lambda: copy.deepcopy(model),
            "loss": nn.functional.mse_loss,
            "data": toys.Samples(),
            "optimizer": make,
            "sync": HOGWILD,
            "global_batch_size": 24,
            "micro_batch_size": 4,
            "observe": {"progress": False},
            **settings,
        }
    )
    trainer.fit(steps)
    assert trainer.model is not None
    return trainer.model


def looped(model: nn.Module, make: Any, steps: int, *, clip: float | None, together: int) -> nn.Module:
    """A plain loop: an update after so many micro-batches of four."""
    data, sampler = toys.Samples(), Sampler(toys.SAMPLES, 0, 24, 4)
    optimizer = make(model.parameters())
    pin_variant(optimizer, torch.device("cpu"))
    for step in range(steps):
        for m in range(6):
            rows = [data[i] for i in sampler.indices(step, m).tolist()]
            loss = nn.functional.mse_loss(model(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows]))
            torch.autograd.backward(loss / together)
            if (m + 1) % together == 0:
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
    return model


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lamb"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("together", [1, 3])
def test_one_worker_does_what_a_plain_loop_does(name: str, clip: float | None, together: int) -> None:
    """Also where gradients are sparse: by plain SGD row by row, by others as a whole."""
    torch.manual_seed(0)
    model, make = toys.Embedded(), toys.OPTIMIZERS[name]
    expected = looped(toys.Embedded(sparse=False), make, 0, clip=None, together=1)
    expected.load_state_dict(model.state_dict())
    ours = alone(model, make, 3, clip=clip, sync={**HOGWILD, "push": together})
    for mine, theirs in zip(
        ours.parameters(), looped(expected, make, 3, clip=clip, together=together).parameters(), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_a_table_is_never_touched_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(gradient: Tensor, *_: Any) -> Tensor:
        raise AssertionError("the whole gradient was made")

    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=0.05)

    monkeypatch.setattr(Tensor, "to_dense", refuse)
    alone(toys.Embedded(), sgd, 2)
    with pytest.raises(AssertionError, match="the whole gradient was made"):
        alone(toys.Embedded(), lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5), 2)


def units(directory: Path) -> list[int]:
    """Pushes of every step."""
    records = [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]
    return [sum(r["staleness"].values()) for r in records if r["event"] == "StepFinished"]


@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize(("model", "optimizer"), [("embedded", "sgd"), ("norm", "momentum"), ("tied", "lamb")])
def test_several_workers_do_each_unit_once(
    pool: LocalLauncher, workers: int, model: str, optimizer: str, tmp_path: Path
) -> None:
    ending = run(pool, workers, model=model, optimizer=optimizer, run_dir=str(tmp_path), steps=4)
    assert ending.result["digest"].startswith("not exact (workers update the state without locks): ")
    assert units(tmp_path) == [40] * 4
    one = run(pool, 1, model=model, optimizer=optimizer, steps=4).result
    assert ending.result["loss"] == pytest.approx(one["loss"], rel=0.1)


@pytest.mark.parametrize("moment", ["compute", "update", "mid-reduce", "wait"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_is_killed_at_any_moment(pool: LocalLauncher, moment: str, rank: int, tmp_path: Path) -> None:
    """(rank, step 3): another takes its unit, all are done, and what was learned is not lost."""
    strikes = [{"rank": rank, "step": 3, "moment": moment, "how": "kill"}]
    live = run(pool, 3, strikes, model="embedded", optimizer="sgd", run_dir=str(tmp_path))
    assert {result["reason"] for result in live.results if result} == {"finished"}
    assert units(tmp_path) == [40] * 6
    whole = run(pool, 3, model="embedded", optimizer="sgd").result
    assert next(result for result in live.results if result)["loss"] == pytest.approx(whole["loss"], rel=0.1)


def test_it_is_resumed_on_other_workers(pool: LocalLauncher, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": "embedded", "optimizer": "sgd", "run_dir": str(tmp_path)}
    run(pool, 3, steps=3, **options)
    resumed = run(pool, 2, steps=6, resume=True, **options)
    assert resumed.result["step"] == 6 and math.isfinite(resumed.result["loss"])
    assert units(tmp_path) == [40] * 6


@pytest.mark.parametrize("key", ["record", "replay"])
def test_a_replay_is_refused_with_the_reason(key: str) -> None:
    given = {"record": True, "replay": "runs/first"}[key]
    with pytest.raises(ConfigurationError, match=f"{key} is given and mode is hogwild: updates without locks have no"):
        validate(TrainingConfig, {"global_batch_size": 8, "sync": {**HOGWILD, key: given}}, "test")


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="8 micro-batches cannot be pushed 3 at a time"):
        settings = {"global_batch_size": 8, "micro_batch_size": 1, "sync": {**HOGWILD, "push": 3}}
        validate(TrainingConfig, settings, "test")
    config = validate(TrainingConfig, {"global_batch_size": 8, "micro_batch_size": 1, "sync": HOGWILD}, "test")
    with pytest.raises(ConfigurationError, match="update the state without locks: no two runs are alike; use another"):
        refuse_to_compare(config)


def test_a_unit_that_a_dying_worker_was_about_to_take_is_not_done_twice() -> None:
    """It died after it had noted what it takes, and before it took it; another took it, a third inherits."""
    layout = LockFreeLayout(workers=3, units=2)
    pool = LockFreePool(layout, memoryview(bytearray(layout.size_bytes)))
    pool.begin(1)
    pool.under_way[0] = 1
    assert pool.take(1) == 0
    assert pool.inherit(2, 0) is None and pool.take(2) == 1
    assert pool.inherit(2, 1) == 0  # and where the other is lost too, it is done


def test_a_pool_gives_each_unit_once_and_again_where_its_worker_is_lost() -> None:
    layout = LockFreeLayout(workers=2, units=3)
    pool = LockFreePool(layout, memoryview(bytearray(layout.size_bytes)))
    pool.begin(1)
    assert (pool.take(0), pool.take(1)) == (0, 1)
    pool.finish(0, 0)
    pool.clock[0] += 1
    assert pool.inherit(1, 0) is None and pool.inherit(0, 1) == 1
    pool.finish(1, 2)
    assert pool.take(0) == 2 and pool.take(1) is None and pool.exhausted
    before = pool.all_done
    assert not before
    pool.finish(2, 0)
    done = pool.all_done
    assert done and pool.staleness() == {0: 2, 2: 1} and pool.pushes == 1
