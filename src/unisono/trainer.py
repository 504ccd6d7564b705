"""The composition root: a user's objects and settings in, a trained model and its digest out."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import nn

from unisono.assembly import Objects, OptimizerFactory, Prepared, assemble, describe
from unisono.comm.group import SNAPSHOT, STOP
from unisono.config import Layout, ScheduleConfig, TrainingConfig, more_workers_than_micro_batches, validate
from unisono.data.feed import Collate, Dataset, size_of
from unisono.errors import CheckpointError, ConfigurationError
from unisono.evaluation import Metrics
from unisono.events import (
    PHASES,
    Emitter,
    Event,
    Listener,
    Notice,
    Resumed,
    RunFinished,
    RunStarted,
    StepFinished,
    Summary,
    ValidationFinished,
)
from unisono.launch.process import keep_freed_memory
from unisono.launch.world import World, in_notebook, this_process
from unisono.observe.choose import observers
from unisono.optim.classes import described
from unisono.optim.schedules import Schedule, schedule
from unisono.parallel.replicated import Loss
from unisono.plan.assignment import UpdateClass
from unisono.run.fingerprint import fingerprint
from unisono.state.checkpoint import DIRECTORY, Description, newest_intact, remove_leftovers, set_aside, steps_in
from unisono.state.training_state import TrainingState
from unisono.state.writer import CheckpointWriter, Retention
from unisono.sync.policy import Outcome

RUN_KEYS = ("seed", "global_batch_size", "micro_batch_size", "precision", "clip", "schedule", "scaling")
"""Settings that define the run; those of `FIXED` may not change when it is resumed."""
FIXED = ("seed", "global_batch_size", "micro_batch_size", "samples")


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps that were trained in all.
        reason: "finished", "stopped" (asked to) or "early stop" (validation did not improve).
        digest: of the training state.
        loss: of the last step, None where no step was taken.
        validation: metrics of the last evaluation, None where there was none.
        run_dir: where records are, None where none were wanted.
    """

    step: int
    reason: str
    digest: str
    loss: float | None
    validation: Mapping[str, float] | None
    run_dir: str | None


