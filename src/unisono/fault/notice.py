"""Notices that this machine is about to be taken away: a file that appears, or a command that says so."""

import shlex
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

EVERY_S = 5.0
LONGEST_S = 30.0
"""A command that takes longer is ended, and counts as no notice."""


class Notices:
    """Looks for them without waiting.

    Arguments:
        file: whose appearance is a notice.
        command: whose exit code 0 is one; None for none.
        clock: seconds, monotonic.
    """

    def __init__(self, file: str | None, command: str | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._file = Path(file) if file is not None else None
        self._command = command
        self._clock = clock
        self._running: subprocess.Popen[bytes] | None = None
        self._next, self._since = 0.0, 0.0

    def arrived(self) -> str | None:
        """What asks to stop, for a reader; None for nothing."""
        if self._file is not None and self._file.exists():
            return f"{self._file} has appeared"
        if self._command is None:
            return None
        return self._asked(self._command)

    def _asked(self, command: str) -> str | None:
        now = self._clock()
        if self._running is None:
            if now >= self._next:
                quiet = subprocess.DEVNULL
                self._running = subprocess.Popen(shlex.split(command), stdin=quiet, stdout=quiet, stderr=quiet)
                self._since, self._next = now, now + EVERY_S
            return None
        code = self._running.poll()
        if code is None and now - self._since > LONGEST_S:
            self.close()
        if code is None:
            return None
        self._running = None
        return f"{command!r} says so" if code == 0 else None

    def close(self) -> None:
        """End a command that still runs."""
        if self._running is not None:
            self._running.kill()
            self._running.wait()
            self._running = None
