"""A host's servers that are updated in rounds, as workers of other hosts ask for them."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from unisono.comm.calls import Asking, Words
from unisono.comm.waiting import Waiter
from unisono.sync.brought import Brought, Need
from unisono.sync.claims import GivesRounds
from unisono.sync.round_updates import NORM, RoundUpdates, Squares
from unisono.sync.server import Servers
from unisono.sync.serving import PULL, Gate, copied

TAKE, CLAIM, BRING = "take in a round", "claim", "bring"
"""What is asked for, besides values and norms."""


class ServingRounds:
    """What answers one worker.

    Arguments:
        servers: of this host.
        brought: the gradients that count.
        updates: that this thread makes.
        claims: of the pool that decides what counts, where that is on this host.
        squares: of this host; None where nothing is clipped by the norm.
        gate: see there.
        waiter: how this thread waits.
    """

    def __init__(
        self,
        servers: Servers,
        brought: Brought,
        updates: RoundUpdates,
        claims: GivesRounds | None,
        squares: Squares | None,
        gate: Gate,
        waiter: Waiter,
    ) -> None:
        self._servers = servers
        self._brought = brought
        self._updates = updates
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
                self._brought.wait(step, words["round"])
            return copied(self._servers, words["since"])
        if op == BRING:
            if self._brought.receive(step, words["round"], words["unit"], data):
                self._updates.end(step, words["round"])
            return {}, ()
        if op == NORM:
            return {}, [self._norms(step, words["word"])]
        assert self._claims is not None, "what counts is decided on another host"
        if op == TAKE:
            unit, now = self._claims.take(step, words["round"], words["worker"], words["again"])
            return {"unit": unit, "round": now}, ()
        return {"counts": self._claims.claim(step, words["round"], words["worker"], words["unit"])}, ()

    def _norms(self, step: int, word: int) -> Tensor:
        squares = self._squares
        assert squares is not None
        return self._waiter(
            lambda: squares.own(word), f"norms of step {step}", lambda: "this host has not all gradients of the round"
        )


class AskedClaims:
    """The pool of another host (see `GivesRounds`).

    Arguments:
        asking: one of that host's workers.
    """

    def __init__(self, asking: Asking) -> None:
        self._asking = asking

    def take(self, step: int, number: int, worker: int, again: int | None) -> tuple[int | None, int]:
        """See there."""
        about = {"op": TAKE, "step": step, "round": number, "worker": worker, "again": again}
        said = self._ask(f"a unit of round {number} of step {step}", about)
        return said["unit"], said["round"]

    def claim(self, step: int, number: int, worker: int, unit: int) -> bool:
        """See there."""
        about = {"op": CLAIM, "step": step, "round": number, "worker": worker, "unit": unit}
        counts: bool = self._ask(f"end of unit {unit} of step {step}", about)["counts"]
        return counts

    def _ask(self, operation: str, words: Mapping[str, object]) -> Words:
        self._asking.ask(operation, words)
        return self._asking.answer(operation)[0]


class Part:
    """One worker's part in rounds: it asks for units, and brings those that count to the hosts that need them.

    Arguments:
        claims: decides what counts.
        brought: of this host.
        updates: that this worker makes; None where it does not reach the servers of its host.
        elsewhere: of each worker that it asks, what that one's host needs.
    """

    def __init__(
        self,
        claims: GivesRounds,
        brought: Brought,
        updates: RoundUpdates | None,
        elsewhere: Sequence[tuple[Asking, Need]],
    ) -> None:
        self.claims = claims
        self._brought = brought
        self._updates = updates
        self._elsewhere = elsewhere

    def bring(self, step: int, number: int, unit: int, entry: int) -> None:
        """A unit that counts in a round lies in one of this worker's buffers."""
        operation, brought = f"unit {unit} of round {number} of step {step}", self._brought
        partial = brought.view(brought.slot, entry)
        for asking, need in self._elsewhere:
            about = {"op": BRING, "step": step, "round": number, "unit": unit}
            asking.ask(operation, about, list(need.views(partial)))
        if self._updates is not None and brought.bring(step, number, unit, entry):
            self._updates.end(step, number)
        for asking, _ in self._elsewhere:
            asking.answer(operation)
