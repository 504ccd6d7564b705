"""A host's servers, as workers ask for them that do not share its memory: on the threads of those of its workers who
answer, or in processes that do nothing else."""

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from torch import Tensor

from unisono.comm.calls import Words
from unisono.comm.waiting import Waiter
from unisono.errors import GroupError
from unisono.sync.messages import Received
from unisono.sync.server import Push, Servers
from unisono.sync.turns import OVER, TAKE, WHO, GivesUnits

PULL, PUSH = "pull", "push"
"""What is asked for."""
LOOK_S = 0.05
"""How often a thread that waits looks whether it is to go on waiting."""


class Gate:
    """Nothing of a step is answered before all workers of this host are in it: until then they may copy the state.

    Arguments:
        waiter: of the group.
    """

    def __init__(self, waiter: Waiter) -> None:
        self._waiter = waiter
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

        def doze(seconds: float) -> None:
            with self._changed:
                if self._step < step:
                    self._changed.wait(LOOK_S)

        waiter = replace(self._waiter.of_thread(), sleep=doze)
        waiter(
            lambda: True if self._step >= step else None,
            f"begin of step {step}",
            lambda: "not all workers of this host are in it",
        )


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
        if words["op"] == TAKE and self._turns is not None:
            return {"unit": self._turns.take(words["step"], words["worker"])}, ()
        if words["op"] == OVER and self._turns is not None:
            self._turns.over(words["step"], words["worker"])
            return {}, ()
        if words["op"] == WHO and self._turns is not None:
            return {"units": [*self._turns.under_way(words["step"]).items()]}, ()
        raise GroupError(f"{words['op']!r} is not for this host")

    def _push(self, words: Words, data: Tensor) -> None:
        push = Push(words["unit"], words["worker"], tuple(words["read"]), words["factor"], words["step"])
        at = words["entries"]
        touched = data[:at].numpy().view(np.bool_)
        for number, own in words["servers"]:
            server, updater = self._servers.parts[number], self._servers.updater
            received = Received.read(server, updater, words, touched, own, data[at:], self._entries)
            at += received.size_bytes
            self._servers.take(number, push, received)
