"""What a step's partials hold besides gradients, summed over hosts: losses and weights, buffers, requests, reports."""

from collections.abc import Sequence

import numpy as np
import torch

from unisono.comm.algorithms import as_tensor
from unisono.comm.canonical import Cover, sum_heads
from unisono.comm.exchange import Crews, ExchangePlan, Reduction, held
from unisono.comm.foretold import Foretold
from unisono.comm.host import HostGroup
from unisono.comm.partial import Partial, head_layout, pack_head, unpack_head
from unisono.comm.wire import Wire
from unisono.events import PHASES
from unisono.plan.assignment import Teams
from unisono.plan.hosts import Place
from unisono.run.summation import Node


class Heads:
    """One host's part: every host sends its subtrees' heads to all, and each finishes the tree by itself.

    Arguments:
        local: the workers of this host.
        crews: for each team, those who compute together, replica by replica.
        teams: who computes what.
        total: receives the sums.

    Attributes:
        flags: everyone's requests joined, of the step that was summed last.
        reports: seconds in each phase of the step before it, by rank.
        foretold: what is known before gradients are; None where that is of no use.
    """

    def __init__(
        self, local: HostGroup, crews: Crews, place: Place, plan: ExchangePlan, teams: Teams, total: Partial
    ) -> None:
        self._local = local
        self._crews = crews
        self._place = place
        self._plan = plan
        self._teams = teams
        self._total = total
        self._layout = head_layout(local.partials)
        self._head_bytes = len(pack_head(self._new()))
        self.foretold: Foretold | None = None
        if local.layout.regions.named["foretold"].size_bytes:
            memory = local.arena.bytes(local.layout.regions.named["foretold"])
            self.foretold = Foretold(memory, plan.count, len(self._new().scalars))
        self.flags = 0
        self.reports: dict[int, list[float]] = {}

    def __call__(self, step: int, wire: Wire, tag: int, *, early: bool = False) -> Reduction:
        """Sum a step's heads into the total.

        Arguments:
            early: by what is foretold.
        """
        own = self._place.host
        share = self._plan.shares[own]
        if early:
            heads = {node: self._expected(step, node) for node in share.nodes}
        else:
            self._local.await_published(step, [part.node for part in share.parts])
            heads = {node: self._summed(node) for node in share.nodes}
        reports = [value for row in self._local.reports(step - 1) for value in row]
        about = np.array([self._local.flags_by_now(), *reports], dtype=np.float64).tobytes()
        packed = as_tensor(b"".join([about, *(pack_head(heads[node]) for node in share.nodes)]))
        others = [host for host in range(wire.size) if host != own]
        received = {host: torch.empty(self._bytes_of(host), dtype=torch.uint8) for host in others}
        yield wire.post([(packed, host) for host in others], [(received[host], host) for host in others], tag)

        self.flags = 0
        for host, tensor in {own: packed, **received}.items():
            data, words = tensor.numpy().tobytes(), self._words_of(host)
            values = np.frombuffer(data[: 8 * words]).tolist()
            self.flags |= int(values[0])
            for i in range(self._place.hosts.sizes[host]):
                start = 1 + i * len(PHASES)
                self.reports[self._place.hosts.rank(host, i)] = values[start : start + len(PHASES)]
            for i, node in enumerate(self._plan.shares[host].nodes if host != own else ()):
                heads[node] = self._new()
                unpack_head(data[8 * words + i * self._head_bytes :], heads[node])
        cover = [(node, head) for node, head in heads.items() if node.start < self._plan.count]
        sum_heads(cover, [cover] * len(self._teams.buffers), self._plan.count, self._total)

    def _words_of(self, host: int) -> int:
        """Numbers that a host sends: its requests, and its workers' reports."""
        return 1 + self._place.hosts.sizes[host] * len(PHASES)

    def _bytes_of(self, host: int) -> int:
        return 8 * self._words_of(host) + len(self._plan.shares[host].nodes) * self._head_bytes

    def _summed(self, node: Node) -> Partial:
        """The head of one of this host's subtrees."""
        head, share = self._new(), self._plan.shares[self._place.host]
        covers: list[Cover] = [list(held(self._local, crews, share, node).items()) for crews in self._crews]
        buffers = [covers[team] for team in self._teams.buffers]
        sum_heads(covers[self._teams.loss], buffers, self._plan.count, head, node)
        return head

    def _expected(self, step: int, node: Node) -> Partial:
        """The head that one of this host's subtrees will have."""
        assert self.foretold is not None
        head, foretold = self._new(), self.foretold
        micro_batches = foretold.of(node)
        self._local.interruptible(
            lambda: True if foretold.has(step, micro_batches) else None,
            f"losses of step {step}",
            lambda: f"not all of this host's are known; {self._local.doing()}",
        )
        for i, value in enumerate(foretold.summed(node)):
            head.scalars[i] = value
        return head

    def _new(self) -> Partial:
        return Partial(self._layout, torch.zeros(self._layout.size_bytes, dtype=torch.uint8))


def join(parts: Sequence[bytes]) -> bytes:
    """Several payloads as one.

    >>> split(join([b"a", b"", b"bc"]))
    [b'a', b'', b'bc']
    """
    lengths = np.array([len(parts), *map(len, parts)], dtype=np.int64).tobytes()
    return b"".join([lengths, *parts])


def split(data: bytes) -> list[bytes]:
    """What `join` made."""
    count = int(np.frombuffer(data[:8], dtype=np.int64)[0])
    lengths = np.frombuffer(data[8 : 8 * (count + 1)], dtype=np.int64).tolist()
    result, at = [], 8 * (count + 1)
    for length in lengths:
        result.append(data[at : at + length])
        at += length
    return result
