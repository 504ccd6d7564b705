"""Newton-CG in a run: the optimum of a convex problem, one result on any workers, resumes, lost workers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer
from torch import Tensor, nn
from torch.nn import functional as F

from tests import toys
from tests.optim.test_newton import BREAST_CANCER
from tests.test_parity import train
from unisono.errors import UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.task import Elastic
from unisono.launch.worker_set import WorkerSet
from unisono.optim import GIANT, NewtonCG
from unisono.parallel.micro_batch import Objective
from unisono.parallel.replicated import Replica
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer


class Logistic(nn.Module):
    """Logistic regression, whose penalty is a part of its output."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(30, dtype=torch.float64))
        self.intercept = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x @ self.weight + self.intercept, 0.5 * (self.weight**2).sum()


def loss(output: tuple[Tensor, Tensor], labels: Tensor) -> tuple[Tensor, float]:
    """The sum over samples, with each one's share of the penalty."""
    scores, penalty = output
    own = F.binary_cross_entropy_with_logits(scores, labels, reduction="sum")
    return own + len(labels) / 569 * penalty, float(len(labels))


def test_it_reaches_the_known_optimum() -> None:
    """To 1e-8, in 15 steps, each of all samples."""
    found = load_breast_cancer()
    inputs = torch.from_numpy(found.data).double()
    inputs = (inputs - inputs.mean(0)) / inputs.std(0, unbiased=False)
    labels = torch.from_numpy(found.target).double()
    trainer = Trainer(
        model=Logistic,
        loss=loss,
        data=list(zip(inputs, labels, strict=True)),
        optimizer=lambda parameters: NewtonCG(parameters),
        global_batch_size=569,
        micro_batch_size=569,
        observe={"progress": False},
    )
    trainer.fit(15)
    assert trainer.model is not None
    with torch.no_grad():
        value, _ = loss(trainer.model(inputs), labels)
    assert abs(float(value) - BREAST_CANCER) < 1e-8


SETTINGS: dict[str, dict[str, Any]] = {
    "hessian": {"model": "plain", "optimizer": "newton"},
    "gauss-newton, damped, dropout": {"model": "smooth", "optimizer": "gauss_newton"},
    "weighted": {"model": "plain", "optimizer": "newton", "loss": "weighted"},
    "checkpointed, dropout": {"model": "checkpointed", "optimizer": "newton"},
    "gauss-newton, checkpointed": {"model": "checkpointed", "optimizer": "gauss_newton"},
}


@pytest.mark.parametrize("name", SETTINGS)
def test_one_result_on_any_workers(pool: LocalLauncher, name: str, tmp_path: Path) -> None:
    """Also stopped on 3, and resumed on 2: damping goes on from where it was."""
    given = {**SETTINGS[name], "validated": True, "validate": {"every": 2}}
    expected = train(pool, 1, **given)
    for workers in (2, 3, 4):
        found = train(pool, workers, **given)
        assert found["digest"] == expected["digest"] and found["losses"] == expected["losses"]
        assert found["validations"] == expected["validations"]
    train(pool, 3, run_dir=str(tmp_path), **{**given, "steps": 3})
    again = train(pool, 2, run_dir=str(tmp_path), resume=True, **given)
    assert again["digest"] == expected["digest"] and again["losses"] == expected["losses"][3:]