class Trainer:
    """Trains a model on however many workers this process was started with.

    The same script runs under ``python``, ``unisono run -n 4`` and ``torchrun --nproc-per-node 4``, with one result.

    Arguments:
        model: a factory; called under the run's seed.
        loss: ``loss(output, target)`` -> the mean over the micro-batch, or a pair (sum, weight).
        data: a map-style dataset; ``data[i]`` is a pair (input, target), or one object that serves as both. A mapping
            as input is passed to the model by name, a tuple by position.
        optimizer: parameters -> a torch.optim.Optimizer.
        validation: a dataset to evaluate on.
        metrics: ``metrics(output, target)`` -> further figures of the evaluation, each a mean or a pair (sum, weight).
        collate: samples -> batch; default: torch's.
        callbacks: called with every event (see `unisono.events`) on rank 0.
        schedule: a name ("constant", "linear", "cosine"), a `ScheduleConfig`, or step (from 0) -> factor.
        layout: "auto", or a `Layout`.
        checkpoint_every: steps between checkpoints; needs ``run_dir``.
        settings: all further keys of `TrainingConfig`: global_batch_size, micro_batch_size, seed, precision, clip,
            run_dir and so on; its section ``validation`` is given as ``validate={"every": 100}``.

    Raises:
        ConfigurationError: for anything that cannot be trained, before training starts.

    Example:
        >>> data = [(torch.randn(4), torch.randn(2)) for _ in range(32)]
        >>> trainer = Trainer(
        ...     model=lambda: nn.Linear(4, 2),
        ...     loss=nn.functional.mse_loss,
        ...     data=data,
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ...     global_batch_size=8,
        ...     micro_batch_size=4,
        ...     observe={"progress": False},
        ... )
        >>> trainer.fit(steps=5).step
        5
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        loss: Loss,
        data: Dataset,
        optimizer: OptimizerFactory,
        validation: Dataset | None = None,
        metrics: Metrics | None = None,
        collate: Collate | None = None,
        callbacks: Sequence[Listener] = (),
        schedule: str | ScheduleConfig | Schedule = "constant",
        layout: str | Layout = "auto",
        checkpoint_every: int | None = None,
        **settings: Any,
    ) -> None:
        if isinstance(model, nn.Module):
            raise ConfigurationError(
                "model is a module that is built already; give a function that builds it, "
                f"for example model=lambda: {type(model).__name__}(...), so that it is built under the run's seed"
            )
        self._objects = Objects(model, loss, data, optimizer, validation, metrics, collate)
        self._callbacks = tuple(callbacks)
        self._probes: tuple[Listener, ...] = ()
        self._schedule = schedule if callable(schedule) else None
        if "validate" in settings:
            settings["validation"] = settings.pop("validate")
        if not callable(schedule):
            settings["schedule"] = {"name": schedule} if isinstance(schedule, str) else schedule
        if layout != "auto":
            settings["layout"] = layout
        if checkpoint_every is not None:
            settings["checkpoint"] = {**dict(settings.get("checkpoint", {})), "every": checkpoint_every}
        self.config = validate(TrainingConfig, settings, "Trainer")
        self.model: nn.Module | None = None
        self._stop = False

    @classmethod
    def from_config(cls, objects: Objects, config: TrainingConfig, callbacks: Sequence[Listener] = ()) -> "Trainer":
        """A trainer for a configuration that has been validated."""
        trainer = cls.__new__(cls)
        trainer._objects, trainer._callbacks, trainer._probes = objects, tuple(callbacks), ()
        trainer._schedule, trainer.config, trainer.model, trainer._stop = None, config, None, False
        return trainer

    def stop(self) -> None:
        """End training in good order after the step that is being computed; callable from a callback."""
        self._stop = True

    def probe(self, listener: Listener) -> None:
        """Hear the events of every phase, in every worker; tests inject faults with it."""
        self._probes = (*self._probes, listener)

    def fit(self, steps: int, resume: bool = False) -> Result:
        """Train until ``steps`` steps have been taken in all; afterwards ``model`` is an ordinary module.

        Arguments:
            steps: the run's length; a run that was stopped goes on to it when resumed.
            resume: go on from the newest intact checkpoint in ``run_dir``.
        """
        world = this_process()
        config = self._checked(world, steps, resume)
        self._stop = False
        keep_freed_memory()
        random_state = torch.random.fork_rng(devices=[])
        with random_state, _threads(config.threads), _interrupts(self.stop), _deterministic(config.device):
            loop = _Loop(self, world, config, steps, resume)
            try:
                return loop.run()
            finally:
                loop.close()

    def _checked(self, world: World, steps: int, resume: bool) -> TrainingConfig:
        config = self.config
        if steps < 1:
            raise ConfigurationError(f"steps is {steps}; give a whole number from 1")
        if world.size > config.micro_batches:
            raise ConfigurationError(more_workers_than_micro_batches(world.size, config.micro_batches))
        if config.layout.data is not None and config.layout.data != world.size:
            raise ConfigurationError(
                f"layout.data is {config.layout.data} but {world.size} worker{'s' * (world.size > 1)} "
                f"were started by {world.launcher}; start as many, for example unisono run -n {config.layout.data}"
            )
        if config.device.startswith("cuda") and world.size > 1:
            raise ConfigurationError(f"device {config.device} with {world.size} workers; use one worker, or device cpu")
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigurationError(f"device {config.device} is not there; use device cpu")
        if config.run_dir is None and (resume or config.checkpoint.every is not None):
            raise ConfigurationError("checkpoints and resume need a place: give run_dir")
        return config


class _Loop:
    """One call of `Trainer.fit` in one worker."""

    def __init__(self, trainer: Trainer, world: World, config: TrainingConfig, steps: int, resume: bool) -> None:
        self._trainer = trainer
        self._world = world
        self._config = config
        self._steps = steps
        self._emit = Emitter()
        self._run_dir = Path(config.run_dir) if config.run_dir is not None else None
        self._writer: CheckpointWriter | None = None
        self._wanted: int | None = None  # the step whose state is to be saved
        self._best_wanted: int | None = None
        self._best: float | None = None
        self._worse = 0
        self._metrics: dict[str, float] | None = None
        self._evaluated = -1
        self._loss: float | None = None
        self._notices: list[Event] = []
        self._recorded: dict[str, Any] | None = None
        self._observers = observers(config.observe, self._run_dir) if world.rank == 0 else []
        if world.rank == 0:
            listeners: list[Listener] = [*self._observers, *trainer._callbacks]
            for listener in listeners:
                self._emit.add(listener)
            self._prepare_run_dir(resume)
        device = torch.device(config.device)
        self._fingerprint = asdict(fingerprint(config.threads, device))
        self._resume = resume
        probes = Emitter(trainer._probes) if trainer._probes else None
        plan = trainer._schedule or schedule(config.schedule, steps)
        self._worker, self._start = assemble(trainer._objects, config, world, device, plan, probes, self._restore)
        trainer.model = self._worker.prepared.model

    def run(self) -> Result:
        """Train."""
        started = time.perf_counter()
        worker = self._worker
        self._announce()
        reason = "finished"
        step = self._start
        for step in range(self._start + 1, self._steps + 1):
            began = time.perf_counter()
            worker.group.set_flags(self._flags())
            outcome = worker.engine.step(step, check_purity=step == self._start + 1, last=step == self._steps)
            self._after_step(step, outcome, time.perf_counter() - began)
            every = self._config.validation.every
            if every is not None and step % every == 0 and self._validate(step):
                reason = "early stop"
                break
            if outcome.flags & STOP:
                reason = "stopped"
                break
        if worker.evaluator is not None and self._evaluated != step and reason == "finished":
            self._validate(step)
        return self._finish(step, reason, time.perf_counter() - started)

    def close(self) -> None:
        """Let go of everything, in whatever state."""
        if self._writer is not None and self._writer.busy:
            self._writer.finish()
        for observer in self._observers:
            observer.close()
        if hasattr(self, "_worker"):
            self._worker.release()
        self._world.release_arena()

    def _prepare_run_dir(self, resume: bool) -> None:
        if self._run_dir is None:
            return
        checkpoints = self._run_dir / DIRECTORY
        if not resume and steps_in(checkpoints):
            raise ConfigurationError(
                f"{self._run_dir} holds the checkpoints of a run (the last at step {steps_in(checkpoints)[0]}); "
                "resume it (--resume, or fit(resume=True)), or give another run_dir"
            )
        remove_leftovers(checkpoints)
        for name in ("config.yaml.tmp", "report.html.tmp"):
            (self._run_dir / name).unlink(missing_ok=True)
        retention = Retention(self._config.checkpoint.keep, self._config.checkpoint.keep_best)
        self._writer = CheckpointWriter(checkpoints, retention, self._emit)

    def _restore(self, prepared: Prepared, state: TrainingState) -> int:
        """On rank 0: load the newest intact checkpoint into the state, where that is wanted."""
        if not self._resume:
            return 0
        assert self._run_dir is not None
        path, manifest, tensors, damaged = newest_intact(self._run_dir / DIRECTORY)
        self._compare(prepared, manifest.run, manifest.fingerprint, path)
        for aside in damaged:
            set_aside(aside)
        state.load(tensors)
        best = manifest.best or {}
        self._best, self._worse = best.get("value"), int(best.get("worse", 0))
        if self._writer is not None:
            self._writer.best_step = best.get("step")
        self._notices.append(Resumed(manifest.step, str(path), list(damaged.values())))
        return manifest.step

    def _compare(self, prepared: Prepared, run: Mapping[str, Any], recorded: Mapping[str, Any], path: Path) -> None:
        mine = self._definition(prepared)
        for key in FIXED:
            if run.get(key) != mine[key]:
                raise ConfigurationError(
                    f"{key} is {mine[key]}, but the run in {path} has {run.get(key)}; it is part of what the run is: "
                    "resume with the same value, or start another run"
                )
        changed = [f"{key} was {run.get(key)}, is {mine[key]}" for key in mine if run.get(key) != mine[key]]
        changed += fingerprint(self._config.threads, torch.device(self._config.device)).differences(dict(recorded))
        if changed:
            text = "from here on the run is not the one that was started: " + "; ".join(changed)
            self._notices.append(Notice(text))

    def _definition(self, prepared: Prepared) -> dict[str, Any]:
        """What the run is, apart from its code: recorded, and compared when it is resumed."""
        if self._recorded is None:
            settings = self._config.model_dump(mode="json")
            facts = self._trainer._objects.definition
            self._recorded = {key: settings[key] for key in RUN_KEYS} | {
                "samples": size_of(self._trainer._objects.data, "training"),
                "task": dict(facts()) if facts else {},
                "optimizer": described(prepared.optimizer),
            }
            if self._config.schedule.name != "constant":
                self._recorded["schedule_steps"] = self._config.schedule.decay_steps or self._steps
        return self._recorded

    def _announce(self) -> None:
        prepared = self._worker.prepared
        state = torch.tensor([self._best if self._best is not None else float("nan"), self._worse], dtype=torch.float64)
        shared = self._worker.group.all_gather(state.numpy().tobytes(), "start")[0]
        best, worse = torch.frombuffer(bytearray(shared), dtype=torch.float64).tolist()
        self._best, self._worse = (None if best != best else best), int(worse)
        parameters = sum(spec.tensor.numel for spec in prepared.layout.flat.parameters)
        run_dir = str(self._run_dir) if self._run_dir else None
        self._emit(RunStarted(self._start, self._steps, self._world.size, parameters, run_dir))
        for notice in self._notices:
            self._emit(notice)
        if prepared.update is UpdateClass.COUPLED and self._world.size > 1:
            name = type(prepared.optimizer).__name__
            self._emit(Notice(f"optimizer {name} is of no known class, so rank 0 updates everything; see update_class"))
        if in_notebook():
            self._emit(
                Notice("a notebook runs one worker; for more, move the code to a script: unisono run -n 2 script.py")
            )

    def _flags(self) -> int:
        """What this worker asks for with the step that begins."""
        flags = STOP if self._trainer._stop else 0
        if self._writer is not None:
            self._writer.poll()
            if self._wanted is not None and self._wanted == self._best_wanted:
                self._writer.finish()  # the best state is this one, and no later one
            if self._wanted is not None and not self._writer.busy:
                flags |= SNAPSHOT
        return flags

    def _after_step(self, step: int, outcome: Outcome, seconds: float) -> None:
        self._loss = outcome.loss
        if self._world.rank != 0:
            return
        if outcome.flags & SNAPSHOT:
            self._save(step - 1, self._worker.snapshot)
        tokens = self._trainer._objects.tokens_per_sample
        reports = [dict(zip(PHASES, row, strict=True)) for row in self._worker.group.reports(step)]
        self._emit(
            StepFinished(
                step=step,
                loss=outcome.loss,
                weight=outcome.weight,
                samples=self._config.global_batch_size,
                tokens=None if tokens is None else tokens * self._config.global_batch_size,
                learning_rate=outcome.learning_rate,
                gradient_norm=outcome.gradient_norm,
                seconds=seconds,
                phases=reports,
            )
        )
        if outcome.weight == 0:
            self._emit(Notice(f"step {step} had no weight, so nothing was updated"))
        every = self._config.checkpoint.every
        if every is not None and step % every == 0:
            self._wanted = step

    def _validate(self, step: int) -> bool:
        """Evaluate; True where training should end because nothing gets better."""
        evaluator = self._worker.evaluator
        if evaluator is None:
            return False
        began = time.perf_counter()
        metrics = evaluator.evaluate(step)
        settings = self._config.validation
        if settings.metric not in metrics:
            raise ConfigurationError(
                f"validation.metric is {settings.metric!r}; the task has {', '.join(sorted(metrics))}"
            )
        value = metrics[settings.metric]
        better = self._best is None or (value < self._best if settings.mode == "min" else value > self._best)
        self._best, self._worse = (value, 0) if better else (self._best, self._worse + 1)
        self._metrics, self._evaluated = metrics, step
        if better and self._writer is not None and self._config.checkpoint.keep_best:
            self._best_wanted = step
            if self._config.checkpoint.every is not None:
                self._wanted = step
        self._emit(ValidationFinished(step, metrics, evaluator.samples, time.perf_counter() - began, better))
        return settings.patience is not None and self._worse >= settings.patience

    def _save(self, step: int, state: TrainingState) -> None:
        assert self._writer is not None
        if step == self._best_wanted:
            self._writer.best_step = step
        best = None
        if self._best is not None:
            best = {"value": self._best, "worse": self._worse, "step": self._writer.best_step}
        about = Description(
            **describe(self._worker.prepared, self._definition(self._worker.prepared), self._fingerprint)
        )
        about = replace(about, validation=self._metrics if self._evaluated == step else None, best=best)
        self._writer.begin(step, state, about)
        if self._wanted is not None and step >= self._wanted:
            self._wanted = None

    def _finish(self, step: int, reason: str, seconds: float) -> Result:
        worker = self._worker
        digest = self._digest(step)
        if self._writer is not None:
            self._writer.finish()
            saved = step in steps_in(self._writer.directory)
            if (self._config.checkpoint.at_end or self._wanted is not None) and not saved and step > 0:
                self._save(step, worker.state)
                self._writer.finish()
        run_dir = str(self._run_dir) if self._run_dir else None
        worker.release()
        summary = self._trainer._objects.summary
        if summary is not None and self._world.rank == 0 and self._observers and reason != "stopped":
            self._emit(Summary(dict(summary(worker.prepared.model))))
        self._emit(RunFinished(step, reason, digest, seconds))
        return Result(step, reason, digest, self._loss, self._metrics, run_dir)

    def _digest(self, step: int) -> str:
        """The digest of the state, from rank 0; replicas must agree."""
        worker = self._worker
        replicated = worker.prepared.host.replicas > 1
        mine = worker.state.digest(step) if replicated or self._world.rank == 0 else ""
        digests = [payload.decode() for payload in worker.group.all_gather(mine.encode(), "digest")]
        if replicated and len(set(digests)) > 1:
            raise CheckpointError(f"replicas differ after step {step}: {digests}; this is a defect of Unisono")
        return digests[0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Pin intra-op threads, whose number changes a result's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _deterministic(device: str) -> Iterator[None]:
    """On CUDA, kernels that give the same bits every time."""
    if device == "cpu":
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def _interrupts(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C (or SIGTERM) stop training in good order; the second acts as ever."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def request(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop()

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


__all__ = ["Result", "Trainer"]
