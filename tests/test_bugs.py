"""Defects that were once found, each with its cause."""

import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import unisono
from tests import jobs, toys
from tests.jobs import small_trainer as trainer
from unisono.errors import ConfigurationError
from unisono.events import CheckpointSaved, Event, StepFinished, ValidationFinished
from unisono.launch.local import LocalLauncher
from unisono.launch.worker_set import WorkerSet
from unisono.optim.classes import pin_variant, update_class
from unisono.state.checkpoint import DIRECTORY, load, path_of, steps_in


def test_the_returned_model_has_the_committed_buffers(tmp_path: Path) -> None:
    """Cause: only parameters were given back; buffers kept what the worker's last micro-batch had written."""
    subject = jobs.trainer(model="norm", run_dir=str(tmp_path))
    subject.fit(3)
    assert subject.model is not None
    _, saved = load(path_of(tmp_path / DIRECTORY, 3))
    assert torch.equal(subject.model.get_buffer("1.running_mean"), saved["buffer/1.running_mean"])


class Average(nn.Module):
    """A buffer that changes in evaluation too."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.seen += x.mean()
        y: Tensor = self.linear(x) * (1 + 0.1 * torch.tanh(self.seen))
        return y


def test_evaluation_does_not_leak_into_training() -> None:
    """Cause: buffers that were written in evaluation survived into the next micro-batch."""
    plain = trainer(model=Average).fit(4).digest
    watched: list[unisono.Trainer] = []

    def use(event: Event) -> None:
        if isinstance(event, StepFinished):
            model = watched[0].model
            assert model is not None
            model(torch.ones(2, 6))

    validated = trainer(model=Average, validation=toys.Samples(), validate={"every": 1}, callbacks=[use])
    watched.append(validated)
    assert validated.fit(4).digest == plain


def test_saves_after_a_resume_outlive_damaged_newer_ones(tmp_path: Path) -> None:
    """Cause: damaged checkpoints of later steps counted as the newest, so what was just written was pruned."""
    settings: dict[str, Any] = {"run_dir": str(tmp_path), "checkpoint": {"every": 2, "keep": 1, "keep_best": False}}
    trainer(**{**settings, "checkpoint": {"every": 2, "keep": 9}}).fit(8)
    *newer, oldest = steps_in(tmp_path / DIRECTORY)
    for step in newer:
        (path_of(tmp_path / DIRECTORY, step) / "manifest.json").write_text("{}")
    trainer(**settings).fit(oldest + 1, resume=True)
    assert newer and steps_in(tmp_path / DIRECTORY) == [oldest + 1]


def test_late_snapshots_do_not_run_away(tmp_path: Path) -> None:
    """Cause: a snapshot taken later than it was wanted left the wish standing."""
    saved: list[int] = []
    trainer(
        run_dir=str(tmp_path),
        checkpoint={"every": 5, "keep": 99},
        callbacks=[lambda e: saved.append(e.step) if isinstance(e, CheckpointSaved) else None],
    ).fit(40)
    assert len(saved) <= 9


def test_a_users_temporary_files_are_left_alone(tmp_path: Path) -> None:
    """Cause: every ``*.tmp`` in the run directory was taken for a leftover."""
    (tmp_path / "mine.tmp").mkdir()
    trainer(run_dir=str(tmp_path)).fit(1)
    assert (tmp_path / "mine.tmp").is_dir()


def test_a_model_may_change_its_input_in_place() -> None:
    """Cause: the purity check computed twice on one batch."""

    class InPlace(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return super().forward(input.div_(2))

    trainer(model=lambda: InPlace(6, 4)).fit(2)


def test_a_dataset_with_random_state_of_its_own_is_refused() -> None:
    """Cause: one load served both computations of the purity check."""

    class Own(toys.Samples):
        generator = torch.Generator().manual_seed(0)

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            x, y = super().__getitem__(index)
            return x + torch.rand(6, generator=self.generator), y

    with pytest.raises(unisono.UnisonoError, match="the run is not pure"):
        trainer(data=Own()).fit(1)


def test_a_micro_batch_without_weight_need_not_depend_on_parameters() -> None:
    """Cause: a constant loss was refused even where its weight is 0."""

    def loss(output: Tensor, target: Tensor) -> tuple[Tensor, float]:
        return (F.mse_loss(output, target, reduction="sum"), 4.0) if target[0, 0] > 0 else (torch.zeros(()), 0.0)

    assert trainer(loss=loss).fit(4).step == 4


def test_a_grown_dataset_cannot_be_resumed(tmp_path: Path) -> None:
    """Cause: the number of samples, which orders them, was not recorded."""
    trainer(run_dir=str(tmp_path)).fit(1)
    larger: Any = torch.utils.data.ConcatDataset([cast(Any, toys.Samples()), cast(Any, toys.Samples())])
    with pytest.raises(ConfigurationError, match=r"samples is 120, but the run in .* has 60"):
        trainer(run_dir=str(tmp_path), data=larger).fit(2, resume=True)


def test_half_precision_is_not_given_to_the_fused_sgd() -> None:
    """Cause: torch's fused SGD for bf16 and fp16 on a CPU gives wrong values (torch 2.13)."""
    for dtype, fused in ((torch.bfloat16, False), (torch.float32, True)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(4, dtype=dtype))], lr=0.1)
        pin_variant(optimizer, torch.device("cpu"))
        assert optimizer.param_groups[0]["fused"] is fused


