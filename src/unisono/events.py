"""Frozen records of what happened, and the emitter that hands them to listeners. Nothing here does I/O."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

PHASES = ("data", "compute", "reduce", "update", "wait")
"""Where the time of a step goes; every worker measures each of them, in seconds."""


@dataclass(frozen=True, slots=True)
class Event:
    """Anything that happened in a run."""


@dataclass(frozen=True, slots=True)
class Notice(Event):
    """Something the user should know, in a sentence."""

    text: str


@dataclass(frozen=True, slots=True)
class RunStarted(Event):
    """Workers are ready; training starts after ``step`` finished steps and should end after ``steps``."""

    step: int
    steps: int
    workers: int
    parameters: int
    run_dir: str | None


@dataclass(frozen=True, slots=True)
class PhaseEntered(Event):
    """A worker enters a phase of a step (``step`` counts from 1); faults are injected in tests by listening to it."""

    rank: int
    step: int
    phase: str
    micro_batch: int | None = None


@dataclass(frozen=True, slots=True)
class WireUse:
    """What a step's exchange between hosts took, on one worker.

    Attributes:
        sent_bytes: payload that it sent.
        seconds: from its first message to its last.
        exposed_s: how long training waited for the exchange: what did not hide behind computation.
        saved_bytes: what compression, or packing without loss, kept from being sent.
        error_norm: the norm of what compression has not sent yet; None without compression.
    """

    sent_bytes: int
    seconds: float
    exposed_s: float
    saved_bytes: int = 0
    error_norm: float | None = None


@dataclass(frozen=True, slots=True)
class StepFinished(Event):
    """Step ``step`` (from 1) is committed.

    ``tokens`` counts what the samples hold, where the task says; ``phases`` maps phase to seconds, once per worker;
    ``wire`` is rank 0's, where there are several hosts; ``staleness`` counts pushes by how many others had changed
    their server since they read it, where workers do not wait for each other.
    """

    step: int
    loss: float
    weight: float
    samples: int
    tokens: int | None
    learning_rate: float
    gradient_norm: float | None
    seconds: float
    phases: Sequence[Mapping[str, float]]
    wire: WireUse | None = None
    staleness: Mapping[int, int] | None = None


@dataclass(frozen=True, slots=True)
class WorkerLost(Event):
    """A worker died; ``number`` counts the losses of a run from 0. ``how`` it did, and the micro-batches of ``step``
    that others computed in its place, by rank: again in the next step, where it was too late to begin it without it.

    Ranks are those of the start: a worker that takes a lost one's place has its rank.
    """

    number: int
    step: int
    rank: int
    how: str
    taken_over: Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class MicroBatchesCopied(Event):
    """Workers that had nothing left to do in ``step`` computed micro-batches of late ones, by rank."""

    step: int
    by: Mapping[int, Sequence[int]]


@dataclass(frozen=True, slots=True)
class ChiefChanged(Event):
    """The worker that kept the run's records is lost; that of ``rank`` does so from step ``step`` on, of ``steps``."""

    step: int
    steps: int
    rank: int


@dataclass(frozen=True, slots=True)
class MembersChanged(Event):
    """Other workers than before begin step ``step``; ``members`` are the ranks of all who do."""

    step: int
    members: Sequence[int]
    joined: Sequence[int]
    left: Sequence[int]


@dataclass(frozen=True, slots=True)
class HostsChanged(Event):
    """Other workers than before, on some of several hosts, begin step ``step``, in the group's ``generation``.

    ``hosts`` are all that take part, with so many ``workers`` each. Of the step, so many micro-batches were not
    published before, and are ``taken_over``; None where nothing of it was.
    """

    step: int
    generation: int
    hosts: Sequence[int]
    workers: Sequence[int]
    joined: Sequence[int]
    lost: Sequence[int]
    taken_over: int | None = None


@dataclass(frozen=True, slots=True)
class ValidationFinished(Event):
    """The state after ``step`` was evaluated on the whole validation set."""

    step: int
    metrics: Mapping[str, float]
    samples: int
    seconds: float
    best: bool


@dataclass(frozen=True, slots=True)
class CheckpointSaved(Event):
    """A checkpoint is complete on disk."""

    step: int
    path: str
    size_bytes: int
    seconds: float
    digest: str


@dataclass(frozen=True, slots=True)
class Resumed(Event):
    """The state of a checkpoint was loaded; ``damaged`` lists newer ones that were passed over, with the reason."""

    step: int
    path: str
    damaged: Sequence[str] = field(default_factory=tuple)


@dataclass(frozen=True, slots=True)
class RolledBack(Event):
    """A worker was lost whose state ended with it: all go on from the snapshot of the state after ``step``.

    ``lost_steps`` had been done after it, and are done again.
    """

    step: int
    lost_steps: int


@dataclass(frozen=True, slots=True)
class RunFinished(Event):
    """Training ended in good order; ``reason`` is "finished", "stopped" or "early stop"."""

    step: int
    reason: str
    digest: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Summary(Event):
    """What the task has to say of the trained model, by name."""

    items: Mapping[str, Any]


def readable(size_bytes: int) -> str:
    """A size for a reader.

    >>> readable(900), readable(30_000), readable(5 << 20)
    ('900 B', '29.3 KiB', '5.0 MiB')
    """
    size, unit = float(size_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.0f} B" if unit == "B" else f"{size:.1f} {unit}"


Listener = Callable[[Event], None]


class Emitter:
    """Hands every event to every listener, in order; a listener's exception ends the run."""

    def __init__(self, listeners: Sequence[Listener] = ()) -> None:
        self._listeners = list(listeners)

    def add(self, listener: Listener) -> None:
        """Let a listener hear everything from now on."""
        self._listeners.append(listener)

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        for listener in self._listeners:
            listener(event)
