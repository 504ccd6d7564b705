"""A host's servers that are updated in rounds, as workers of other hosts ask for them."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor

from unisono.comm.calls import Words
from unisono.comm.waiting import Waiter
from unisono.errors import GroupError
from unisono.sync.brought import BRING, Brought
from unisono.sync.claims import CLAIM, TAKE_IN_ROUND, GivesRounds
from unisono.sync.round_updates import NORM, RoundUpdates, Squares
from unisono.sync.serving import PULL, Gate, copied


class ServingRounds:
    """What answers one worker.

    Arguments:
        updates: makes those of this thread, where it has to.
        brought: the gradients that count.
        claims: of the pool that decides what counts, where that is on this host.
        squares: of this host; None where nothing is clipped by the norm.
        gate: see there.
        waiter: how this thread waits.
    """

    def __init__(
        self,
        updates: Callable[[], RoundUpdates],
        brought: Brought,
        claims: GivesRounds | None,
        squares: Squares | None,
        gate: Gate,
        waiter: Waiter,
    ) -> None:
        self._updates = functools.cache(updates)
        self._brought = brought
        self._claims = claims
        self._squares = squares
        self._gate = gate
        self._waiter = waiter

    def __call__(self, words: Words, data: Tensor) -> tuple[Words, Sequence[Tensor]]:
        """Do what is asked for."""
        op, step = words["op"], words["step"]
        self._gate.wait(step)
        if op == PULL:
            if "round" in words:
                self._brought.wait(step, words["round"], self._waiter)
            return copied(self._updates().servers, words["since"])
        if op == BRING:
            if self._brought.receive(step, words["round"], words["unit"], data):
                self._updates().end(step, words["round"])
            return {}, ()
        if op == NORM and self._squares is not None:
            return {}, [self._norms(step, words["word"], self._squares)]
        if op == TAKE_IN_ROUND and self._claims is not None:
            unit, now = self._claims.take(step, words["round"], words["worker"], words["again"])
            return {"unit": unit, "round": now}, ()
        if op == CLAIM and self._claims is not None:
            return {"counts": self._claims.claim(step, words["round"], words["worker"], words["unit"])}, ()
        raise GroupError(f"{op!r} is not for this host")

    def _norms(self, step: int, word: int, squares: Squares) -> Tensor:
        return self._waiter(
            lambda: squares.own(word), f"norms of step {step}", lambda: "this host has not all gradients of the round"
        )
