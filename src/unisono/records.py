"""What the chief keeps of a run: its directory, its observers, its checkpoints; the next one's when it is lost.

All workers come to the same events. Each leaves its last ones in the arena, where they outlive it: whoever becomes the
chief tells what those before could not, though none of those who knew may be left.
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

from unisono.comm.memos import Memos
from unisono.config import TrainingConfig, to_yaml
from unisono.errors import ConfigurationError, RecordError
from unisono.events import (
    ChiefChanged,
    Emitter,
    Event,
    HostsChanged,
    Listener,
    MembersChanged,
    MicroBatchesCopied,
    Notice,
    RunStarted,
    StepFinished,
    ValidationFinished,
    WorkerLost,
)
from unisono.launch.runs import lock, sweep, write_config
from unisono.observe.choose import observers
from unisono.observe.observer import Observer
from unisono.observe.records import EVENTS
from unisono.state.checkpoint import DIRECTORY, remove_leftovers, steps_in
from unisono.state.writer import CheckpointWriter, Retention

STARTING_S, SUCCEEDING_S = 1.0, 30.0
"""Until the children of workers that were ended, or a chief that leaves, have let go of the run's directory."""
OF_A_STEP = (StepFinished, ValidationFinished, WorkerLost, MembersChanged, HostsChanged, MicroBatchesCopied)
_BY_NAME: dict[str, type[Event]] = {kind.__name__: kind for kind in OF_A_STEP}
_ORDER = {"StepFinished": 1, "ValidationFinished": 2}
"""Of what comes of a step; the rest is before."""
TAIL_BYTES = 1 << 22
"""Of the record, in which all that may still have to be told would be found."""


