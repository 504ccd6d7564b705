"""What chaos does inside a worker: at (rank, step, phase) it is killed, stopped, or made to hang.

Moments are the phases of a step, and others inside them: ``forward``, ``backward``, ``mid-reduce``, ``mid-update``,
``mid-commit``, ``rescue`` (while it computes in a lost worker's place), ``validation``, and ``entry`` (while it joins).
"""

import errno
import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from unisono.comm.host import HostGroup
from unisono.comm.journal import Image, Journal
from unisono.comm.numbers import ArenaNumbers
from unisono.config import Config, validate
from unisono.engine import Engine
from unisono.evaluation import Evaluator
from unisono.events import PHASES, Event, PhaseEntered
from unisono.launch.control import send
from unisono.launch.world import this_process
from unisono.state import checkpoint
from unisono.sync.updater import Updater
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task
from unisono.trainer import Trainer

MOMENTS = (
    *PHASES,
    *("forward", "backward", "mid-reduce", "mid-numbers", "mid-update", "mid-commit", "rescue", "validation", "entry"),
)
WAYS = ("kill", "stop", "hang", "sleep", "exit", "clock", "slow")
HOUR_S = 3600.0
SLOWER = 10


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: what happens to the worker of ``rank`` in ``step`` at a moment; 0 as step is any.

    Attributes:
        how: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``hang`` (an endless loop), ``sleep`` (in a system call), ``exit``,
            ``clock`` (the wall clock is set back by an hour, or forward), ``slow`` (each micro-batch takes ``seconds``
            more from here on).
        code: of an exit.
    """

    rank: int
    step: int
    moment: str
    how: str = "kill"
    code: int = 1
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Storage:
    """A disk that is ``full``, ``read-only`` or ``slow`` (10 times), from one step on until another is begun."""

    how: str
    start: int
    stop: int

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


def strike(fault: Strike) -> None:
    """Let it happen to this process; the launcher is told when."""
    control = this_process().control
    if control is not None:
        send(control, {"op": "note", "struck": asdict(fault), "at": time.monotonic(), "process": os.getpid()})
    if fault.how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault.how == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault.how == "sleep":
        time.sleep(3600)
    elif fault.how == "exit":
        os._exit(fault.code)
    elif fault.how == "clock":
        wall, shift = time.time, HOUR_S if fault.step % 2 else -HOUR_S
        time.time = lambda: wall() + shift
    while fault.how == "hang":
        pass


class Armed:
    """Strikes this process once its moment has come; each strike once in a run.

    A worker that takes a lost one's place has the same rank and the same strikes; those of steps before it joined do
    not come again. One at an entry strikes every second worker that joins there.

    Attributes:
        step: the one under way.
    """

    def __init__(self, strikes: Sequence[Strike]) -> None:
        world = this_process()
        mine = [s for s in strikes if s.rank == world.rank]
        self._left = list(mine)
        self._joins = world.joins
        if world.rolled_back is not None:  # it does steps again in which it was struck
            self._left = [fault for fault in self._left if fault.step == 0 or fault.step > world.rolled_back + 1]
        self.step = 0
        self._more_s = 0.0
        self._computed: set[tuple[int, int | str | None]] = set()

    def at(self, moment: str, step: int) -> None:
        """The worker is at a moment of a step."""
        for fault in list(self._left):
            if fault.moment == moment and fault.step in (0, step):
                self._left.remove(fault)
                if fault.how == "slow":
                    self._more_s = fault.seconds
                else:
                    strike(fault)

    def __call__(self, event: Event) -> None:
        """Hear of phases."""
        if not isinstance(event, PhaseEntered):
            return
        if self._joins and self.step == 0:  # with the other hosts it does that step again in which one was struck
            self._left = [fault for fault in self._left if fault.step == 0 or fault.step > event.step]
        self.step = event.step
        self.at(event.phase, event.step)
        if event.phase == "compute":
            again = (event.step, event.micro_batch) in self._computed
            self._computed.add((event.step, event.micro_batch))
            self.at("backward" if again else "forward", event.step)
            time.sleep(0.0 if again else self._more_s)

    def install(self) -> None:
        """Reach the moments inside phases too. For a process whose only use this is: nothing is put back."""
        self._before(Updater, "reduce", lambda *_: self._second("mid-reduce"))
        self._before(ArenaNumbers, "put", lambda *_: self._second("mid-numbers"))
        self._before(Journal, "advance", self._advance)
        self._before(Engine, "_rescue", lambda *_: self.at("rescue", self.step))
        self._before(Evaluator, "_leaf", lambda *_: self.at("validation", self.step))
        self._before(HostGroup, "_settled", self._enter)

    def _enter(self, group: HostGroup, *_: object) -> None:
        """This worker was let in; it is struck where it comes for one that trained, and not for one struck here."""
        header = group.header
        if sum(header.lost(number) == group.slot for number in range(header.losses)) % 2:
            self.at("entry", 0)

    def _second(self, moment: str) -> None:
        """After the first of several."""
        key = (self.step, moment)
        if key in self._computed:
            self.at(moment, self.step)
        self._computed.add(key)

    def _advance(self, journal: Journal, image: Image, version: int) -> None:
        self.at("mid-update", version)  # updated in place, and not said so yet
        if any(fault.moment == "mid-commit" and fault.step == version for fault in self._left):
            for block in range(image.first, image.first + max(1, image.count // 2)):
                journal._versions[block] = version
            self.at("mid-commit", version)

    @staticmethod
    def _before(owner: type, name: str, first: Callable[..., None]) -> None:
        method = getattr(owner, name)

        def wrapped(self: Any, *arguments: Any, **named: Any) -> Any:
            first(self, *arguments, **named)
            return method(self, *arguments, **named)

        setattr(owner, name, wrapped)


def spoil(storage: Storage, step: Callable[[], int]) -> None:
    """Let this process's disk be full, read-only or slow; for a process whose only use this is."""
    write = checkpoint._write

    def spoiled(path: Path, data: bytes) -> None:
        if not storage.start <= step() < storage.stop:
            write(path, data)
        elif storage.how == "slow":
            started = time.perf_counter()
            write(path, data)
            time.sleep((SLOWER - 1) * (time.perf_counter() - started))
        else:
            number = errno.ENOSPC if storage.how == "full" else errno.EROFS
            write(path, data[: len(data) // 2])
            raise OSError(number, os.strerror(number), str(path))

    checkpoint._write = spoiled


def armed(trainer: Trainer, strikes: Sequence[Mapping[str, Any]], storage: Mapping[str, Any] | None = None) -> Trainer:
    """A trainer whose workers are struck, and whose disk may be."""
    arm = Armed([Strike(**fault) for fault in strikes])
    arm.install()
    if storage is not None:
        spoil(Storage(**storage), lambda: arm.step)
    trainer.probe(arm)
    return trainer


def train(
    config: Mapping[str, Any],
    strikes: Sequence[Mapping[str, Any]],
    storage: Mapping[str, Any] | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """What every worker of ``unisono chaos`` does: train a task, and be struck."""
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    task = make_task(settings.task, settings.options)
    objects = replace(objects_of(task, settings.optimizer), summary=None)
    if settings.validation.every is None:
        objects = replace(objects, validation=None)
    trainer = armed(Trainer.from_config(objects, settings), strikes, storage)
    return asdict(trainer.fit(settings.steps, resume=resume))
