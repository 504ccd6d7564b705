"""The end of a round on one of several hosts: its servers are updated by the mean of the gradients that count."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unisono.comm.calls import Asking
from unisono.comm.numbers import ArenaNumbers
from unisono.comm.partial import Partial
from unisono.optim.clipping import global_norm
from unisono.plan.assignment import Run
from unisono.sync.brought import Brought
from unisono.sync.server import Servers
from unisono.sync.sums import Gradient, StepSums

NORM = "norm"
"""What hosts ask each other for: the squared norms of their blocks."""


@dataclass(slots=True)
class Squares:
    """The squared norms of a round's gradient, block by block, of which each host computes those of its servers.

    Attributes:
        numbers: of this host.
        runs: of its servers.
        others: a worker of each other host.
    """

    numbers: ArenaNumbers
    runs: Sequence[Run]
    others: list[Asking]
    _asking: threading.Lock = field(default_factory=threading.Lock)

    def put(self, round_word: int, run: Run, values: Sequence[float]) -> None:
        """Those of a run are known."""
        self.numbers.put(round_word, run, values)

    def own(self, round_word: int) -> Tensor | None:
        """This host's; None until they are known."""
        if not all(self.numbers.has(round_word, run) for run in self.runs):
            return None
        everything = self.numbers.all(round_word)
        found = [value for run in self.runs for value in everything[run.first : run.stop]]
        return torch.tensor(found, dtype=torch.float64)

    def all(self, step: int, round_word: int) -> list[float]:
        """Everyone's."""
        operation = f"norms of step {step}"
        with self._asking:
            for asking in self.others:
                asking.ask(operation, {"op": NORM, "step": step, "word": round_word})
            theirs = [asking.answer(operation)[1].view(torch.float64) for asking in self.others]
        own = self.own(round_word)
        assert own is not None
        return [value for part in (own, *theirs) for value in part.tolist()]


class RoundUpdates:
    """Those that one thread makes.

    Arguments:
        servers: with memory of this thread's.
        numbers: of the servers that live here.
        brought: the gradients that count.
        together: what units, in order, come to.
        clipped: (gradient, what knows its norm, step) -> by what clipping makes it smaller.
        squares: for clipping; None where nothing is clipped by the norm.

    Attributes:
        servers: see there.
    """

    def __init__(
        self,
        servers: Servers,
        numbers: Sequence[int],
        brought: Brought,
        together: Callable[[Sequence[Partial]], StepSums],
        clipped: Callable[[StepSums, "RoundUpdates", int], float],
        squares: Squares | None,
    ) -> None:
        self.servers = servers
        self._numbers = numbers
        self._brought = brought
        self._together = together
        self._clipped = clipped
        self._squares = squares
        self._step = self._word = 0

    def end(self, step: int, number: int) -> None:
        """Bring this host's servers to the end of a round that is whole."""
        pool, servers = self._brought.pool, self.servers
        with torch.no_grad():
            sums = self._together(self._brought.partials(number))
            self._step, self._word = step, 1 + pool.version(self._numbers[0], number)
            factor = self._clipped(sums, self, step)
            versions = [pool.version(server, number) for server in range(servers.count)]
            servers.update_all(versions, pool.busy, sums, factor, step, 0, self._numbers)
        self._brought.end(step, number, sums.loss, sums.weight)

    def norm(self, sums: Gradient) -> float:
        """The norm of a round's gradient, over all hosts."""
        assert self._squares is not None
        for number in self._numbers:
            for run, values in self.servers.squares(number, sums):
                self._squares.put(self._word, run, values)
        return global_norm(self._squares.all(self._step, self._word))
