"""When the training state is saved, and what is said of it: decided alike by all workers, done by the chief."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from unisono.assembly import Worker
from unisono.comm.group import SNAPSHOT
from unisono.config import TrainingConfig
from unisono.errors import CheckpointError
from unisono.events import Notice
from unisono.preparation import describe
from unisono.records import Records
from unisono.state.checkpoint import Description, steps_in
from unisono.state.interval import best_interval_s
from unisono.state.shared import streamed
from unisono.state.training_state import TrainingState
from unisono.state.writer import CheckpointWriter

FIRST_RETRY_S, LONGEST_RETRY_S = 5.0, 300.0
LAST_TRIES = 3
FIRST_AUTO_S = 30.0
"""Until the first checkpoint where their interval is chosen: what one takes is not known before."""


class Saving:
    """The checkpoints of one run, as one worker sees them.

    Arguments:
        config: the run's.
        records: where the writer is, on the chief.
        worker: whose state is saved.
        definition, fingerprint: what is recorded with each.
        clock: seconds, monotonic.

    Attributes:
        possible: whether the chief writes any.
        best, worse: the best value of the deciding metric so far, and the evaluations since.
        best_steps: the steps that were the best of their time, in order.
        metrics, evaluated: of the last evaluation, and its step.
    """

    def __init__(
        self,
        config: TrainingConfig,
        records: Records,
        worker: Worker,
        definition: Callable[[], dict[str, Any]],
        fingerprint: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config = config
        self._records = records
        self._worker = worker
        self._definition = definition
        self._fingerprint = fingerprint
        self._clock = clock
        self._wanted: int | None = None  # the step whose state is to be saved
        self._begun: int | None = None  # the last that was begun
        self._saved_at, self._saved_step = clock(), 0
        self._failures = 0  # one after another
        self._failure: CheckpointError | None = None
        self._retry_at, self._retry_s = 0.0, FIRST_RETRY_S
        self._compression: tuple[int, Mapping[str, Tensor]] = (-1, {})
        self.possible = False
        self.best: float | None = None
        self.worse = 0
        self.best_steps: list[int] = []
        self.metrics: dict[str, float] | None = None
        self.evaluated = -1

    def as_bytes(self) -> bytes:
        """What a worker that joins must know."""
        known = ("possible", "best", "worse", "best_steps", "metrics", "evaluated", "run_dir")
        return json.dumps({name: getattr(self, name) for name in known}).encode()

    def take(self, data: bytes) -> None:
        """Know what the others know."""
        for name, value in json.loads(data).items():
            setattr(self, name, value)

    @property
    def run_dir(self) -> str | None:
        """Where records go, as all hosts find it."""
        run_dir = self._records.run_dir
        return str(run_dir.absolute()) if run_dir is not None else None

    @run_dir.setter
    def run_dir(self, value: str | None) -> None:
        if not self._records.kept_here:
            self._records.run_dir = Path(value) if value is not None else None

    @property
    def _writer(self) -> CheckpointWriter | None:
        return self._records.writer

    @property
    def _shares_state(self) -> bool:
        """Whether hosts share one state."""
        return self._worker.prepared.shards is not None

    @property
    def _saves_at_once(self) -> bool:
        """A device's snapshot shares words with the live state; the memory of compression has no snapshot."""
        return not self._worker.state.holds_words or bool(self._compression[1])

    def may_be_saved(self, step: int) -> bool:
        """Whether a checkpoint of this step can be wanted; the same on all hosts."""
        every = (self._config.checkpoint.every, self._config.validation.every)
        if not self.possible or every[0] in (None, "auto"):  # auto is for what the chief saves alone
            return False
        return any(isinstance(n, int) and step % n == 0 for n in every)

    def take_over(self, step: int) -> None:
        """This worker is the chief from now on: what the last one did not finish is wanted again."""
        if self._writer is None:
            return
        saved, every = steps_in(self._writer.directory), self._config.checkpoint.every
        self._writer.best_step = next((s for s in reversed(self.best_steps) if s in saved), None)
        self._saved_at, self._saved_step = self._clock(), step
        due = step - step % every if isinstance(every, int) else 0
        if due and (not saved or saved[0] < due):
            self._wanted = due

    def keep_compression(self, step: int) -> None:
        """The memory of compression as of this step, on rank 0: the state's own copy is made in the next."""
        if self._worker.group.owners.rank == 0:
            self._compression = (step, self._worker.group.gather_compression())

    def flags(self, step: int) -> int:
        """What the chief asks for with ``step``, which begins."""
        writer = self._writer
        if writer is None:
            return 0
        self._poll()
        if self._wanted is not None and self.best_steps and self._wanted == self.best_steps[-1]:
            self._await_writer()  # the best state is this one, and no later one
        if self._shares_state or self._wanted is None or self._clock() < self._retry_at:
            return 0
        if self._saves_at_once:
            self._save(writer, step - 1, self._worker.state)
            self._await_writer()
            return 0
        return 0 if writer.busy else SNAPSHOT

    def after_step(self, step: int, flags: int) -> None:
        """The step is committed."""
        if self._writer is not None and flags & SNAPSHOT:
            self._save(self._writer, step - 1, self._worker.snapshot)
        if self._records.kept_here and self._is_due(step):
            self._wanted, self._saved_at, self._saved_step = step, self._clock(), step

    def _is_due(self, step: int) -> bool:
        """Whether the state after a step is to be saved for its own sake."""
        every = self._config.checkpoint.every
        if every != "auto" or self._writer is None:
            return isinstance(every, int) and step % every == 0
        cost_s = self._writer.last_s
        interval_s = best_interval_s(cost_s, 3600 * self._config.checkpoint.mtbf_h) if cost_s else FIRST_AUTO_S
        return step > self._saved_step and self._clock() - self._saved_at >= interval_s

    def evaluated_at(self, step: int, metrics: dict[str, float]) -> bool:
        """Take note of an evaluation; whether it is the best so far."""
        settings = self._config.validation
        value = metrics[settings.metric]
        number = value == value  # what is not a number is never better, and never the best
        better = number and (self.best is None or (value < self.best if settings.mode == "min" else value > self.best))
        self.best, self.worse = (value, 0) if better else (self.best, self.worse + 1)
        self.metrics, self.evaluated = metrics, step
        if better and self.possible and self._config.checkpoint.keep_best:
            self.best_steps.append(step)
            if self._writer is not None and self._config.checkpoint.every is not None:
                self._wanted = step
        return better

    def save_together(self, step: int, *, at_end: bool = False) -> None:
        """Where hosts share a state: all, each with what it keeps, write a checkpoint, if the chief wants one."""
        worker = self._worker
        wanted = self._wanted is not None or (at_end and self._wanted_at_end(step))
        answer = worker.group.all_gather(b"yes" if wanted else b"", f"checkpoint of step {step}")[0]
        if not answer:
            return
        tensors = streamed(worker.shared, worker.group.owners, f"checkpoint of step {step}")
        if self._writer is not None:
            try:
                self._writer.write(step, tensors, self._about(step, self._writer))
                self._is_saved(step)
            except CheckpointError as error:
                self._has_failed(error)
        for _ in tensors:  # to which this host gives its part
            pass

    def at_end(self, step: int, take_over: Callable[[], None]) -> None:
        """Training is over: its state is saved, unless that has been done; all wait for the chief.

        Arguments:
            take_over: makes the next worker the chief, where the chief is lost.

        Raises:
            CheckpointError: on the chief, where it cannot be written.
        """
        group = self._worker.group
        if self.possible and self._compression[0] != step:
            self.keep_compression(step)
        if self._shares_state:
            self._await_writer()
            if self.possible:
                self.save_together(step, at_end=True)
            return
        self._failures = 0
        while True:
            word = (b"over" if self._write_last(step) else b"busy") if self._records.kept_here else b""
            said = group.all_gather(word, f"last checkpoint, of step {step}")
            if b"over" in said:
                break
            if b"busy" not in said:
                take_over()
        if self._failures >= LAST_TRIES and self._failure is not None:
            raise self._failure

    def _write_last(self, step: int) -> bool:
        """Go on with the last checkpoint for a while; whether it is over, in whatever way."""
        writer = self._writer
        if writer is None:
            return True
        writer.wait(self._worker.group.deadline_s / 4)
        self._poll()
        if writer.busy:
            return False
        if not self._wanted_at_end(step) or self._failures >= LAST_TRIES:
            return True
        self._save(writer, step, self._worker.state)
        return False

    def _wanted_at_end(self, step: int) -> bool:
        """Whether the last state is to be saved, and is not."""
        writer = self._writer
        if writer is None or step == 0 or step in steps_in(writer.directory):
            return False
        return self._config.checkpoint.at_end or self._wanted is not None

    def _save(self, writer: CheckpointWriter, step: int, state: TrainingState) -> None:
        kept_of, kept = self._compression
        writer.begin(step, state, self._about(step, writer), kept if kept_of == step else None)
        self._is_saved(step)

    def _poll(self) -> None:
        """Hear what has become of the checkpoint that was being written."""
        if self._writer is not None and not self._writer.busy:
            self._await_writer()

    def _await_writer(self) -> None:
        """Let the checkpoint be finished that is being written."""
        writer = self._writer
        if writer is None:
            return
        while writer.busy:  # and say now and then that this worker is alive
            self._worker.group.enter("checkpoint", self._begun or 0)
            writer.wait(min(1.0, self._worker.group.deadline_s / 4))
        try:
            if writer.finish():
                self._failures, self._retry_s = 0, FIRST_RETRY_S
        except CheckpointError as error:
            self._has_failed(error)

    def _has_failed(self, error: CheckpointError) -> None:
        """Training goes on, and a later state is saved."""
        self._failures, self._failure = self._failures + 1, error
        self._wanted = self._begun
        self._retry_at = self._clock() + self._retry_s
        self._records(Notice(f"NO CHECKPOINT was saved: {error}; the next try is in {self._retry_s:g} s"))
        self._retry_s = min(2 * self._retry_s, LONGEST_RETRY_S)

    def _about(self, step: int, writer: CheckpointWriter) -> Description:
        """What a checkpoint says besides the state."""
        if step in self.best_steps[-1:]:
            writer.best_step = step
        best = None
        if self.best is not None:
            best = {"value": self.best, "worse": self.worse, "step": writer.best_step}
        about = Description(**describe(self._worker.prepared, self._definition(), self._fingerprint))
        return replace(about, validation=self.metrics if self.evaluated == step else None, best=best)

    def _is_saved(self, step: int) -> None:
        self._begun = step
        if self._wanted is not None and step >= self._wanted:
            self._wanted = None
