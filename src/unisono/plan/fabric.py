"""Messages that share links: each gets an equal part of every link that it takes, as long as they last.

Links are those of nodes, out and in, and the spine that all cross. A flow may stand for several that are alike.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

Link = Hashable


@dataclass(slots=True)
class Flow:
    """A message on its way.

    Attributes:
        links: that it takes.
        alike: how many messages it stands for, on links that they all take.
        left: bytes of each that have not arrived, when ``since`` was.
        rate: bytes a second of each.
        version: of its rate, which the time of its arrival belongs to.
    """

    links: tuple[Link, ...]
    alike: Mapping[Link, int]
    left: float
    since: float
    rate: float = 0.0
    version: int = 0


@dataclass(slots=True)
class Fabric:
    """Links and what is on them.

    Attributes:
        rates: bytes a second of each link.
    """

    rates: Mapping[Link, float]
    _on: dict[Link, dict[int, Flow]] = field(default_factory=dict)

    def begin(self, now: float, flow: Flow) -> list[Flow]:
        """A message begins; all flows whose rate changes, its own among them."""
        for link in flow.links:
            self._on.setdefault(link, {})[id(flow)] = flow
        return self._changed(now, flow)

    def end(self, now: float, flow: Flow) -> list[Flow]:
        """A message has arrived; all flows whose rate changes by it."""
        for link in flow.links:
            del self._on[link][id(flow)]
        return [other for other in self._changed(now, flow) if other is not flow]

    def _changed(self, now: float, by: Flow) -> list[Flow]:
        near = {id(flow): flow for link in by.links for flow in self._on.get(link, {}).values()}
        changed = []
        for flow in near.values():
            rate = min(self.rates[link] / self._load(link) for link in flow.links)
            if rate != flow.rate:
                flow.left = max(0.0, flow.left - flow.rate * (now - flow.since))
                flow.since, flow.rate, flow.version = now, rate, flow.version + 1
                changed.append(flow)
        return changed

    def _load(self, link: Link) -> int:
        return sum(flow.alike.get(link, 1) for flow in self._on[link].values())
