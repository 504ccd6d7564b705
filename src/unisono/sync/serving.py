"""A host's servers, as workers ask for them that do not share its memory: on the threads of those of its workers who
answer, or in processes that do nothing else."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from unisono.comm.calls import Words
from unisono.errors import Revoked, WaitTimeout
from unisono.sync.messages import Received
from unisono.sync.server import Push, Servers
from unisono.sync.turns import GivesUnits

PULL, PUSH, TAKE, OVER = "pull", "push", "take", "over"
"""What is asked for."""
LOOK_S = 0.05


class Gate:
    """Nothing of a step is answered before all workers of this host are in it: until then they may copy the state.

    Arguments:
        deadline_s: seconds that a wait may take.
        revoked: whether nothing is to be waited for any more.
    """

    def __init__(self, deadline_s: float, revoked: Callable[[], bool]) -> None:
        self._deadline_s = deadline_s
        self._revoked = revoked
        self._step = 0
        self._changed = threading.Condition()

    def open(self, step: int) -> None:
        """All are in a step."""
        with self._changed:
            self._step = step
            self._changed.notify_all()

    def wait(self, step: int) -> None:
        """Wait until all are.

        Raises:
            WaitTimeout: where they are not in time.
            Revoked: where they will not be.
        """
        until = time.monotonic() + self._deadline_s
        with self._changed:
            while self._step < step:
                if self._revoked():
                    raise Revoked(f"the group was revoked before step {step} began")
                if time.monotonic() > until:
                    raise WaitTimeout(f"not all workers of this host have begun step {step} in {self._deadline_s:g} s")
                self._changed.wait(LOOK_S)


def copied(servers: Servers, since: Sequence[tuple[int, int]]) -> tuple[Words, list[Tensor]]:
    """What servers have, as words and bytes.

    Arguments:
        since: the number of each, and the version that the other has.
    """
    said: list[dict[str, Any]] = []
    parts: list[Tensor] = []
    for number, version in since:
        now, found = servers.copy(number, version)
        said.append({"version": now, **(found.words if found is not None else {})})
        parts += found.parts if found is not None else []
    return {"servers": said}, parts


class Serving:
    """What answers one worker.

    Arguments:
        servers: of this host.
        turns: of the pool, where that is on this host.
        gate: see there.
        entries: of the model's buffers.
    """

    def __init__(self, servers: Servers, turns: GivesUnits | None, gate: Gate, entries: Sequence[int]) -> None:
        self._servers = servers
        self._turns = turns
        self._gate = gate
        self._entries = entries

    def __call__(self, words: Words, data: Tensor) -> tuple[Words, Sequence[Tensor]]:
        """Do what is asked for."""
        self._gate.wait(words["step"])
        if words["op"] == PULL:
            return copied(self._servers, words["since"])
        if words["op"] == PUSH:
            self._push(words, data)
            return {}, ()
        assert self._turns is not None, "the pool is on another host"
        if words["op"] == TAKE:
            return {"unit": self._turns.take(words["step"], words["worker"])}, ()
        self._turns.over(words["step"], words["worker"])
        return {}, ()

    def _push(self, words: Words, data: Tensor) -> None:
        push = Push(words["unit"], words["worker"], tuple(words["read"]), words["factor"], words["step"])
        at = words["entries"]
        touched = data[:at].numpy().view(np.bool_)
        for number, own in words["servers"]:
            server, updater = self._servers.parts[number], self._servers.updater
            received = Received.read(server, updater, words, touched, own, data[at:], self._entries)
            at += received.size_bytes
            self._servers.take(number, push, received)
