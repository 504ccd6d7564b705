"""Locks that the workers of a host share: bytes of the arena's descriptor, locked by the kernel.

A lock is let go of when its holder dies, so whoever comes next can put right what was begun under it.
"""

import fcntl
import os
import threading

from unisono.comm.waiting import Waiter


class Locks:
    """A worker's, and its threads'.

    Arguments:
        descriptor: of memory that all workers of the host share, which this closes in the end; None where a worker is
            alone, and nobody else could hold a lock.
        waiter: how it waits.
    """

    def __init__(self, descriptor: int | None, waiter: Waiter) -> None:
        self._descriptor = descriptor
        self._waiter = waiter
        self._of_threads: dict[int, threading.Lock] = {}  # to the kernel all threads are one holder

    def hold(self, number: int, operation: str) -> None:
        """Wait for a lock, and hold it."""
        self._waiter(lambda: self._try(number) or None, operation, lambda: "another worker holds it")

    def let_go(self, number: int) -> None:
        """Let go of a lock that this thread holds."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)
        self._of_threads[number].release()

    def _try(self, number: int) -> bool:
        own = self._of_threads.setdefault(number, threading.Lock())
        if not own.acquire(blocking=False):
            return False
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            own.release()
            return False
        return True

    def close(self) -> None:
        """Let go of everything."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
