"""Which worker this process is: read from the environment, once, and passed on."""

import functools
import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from unisono.errors import LaunchError
from unisono.launch.control import receive, send
from unisono.launch.keeper import connect

CONTROL = "UNISONO_CONTROL"
"""Environment: the number of the descriptor that leads to the launcher."""


@dataclass(slots=True)
class World:
    """A worker's place among all workers of the run, and its line to whoever keeps the arena.

    Attributes:
        rank, size: this worker's number, and how many there are.
        control: the line; None for a world of one.
        launcher: "unisono", "torchrun" or "python".
    """

    rank: int
    size: int
    control: socket.socket | None
    launcher: str
    _arenas: int = 0

    def arena(self, size_bytes: int) -> int | None:
        """The descriptor of the next arena, the same for all workers; None where memory need not be shared.

        Raises:
            LaunchError: where it cannot be had.
        """
        if self.size == 1:
            return None
        assert self.control is not None
        self._arenas += 1
        send(self.control, {"op": "arena", "name": f"arena {self._arenas}", "size_bytes": size_bytes})
        reply, descriptors = receive(self.control, 1)
        if reply is None:
            raise LaunchError("the process that keeps the shared memory is gone; start the run again")
        if "error" in reply:
            raise LaunchError(reply["error"])
        return descriptors[0]

    def release_arena(self) -> None:
        """Training is over: the keeper may let go of the last arena, so that its memory ends with the workers' maps."""
        if self.control is not None and self.rank == 0 and self._arenas:
            send(self.control, {"op": "release", "name": f"arena {self._arenas}"})


def in_notebook() -> bool:
    """Whether this process is a notebook's kernel."""
    return "ipykernel" in sys.modules


@functools.cache
def this_process() -> World:
    """This process's world: one line to the arena's keeper, however many times it trains."""
    return discover(os.environ)


def discover(environ: Mapping[str, str]) -> World:
    """This process's world, from the environment that ``unisono run``, ``torchrun`` or nobody has set.

    Raises:
        LaunchError: for an environment that describes more than one host.
    """
    size = int(environ.get("WORLD_SIZE", "1"))
    rank = int(environ.get("RANK", "0"))
    if CONTROL in environ:
        control = socket.socket(fileno=os.dup(int(environ[CONTROL])))
        return World(rank, size, control, "unisono")
    if size == 1:
        return World(0, 1, None, "python")
    local = int(environ.get("LOCAL_WORLD_SIZE", size))
    if local != size:
        raise LaunchError(
            f"{size} workers on several hosts ({local} on this one); one host is what this version can use: "
            f"torchrun --nnodes 1 --nproc-per-node {local}"
        )
    return World(rank, size, connect(environ, rank), "torchrun")
