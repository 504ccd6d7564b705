"""Locks that the workers of a host share: bytes of the arena's descriptor, locked by the kernel.

A lock is let go of when its holder dies, so whoever comes next can put right what was begun under it.
"""

import fcntl
import os

from unisono.comm.waiting import Waiter


class Locks:
    """A worker's.

    Arguments:
        descriptor: of memory that all workers of the host share, which this closes in the end; None where a worker is
            alone, and nobody else could hold a lock.
        waiter: how it waits.
    """

    def __init__(self, descriptor: int | None, waiter: Waiter) -> None:
        self._descriptor = descriptor
        self._waiter = waiter

    def hold(self, number: int, operation: str) -> None:
        """Wait for a lock, and hold it."""
        self._waiter(lambda: self._try(number) or None, operation, lambda: "another worker holds it")

    def let_go(self, number: int) -> None:
        """Let go of a lock that this worker holds."""
        if self._descriptor is not None:
            fcntl.lockf(self._descriptor, fcntl.LOCK_UN, 1, number)

    def _try(self, number: int) -> bool:
        if self._descriptor is None:
            return True
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, number)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let go of everything."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None
