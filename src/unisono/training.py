"""The course of a run in one worker: steps, evaluation, checkpoints, and what is told of them."""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from unisono.assembly import Worker, assemble
from unisono.comm.group import SNAPSHOT, STOP
from unisono.comm.wire_state import PREFIX
from unisono.config import TrainingConfig, to_yaml
from unisono.definition import definition, differences
from unisono.errors import CheckpointError, ConfigurationError
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
from unisono.filling import Load, Restored
from unisono.launch.membership import device_of
from unisono.launch.runs import lock, write_config
from unisono.launch.world import World, in_notebook
from unisono.observe.choose import observers
from unisono.optim.schedules import Schedule, schedule
from unisono.plan.assignment import UpdateClass
from unisono.preparation import Objects, Prepared, describe
from unisono.run.digest import digest
from unisono.run.fingerprint import fingerprint
from unisono.state.checkpoint import (
    DIRECTORY,
    Description,
    newest_intact,
    remove_leftovers,
    set_aside,
    steps_in,
    stream,
)
from unisono.state.shared import streamed
from unisono.state.training_state import TrainingState
from unisono.state.writer import CheckpointWriter, Retention
from unisono.sync.policy import Outcome


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


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be trained.

    Attributes:
        objects, config: the user's.
        steps: the run's length, in all.
        resume: go on from the newest intact checkpoint.
        callbacks: hear every event, on rank 0.
        probes: hear the events of every phase, in every worker.
        schedule: in place of the configured one, where given.
        stopping: whether this worker was asked to stop.
    """

    objects: Objects
    config: TrainingConfig
    steps: int
    resume: bool
    callbacks: Sequence[Listener]
    probes: Sequence[Listener]
    schedule: Schedule | None
    stopping: Callable[[], bool]


class Training:
    """One call of `Trainer.fit` in one worker."""

    def __init__(self, job: Job, world: World) -> None:
        self._job = job
        self._world = world
        self._config = config = job.config
        self._steps = job.steps
        self._emit = Emitter()
        self._observed = False
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
        self._saves = False  # whether rank 0 writes checkpoints
        self._compression: tuple[int, Mapping[str, Tensor]] = (-1, {})
        self._recorded: dict[str, Any] | None = None
        self._device = device_of(config, world)
        self._fingerprint = asdict(fingerprint(config.threads, self._device))
        self._worker: Worker | None = None
        self._open = ExitStack()  # what is to be let go of, the last first
        self._open.callback(world.release_arena)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Take the run's directory, attach observers, and put the worker together."""
        job, device = self._job, self._device
        if self._world.rank == 0:
            self._prepare_run_dir(job.resume)
            chosen = observers(self._config.observe, self._run_dir)
            for observer in reversed(chosen):
                self._open.callback(observer.close)
            self._observed = bool(chosen)
            listeners: list[Listener] = [*chosen, *job.callbacks]
            for listener in listeners:
                self._emit.add(listener)
        probes = Emitter(job.probes) if job.probes else None
        plan = job.schedule or schedule(self._config.schedule, job.steps)
        self._worker, self._start = assemble(
            job.objects, self._config, self._world, device, plan, probes, self._restore
        )
        if self._writer is not None:
            self._open.callback(self._writer.finish)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._assembled.prepared.model

    @property
    def _assembled(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def run(self) -> Result:
        """Train."""
        started = time.perf_counter()
        worker = self._assembled
        self._announce()
        if worker.evaluator is not None and (worker.group.rank == 0 or worker.replica.divides_values):
            worker.evaluator.rehearse(self._config.validation.metric)
        reason = "finished"
        step = self._start
        for step in range(self._start + 1, self._steps + 1):
            began = time.perf_counter()
            worker.group.set_flags(self._flags(step))
            outcome = worker.engine.step(step, check_purity=step == self._start + 1, last=step == self._steps)
            if worker.offload is not None:
                worker.offload.page_out()
            if self._may_be_saved(step):
                self._keep_compression(step)
            self._after_step(step, outcome, time.perf_counter() - began)
            every = self._config.validation.every
            no_better = every is not None and step % every == 0 and self._validate(step)
            if self._shares_state and self._may_be_saved(step):
                self._save_together(step, wanted=self._wanted is not None)
            if no_better:
                reason = "early stop"
                break
            if outcome.flags & STOP:
                reason = "stopped"
                break
        if worker.evaluator is not None and self._evaluated != step and reason == "finished":
            self._validate(step)
        return self._finish(step, reason, time.perf_counter() - started)

    def close(self) -> None:
        """Let go of everything, in whatever state; an exception that passes is told to the others."""
        if self._worker is not None:
            self._worker.release(sys.exception())
        self._open.close()

    def _prepare_run_dir(self, resume: bool) -> None:
        if self._run_dir is None:
            return
        checkpoints = self._run_dir / DIRECTORY
        if not resume and steps_in(checkpoints):
            raise ConfigurationError(
                f"{self._run_dir} holds the checkpoints of a run (the last at step {steps_in(checkpoints)[0]}); "
                "resume it (--resume, or fit(resume=True)), or give another run_dir"
            )
        self._open.callback(os.close, lock(self._run_dir))
        remove_leftovers(checkpoints)
        for name in ("config.yaml.tmp", "report.html.tmp"):
            (self._run_dir / name).unlink(missing_ok=True)
        write_config(self._run_dir, to_yaml(self._config))
        retention = Retention(self._config.checkpoint.keep, self._config.checkpoint.keep_best)
        self._writer = CheckpointWriter(checkpoints, retention, self._emit)

    def _restore(self, prepared: Prepared, load: Load) -> Restored:
        """On rank 0: load the newest intact checkpoint, where that is wanted."""
        if not self._job.resume:
            return Restored()
        assert self._run_dir is not None
        path, manifest, damaged = newest_intact(self._run_dir / DIRECTORY)
        changed = differences(self._definition(prepared), manifest.run, path)
        changed += fingerprint(self._config.threads, self._device).differences(manifest.fingerprint)
        if changed:
            text = "from here on the run is not the one that was started: " + "; ".join(changed)
            self._notices.append(Notice(text))
        for aside in damaged:
            set_aside(aside)
        compression: dict[str, Tensor] = {}
        load(manifest.tensors, _aside(stream(path), compression))
        best = manifest.best or {}
        self._best, self._worse = best.get("value"), int(best.get("worse", 0))
        if self._writer is not None:
            self._writer.best_step = best.get("step")
        self._notices.append(Resumed(manifest.step, str(path), list(damaged.values())))
        return Restored(manifest.step, compression)

    def _definition(self, prepared: Prepared) -> dict[str, Any]:
        if self._recorded is None:
            self._recorded = definition(self._job.objects, self._config, self._steps, prepared)
        return self._recorded

    def _announce(self) -> None:
        prepared = self._assembled.prepared
        best = self._best if self._best is not None else float("nan")
        state = torch.tensor([best, self._worse, self._run_dir is not None], dtype=torch.float64)
        shared = self._assembled.group.all_gather(state.numpy().tobytes(), "start")[0]
        best, worse, saves = torch.frombuffer(bytearray(shared), dtype=torch.float64).tolist()
        self._best, self._worse, self._saves = (None if best != best else best), int(worse), bool(saves)
        parameters = sum(spec.tensor.numel for spec in prepared.layout.flat.parameters)
        run_dir = str(self._run_dir) if self._run_dir else None
        self._emit(RunStarted(self._start, self._steps, self._world.size, parameters, run_dir))
        for notice in self._notices:
            self._emit(notice)
        if self._start >= self._steps:
            self._emit(Notice(f"the run is at step {self._start} already; ask for more than that to train on"))
        if prepared.update is UpdateClass.COUPLED and self._world.size > 1:
            name = type(prepared.optimizer).__name__
            self._emit(Notice(f"optimizer {name} is of no known class, so rank 0 updates everything; see update_class"))
        if self._inexact:
            self._emit(Notice(f"not exact: {self._inexact}"))
        if in_notebook():
            self._emit(
                Notice("a notebook runs one worker; for more, move the code to a script: unisono run -n 2 script.py")
            )

    def _may_be_saved(self, step: int) -> bool:
        """Whether a checkpoint of this step can be wanted; the same on all hosts."""
        every = (self._config.checkpoint.every, self._config.validation.every)
        return self._saves and every[0] is not None and any(n and step % n == 0 for n in every)

    def _keep_compression(self, step: int) -> None:
        """The memory of compression as of this step, on rank 0: the state's own copy is made in the next."""
        if self._assembled.group.owners.rank == 0:
            self._compression = (step, self._assembled.group.gather_compression())

    def _flags(self, step: int) -> int:
        """What this worker asks for with ``step``, which begins."""
        flags = STOP if self._job.stopping() else 0
        if self._writer is not None:
            self._writer.poll()
            if self._wanted is not None and self._wanted == self._best_wanted:
                self._writer.finish()  # the best state is this one, and no later one
            if self._shares_state:
                return flags
            if self._wanted is not None and self._saves_at_once:
                self._save(step - 1, self._assembled.state)
                self._writer.finish()
            if self._wanted is not None and not self._writer.busy:
                flags |= SNAPSHOT
        return flags

    @property
    def _saves_at_once(self) -> bool:
        """A device's snapshot shares words with the live state; the memory of compression has no snapshot."""
        return self._device.type != "cpu" or bool(self._compression[1])

    def _after_step(self, step: int, outcome: Outcome, seconds: float) -> None:
        self._loss = outcome.loss
        if self._world.rank != 0:
            return
        if outcome.flags & SNAPSHOT:
            self._save(step - 1, self._assembled.snapshot)
        tokens = self._job.objects.tokens_per_sample
        reports = [dict(zip(PHASES, row, strict=True)) for row in self._assembled.group.reports(step)]
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
                wire=self._assembled.group.wire_use,
            )
        )
        if outcome.weight == 0:
            self._emit(Notice(f"step {step} had no weight, so nothing was updated"))
        every = self._config.checkpoint.every
        if every is not None and step % every == 0:
            self._wanted = step

    def _validate(self, step: int) -> bool:
        """Evaluate; True where training should end because nothing gets better."""
        evaluator = self._assembled.evaluator
        if evaluator is None:
            return False
        began = time.perf_counter()
        metrics = evaluator.evaluate(step)
        settings = self._config.validation
        value = metrics[settings.metric]
        number = value == value  # what is not a number is never better, and never the best
        better = number and (
            self._best is None or (value < self._best if settings.mode == "min" else value > self._best)
        )
        self._best, self._worse = (value, 0) if better else (self._best, self._worse + 1)
        self._metrics, self._evaluated = metrics, step
        if better and self._writer is not None and self._config.checkpoint.keep_best:
            self._best_wanted = step
            if self._config.checkpoint.every is not None:
                self._wanted = step
        self._emit(ValidationFinished(step, metrics, evaluator.samples, time.perf_counter() - began, better))
        return settings.patience is not None and self._worse >= settings.patience

    @property
    def _shares_state(self) -> bool:
        """Whether hosts share one state."""
        return self._assembled.prepared.shards is not None

    def _save(self, step: int, state: TrainingState) -> None:
        assert self._writer is not None
        kept_of, kept = self._compression
        self._writer.begin(step, state, self._about(step, self._writer), kept if kept_of == step else None)
        self._is_saved(step)

    def _save_together(self, step: int, *, wanted: bool) -> None:
        """All hosts, each with what it keeps, write a checkpoint, if rank 0 wants one."""
        worker = self._assembled
        answer = worker.group.all_gather(b"yes" if wanted else b"", f"checkpoint of step {step}")[0]
        if not answer:
            return
        tensors = streamed(worker.shared, worker.group.owners, f"checkpoint of step {step}")
        if self._writer is not None:
            self._writer.write(step, tensors, self._about(step, self._writer))
            self._is_saved(step)
        for _ in tensors:  # to which this host gives its part
            pass

    def _about(self, step: int, writer: CheckpointWriter) -> Description:
        """What a checkpoint says besides the state."""
        if step == self._best_wanted:
            writer.best_step = step
        best = None
        if self._best is not None:
            best = {"value": self._best, "worse": self._worse, "step": writer.best_step}
        about = Description(
            **describe(self._assembled.prepared, self._definition(self._assembled.prepared), self._fingerprint)
        )
        return replace(about, validation=self._metrics if self._evaluated == step else None, best=best)

    def _is_saved(self, step: int) -> None:
        if self._wanted is not None and step >= self._wanted:
            self._wanted = None

    def _finish(self, step: int, reason: str, seconds: float) -> Result:
        worker = self._assembled
        digest = self._digest(step)
        if self._saves and self._compression[0] != step:
            self._keep_compression(step)
        wanted = False
        if self._writer is not None:
            self._writer.finish()
            saved = step in steps_in(self._writer.directory)
            wanted = (self._config.checkpoint.at_end or self._wanted is not None) and not saved and step > 0
        if self._shares_state and self._saves:
            self._save_together(step, wanted=wanted)
        elif wanted and self._writer is not None:
            self._save(step, worker.state)
            self._writer.finish()
        run_dir = str(self._run_dir) if self._run_dir else None
        worker.release()
        summary = self._job.objects.summary
        shards = worker.prepared.shards
        elsewhere = shards is not None and shards.values and not worker.prepared.copies
        if elsewhere:
            self._emit(Notice("every host keeps a part of the model; unisono checkpoint export writes the whole"))
        shown = self._world.rank == 0 and self._observed and reason != "stopped" and not elsewhere
        if summary is not None and shown:
            self._emit(Summary(dict(summary(worker.prepared.model))))
        self._emit(RunFinished(step, reason, digest, seconds))
        return Result(step, reason, digest, self._loss, self._metrics, run_dir)

    def _digest(self, step: int) -> str:
        """The digest of the state, from rank 0; replicas must agree."""
        worker = self._assembled
        replicated = worker.prepared.host.replicas > 1
        mine = ""
        if self._shares_state:
            tensors = streamed(worker.shared, worker.group.owners, f"digest of step {step}")
            mine = digest(step, tensors) if worker.group.rank == 0 else ""
            for _ in tensors:  # to which this host gives its part; to read the rest would take memory for it
                pass
        elif replicated or worker.group.owners.rank == 0:
            mine = worker.state.digest(step)
        digests = [payload.decode() for payload in worker.group.all_gather(mine.encode(), "digest") if payload]
        if len(set(digests)) > 1:
            raise CheckpointError(f"replicas differ after step {step}: {digests}; this is a defect of Unisono")
        return f"not exact ({self._inexact}): {digests[0]}" if self._inexact else digests[0]

    @property
    def _inexact(self) -> str | None:
        """Why the result depends on the number of hosts; None where it does not."""
        group = self._assembled.group
        wire = self._config.wire.inexact if group.size > group.owners.size else None
        return "; ".join(filter(None, (wire, group.unlike))) or None


def _aside(tensors: Iterable[tuple[str, Tensor]], compression: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, without the memory of compression, which is put aside."""
    for name, tensor in tensors:
        if name.startswith(PREFIX):
            compression[name] = tensor
        else:
            yield name, tensor
