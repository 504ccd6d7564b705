"""What chaos does inside a worker: at (rank, step, phase) it is killed, stopped, or made to hang.

Moments are the phases of a step, and others inside them: ``forward``, ``backward``, ``mid-reduce``, ``mid-update``,
``mid-commit``, ``rescue`` (while it computes in a lost worker's place), ``validation``, and ``entry`` (while it joins).
"""

import os
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unisono.comm.host import HostGroup
from unisono.comm.journal import Image, Journal
from unisono.config import Config, validate
from unisono.engine import Engine
from unisono.evaluation import Evaluator
from unisono.events import PHASES, Event, PhaseEntered
from unisono.launch.control import send
from unisono.launch.world import this_process
from unisono.sync.every_step import EveryStep
from unisono.tasks.job import objects_of
from unisono.tasks.task import make_task
from unisono.trainer import Trainer

MOMENTS = (
    *PHASES,
    *("forward", "backward", "mid-reduce", "mid-update", "mid-commit", "rescue", "validation", "entry"),
)
WAYS = ("kill", "stop", "hang", "sleep", "exit")


@dataclass(frozen=True, slots=True)
class Strike:
    """One fault: what happens to the worker of ``rank`` in ``step`` at a moment; 0 as step is any.

    Attributes:
        how: ``kill`` (SIGKILL), ``stop`` (SIGSTOP), ``hang`` (an endless loop), ``sleep`` (in a system call), ``exit``.
        code: of an exit.
    """

    rank: int
    step: int
    moment: str
    how: str = "kill"
    code: int = 1


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
    while fault.how == "hang":
        pass


class Armed:
    """Strikes this process once its moment has come; each strike once in a run.

    A worker that takes a lost one's place has the same rank and the same strikes: those of steps before it joined do
    not come again, and one of any step (0) strikes the first process alone.
    """

    def __init__(self, strikes: Sequence[Strike]) -> None:
        world = this_process()
        mine = [s for s in strikes if s.rank == world.rank and (s.step > 0 or not world.joins or s.moment == "entry")]
        self._left = list(mine)
        self._step = 0
        self._computed: set[tuple[int, int | None]] = set()

    def at(self, moment: str, step: int) -> None:
        """The worker is at a moment of a step."""
        for fault in list(self._left):
            if fault.moment == moment and fault.step in (0, step):
                self._left.remove(fault)
                strike(fault)

    def __call__(self, event: Event) -> None:
        """Hear of phases."""
        if not isinstance(event, PhaseEntered):
            return
        self._step = event.step
        self.at(event.phase, event.step)
        if event.phase == "compute":
            again = (event.step, event.micro_batch) in self._computed
            self._computed.add((event.step, event.micro_batch))
            self.at("backward" if again else "forward", event.step)

    def install(self) -> None:
        """Reach the moments inside phases too. For a process whose only use this is: nothing is put back."""
        self._before(EveryStep, "_reduce", lambda *_: self._second("mid-reduce"))
        self._before(Journal, "advance", self._advance)
        self._before(Engine, "_rescue", lambda *_: self.at("rescue", self._step))
        self._before(Evaluator, "_leaf", lambda *_: self.at("validation", self._step))
        self._before(HostGroup, "_settled", lambda *_: self.at("entry", 0))

    def _second(self, moment: str) -> None:
        """After the first of several."""
        key = (self._step, None)
        if key in self._computed:
            self.at(moment, self._step)
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


def armed(trainer: Trainer, strikes: Sequence[Mapping[str, Any]]) -> Trainer:
    """A trainer whose workers are struck."""
    arm = Armed([Strike(**fault) for fault in strikes])
    arm.install()
    trainer.probe(arm)
    return trainer


def train(config: Mapping[str, Any], strikes: Sequence[Mapping[str, Any]], resume: bool = False) -> dict[str, Any]:
    """What every worker of ``unisono chaos`` does: train a task, and be struck."""
    settings = validate(Config, config, "configuration")
    torch.set_num_threads(settings.threads)
    task = make_task(settings.task, settings.options)
    trainer = armed(Trainer.from_config(objects_of(task, settings.optimizer), settings), strikes)
    return asdict(trainer.fit(settings.steps, resume=resume))
