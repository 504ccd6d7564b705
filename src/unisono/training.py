"""The course of a run in one worker: steps, evaluation, checkpoints, and what is told of them."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from torch import Tensor, nn

from unisono.assembly import Worker, assemble
from unisono.comm.group import KEEP, LEAVE, SNAPSHOT, STOP
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.wire_state import PREFIX
from unisono.config import TrainingConfig
from unisono.definition import definition, differences
from unisono.errors import CheckpointError, Regrouped, RunOver
from unisono.events import (
    PHASES,
    Emitter,
    Event,
    HostsChanged,
    Listener,
    Notice,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    StepFinished,
    Summary,
    ValidationFinished,
)
from unisono.fault.slowness import Slowness
from unisono.filling import Load, Restored
from unisono.launch.membership import device_of
from unisono.launch.world import World, in_notebook
from unisono.optim.schedules import Schedule, schedule
from unisono.plan.assignment import UpdateClass
from unisono.preparation import Objects, Prepared
from unisono.records import Records
from unisono.run.digest import digest
from unisono.run.fingerprint import fingerprint
from unisono.saving import Saving
from unisono.state.checkpoint import DIRECTORY, newest_intact, set_aside, stream
from unisono.state.shared import streamed
from unisono.sync.local import told_of
from unisono.sync.policy import Outcome

LOOK_EVERY = 8
"""Steps from one look for slow workers to the next."""
STOPPED = "stopped"
"""Why a run ends that was asked to."""


@dataclass(frozen=True, slots=True)
class Result:
    """How a run ended.

    Attributes:
        step: steps that were trained in all.
        reason: "finished", "stopped" (asked to), "early stop" (validation did not improve), or, for a worker that left
            while the others went on, "left".
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
        if world.run_dir is not None and config.run_dir is not None:
            self._config = config = config.model_copy(update={"run_dir": world.run_dir})
        self._steps = job.steps
        self._records = Records(config, job.callbacks)
        self._loss: float | None = None
        self._outcome: Outcome | None = None
        self._slowness = Slowness()
        self._interrupted = False  # in the middle of an evaluation
        self._ends = ""  # why no step follows
        self._began = time.perf_counter()  # of a step
        self._notices: list[Event] = []
        self._recorded: dict[str, Any] | None = None
        self._resumed: Mapping[str, Any] = {}
        self._device = device_of(config, world)
        self._fingerprint = asdict(fingerprint(config.threads, self._device))
        self._worker: Worker | None = None
        self._over = False  # for all; this worker alone may end before
        self._open = ExitStack()  # what is to be let go of, the last first
        self._open.callback(self._release_arena)
        self._open.callback(self._records.close)
        try:
            self._begin()
        except BaseException:
            self.close()
            raise

    def _begin(self) -> None:
        """Take the run's directory, attach observers, and put the worker together."""
        job, device, world = self._job, self._device, self._world
        world.begin_training()
        if world.host == 0 and world.local_rank == min(world.present) and not world.joins:
            self._records.begin(resume=job.resume, again=world.rolled_back is not None)
        probes = Emitter(job.probes) if job.probes else None
        plan = job.schedule or schedule(self._config.schedule, job.steps)
        self._worker, self._start = assemble(
            job.objects, self._config, self._world, device, plan, probes, self._restore, job.stopping
        )
        several = isinstance(self._worker.group, HierarchicalGroup)  # where others wait for it, to end together
        if self._world.joins and self._start >= self._steps and not several:
            raise RunOver("training was over before this worker could take part")
        self._records.memos = self._worker.memos
        prepared = self._worker.prepared
        self._saving = Saving(
            self._config, self._records, self._worker, lambda: self._definition(prepared), self._fingerprint
        )
        group = self._worker.group
        if several and self._world.joins:
            self._saving.take(group.known())
        snapshots = self._worker.snapshots
        if snapshots is not None and snapshots.found is not None:
            done = max(world.rolled_back or 0, self._start)
            self._notices.append(RolledBack(self._start, done - self._start))
        if world.before and world.rolled_back is not None:
            self._notices.append(self._hosts_changed(world))
        if isinstance(group, HierarchicalGroup) and group.continuity is not None:
            group.continuity = replace(group.continuity, say=self._say, idle=self._records.let_go)

    def _hosts_changed(self, world: World) -> HostsChanged:
        now, before = set(world.hosts.numbers), set(world.before)
        joined, lost = sorted(now - before), sorted(before - now)
        hosts = world.hosts
        return HostsChanged(self._start + 1, world.generation, hosts.numbers, hosts.sizes, joined, lost)

    @property
    def model(self) -> nn.Module:
        """The model that is trained."""
        return self._assembled.prepared.trained

    @property
    def _assembled(self) -> Worker:
        assert self._worker is not None
        return self._worker

    def run(self) -> Result:
        """Train."""
        started = time.perf_counter()
        worker, saving = self._assembled, self._saving
        joins = self._world.joins
        if not joins:
            self._announce()
            if worker.evaluator is not None and (worker.group.chief or worker.replica.divides_values):
                worker.evaluator.rehearse(self._config.validation.metric)
        reason, step, change = "", self._start, worker.entered
        while True:
            try:
                if change is not None:
                    step, reason = self._catch_up(change)
                while not reason and step < self._steps:
                    step, reason = self._advance(step + 1)
                    if reason == "left":
                        return self._leave(step)
                reason = reason or "finished"
                if worker.evaluator is not None and saving.evaluated != step and reason == "finished":
                    self._validate(step)
                    reason = STOPPED if self._interrupted else reason
                return self._finish(step, reason, started)
            except Regrouped as ahead:
                change = ahead

    def _advance(self, step: int) -> tuple[int, str]:
        """Train a step, and what comes with it; the step that was done, and why training ends there, if it does.

        Raises:
            Regrouped: where other hosts are ahead, and their state is here.
        """
        worker, self._began = self._assembled, time.perf_counter()
        worker.group.set_flags(self._flags(step))
        first, joins = step == self._start + 1, self._world.joins
        outcome = worker.engine.step(step, check_purity=first and not joins, last=step == self._steps)
        if first and joins:
            self._saving.take(worker.group.known())
        return self._go_on(step, outcome)

    def _catch_up(self, change: Regrouped) -> tuple[int, str]:
        """Other hosts have done a step, and its state is here: as `_advance`."""
        self._take(change)
        if change.known["outcome"] is None:
            return change.step, ""
        outcome = Outcome(**change.known["outcome"])
        return self._go_on(change.step, replace(outcome, flags=outcome.flags & ~SNAPSHOT))  # none was made here

    def _take(self, change: Regrouped) -> None:
        """Know what other hosts know; that this one was interrupted counts where they have heard it."""
        self._saving.take(self._assembled.group.known())
        self._interrupted = change.known["ends"] == STOPPED

    def _go_on(self, step: int, outcome: Outcome) -> tuple[int, str]:
        """A step is committed: what comes with it, as `_advance`."""
        worker, saving = self._assembled, self._saving
        self._outcome = outcome
        if worker.offload is not None:
            worker.offload.page_out()
        if saving.may_be_saved(step):
            saving.keep_compression(step)
        self._after_step(step, outcome, time.perf_counter() - self._began)
        every = self._config.validation.every
        no_better = every is not None and step % every == 0 and self._validate(step)
        if worker.prepared.shards is not None and saving.may_be_saved(step):
            saving.save_together(step)
        ends = no_better or step == self._steps  # then nothing goes on from here
        if outcome.flags & KEEP and worker.snapshots is not None and not ends:
            worker.snapshots.take(step, saving.as_bytes())
        if no_better:
            return step, "early stop"
        if outcome.flags & STOP or self._interrupted:
            return step, STOPPED
        leaves = worker.group.leaves and step < self._steps  # at the last step all end together
        return step, "left" if leaves else ""

    def close(self) -> None:
        """Let go of everything, in whatever state; an exception that passes is told to the others."""
        if self._worker is not None:
            self._worker.release(sys.exception())
        self._open.close()

    def _release_arena(self) -> None:
        if self._over:
            self._world.release_arena()

    def _restore(self, prepared: Prepared, load: Load) -> Restored:
        """On rank 0: load the newest intact checkpoint, where that is wanted."""
        if not self._job.resume:
            return Restored()
        run_dir = self._records.run_dir
        assert run_dir is not None
        path, manifest, damaged = newest_intact(run_dir / DIRECTORY)
        changed = differences(self._definition(prepared), manifest.run, path)
        changed += fingerprint(self._config.threads, self._device).differences(manifest.fingerprint)
        if changed:
            text = "from here on the run is not the one that was started: " + "; ".join(changed)
            self._notices.append(Notice(text))
        for aside in damaged:
            set_aside(aside)
        compression: dict[str, Tensor] = {}
        load(manifest.tensors, _aside(stream(path), compression))
        self._resumed = manifest.best or {}
        if self._records.writer is not None:
            self._records.writer.best_step = self._resumed.get("step")
        self._notices.append(Resumed(manifest.step, str(path), list(damaged.values())))
        return Restored(manifest.step, compression)

    def _definition(self, prepared: Prepared) -> dict[str, Any]:
        if self._recorded is None:
            self._recorded = definition(self._job.objects, self._config, self._steps, prepared)
        return self._recorded

    def _announce(self) -> None:
        """All know what rank 0 has found, and the user is told."""
        prepared, saving, group = self._assembled.prepared, self._saving, self._assembled.group
        best = self._resumed
        saving.possible = self._records.run_dir is not None and self._records.kept_here
        saving.best, saving.worse = best.get("value"), int(best.get("worse", 0))
        saving.best_steps = [best["step"]] if best.get("step") is not None else []
        snapshots = self._assembled.snapshots
        if snapshots is not None and snapshots.found is not None:
            saving.take(snapshots.found.known)
            saving.take_over(self._start)
        saving.take(group.all_gather(saving.as_bytes(), "start")[0])
        self._leave_known()
        if snapshots is not None and snapshots.is_needed(len(prepared.place.hosts.sizes)):
            snapshots.take(self._start, saving.as_bytes())
        parameters = sum(spec.tensor.numel for spec in prepared.layout.flat.own if not spec.is_factor)
        run_dir = str(self._records.run_dir) if self._records.run_dir else None
        tell = self._records
        tell(RunStarted(self._start, self._steps, group.size, parameters, run_dir))
        for notice in self._notices:
            tell(notice)
        if self._start >= self._steps:
            tell(Notice(f"the run is at step {self._start} already; ask for more than that to train on"))
        if prepared.update is UpdateClass.COUPLED and group.size > 1:
            name = type(prepared.optimizer).__name__
            tell(Notice(f"optimizer {name} is of no known class, so rank 0 updates everything; see update_class"))
        if self._inexact:
            tell(Notice(f"not exact: {self._inexact}"))
        if prepared.stashing is not None:
            tell(Notice(str(prepared.stashing)))
        for text in told_of(self._config.sync, self._steps) if self._config.sync.apart else ():
            tell(Notice(text))
        if self._assembled.unprotected:
            tell(Notice(self._assembled.unprotected))
        if self._world.launcher == "torchrun":
            tell(Notice("torchrun ends all workers when one is lost; unisono run goes on without it"))
        if in_notebook():
            tell(Notice("a notebook runs one worker; for more, move the code to a script: unisono run -n 2 script.py"))

    def _say(self) -> dict[str, Any]:
        """What this host tells others when hosts are lost or come."""
        outcome = asdict(self._outcome) if self._outcome is not None else None
        known = {"evaluated": self._saving.evaluated, "chief": self._records.kept_here}
        return {**known, "outcome": outcome, "ends": self._ends}

    def _leave_known(self) -> None:
        """What a worker that joins must know."""
        self._assembled.group.leave_known(self._saving.as_bytes())

    def _flags(self, step: int) -> int:
        """What this worker asks for with ``step``, which begins."""
        flags = STOP if self._job.stopping() else 0
        if self._assembled.group.asked_to_leave:
            flags |= LEAVE
        snapshots = self._assembled.snapshots
        if snapshots is not None and self._assembled.group.chief and snapshots.is_due(step):
            flags |= KEEP
        return flags | self._saving.flags(step)

    def _after_step(self, step: int, outcome: Outcome, seconds: float) -> None:
        self._loss = outcome.loss
        group = self._assembled.group
        self._tell_news()
        self._agree_on_records(step)
        self._saving.after_step(step, outcome.flags)
        tokens = self._job.objects.tokens_per_sample
        reports = [dict(zip(PHASES, row, strict=True)) for row in group.reports(step)]
        self._records(
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
                wire=group.wire_use,
                staleness=outcome.staleness,
            )
        )
        if group.size > 1 and group.chief and step % LOOK_EVERY == 0:
            for sentence in self._slowness.look(dict(zip(group.members, reports, strict=False)), group.work()):
                self._records(Notice(f"step {step}: {sentence}"))
        if outcome.weight == 0:
            self._records(Notice(f"step {step} had no weight, so nothing was updated"))

    def _tell_news(self) -> None:
        for event in self._assembled.group.news():
            self._records(event)

    def _agree_on_records(self, step: int) -> None:
        """The chief keeps the records, and nobody else."""
        group = self._assembled.group
        if group.chief and not self._records.kept_here:
            self._become_chief(step)
        elif self._records.kept_here and not group.chief:
            self._records.let_go()

    def _become_chief(self, step: int) -> None:
        """The chief is lost, and this worker is the next."""
        self._world.take_output()
        self._records.take_over(step, self._steps, self._world.rank)
        self._saving.take_over(step)

    def _validate(self, step: int) -> bool:
        """Evaluate; True where training should end because nothing gets better.

        Raises:
            Regrouped: where other hosts are ahead, and their state is here.
        """
        evaluator = self._assembled.evaluator
        if evaluator is None:
            return False
        began = time.perf_counter()
        while self._saving.evaluated < step and not self._interrupted:
            try:
                metrics = evaluator.evaluate(step)
            except Regrouped as change:
                if change.step > step:
                    raise
                self._take(change)  # others may have done it
                self._agree_on_records(step)
                continue
            self._interrupted = metrics is None
            if metrics is not None:
                self._saving.evaluated_at(step, metrics)
        if self._interrupted:
            return False
        metrics, better = self._saving.metrics or {}, self._saving.worse == 0
        self._leave_known()
        self._records(ValidationFinished(step, metrics, evaluator.samples, time.perf_counter() - began, better))
        patience = self._config.validation.patience
        return patience is not None and self._saving.worse >= patience

    def _leave(self, step: int) -> Result:
        """The others go on without this worker."""
        self._assembled.group.enter("start", 0)
        self._assembled.release()
        return Result(step, "left", "", self._loss, self._saving.metrics, None)

    def _finish(self, step: int, reason: str, started: float) -> Result:
        """All agree on the state, and it is saved.

        Raises:
            Regrouped: where other hosts, which did not hear that training ends, are ahead.
        """
        worker, tell, self._ends = self._assembled, self._records, reason
        while True:
            try:
                self._agree_on_chief(step)
                digest = self._digest(step)
                self._saving.at_end(step, lambda: self._agree_on_chief(step))
                break
            except Regrouped as change:
                if change.step > step:
                    self._ends = ""
                    raise  # else all begin the end again
        self._tell_news()
        worker.group.end()
        self._over = True
        run_dir = str(tell.run_dir) if tell.run_dir else None
        worker.release()
        summary = self._job.objects.summary
        shards = worker.prepared.shards
        elsewhere = shards is not None and shards.values and not worker.prepared.copies
        if elsewhere:
            tell(Notice("every host keeps a part of the model; unisono checkpoint export writes the whole"))
        if summary is not None and tell.observed and reason != STOPPED and not elsewhere:
            tell(Summary(dict(summary(worker.prepared.trained))))
        tell(RunFinished(step, reason, digest, time.perf_counter() - started))
        return Result(step, reason, digest, self._loss, self._saving.metrics, run_dir)

    def _agree_on_chief(self, step: int) -> None:
        self._assembled.group.conclude()
        self._agree_on_records(step)

    def _digest(self, step: int) -> str:
        """The digest of the state, from the chief; replicas must agree."""
        worker = self._assembled
        while True:
            mine = self._own_digest(step)
            digests = [payload.decode() for payload in worker.group.all_gather(mine.encode(), "digest") if payload]
            if digests:
                break
            self._agree_on_chief(step)
        if len(set(digests)) > 1:
            raise CheckpointError(f"replicas differ after step {step}: {digests}; this is a defect of Unisono")
        return f"not exact ({self._inexact}): {digests[0]}" if self._inexact else digests[0]

    def _own_digest(self, step: int) -> str:
        """The digest of this worker's state, where it is to compute one; else nothing."""
        worker = self._assembled
        if worker.prepared.shards is not None:
            tensors = streamed(worker.shared, worker.group.owners, f"digest of step {step}")
            mine = digest(step, tensors) if worker.group.rank == 0 else ""
            for _ in tensors:  # to which this host gives its part; to read the rest would take memory for it
                pass
            return mine
        replicated, several = worker.prepared.host.replicas > 1, worker.group.size > worker.group.owners.size
        computes = replicated or worker.group.owners.chief or (several and worker.group.owners.rank == 0)
        return worker.state.digest(step) if computes else ""

    @property
    def _inexact(self) -> str | None:
        """Why the result depends on the number of hosts; None where it does not."""
        group = self._assembled.group
        wire = self._config.wire.inexact if group.size > group.owners.size else None
        return "; ".join(filter(None, (wire, group.unlike, self._config.sync.inexact))) or None


def _aside(tensors: Iterable[tuple[str, Tensor]], compression: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, without the memory of compression, which is put aside."""
    for name, tensor in tensors:
        if name.startswith(PREFIX):
            compression[name] = tensor
        else:
            yield name, tensor