@pytest.mark.parametrize("make", ["newton", "gauss_newton"])
def test_it_takes_the_steps_of_a_plain_loop(make: str) -> None:
    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()

    samples = [(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))]
    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        plain = model()
    optimizer = toys.OPTIMIZERS[make](plain.parameters())
    for step in range(4):
        rows = [[samples[i] for i in Sampler(toys.SAMPLES, 0, 12, 4).indices(step, m).tolist()] for m in range(3)]

        def closure(rows: Any = rows) -> Any:
            outputs = [plain(torch.stack([x for x, _ in part])) for part in rows]
            targets = [torch.stack([y for _, y in part]) for part in rows]
            return [(o, F.mse_loss(o, t) / 3) for o, t in zip(outputs, targets, strict=True)]

        optimizer.step(closure)
    trainer = Trainer(
        model=model,
        loss=F.mse_loss,
        data=samples,
        optimizer=toys.OPTIMIZERS[make],
        global_batch_size=12,
        micro_batch_size=4,
        observe={"progress": False},
    )
    trainer.fit(4)
    assert trainer.model is not None
    for ours, theirs in zip(trainer.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("moment", ["data", "compute", "wait", "update"])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_worker_is_killed(pool: LocalLauncher, rank: int, moment: str, tmp_path: Path) -> None:
    """(rank, step 4): all start again from a snapshot, with the same bits."""
    options: dict[str, Any] = {"model": "plain", "optimizer": "newton", "steps": 6}
    expected = train(pool, 1, **options)["digest"]
    strikes = [{"rank": rank, "step": 4, "moment": moment, "how": "kill"}]
    further = {"fault": {"snapshot_every": 2}, "run_dir": str(tmp_path), "deadline_s": 20.0}
    target = {"call": "tests.jobs:struck", "arguments": {"strikes": strikes, **further, **options}}
    assert pool.run(target, 3).result["digest"] == expected
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [r["event"] for r in records].count("RolledBack") == 1


def test_a_worker_that_hangs_is_ended(pool: LocalLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    """(rank 1 of 3, step 4, as it computes): SIGSTOP; all start again, with the same bits."""
    options: dict[str, Any] = {"model": "plain", "optimizer": "newton", "steps": 6}
    expected = train(pool, 1, **options)["digest"]
    strikes = [{"rank": 1, "step": 4, "moment": "compute", "how": "stop"}]
    target = {"call": "tests.jobs:struck", "arguments": {"strikes": strikes, "deadline_s": 1.0, **options}}
    assert pool.run(target, 3).result["digest"] == expected
    assert "worker 1" in (said := capfd.readouterr().err) and "has made no progress" in said


def test_the_loss_is_evaluated_once_for_each_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that goes the whole way: at its beginning, and where it arrives."""
    seen: list[bool] = []
    objective = Replica.objective

    def noted(replica: Replica, step: int, micro_batch: int, batch: object) -> Objective:
        seen.append(torch.is_grad_enabled())
        return objective(replica, step, micro_batch, batch)

    monkeypatch.setattr(Replica, "objective", noted)
    Trainer(
        model=lambda: nn.Linear(6, 4, dtype=torch.float64),
        loss=F.mse_loss,
        data=[(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))],
        optimizer=lambda parameters: NewtonCG(parameters),
        global_batch_size=8,
        micro_batch_size=4,
        observe={"progress": False},
    ).fit(1)
    assert seen == [True, True, False, False]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip": 1.0}, "NewtonCG and clip do not go together: it evaluates the whole loss several times"),
        ({"layout": {"pipeline": 2}}, "NewtonCG and layout.pipeline 2 do not go together"),
        (
            {"model": "norm"},
            r"the model writes to 1\.running_mean in its forward, and the optimizer",
        ),
        ({"schedule": {"warmup_steps": 2}}, r"NewtonCG and schedule\.warmup_steps do not go together"),
        ({"loss": "nan"}, "the loss is nan at step 1; begin with other values"),
        ({"model": "tied"}, "NewtonCG cannot train a weight under several names"),
    ],
    ids=["clip", "pipeline", "norm", "warm-up", "nan", "tied"],
)
def test_what_it_does_not_go_with_is_refused(pool: LocalLauncher, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnisonoError, match=message) as raised:
        train(pool, 2, **{"model": "plain", "optimizer": "newton", **options})
    assert raised.value.exit_code == 2


def test_no_weight_skips_the_step(pool: LocalLauncher) -> None:
    """A step in which no micro-batch counts changes nothing; one that depends on nothing counts as such."""
    digests = [train(pool, n, model="plain", optimizer="newton", loss="no_weight", steps=2)["digest"] for n in (1, 2)]
    assert digests[0] == digests[1]
    found = [train(pool, n, model="plain", optimizer="newton", loss="sometimes", steps=2) for n in (1, 3)]
    assert found[0]["digest"] == found[1]["digest"] != digests[0]


def test_a_worker_that_joins_goes_on_from_the_state(pool: LocalLauncher) -> None:
    """Another comes after some steps: the bits of one."""
    options: dict[str, Any] = {"model": "plain", "optimizer": "newton", "steps": 60, "deadline_s": 20.0}
    expected = train(pool, 1, **options)["digest"]
    asked: list[int] = []

    def look(workers: WorkerSet) -> None:
        header = workers.survival.header
        if header is not None and header.committed >= 3 and not asked:
            asked.append(header.committed)
            workers.scale(2)

    before = pool.turn_s
    pool.each_turn, pool.turn_s = look, 0.002
    try:
        target = {"call": "tests.jobs:train", "arguments": options}
        ending = pool.run(target, 1, elastic=Elastic(1, 2))
    finally:
        pool.each_turn, pool.turn_s = None, before
    assert next(result for result in ending.results if result)["digest"] == expected


def test_giant_is_refused_with_the_reason() -> None:
    trainer = Trainer(
        model=lambda: nn.Linear(6, 4),
        loss=F.mse_loss,
        data=toys.Samples(),
        optimizer=lambda parameters: GIANT(parameters, share=1.0, processes=1),
        global_batch_size=8,
        micro_batch_size=4,
        observe={"progress": False},
    )
    with pytest.raises(UnisonoError, match="its directions depend on how many processes have parts of the data"):
        trainer.fit(1)
