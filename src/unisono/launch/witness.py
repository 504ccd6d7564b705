"""A voter that trains nothing: with it, half of a run's hosts can decide that they go on. Its votes are on a disk."""

import json
import os
import re
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from unisono.errors import ConfigurationError
from unisono.fault.coordination import Coordination
from unisono.fault.generation import WITNESS, Acceptor, Generation
from unisono.launch.channel import Refused
from unisono.launch.control import Message
from unisono.launch.ledger import Ledger
from unisono.launch.lines import MOST_STRANGERS, Line, Lines

NOTHING = Generation(0, (0,), ((0,),), 0)
"""Before the first generation of a run that it hears of."""
TURN_S = 0.5
_RUN = re.compile("[0-9a-f]{16}")


@dataclass(slots=True)
class Witness:
    """Votes for any number of runs that know its secret; a context manager is not needed: `close` lets go of all.

    Arguments:
        secret: the jobs'.
        directory: where votes are kept, a file for each run.
        told: called with a sentence for each generation that it hears of.
    """

    secret: bytes
    directory: Path
    told: Callable[[str], None]
    _lines: Lines = field(init=False)
    _runs: dict[str, Coordination] = field(default_factory=dict)
    _run_of: dict[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._lines = Lines(self.secret)

    def listen(self, address: str, port: int) -> int:
        """Begin; the port.

        Raises:
            ConfigurationError: where that cannot be had.
        """
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._lines.listen(address, port, backlog=MOST_STRANGERS)
        except OSError as error:
            raise ConfigurationError(
                f"the witness cannot listen on {address}:{port} and write into {self.directory}: "
                f"{error.strerror or error}; choose others (--listen, --state)"
            ) from error
        assert self._lines.listener is not None
        found: int = self._lines.listener.getsockname()[1]
        return found

    def turn(self, timeout: float = TURN_S) -> None:
        """Answer whoever asks."""
        for line in self._lines.select(timeout):
            if line in self._lines.all:
                self._hear(line)

    def close(self) -> None:
        """Let go of all lines."""
        self._lines.close()

    def _hear(self, line: Line) -> None:
        try:
            messages = line.read()
            for message in messages or []:
                self._handle(line, message)
        except (Refused, OSError, ValueError, KeyError, TypeError):
            messages = None
        if messages is None:
            self._lines.drop(line)
            self._run_of.pop(id(line), None)

    def _handle(self, line: Line, message: Message) -> None:
        if message["op"] == "hail":
            self._run_of[id(line)] = self._known(str(message["run"]))
            self._lines.know(line, int(message["number"]))
            return
        run = self._run_of[id(line)]
        voter = self._runs[run]
        assert line.number is not None
        voter.heard(line.number, message, time.monotonic())
        outbox, voter.outbox = voter.outbox, []
        for numbers, answer in outbox:
            if line.number in numbers:
                with suppress(OSError):
                    line.send(answer)
        for generation in voter.decided:
            hosts = ", ".join(map(str, generation.hosts))
            self.told(f"run {run}: generation {generation.number} is hosts {hosts}")
        voter.decided.clear()

    def _known(self, run: str) -> str:
        """A run, with what was voted in it before.

        Raises:
            ValueError: for what is no run's name, or a file that is damaged.
        """
        if not _RUN.fullmatch(run):
            raise ValueError(f"not a run: {run!r}")
        if run not in self._runs:
            ledger = Ledger(self.directory / f"{run}.json")
            if ledger.path is not None and ledger.path.exists():
                acceptor = Acceptor.read(json.loads(ledger.path.read_text(encoding="utf-8")), ledger)
            else:
                acceptor = Acceptor(NOTHING, ledger)
            voter = Coordination(WITNESS, acceptor, float("inf"))
            voter.follows = None
            self._runs[run] = voter
        return run


def default_state() -> Path:
    """Where votes are kept if nothing else is said."""
    home = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(home) / "unisono" / "witness"
