"""Which of a worker's buckets are final, and whether the sums of those before have come: in a step or its rounds."""

import threading
from collections.abc import Callable, Sequence

from unisono.comm.exchange import Words
from unisono.comm.words import store_fence
from unisono.plan.exchange import Bucket

BUCKETS_WAITING = 1
"""In rounds, how many buckets of a gradient may wait for the link before its backward does."""

Wait = Callable[[Callable[[], bool | None], str], object]
"""(ready, operation): returns when ready returns True."""


class Readiness:
    """Follows one worker's backward, bucket by bucket.

    Arguments:
        words: through which the host's workers follow an exchange.
        slot: this worker's.
        buckets: of its team, in the order in which they leave.
        rounds: of a step; 0 where a step's gradients leave once.
        wait: for the exchange.

    Attributes:
        over: the last step of which this worker has computed everything.
        stirred: a bucket has become final, or a step is over.
    """

    def __init__(self, words: Words, slot: int, buckets: Sequence[Bucket], rounds: int, wait: Wait) -> None:
        self._words = words
        self._slot = slot
        self._buckets = buckets
        self._rounds = rounds
        self._wait = wait
        self._bucket_of = {use: bucket.index for bucket in buckets for use in bucket.uses}
        self._step, self._round = 0, 0
        self._left: dict[int, int] = {}  # bucket -> uses whose gradient is not final
        self.over = 0
        self.stirred = threading.Event()

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self._round = step, 0
        self._left = {bucket.index: len(bucket.uses) for bucket in self._buckets}

    def turn(self, number: int) -> int:
        """The number of a round among those of all steps; without rounds, that of the step."""
        return self._step * self._rounds + number if self._rounds else self._step

    @property
    def last_turn(self) -> int:
        """That of the step's last round."""
        return self.turn(self._rounds - 1)

    def gradient_is_final(self, use: int) -> None:
        """Count down the uses of a bucket; the last one sends it on its way."""
        bucket = self._bucket_of.get(use)
        if bucket is None:  # of a replica that trains apart
            return
        left = self._left.get(bucket, 0) - 1
        self._left[bucket] = left
        if left == 0:
            self._is_final(bucket)

    def end(self) -> None:
        """The step's or the round's last gradient has come: what none has come for is final too."""
        for bucket in list(self._left):
            self._is_final(bucket)
        if self._rounds:
            self._round += 1
            self._left = {bucket.index: len(bucket.uses) for bucket in self._buckets}
        if self._round == self._rounds:
            self.over = self._step
            self.stirred.set()

    def _is_final(self, bucket: int) -> None:
        del self._left[bucket]
        store_fence()
        self._words.set_ready(self._slot, bucket, self.turn(self._round))
        self.stirred.set()
        if self._rounds:  # who computes faster than the link carries would pile gradients up
            first_left = min(self._left, default=len(self._buckets))
            self.await_summed(first_left - BUCKETS_WAITING, self._round)

    def await_summed(self, count: int, number: int) -> None:
        """Wait until the first buckets of a round of this step have been summed."""
        turn = self.turn(number)

        def summed() -> bool | None:
            return True if all(self._words.summed(bucket, turn) for bucket in range(count)) else None

        self._wait(summed, f"exchange of the first {count} buckets of step {self._step}")
