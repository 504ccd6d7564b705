"""How a worker of several hosts waits: with a deadline, and so that every host's error names the one who is missing."""

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import replace
from typing import Any, TypeVar

from unisono.comm.blame import PATIENCE_S, Bulletin
from unisono.comm.host import HostGroup
from unisono.comm.waiting import revoked
from unisono.errors import GroupError, Revoked
from unisono.plan.hosts import Place

T = TypeVar("T")

GRACE_S = PATIENCE_S + 0.6
"""How much longer than the deadline workers wait for a mate that waits for another host: its error names the cause."""


class Patience:
    """One worker's.

    Arguments:
        local: the workers of this host, its mates.
        place: this worker among all.
        bulletin: where members say whom they wait for; None where the others go on without who is missing.
        late: local ranks that have not finished their part of the exchange.
        revoke: ends this generation on this host, for a cause.
    """

    def __init__(
        self,
        local: HostGroup,
        place: Place,
        bulletin: Bulletin | None,
        late: Callable[[], set[int]],
        revoke: Callable[[str], None],
    ) -> None:
        self._local = local
        self._place = place
        self._bulletin = bulletin
        self._late = late
        self._revoke = revoke

    def wait(self, ready: Callable[[], T | None], running: "Future[Any] | None", operation: str) -> T:
        """Wait for what this worker's exchange thread does, or for what a mate's leads to.

        Raises:
            GroupError: the thread's own, or the first that this wait meets with; the others are told, and freed.
        """
        waiter = self._local.interruptible
        deadline = time.monotonic() + waiter.deadline_s

        def ready_or_failed() -> T | None:
            error = running.exception() if running is not None and running.done() else None
            if isinstance(error, Revoked):
                raise Revoked(revoked(operation, self._local.cause()))
            if error is not None:
                raise error
            if time.monotonic() > deadline:
                self._suspect_mates(operation)
            return ready()

        pending: list[Future[Any]] = [running] if running is not None else []

        def doze(seconds: float) -> None:
            if all(future.done() for future in pending):
                time.sleep(seconds)
            else:
                wait(pending, seconds)

        with self.telling():
            patient = replace(waiter, deadline_s=waiter.deadline_s + GRACE_S, sleep=doze)
            return patient(ready_or_failed, operation, self._unfinished)

    @contextlib.contextmanager
    def telling(self) -> Iterator[None]:
        """An error of the group that this worker meets with is told to the others, and frees them."""
        try:
            yield
        except GroupError as error:
            self.tell(error)
            self._revoke(str(error))
            raise

    def tell(self, error: BaseException) -> None:
        """Post why this worker ends; one that was freed by a mate says what that one met with."""
        if self._bulletin is None:
            return
        said = self._local.cause() if isinstance(error, Revoked) else ""
        kind = "" if isinstance(error, GroupError) else f"{type(error).__name__}: "
        self._bulletin.post(None, said or f"{kind}{error}")

    def _suspect_mates(self, operation: str) -> None:
        """Other hosts that wait for this worker must learn that it waits itself, before its patience ends."""
        late = self._late()
        if self._bulletin is not None and late and self._place.local_rank not in late:
            suspect = self._place.hosts.rank(self._place.host, min(late))
            self._bulletin.post(suspect, f"waited for {self._place.hosts.name(suspect)} in {operation}")

    def _unfinished(self) -> str:
        """Which mates have not finished their part of an exchange."""
        late = self._late()
        if self._place.local_rank in late or not late:
            return "the exchange with other hosts is not complete"
        return "; ".join(
            self._local.describe(local_rank) + " has not exchanged its buckets" for local_rank in sorted(late)
        )
