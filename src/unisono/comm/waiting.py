"""Waiting for other workers: a brief spin, then sleep, never past the deadline, never in a revoked generation."""

import ctypes
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from unisono.errors import Revoked, RunOver, WaitTimeout

T = TypeVar("T")

SPIN_S = 100e-6
FIRST_SLEEP_S = 20e-6
LONGEST_SLEEP_S = 1e-3
THREAD_SLEEP_S = 5e-3
"""In place of the longest sleep, for a thread that would take the interpreter away from a worker that computes."""
LATE = 0.02
"""A wait ends at most this part of its length late, as long as that is less than the longest sleep."""

_PR_SET_TIMERSLACK = 29


@dataclass(frozen=True, slots=True)
class Waiter:
    """How one worker waits.

    Attributes:
        deadline_s: seconds after which a wait raises.
        revoked: whether this worker's generation has ended.
        cause: why it has, where that is known.
        over: whether training has ended: who waits on was let in for a step that did not come.
        told: called with the operation as a wait begins.
        beat: called again and again while it lasts.
        clock: seconds, monotonic; replaced in tests.
        sleep: called with seconds; replaced in tests.
    """

    deadline_s: float
    revoked: Callable[[], bool]
    cause: Callable[[], str] = str
    over: Callable[[], bool] = bool
    told: Callable[[str], None] = lambda operation: None
    beat: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep

    def of_worker(self) -> "Waiter":
        """For whatever thread: what others than this one do is no sign that the worker lives."""
        worker = threading.get_ident()
        return replace(
            self,
            told=lambda operation: self.told(operation) if threading.get_ident() == worker else None,
            beat=lambda: self.beat() if threading.get_ident() == worker else None,
        )

    def of_thread(self) -> "Waiter":
        """For a thread beside the worker's own: what it does is no sign that the worker lives, and it may take more
        time to notice."""
        patient = lambda seconds: self.sleep(seconds if seconds < LONGEST_SLEEP_S else THREAD_SLEEP_S)  # noqa: E731
        return replace(self, told=lambda operation: None, beat=lambda: None, sleep=patient)

    def __call__(
        self,
        ready: Callable[[], T | None],
        operation: str,
        missing: Callable[[], str],
        progress: Callable[[], object] | None = None,
    ) -> T:
        """What ``ready`` returns once it is not None.

        Arguments:
            missing: who or what is, for the error.
            progress: the deadline begins anew whenever this changes.

        Raises:
            WaitTimeout: with the operation, the line that waits, and what ``missing`` says.
            Revoked: the generation ended.
            RunOver: training ended.
        """
        result = ready()
        if result is not None:
            return result
        self.told(operation)
        started, seen = self.clock(), progress() if progress is not None else None
        while True:
            over = self.over()  # read before: what came until then counts
            result = ready()
            if result is not None:
                return result
            if over:
                raise RunOver(f"training was over while this worker waited in {operation}")
            if self.revoked():
                raise Revoked(revoked(operation, self.cause()))
            if progress is not None and (now := progress()) != seen:
                started, seen = self.clock(), now
            waited = self.clock() - started
            if waited > self.deadline_s:
                raise WaitTimeout(
                    f"{operation} waited {waited:.1f} s (deadline {self.deadline_s:g} s) at {_caller()}; {missing()}"
                )
            if waited > SPIN_S:
                self.beat()
                self.sleep(min(max(FIRST_SLEEP_S, LATE * waited), LONGEST_SLEEP_S))


def revoked(operation: str, cause: str) -> str:
    """The sentence for a wait that ended because someone else met with an error."""
    return f"the group was revoked while this worker waited in {operation}" + (f": {cause}" if cause else "")


def _caller() -> str:
    """The nearest source line outside this package's communication; on a thread of its own, the first inside."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith(("unisono.comm", "contextlib")):
        if frame.f_back.f_globals.get("__name__", "").startswith("concurrent."):
            break
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"


def wake_on_time() -> None:
    """Let short sleeps end when they should: by default Linux may add 50 us, several times a step."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PR_SET_TIMERSLACK, 1_000, 0, 0, 0)
