"""A parameter server some of whose parts are elsewhere: their workers are asked for them, all at the same time."""

from collections.abc import Sequence

from unisono.comm.calls import Asking, Words
from unisono.sync.messages import announced, pushed, put_copied
from unisono.sync.pulled import PulledValues
from unisono.sync.server import Servers
from unisono.sync.serving import PULL, PUSH, Gate
from unisono.sync.sums import Gradient


class SpreadServers:
    """All servers, as one worker sees them.

    Arguments:
        here: those that it reaches itself, and with what it knows of all others.
        worker: its number.
        elsewhere: of each worker that it asks, the servers.
        values: what this worker computes with.
        gate: to be opened as it begins a step.
        entries: of the model's buffers.
    """

    def __init__(
        self,
        here: Servers,
        worker: int,
        elsewhere: Sequence[tuple[Asking, Sequence[int]]],
        values: PulledValues,
        gate: Gate,
        entries: Sequence[int],
    ) -> None:
        self._here = here
        self._worker = worker
        self._elsewhere = elsewhere
        apart = {number for _, numbers in elsewhere for number in numbers}
        self._direct = [number for number in range(here.count) if number not in apart]
        self._values = values
        self._gate = gate
        self._entries = entries
        self._step = 0

    def begin(self, step: int) -> None:
        """Let the pool be that of a step, in which all workers of this host are."""
        self._here.begin(step)
        self._step = step
        self._gate.open(step)

    def end(self, step: int) -> None:
        """As of `Servers`."""

    def pull_all(self) -> None:
        """Compute with what the servers have."""
        self.pull()

    def pull(self, about: Words | None = None) -> None:
        """Compute with what the servers have now.

        Arguments:
            about: what else others are to know.
        """
        read, operation = self._here.read, f"pull in step {self._step}"
        for asking, numbers in self._elsewhere:
            since = [[number, read[number]] for number in numbers]
            asking.ask(operation, {"op": PULL, "step": self._step, "since": since, **(about or {})})
        for number in self._direct:
            self._here.pull_from(number)
        for asking, numbers in self._elsewhere:
            words, data = asking.answer(operation)
            at = 0
            for number, said in zip(numbers, words["servers"], strict=True):
                if "rows" in said:
                    at += put_copied(self._here.parts[number], self._values, read[number], said, data[at:])
                read[number] = said["version"]

    def push(self, unit: int, sums: Gradient, factor: float, step: int) -> None:
        """Update every server by a unit's gradient, made smaller by ``factor``."""
        operation = f"push {unit} in step {step}"
        push = self._here.push_of(unit, factor, step)
        general, touched = announced(sums)
        about = {"op": PUSH, "step": step, "unit": unit, "worker": self._worker, "read": push.read, "factor": factor}
        for asking, numbers in self._elsewhere:
            told, parts = [], [touched]
            for number in numbers:
                words, own = pushed(self._here.parts[number], self._here.updater, sums, self._entries)
                told.append([number, words])
                parts += own
            asking.ask(operation, {**about, **general, "entries": len(touched), "servers": told}, parts)
        for number in self._direct:
            self._here.take(number, push, sums)
        for asking, _ in self._elsewhere:
            asking.answer(operation)

    def norm(self, sums: Gradient) -> float:
        """The norm of a unit's gradient."""
        return self._here.norm(sums)

    def rate(self, step: int) -> float:
        """The learning rate in a step, before damping."""
        return self._here.rate(step)