def test_an_optimizer_that_wraps_another_is_refused() -> None:
    """Cause: the copy over blocks went on stepping the inner one, over parameters that get no gradient."""

    class Wrapper(torch.optim.Optimizer):
        def __init__(self, parameters: Any) -> None:
            super().__init__(parameters, {})
            self.base = torch.optim.SGD(self.param_groups, lr=0.1)

    with pytest.raises(ConfigurationError, match="wraps another optimizer"):
        update_class(Wrapper([nn.Parameter(torch.ones(1))]))


def test_numbers_that_an_owner_would_count_alone_are_refused() -> None:
    """Cause: plain numbers in state or groups were lost on resume, or counted once for every run of blocks."""

    class Counting(torch.optim.SGD):
        update_class = "element-wise"

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                group["count"] = group.get("count", 0) + 1

    class InState(torch.optim.SGD):
        update_class = "per parameter"

        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            for group in self.param_groups:
                for p in group["params"]:
                    self.state[p]["step"] = 1

    with pytest.raises(ConfigurationError, match="counts in its parameter groups"):
        trainer(optimizer=lambda p: Counting(p, lr=0.1)).fit(1)
    with pytest.raises(ConfigurationError, match="keeps state 'step' of type int"):
        trainer(optimizer=lambda p: InState(p, lr=0.1)).fit(1)


def test_a_module_under_two_names_is_exported_under_both(tmp_path: Path) -> None:
    """Cause: names of buffers were taken once each."""
    from unisono.state.export import state_dict

    def build() -> nn.Module:
        model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        model.add_module("again", model[1])
        return model

    subject = trainer(model=build, run_dir=str(tmp_path))
    subject.fit(1)
    assert subject.model is not None
    build().load_state_dict(state_dict(path_of(tmp_path / DIRECTORY, 1)))


def test_a_script_may_train_twice_on_several_workers(pool: Any) -> None:
    """Cause: both trainings asked for an arena of the same name, and some workers got the first one's."""
    results = pool.run({"call": "tests.jobs:train_twice", "arguments": {}}, 3).results
    assert all(r == results[0] for r in results) and results[0][0] != results[0][1]


def test_training_leaves_no_descriptor(pool: Any) -> None:
    """Cause: the arena's descriptor was kept beside its mapping, and with it the memory, after every training."""
    for before, after in pool.run({"call": "tests.jobs:descriptors_before_and_after", "arguments": {}}, 2).results:
        assert after <= before


def test_state_that_would_be_lost_on_resume_is_refused() -> None:
    """Cause: attributes, state of no parameter, and state made later than the first step were dropped in silence."""

    class Base(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            self.keep()

        def keep(self) -> None:
            raise NotImplementedError

    class Attribute(Base):
        t = 0

        def keep(self) -> None:
            self.t += 1

    class Elsewhere(Base):
        def keep(self) -> None:
            cast(Any, self.state)["all"] = {"k": 1}

    class Late(Base):
        def keep(self) -> None:
            for p in self.param_groups[0]["params"]:
                count = self.state[p]["count"] = self.state[p].get("count", 0) + 1
                if count == 2:
                    self.state[p]["slow"] = p.detach().clone()

    for kind, match in ((Attribute, "keeps 't' as an attribute"), (Elsewhere, "state of no parameter")):
        with pytest.raises(ConfigurationError, match=match):
            trainer(optimizer=lambda p, kind=kind: kind(p, lr=0.1)).fit(1)
    with pytest.raises(unisono.UnisonoError, match="made the state 'slow' after its first step"):
        trainer(optimizer=lambda p: Late(p, lr=0.1)).fit(3)


def test_what_is_not_a_number_is_never_the_best() -> None:
    """Cause: a first metric of NaN stayed the best, since nothing compares as better; a resume forgot it."""
    heard: list[bool] = []
    values = iter([float("nan"), 3.0, 2.0, float("nan"), 1.0, 1.0, 1.0, 1.0, 1.0])
    subject = trainer(
        data=toys.Samples(),
        validation=cast(Any, [toys.Samples()[0]]),
        metrics=lambda output, target: {"m": next(values)},
        validate={"every": 1, "metric": "m"},
        callbacks=[lambda e: heard.append(e.best) if isinstance(e, ValidationFinished) else None],
    )
    subject.fit(4)
    assert heard == [True, True, False, True]  # the rehearsal took the first value


def test_a_failed_start_gives_the_directory_back(tmp_path: Path) -> None:
    """Cause: what failed between taking the directory's lock and training kept it."""
    (tmp_path / "events.jsonl").mkdir()
    with pytest.raises(OSError):
        trainer(run_dir=str(tmp_path)).fit(1)
    (tmp_path / "events.jsonl").rmdir()
    assert trainer(run_dir=str(tmp_path)).fit(1).step == 1


def test_adagrad_takes_a_parameter_without_dimensions() -> None:
    """Cause: state that its constructor makes for such a parameter was taken for a scalar of every parameter."""

    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.tensor(1.0))
            self.linear = nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.linear(x) * self.scale
            return y

    assert trainer(model=Scaled, optimizer=lambda p: torch.optim.Adagrad(p, lr=0.1)).fit(3).step == 3


