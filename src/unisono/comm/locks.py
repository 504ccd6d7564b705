"""Locks that the workers of a host share: bytes of the arena's descriptor, locked by the kernel.

A lock is let go of when its holder dies, so whoever comes next can put right what was begun under it. One that a thread
of a living worker was holding as it failed stays held: what is half done is nobody's to use.
"""

import contextlib
import fcntl
import os
import threading
from collections.abc import Iterator

from unisono.comm.waiting import Waiter
from unisono.errors import Revoked


class Locks:
    """A worker's, and its threads'.

    Arguments:
        descriptor: of memory that all workers of the host share, which this closes in the end; None where a worker is
            alone, and nobody else could hold a lock.
        waiter: how the worker waits; its threads wait alike, but what they do says nothing of the worker.
    """

    def __init__(self, descriptor: int | None, waiter: Waiter) -> None:
        self._alone = descriptor is None
        self._descriptor = descriptor
        self._waiter = waiter.of_worker()
        self._of_threads: dict[int, threading.Lock] = {}  # to the kernel all threads are one holder

    @contextlib.contextmanager
    def held(self, number: int, operation: str) -> Iterator[None]:
        """Hold a lock meanwhile; where something fails, it stays held."""
        self.hold(number, operation)
        yield
        self.let_go(number)

    def hold(self, number: int, operation: str) -> None:
        """Wait for a lock, and hold it."""
        self._waiter(lambda: self._try(number) or None, operation, lambda: "another holds it")

    def let_go(self, number: int) -> None:
        """Let go of a lock that this thread holds."""
        if not self._alone:
            fcntl.lockf(self._open(), fcntl.LOCK_UN, 1, number)
        self._of_threads[number].release()

    def _try(self, number: int) -> bool:
        own = self._of_threads.setdefault(number, threading.Lock())
        if not own.acquire(blocking=False):
            return False
        if self._alone:
            return True
        try:
            fcntl.lockf(self._open(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            own.release()
            return False
        return True

    def _open(self) -> int:
        """The descriptor; its number may be another file's as soon as it is closed.

        Raises:
            Revoked: where it is.
        """
        descriptor = self._descriptor
        if descriptor is None:
            raise Revoked("this worker ends, and its threads with it")
        return descriptor

    def close(self) -> None:
        """Let go of everything."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
