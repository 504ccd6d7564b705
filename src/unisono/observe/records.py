"""Records for programs: every event as a line of JSON, and TensorBoard's files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from unisono.errors import RecordError
from unisono.events import Event, PhaseEntered, StepFinished, ValidationFinished

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


EVENTS = "events.jsonl"


class EventLog:
    """Appends every event to ``events.jsonl``, line by line; a resumed run goes on in the same file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8", buffering=1 << 14)

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, PhaseEntered):
            return
        try:
            self._file.write(json.dumps({"event": type(event).__name__, **asdict(event)}) + "\n")
            self._file.flush()  # whatever happens to this process, what it has told of is on record: 3 us
        except OSError as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Write out what is buffered."""
        try:
            self._file.close()
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> RecordError:
        return RecordError(f"cannot write {self._path}: {error.strerror}; make room, or choose another run_dir")


class TensorBoard:
    """Writes scalars every few steps. Imported at the first of them: it takes longer than most first steps."""

    def __init__(self, directory: Path, every: int) -> None:
        self._directory = directory
        self._every = every
        self._writer: SummaryWriter | None = None

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        if isinstance(event, StepFinished) and event.step % self._every == 0:
            writer = self._open()
            writer.add_scalar("train/loss", event.loss, event.step)
            writer.add_scalar("train/learning_rate", event.learning_rate, event.step)
            writer.add_scalar("train/samples_per_s", event.samples / event.seconds, event.step)
            if event.gradient_norm is not None:
                writer.add_scalar("train/gradient_norm", event.gradient_norm, event.step)
        elif isinstance(event, ValidationFinished):
            for name, value in event.metrics.items():
                self._open().add_scalar(f"validation/{name}", value, event.step)

    def close(self) -> None:
        """Write out what is buffered."""
        if self._writer is not None:
            self._writer.close()

    def _open(self) -> "SummaryWriter":
        if self._writer is None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._directory))
        return self._writer
