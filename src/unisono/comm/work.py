"""Handles of operations, as torch.distributed wants them."""

import threading
import time
from collections.abc import Callable
from datetime import timedelta

from torch import Tensor
from torch._C._distributed_c10d import Work
from torch.futures import Future

from unisono.comm.meeting import MeetingError
from unisono.comm.waiting import FIRST_SLEEP_S, LONGEST_SLEEP_S


class ArenaWork(Work):
    """A handle of an operation.

    Arguments:
        result: the tensors that it fills.
        deadline: when waiting for it ends in an error, by `time.monotonic`.
        idle: called while waiting; moves messages on.
        late: called at the deadline; gives the operation up, and says what is missing.
    """

    def __init__(
        self,
        result: list[Tensor],
        deadline: float = float("inf"),
        idle: Callable[["ArenaWork"], None] = lambda work: None,
        late: Callable[[], MeetingError] = lambda: MeetingError("the operation was not over in time"),
    ) -> None:
        super().__init__()
        self._late = late
        self._result = result
        self._deadline = deadline
        self._idle = idle
        self._over = threading.Event()
        self._error: BaseException | None = None
        self._future: Future[list[Tensor]] | None = None
        self._lock = threading.Lock()
        self.source = -1

    def finish(self, error: BaseException | None = None) -> None:
        """The operation is over."""
        with self._lock:
            self._error = error
            self._over.set()
            future = self._future
        if future is not None:
            self._fill(future)

    def _fill(self, future: "Future[list[Tensor]]") -> None:
        if self._error is not None:
            future.set_exception(self._error)  # type: ignore[arg-type]
        else:
            future.set_result(self._result)

    def wait(self, timeout: timedelta | None = None) -> bool:
        """Return once it is over.

        Raises:
            RuntimeError: what it ended in, or that it took too long.
        """
        deadline = self._deadline
        if timeout is not None and timeout.total_seconds() > 0:
            deadline = min(deadline, time.monotonic() + timeout.total_seconds())
        pause = FIRST_SLEEP_S
        while not self._over.is_set():
            self._idle(self)
            if time.monotonic() > deadline:
                raise self._late()
            if not self._over.wait(pause):
                pause = min(pause * 1.5, LONGEST_SLEEP_S)
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """As `wait`."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether it is over."""
        if not self._over.is_set():
            self._idle(self)
        return self._over.is_set()

    def is_success(self) -> bool:
        """Whether it is over, and well."""
        return self._over.is_set() and self._error is None

    def exception(self) -> BaseException | None:
        """What it ended in."""
        return self._error

    def result(self) -> list[Tensor]:
        """The tensors that it filled."""
        return self._result

    def get_future(self) -> "Future[list[Tensor]]":
        """The same as a future."""
        with self._lock:
            if self._future is not None:
                return self._future
            self._future = Future()
            over = self._over.is_set()
        if over:
            self._fill(self._future)
        return self._future

    def source_rank(self) -> int:
        """Who sent what was received."""
        return self.source

    _source_rank = source_rank
