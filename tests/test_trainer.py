"""What a user meets in Python: arguments, callbacks, stops, and errors that say what to do."""

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests import jobs, toys
from tests.jobs import small_trainer as trainer
from unisono.errors import ConfigurationError, DataError, ImpureRunError, TrainingError
from unisono.events import Event, Notice, RunFinished, RunStarted, StepFinished, ValidationFinished
from unisono.launch.world import World
from unisono.plan.hosts import Hosts
from unisono.state.checkpoint import DIRECTORY, steps_in


def refused(match: str, **options: Any) -> None:
    with pytest.raises((ConfigurationError, DataError, TrainingError), match=match):
        jobs.trainer(**options).fit(2)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        (
            "micro_batch_size 5 does not divide global_batch_size 28; the nearest multiple is 25",
            {"micro_batch_size": 5},
        ),
        ("unknown key globl_batch_size; did you mean global_batch_size?", {"globl_batch_size": 8}),
        ("unknown key observe.progres; did you mean progress?", {"observe": {"progres": True}}),
        ("precision = 'fp8'", {"precision": "fp8"}),
        (
            "the layout has 2 workers (data 2 x pipeline 1), but 1 is there; start 2 (-n 2), or use data=1",
            {"layout": {"data": 2}},
        ),
        ("1 worker cannot make replicas of 3 (layout.pipeline=3); use 3 workers", {"layout": {"pipeline": 3}}),
        ("8 workers but only 7 micro-batches in a step; use at most 7 workers", {"layout": {"data": 8}}),
        ("the loss is nan at step 1, micro-batch 0", {"loss": "nan"}),
        ("give run_dir", {"checkpoint_every": 3}),
        ("device cuda", {"device": "cuda"}),
        ("the model wrote to its parameter linear.weight", {"model": "writes_parameter"}),
    ],
)
def test_wrong_input_is_one_clear_sentence(match: str, options: dict[str, Any]) -> None:
    if "cuda" in match and torch.cuda.is_available():
        pytest.skip("a device is there")
    refused(re.escape(match), **options)


@pytest.mark.parametrize("model", ["counter", "python_noise"])
def test_an_impure_model_is_refused_by_the_name_of_a_parameter(model: str) -> None:
    with pytest.raises(ImpureRunError, match=r"micro-batch 0 of step 1, .* two gradients of linear\.weight"):
        jobs.trainer(model=model).fit(3)


@pytest.mark.parametrize(
    ("match", "options"),
    [
        ("model is a module that is built already", {"model": nn.Linear(6, 4)}),
        ("the model's factory returned int", {"model": lambda: 5}),
        ("has no shape yet", {"model": lambda: nn.LazyLinear(4)}),
        ("the optimizer's factory returned NoneType", {"optimizer": lambda p: None}),
        ("trains no parameter", {"model": lambda: nn.Linear(6, 4).requires_grad_(False)}),
        ("not parameters of the model", {"optimizer": lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))])}),
        ("the training dataset is empty", {"data": []}),
        ("is a generator, which has no len()", {"data": (x for x in [1])}),
        ("the loss returned a tensor of shape (4, 4)", {"loss": lambda o, t: (o - t) ** 2}),
        ("the loss returned float", {"loss": lambda o, t: 1.0}),
        ("does not depend on any trained parameter", {"loss": lambda o, t: t.mean()}),
        ("the weight -1.0", {"loss": lambda o, t: (o.sum(), -1.0)}),
        ("steps is 0", {"steps": 0}),
        ("optimizer is a SGD that is built already", {"optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}),
        ("the task has loss", {"validation": toys.Samples(), "validate": {"metric": "accurcy"}}),
        ("metrics returned NoneType", {"validation": toys.Samples(), "metrics": lambda o, t: None}),
    ],
)
def test_wrong_parts_are_one_clear_sentence(match: str, options: dict[str, Any]) -> None:
    steps = options.pop("steps", 1)
    with pytest.raises(unisono.UnisonoError, match=re.escape(match)):
        trainer(**options).fit(steps)


