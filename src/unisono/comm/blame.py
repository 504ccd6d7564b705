"""Who is to blame when an exchange fails: survivors tell each other whom they waited for, and follow the chain.

A member that only waits for someone else must not be named in place of that one. Whoever meets with an error posts its
suspect; whoever has posted is alive; the chain of suspects ends at the one that has not.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch._C._distributed_c10d import Store

from unisono.errors import GroupError, LaunchError, PeerLost, WaitTimeout
from unisono.plan.hosts import Hosts

PATIENCE_S = 0.6
"""How long a suspect's own post is waited for: all survivors meet their deadlines at about the same time."""


@dataclass(slots=True)
class Bulletin:
    """Where the members of one generation post whom they suspect.

    Attributes:
        store: shared by all; a failing one is no error, then the first suspect is named.
        hosts, rank: the members, and this one.
        name: of the generation.
    """

    store: Store
    hosts: Hosts
    rank: int
    name: str
    clock: Callable[[], float] = time.monotonic
    posted: bool = False

    def post(self, suspect: int | None, text: str) -> None:
        """Say whom this member waited for in vain, or in a sentence what else ended it; the first post stays."""
        if self.posted:
            return
        self.posted = True
        try:
            self.store.set(self._key(self.rank), json.dumps({"suspect": suspect, "text": text}))
        except (RuntimeError, LaunchError):
            return

    def explain(self, suspect: int, operation: str, deadline: str) -> GroupError:
        """The error for a wait for ``suspect`` that failed; ``deadline`` is empty where the connection broke."""
        what = f"waited for {self.hosts.name(suspect)} in {operation}"
        self.post(suspect, what)
        chain, last = self._follow(suspect)
        culprit = chain[-1]
        kind = WaitTimeout if deadline else PeerLost
        how = f"{operation} on {self.hosts.name(self.rank)}: "
        if last is not None and last["suspect"] is not None:
            a, b = sorted((chain[-2] if len(chain) > 1 else self.rank, culprit))
            return kind(
                f"{how}{self.hosts.name(a)} and {self.hosts.name(b)} are both alive but do not reach each other "
                f"({deadline or 'connection lost'}); look at the network between them"
            )
        if last is not None:
            return kind(f"{how}{self.hosts.name(culprit)} ended: {last['text']}")
        if deadline:
            return kind(f"{how}{self.hosts.name(culprit)} did not answer ({deadline}); is it stopped, or cut off?")
        return kind(f"{how}{self.hosts.name(culprit)} is gone (connection lost)")

    def _follow(self, suspect: int) -> tuple[list[int], dict[str, Any] | None]:
        """The chain of suspects, and the last one's post: None where it has not posted, with a suspect for a circle."""
        until = self.clock() + PATIENCE_S
        while True:
            chain, seen = [suspect], {self.rank, suspect}
            while True:
                said = self._read(chain[-1])
                if said is None or said["suspect"] is None:
                    break
                if said["suspect"] in seen:
                    return chain, said
                chain.append(said["suspect"])
                seen.add(said["suspect"])
            if said is not None or self.clock() > until:
                return chain, said
            time.sleep(0.01)

    def _read(self, rank: int) -> dict[str, Any] | None:
        try:
            if not self.store.check([self._key(rank)]):
                return None
            said: dict[str, Any] = json.loads(self.store.get(self._key(rank)))
        except (RuntimeError, LaunchError):
            return None
        return said

    def _key(self, rank: int) -> str:
        return f"{self.name}/suspect/{rank}"
