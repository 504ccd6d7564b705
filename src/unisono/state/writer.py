"""Writing checkpoints in the background, from a copy that does not change, while training goes on."""

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from unisono.errors import CheckpointError, UnisonoError
from unisono.events import CheckpointSaved
from unisono.state.checkpoint import Description, prune, save
from unisono.state.training_state import TrainingState

NICE = 10
"""Of the writing thread: a tenth of a core that training wants whole. At 19, too little of a busy one was left."""


@dataclass(frozen=True, slots=True)
class Retention:
    """Which checkpoints are kept: the newest ones, and the best one where that is wanted."""

    newest: int
    best: bool


class CheckpointWriter:
    """Writes one checkpoint at a time; belongs to one worker.

    Arguments:
        directory: where checkpoints lie.
        saved: told of each complete checkpoint, from the thread that trains.

    Attributes:
        best_step: the step of the best checkpoint, which is kept.
        last_s: seconds that the last one took to write.
    """

    def __init__(self, directory: Path, retention: Retention, saved: Callable[[CheckpointSaved], None]) -> None:
        self.directory = directory
        self._retention = retention
        self._saved = saved
        self._thread: threading.Thread | None = None
        self._outcome: CheckpointSaved | BaseException | None = None
        self.best_step: int | None = None
        self.last_s = 0.0

    @property
    def busy(self) -> bool:
        """Whether a checkpoint is being written."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, step: int, tensors: Iterable[tuple[str, Tensor]], about: Description) -> None:
        """Write tensors, here and now; they come in order of name.

        Raises:
            CheckpointError: where they cannot be written.
        """
        self.finish()
        self._saved(self._write(step, tensors, about))

    def begin(
        self, step: int, state: TrainingState, about: Description, more: Mapping[str, Tensor] | None = None
    ) -> None:
        """Start writing ``state``, and ``more``, which must not change until the writer is no longer busy."""
        self.finish()
        tensors = sorted([*state.named_tensors(), *(more or {}).items()], key=lambda item: item[0])

        def write() -> None:
            _give_way()
            try:
                self._outcome = self._write(step, tensors, about)
            except BaseException as error:
                self._outcome = error

        self._thread = threading.Thread(target=write, name="unisono-checkpoint")
        self._thread.start()

    def wait(self, seconds: float) -> None:
        """Wait until nothing is being written, or for so long."""
        if self._thread is not None:
            self._thread.join(seconds)

    def finish(self) -> bool:
        """Wait until nothing is being written, and report what has been; whether there was something.

        Raises:
            CheckpointError: where the last checkpoint could not be written.
        """
        if self._thread is None:
            return False
        self._thread.join()
        outcome, self._thread, self._outcome = self._outcome, None, None
        if isinstance(outcome, UnisonoError):
            raise outcome
        if isinstance(outcome, BaseException):
            raise CheckpointError(f"the checkpoint could not be written: {outcome!r}") from outcome
        if outcome is not None:
            self._saved(outcome)
        return True

    def abandon(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()
            self._thread = self._outcome = None

    def _write(self, step: int, tensors: Iterable[tuple[str, Tensor]], about: Description) -> CheckpointSaved:
        started = time.perf_counter()
        path, manifest = save(self.directory, step, tensors, about)
        always = [self.best_step] if self._retention.best and self.best_step is not None else []
        prune(self.directory, self._retention.newest, always)
        size_bytes = sum(file.size_bytes for file in manifest.files.values())
        self.last_s = time.perf_counter() - started
        return CheckpointSaved(step, str(path), size_bytes, self.last_s, manifest.digest)


def _give_way() -> None:
    """Let this thread take what training leaves of its core: where every core trains, it would hold all workers up."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