def test_a_collate_that_draws_is_exact() -> None:
    """Cause: batches were made outside of the samples' random state."""

    def mix(samples: list[Any]) -> Any:
        x, y = torch.utils.data.default_collate(samples)
        order = torch.randperm(len(x))
        return x * 0.7 + x[order] * 0.3, y

    assert trainer(collate=mix).fit(3).digest == trainer(collate=mix).fit(3).digest


def test_a_changed_setting_of_a_coupled_optimizer_takes_effect_on_resume(tmp_path: Path) -> None:
    """Cause: all numbers of its groups were restored, those that the user had changed too."""
    digests = []
    for momentum in (0.9, 0.1):
        run_dir = str(tmp_path / str(momentum))

        class Mine(torch.optim.SGD):
            pass

        trainer(run_dir=run_dir, optimizer=lambda p: Mine(p, lr=0.1, momentum=0.9)).fit(2)
        subject = trainer(run_dir=run_dir, optimizer=lambda p: Mine(p, lr=0.1, momentum=momentum))  # noqa: B023
        digests.append(subject.fit(4, resume=True).digest)
    assert digests[0] != digests[1]


def test_a_worker_that_fails_in_the_middle_of_a_step_tells_other_hosts_why(
    pool: LocalLauncher, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exchange thread waited for gradients that could not come, without a deadline; others lost a connection."""
    monkeypatch.setattr(WorkerSet, "_failures", lambda self: (False, False))
    monkeypatch.setattr(WorkerSet, "_raise_failure", lambda self: None)
    target = {"call": "tests.jobs:survive", "arguments": {"rank": 1, "how": "raise", "step": 3, "deadline_s": 5.0}}
    results = pool.run(target, 2, hosts=2).results
    assert "rank 1 (host 1) ended: RuntimeError: struck on purpose" in results[0]["error"]
    assert results[1] is None


def test_all_to_all_with_lengths_that_do_not_match_is_refused(pool: LocalLauncher) -> None:
    """Old bytes of the shared buffer were handed out. Later operations of the group are refused too."""
    results = pool.run({"call": "tests.arena_jobs:unmatched_lengths", "arguments": {}}, 2).results
    assert "rank 0 sends 8 bytes, expected are 24" in results[1][0]
    assert all("failed before" in later for _, later in results[1:])


def test_bytes_that_come_after_a_receive_was_given_up_are_dropped() -> None:
    """They were written into the tensor, which its owner may have used again."""
    from unisono.comm.arena import Arena, Regions
    from unisono.comm.channels import CHANNEL_BYTES, RING_BYTES, Channels, Request
    from unisono.comm.meeting import MeetingError

    regions = Regions()
    region = regions.add("channels", 4 * CHANNEL_BYTES)
    arena = Arena(None, regions.size_bytes)
    sender, receiver = (Channels(arena, region, rank, 2) for rank in range(2))
    memory = bytearray(2 * RING_BYTES)
    request = Request(0, 1, memoryview(memory))
    receiver.receive(request)
    sender.send(Request(1, 1, memoryview(b"\1" * len(memory))))
    receiver.move()
    receiver.cancel(request, MeetingError("too late"))
    before = bytes(memory)
    again = Request(0, 2, memoryview(bytearray(3)))
    receiver.receive(again)
    sender.send(Request(1, 2, memoryview(b"abc")))
    for _ in range(20):
        sender.move()
        receiver.move()
    assert bytes(memory) == before and bytes(again.data) == b"abc"
    sender.close()
    receiver.close()


def test_what_a_killed_chief_had_begun_to_write_is_removed(tmp_path: Path) -> None:
    """Cause: another worker found the mistake first, and the chief was killed before it had renamed config.yaml.tmp."""
    (tmp_path / "small.yaml").write_text("task: images\nsteps: 1\nglobal_batch_size: 28\nmicro_batch_size: 4\n")
    (tmp_path / "here").mkdir()
    begun = [tmp_path / "here" / name for name in ("config.yaml.tmp", "report.html.tmp")]
    for path in begun:
        path.write_text("half")
    wrong = ["optimizer={name: SGD, options: {beta: 1}}", "run_dir=here"]
    command = [sys.executable, "-m", "unisono", "train", "small.yaml", *wrong]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done.stderr
    assert not [path for path in begun if path.exists()]