class Records:
    """One worker's, open while it is the chief.

    Arguments:
        config: the run's.
        callbacks: the user's, which hear every event.

    Attributes:
        writer: of checkpoints; None where there is no directory for them, or this worker is not the chief.
        observed: whether anybody but callbacks listens.
        memos: where events are left for a successor; None where there is none.
    """

    def __init__(self, config: TrainingConfig, callbacks: Sequence[Listener]) -> None:
        self._config = config
        self._callbacks = callbacks
        self.run_dir = Path(config.run_dir) if config.run_dir is not None else None
        self.writer: CheckpointWriter | None = None
        self.observed = False
        self._emit: Emitter | None = None
        self._observers: list[Observer] = []
        self._failing: list[Observer] = []
        self.memos: Memos | None = None
        self._ahead: set[tuple[str, int, int | None]] = set()  # what others had left, and this worker comes to yet
        self._open = ExitStack()

    @property
    def kept_here(self) -> bool:
        """Whether this worker keeps them."""
        return self._emit is not None

    def __call__(self, event: Event) -> None:
        """Tell listeners, and leave it for whoever becomes the chief before it is told."""
        if self.memos is not None and isinstance(event, OF_A_STEP):
            self._leave(self.memos, event)
        if _key(event) not in self._ahead:
            self._say(event)

    def _say(self, event: Event) -> None:
        if self._emit is not None:
            for observer in self._observers:
                self._tell(observer, event)
            self._emit(event)

    @staticmethod
    def _leave(memos: Memos, event: Event) -> None:
        kept = memos.keep(_written(event))
        if not kept and isinstance(event, StepFinished):
            memos.keep(_written(replace(event, phases=[])))
        elif not kept and isinstance(event, WorkerLost):
            memos.keep(_written(replace(event, taken_over={})))

    def begin(self, *, resume: bool, again: bool = False) -> None:
        """This worker is the chief from the start.

        Arguments:
            resume: there may be checkpoints already.
            again: all have started again, and another chief may just be ending.

        Raises:
            ConfigurationError: where the directory cannot be used.
        """
        if self.run_dir is not None:
            checkpoints = self.run_dir / DIRECTORY
            if not (resume or again) and steps_in(checkpoints):
                raise ConfigurationError(
                    f"{self.run_dir} holds the checkpoints of a run (the last at step {steps_in(checkpoints)[0]}); "
                    "resume it (--resume, or fit(resume=True)), or give another run_dir"
                )
        self._keep(SUCCEEDING_S if again else STARTING_S)
        if self.run_dir is not None:
            sweep(self.run_dir)
            write_config(self.run_dir, to_yaml(self._config))

    def take_over(self, step: int, steps: int, rank: int) -> None:
        """The chief is lost, and this worker is the next: say what it could not.

        Arguments:
            step: the one that has been trained now, of ``steps``.
            rank: this worker's.
        """
        said = self._said()
        self._keep(SUCCEEDING_S)
        self._say(ChiefChanged(step, steps, rank))
        for event in self._left():
            name = json.dumps(_key(event))
            known = name in said if self.run_dir is not None else _key(event)[1] < step - 1
            if not known:
                said.add(name)  # others have left it too
                self._say(event)
                if _key(event)[1] >= step:
                    self._ahead.add(_key(event))

    def _left(self) -> Iterator[Event]:
        """What all workers of this host have left, those of a step after those of the one before."""
        found = [json.loads(data) for data in self.memos.all()] if self.memos is not None else []
        for name, fields in sorted(found, key=lambda memo: (memo[1]["step"], _ORDER.get(memo[0], 0))):
            yield _BY_NAME[name](**fields)

    def _keep(self, patience_s: float) -> None:
        if self.run_dir is not None:
            self._open.callback(os.close, lock(self.run_dir, patience_s))
            remove_leftovers(self.run_dir / DIRECTORY)
            retention = Retention(self._config.checkpoint.keep, self._config.checkpoint.keep_best)
            self.writer = CheckpointWriter(self.run_dir / DIRECTORY, retention, self)
            self._open.callback(self.writer.abandon)
        self._observers = observers(self._config.observe, self.run_dir)
        for observer in reversed(self._observers):
            self._open.callback(self._let_go, observer)
        self.observed = bool(self._observers)
        self._emit = Emitter(self._callbacks)

    def _tell(self, observer: Observer, event: Event) -> None:
        """A record that cannot be written, on a full disk for example, is no reason to stop training."""
        try:
            observer(event)
        except (RecordError, OSError) as error:
            self._complain(observer, error)

    def _let_go(self, observer: Observer) -> None:
        try:
            observer.close()
        except (RecordError, OSError) as error:
            self._complain(observer, error)

    def _complain(self, observer: Observer, error: Exception) -> None:
        """Once for each observer; it is told of later events all the same."""
        if observer not in self._failing:
            self._failing.append(observer)
            for other in self._observers:
                if other is not observer:
                    self._tell(other, Notice(f"NO RECORD was kept: {error}; training goes on"))

    def _said(self) -> set[str]:
        """What is on record already, of the last events."""
        found: set[str] = set()
        if self.run_dir is None or not (self.run_dir / EVENTS).exists():
            return found
        with (self.run_dir / EVENTS).open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL_BYTES))
            for line in file.read().splitlines():
                try:
                    record = json.loads(line)
                    if record["event"] == RunStarted.__name__:
                        found.clear()  # what was said before is of the run that this one resumes
                        continue
                    found.add(json.dumps([record["event"], record["step"], record.get("number")]))
                except (ValueError, KeyError, TypeError):  # a line that was cut off, or that is of no step
                    continue
        return found

    def let_go(self) -> None:
        """Another worker may become the chief; this one remembers from now on, like all others."""
        self._open.close()
        self._emit, self.writer, self.observed, self._observers = None, None, False, []

    def close(self) -> None:
        """Let go of everything, in whatever state."""
        self._open.close()


def _written(event: Event) -> bytes:
    return json.dumps([type(event).__name__, asdict(event)]).encode()


def _key(event: Event) -> tuple[str, int, int | None]:
    """What tells one event of a step from another."""
    return type(event).__name__, getattr(event, "step", 0), getattr(event, "number", None)
