"""What a set of workers is started with, and how it ended: as data."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from unisono.launch.control import Message
from unisono.plan.hosts import Hosts

STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


@dataclass(frozen=True, slots=True)
class Elastic:
    """How many workers a run may have while it trains: from ``least`` to ``most``, and spares that wait besides."""

    least: int
    most: int
    spares: int = 0


@dataclass(frozen=True, slots=True)
class Task:
    """What workers are started with, and again those who come later.

    Attributes:
        target: what each of them does.
        hosts: the workers that each host has room for.
        first: the rank of this host's first.
        environment: variables for all.
        workers: of this host, that begin; where hosts are played, of all of them.
        elastic: how many there may be later.
        together: workers that make a replica.
        show_all: every worker's output is shown, not only rank 0's.
        output: the descriptor that it goes to.
    """

    target: Message
    hosts: Hosts
    first: int
    environment: Mapping[str, str]
    workers: int
    elastic: Elastic
    together: int = 1
    show_all: bool = False
    output: int = STANDARD_OUTPUT

    @property
    def places(self) -> range:
        """The ranks that this host has room for, where it is the only one."""
        return range(self.first, self.first + self.hosts.sizes[self.hosts.place(self.first)[0]])


@dataclass(slots=True)
class Ending:
    """How a set of workers ended in good order.

    Attributes:
        results: by rank; a worker that was lost, or that left before the end, has none.
        interrupted: the user had asked to stop.
        preempted: a scheduler, or a notice, had.
    """

    results: list[Any]
    interrupted: bool = False
    preempted: bool = False

    @property
    def result(self) -> Any:
        """That of the first worker that has one."""
        return next((result for result in self.results if result is not None), None)