def test_batches_may_be_any_tree() -> None:
    """A mapping by name, a tuple by position, an object as output, a batch that is input and target at once."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor, scale: Tensor) -> dict[str, Tensor]:
            return {"y": self.linear(x) * scale[:, None]}

    class Mapping(toys.Samples):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return {"x": x, "scale": torch.tensor(2.0)}, y

    class Positional(toys.Samples):
        def __getitem__(self, index: int) -> Any:
            x, y = super().__getitem__(index)
            return (x, torch.tensor(2.0)), y

    class Inputs(toys.Samples):
        def __getitem__(self, index: int) -> Any:
            return super().__getitem__(index)[0]

    def loss(output: dict[str, Tensor], target: Tensor) -> Tensor:
        return F.mse_loss(output["y"], target)

    by_name = trainer(model=Named, loss=loss, data=Mapping()).fit(3).digest
    by_position = trainer(model=Named, loss=loss, data=Positional()).fit(3).digest
    assert by_name == by_position
    trainer(model=lambda: nn.Linear(6, 6), data=Inputs()).fit(3)


def test_after_fit_the_model_is_an_ordinary_module() -> None:
    subject = jobs.trainer(model="tied")
    subject.fit(2)
    model = subject.model
    assert isinstance(model, toys.Tied) and model.head.weight is model.embedding.weight
    model(torch.randn(3, 6)).sum().backward()
    assert model.mix.weight.grad is not None
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    first = subject.fit(2).digest  # a second fit starts anew
    assert first == jobs.trainer(model="tied").fit(2).digest


def test_callbacks_hear_events_and_may_stop_the_run() -> None:
    heard: list[Event] = []

    def listen(event: Event) -> None:
        heard.append(event)
        if isinstance(event, StepFinished) and event.step == 3:
            subject.stop()

    subject = jobs.trainer(callbacks=[listen], clip=0.1, schedule="cosine")
    result = subject.fit(50)
    assert (result.step, result.reason) == (4, "stopped")
    assert isinstance(heard[0], RunStarted) and isinstance(heard[-1], RunFinished)
    steps = [e for e in heard if isinstance(e, StepFinished)]
    assert [s.step for s in steps] == [1, 2, 3, 4]
    assert all(s.gradient_norm is not None and s.gradient_norm > 0.1 for s in steps)
    assert steps[3].learning_rate < steps[0].learning_rate
    assert all(sum(s.phases[0].values()) > 0 for s in steps)


def test_a_callbacks_exception_ends_the_run() -> None:
    def listen(event: Event) -> None:
        if isinstance(event, StepFinished):
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        jobs.trainer(callbacks=[listen]).fit(3)


def test_validation_stops_early_and_keeps_the_best(tmp_path: Path) -> None:
    """A learning rate that makes everything worse: the first evaluation stays the best."""
    heard: list[ValidationFinished] = []
    subject = unisono.Trainer(
        model=lambda: nn.Linear(6, 4),
        loss=F.mse_loss,
        data=toys.Samples(),
        validation=toys.Samples(),
        metrics=lambda output, target: {"error": (output - target).abs().mean()},
        optimizer=lambda p: torch.optim.SGD(p, lr=2.0),
        global_batch_size=8,
        micro_batch_size=4,
        validate={"every": 2, "patience": 3, "metric": "error"},
        checkpoint={"every": 1, "keep": 1},
        run_dir=str(tmp_path),
        observe={"progress": False},
        callbacks=[lambda e: heard.append(e) if isinstance(e, ValidationFinished) else None],
    )
    result = subject.fit(100)
    best = 2 * max(i for i, e in enumerate(heard, 1) if e.best)
    assert result.reason == "early stop" and result.step == best + 6 == 2 * len(heard)
    assert [e.best for e in heard[-3:]] == [False, False, False]
    assert set(heard[0].metrics) == {"loss", "error"} and heard[0].samples == toys.SAMPLES
    assert steps_in(tmp_path / DIRECTORY) == [result.step, best]


def test_validation_is_the_mean_over_all_samples() -> None:
    """60 samples in batches of 8: the last batch is smaller, and counts by its size."""
    subject = jobs.trainer(model="plain", validation=toys.Samples(), micro_batch_size=8, global_batch_size=8)
    result = subject.fit(1)
    data = toys.Samples()
    assert subject.model is not None and result.validation is not None
    with torch.no_grad():
        expected = F.mse_loss(subject.model(data.inputs), data.targets)
    assert result.validation["loss"] == pytest.approx(float(expected), rel=1e-6)


def test_no_weight_is_said() -> None:
    notices: list[str] = []
    subject = jobs.trainer(
        loss="no_weight", callbacks=[lambda e: notices.append(e.text) if isinstance(e, Notice) else None]
    )
    before = subject.fit(1).digest
    assert any("step 1 had no weight" in text for text in notices)
    assert subject.fit(1).digest == before


def test_damage_and_differences_are_said_on_resume(tmp_path: Path) -> None:
    notices: list[Event] = []
    jobs.trainer(run_dir=str(tmp_path), checkpoint={"every": 1}).fit(3)
    newest = tmp_path / DIRECTORY / "step-00000003" / "manifest.json"
    newest.write_text(newest.read_text()[:-10])
    subject = jobs.trainer(run_dir=str(tmp_path), clip=1.0, callbacks=[notices.append])
    assert subject.fit(4, resume=True).step == 4
    text = " ".join(str(n) for n in notices)
    assert "step-00000003/manifest.json is damaged" in text and "clip was None, is 1.0" in text


def test_a_model_of_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trainer(model=lambda: nn.Linear(6, 4)).fit(1)
    trainer(model=lambda: nn.Linear(6, 4), validation=toys.Samples()).fit(1)
    assert torch.equal(torch.rand(3), expected)


def test_a_notebook_is_told_that_one_worker_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    trainer(callbacks=[lambda e: notices.append(e.text) if isinstance(e, Notice) else None]).fit(1)
    assert any("a notebook runs one worker" in text for text in notices)


def test_a_run_that_is_long_enough_already_is_said(tmp_path: Path) -> None:
    notices: list[str] = []
    note = lambda e: notices.append(e.text) if isinstance(e, Notice) else None  # noqa: E731
    trainer(run_dir=str(tmp_path)).fit(3)
    assert trainer(run_dir=str(tmp_path), resume=True, callbacks=[note]).fit(2).step == 3
    assert any("the run is at step 3 already" in text for text in notices)


def test_a_disk_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"layout\.offload: cannot keep \d+ bytes in .*: No such file"):
        trainer(layout={"offload": str(tmp_path / "none")}, optimizer=lambda p: torch.optim.AdamW(p)).fit(1)
    with pytest.raises(ConfigurationError, match=r"layout\.offload is for optimizers that update element by element"):
        trainer(layout={"offload": str(tmp_path)}, optimizer=lambda p: torch.optim.Adafactor(p)).fit(1)
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_cannot_fit_into_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.assembly.machine_bytes", lambda: 100 << 20)
    with pytest.raises(
        ConfigurationError, match=r"1 worker of this host would take 160\.. MiB, among it process .*100\.0 MiB"
    ):
        trainer().fit(1)


def test_torchrun_is_said_to_survive_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("unisono.trainer.this_process", lambda: World(0, Hosts((2,)), None, "torchrun"))
    with pytest.raises(ConfigurationError, match=r"torchrun ends all workers .* unisono run -n 2, or set"):
        jobs.trainer(fault={"on_loss": "replace"}).fit(1)


def test_a_cost_that_is_no_positive_number_is_refused_by_the_sample() -> None:
    class Free(toys.Samples):
        def cost(self, index: int) -> float:
            return 0.0

    with pytest.raises(DataError, match=r"cost\(\d+\) of the training dataset is 0; give a positive number"):
        jobs.small_trainer(data=Free()).fit(2)
