"""A thread that does one thing after another for a worker, and can be left behind where a transport holds it up."""

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_S = 0.5
"""Between two looks at whether a thread that does not end is held up."""


class Background:
    """One thread.

    Arguments:
        name: of the thread.
        begin: called first, on it.

    Example:
        >>> background = Background("example", lambda: None)
        >>> background.submit(lambda: 6 * 7).result()
        42
        >>> background.close(lambda: False)
    """

    def __init__(self, name: str, begin: Callable[[], None]) -> None:
        self._waiting: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._begin = begin
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> "Future[T]":
        """Do something when what was submitted before is done."""
        future: Future[T] = Future()
        self._waiting.put((future, work))
        return future

    def _run(self) -> None:
        self._begin()
        while (item := self._waiting.get()) is not None:
            future, work = item
            future.set_running_or_notify_cancel()
            try:
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)
            del item, future, work  # and with them what they hold, until there is more to do

    def close(self, held_up: Callable[[], bool]) -> None:
        """Wait until all is done; a thread that is held up, and does nothing when it is let go, is left behind."""
        self._waiting.put(None)
        while self._thread.is_alive():
            self._thread.join(PATIENCE_S)
            if self._thread.is_alive() and held_up():
                return
