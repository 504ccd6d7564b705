"""One worker, as its launcher knows it: its process, its line, what it has told, how it ended."""

import os
import signal
import socket
from dataclasses import dataclass
from enum import Enum
from typing import Any

from unisono.launch.control import Message
from unisono.launch.survival import Subject


class Heard(Enum):
    """What came over a worker's line."""

    MESSAGE = "message"
    NOTHING = "nothing"
    END = "end"


@dataclass(slots=True)
class WorkerProcess:
    """One worker, as its launcher knows it.

    Attributes:
        control, log, stacks: its line, its hidden output, and where its stacks are written.
        joins: it was started while others trained.
        status: as ``waitpid`` gives it; None while it lives.
        leaves: it was asked to.
        lost, fatal: it ended in no good order, and the others go on, or do not.
        finished: it has done its task.
        result, error: what it has told.
    """

    rank: int
    control: socket.socket
    log: int | None
    pid: int = 0
    handle: int = -1
    stacks: int = -1
    joins: bool = False
    status: int | None = None
    leaves: bool = False
    lost: bool = False
    fatal: bool = False
    finished: bool = False
    result: Any = None
    error: Message | None = None

    @property
    def subject(self) -> Subject:
        """As it is watched."""
        return Subject(self.rank, self.pid, self.handle, self.stacks)

    def close(self) -> None:
        """Let go of what leads to it."""
        self.control.close()
        for descriptor in (self.handle, self.log, self.stacks):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)
        self.handle = -1

    def how_it_ended(self, workers: int) -> str:
        """For a reader; ``workers``: how many there were."""
        code = os.waitstatus_to_exitcode(self.status or 0)
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        return f"worker {self.rank} of {workers} (process {self.pid}) {how}"

    def last_words(self) -> str:
        """The end of what it has said, where that was hidden."""
        if self.log is None or not (size := os.fstat(self.log).st_size):
            return ""
        return os.pread(self.log, 2000, max(0, size - 2000)).decode(errors="replace").strip()
