"""Messages between a worker and whoever keeps its host's arena: JSON over a local socket, descriptors beside it.

The socket is a pair made by the launcher, or an abstract Unix socket whose peer's user is checked. Nothing is pickled.
"""

import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from unisono.comm.descriptor import create_descriptor
from unisono.errors import LaunchError

CONTROL = "UNISONO_CONTROL"
"""Environment: the number of the descriptor that leads to the launcher."""

HOSTS, ADDRESS = "UNISONO_HOSTS", "UNISONO_ADDRESS"
"""Environment: the numbers of workers on each host (see `Hosts.written`); this host's address."""

MEMBERS, JOINS = "UNISONO_MEMBERS", "UNISONO_JOINS"
"""Environment: how many of a host's workers begin, where there is room for more; set for one that joins later."""

ROLLED_BACK = "UNISONO_ROLLED_BACK"
"""Environment: the step that was committed when a worker was lost, for those who start again from a snapshot."""

GENERATION, BEFORE = "UNISONO_GENERATION", "UNISONO_BEFORE"
"""Environment: the number of the hosts that start together, where all start again; who was there before them."""

RUN_DIR = "UNISONO_RUN_DIR"
"""Environment: where the run's records go, as the first of the hosts said, for those who start again."""

SPANS = "UNISONO_SPANS"
"""Environment: set where several launchers are at work, each on a host of its own."""

LONGEST_MESSAGE_BYTES = 1 << 17

Message = dict[str, Any]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; every send is one whole message."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(connection: socket.socket, message: Message, descriptors: Sequence[int] = ()) -> None:
    """Send one message, with descriptors."""
    socket.send_fds(connection, [json.dumps(message).encode()], list(descriptors))


def receive(connection: socket.socket, descriptors: int = 0) -> tuple[Message | None, list[int]]:
    """The next message with up to ``descriptors`` descriptors; None when the other end has closed."""
    try:
        data, received, _, _ = socket.recv_fds(connection, LONGEST_MESSAGE_BYTES, descriptors)
    except ConnectionResetError:
        return None, []
    for descriptor in received:
        os.set_inheritable(descriptor, False)
    if not data:
        return None, []
    message: Message = json.loads(data)
    return message, received


class ArenaKeeper:
    """Makes each arena once, and hands its descriptor to every worker that asks; lives outside all workers."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[int, int]] = {}
        self._released: set[str] = set()
        self._outlives: set[str] = set()

    def answer(self, connection: socket.socket, request: Message) -> None:
        """Reply to ``{"op": "arena", "name": ..., "size_bytes": ..., "rules": ..., "outlives": ...}``.

        ``outlives``: it is kept where all workers start again.
        """
        name, size_bytes = str(request["name"]), int(request["size_bytes"])
        if name in self._released:
            send(connection, {"over": True})
            return
        try:
            if name not in self._kept:
                self._kept[name] = (create_descriptor(size_bytes), size_bytes)
                self._outlives |= {name} if request.get("outlives") else set()
            descriptor, made = self._kept[name]
            if made != size_bytes:
                raise LaunchError(
                    f"workers asked for arenas of {made} and {size_bytes} bytes; "
                    "the model's factory and the configuration must not depend on the rank"
                )
        except (LaunchError, OSError) as error:
            send(connection, {"error": str(error)})
            return
        send(connection, {"op": "arena"}, [descriptor])

    def kept(self) -> dict[str, int]:
        """What outlives workers: names, and sizes in bytes."""
        return {name: self._kept[name][1] for name in sorted(self._outlives) if name in self._kept}

    def descriptor(self, name: str) -> int | None:
        """That of an arena, which stays the keeper's."""
        return self._kept[name][0] if name in self._kept else None

    def release(self, name: str) -> None:
        """Let go of an arena; its memory is freed with the last worker's mapping."""
        if name in self._kept:
            os.close(self._kept.pop(name)[0])
            self._released.add(name)
            self._outlives.discard(name)

    def renew(self) -> None:
        """All workers start again: let go of all but what outlives them."""
        for name in set(self._kept) - self._outlives:
            self.release(name)
        self._released.clear()

    def close(self) -> None:
        """Let go of all."""
        self._outlives.clear()
        self.renew()
