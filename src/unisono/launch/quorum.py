"""Whether enough hosts are left to decide who goes on: what a launcher tells its user, and what it is told."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from unisono.errors import ConfigurationError, WorkerFailed
from unisono.fault.rules import Rules
from unisono.launch.nodes import Nodes

DIRECTORY = "membership"
"""In the run's directory: each host's vote."""


@dataclass(slots=True)
class Quorum:
    """As one host's launcher sees it.

    Arguments:
        nodes: the launchers of all hosts.
        rules: of what is trained.
        say: tells the user something.

    Attributes:
        failure: why the run cannot go on.
    """

    nodes: Nodes
    rules: Rules
    say: Callable[[str], None] = field(default=lambda text: print(f"unisono: {text}", file=sys.stderr, flush=True))
    failure: WorkerFailed | None = None
    _waiting: tuple[int, ...] = ()

    @property
    def run_dir(self) -> Path | None:
        """Where the run's records go."""
        found = self.nodes.run_dir or self.rules.run_dir
        return Path(found) if found is not None else None

    def begin(self) -> None:
        """From now on hosts may be lost."""
        self.nodes.survive(self.run_dir / DIRECTORY if self.run_dir else None, self.rules.host_deadline_s)

    def look(self, members: Sequence[int]) -> None:
        """Say for whom it waits, where too few of those who trained together are left."""
        waiting = tuple(self.nodes.waits_for())
        if waiting == self._waiting:
            return
        self._waiting = waiting
        if not waiting:
            return
        few = f"only part of {named(members)} is left, too few to decide who goes on: without {named(waiting)}"
        if self.rules.on_tie == "stop":
            self.failure = WorkerFailed(f"{few} (fault.on_tie=stop); resume from the newest checkpoint (--resume)")
            return
        number = " or ".join(map(str, waiting))
        self.say(f"{few} nothing is trained; waiting for the link, or for: unisono fence {number} {self.run_dir}")

    def fence(self, host: int) -> str:
        """Somebody vouches for a host being dead.

        Raises:
            ConfigurationError: where it is this one, none of them, or heard.
        """
        coordination = self.nodes.coordination
        assert coordination is not None
        if host == self.nodes.number or host not in coordination.current.hosts:
            known = ", ".join(map(str, coordination.current.hosts))
            raise ConfigurationError(f"host {host} cannot be fenced on host {self.nodes.number}; the hosts are {known}")
        if coordination.is_heard(host, self.nodes.clock()):
            raise ConfigurationError(f"host {host} is not dead: host {self.nodes.number} hears it; end it before")
        coordination.fence(host)
        return f"host {host} counts as dead"


def named(numbers: Sequence[int]) -> str:
    """Hosts for a reader.

    >>> named([1]), named((0, 2))
    ('host 1', 'hosts 0, 2')
    """
    return f"host{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"


def changed(before: Sequence[int], now: Sequence[int]) -> list[str]:
    """Who is lost and who has come, for a reader.

    >>> changed((0, 1, 2), (0, 2, 3))
    ['host 1 lost', 'host 3 joined']
    """
    lost, joined = sorted(set(before) - set(now)), sorted(set(now) - set(before))
    return ([f"{named(lost)} lost"] if lost else []) + ([f"{named(joined)} joined"] if joined else [])
