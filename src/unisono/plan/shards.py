"""Hosts that share one training state: which of them keeps and updates each block."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from unisono.plan.assignment import Run, UpdateClass, contiguous_shares, micro_batches, units
from unisono.plan.blocks import FlatLayout, aligned
from unisono.plan.exchange import Bucket
from unisono.plan.hosts import host_of


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, stop) of a segment's values, and the host that keeps them."""

    segment: int
    start: int
    stop: int
    host: int


EVERYWHERE = -1
"""In place of a host: all of them keep a block, and update it alike."""


@dataclass(frozen=True, slots=True)
class StateShards:
    """Who keeps what.

    Attributes:
        flat: where parameters and gradients lie.
        hosts: how many share.
        of_block: the host of each block, or `EVERYWHERE`.
        rounds: in which a step's gradients are summed, each of one micro-batch a host; 0 where each host first sums
            its own.
        values: parameters are divided too; else every host has all of them.
    """

    flat: FlatLayout
    hosts: int
    of_block: tuple[int, ...]
    rounds: int = 0
    values: bool = False

    def blocks(self, host: int) -> list[int]:
        """The blocks of a host, in flat order."""
        return [i for i, owner in enumerate(self.of_block) if owner in (host, EVERYWHERE)]

    def first(self, block: int) -> int:
        """The first host that keeps a block."""
        return max(0, self.of_block[block])

    def gradients(self, bucket: Bucket) -> list[list[slice]]:
        """For each host: the parts of a bucket's gradients that it sums, as places in the bucket."""
        return self._parts(bucket, bucket.uses)

    def updated(self, bucket: Bucket) -> list[list[slice]]:
        """For each host: the parts of a bucket's parameters that it updates, as places in the bucket."""
        first_uses = [use for use in bucket.uses if self.flat.use_places[use] == self._place(use)]
        return self._parts(bucket, first_uses)

    def pieces(self, parameters: Sequence[int]) -> list[Piece]:
        """Some parameters' values, cut where another host keeps them; neighbours of one host are one piece."""
        result: list[Piece] = []
        first_use = {parameter: use for use, (_, parameter) in reversed(list(enumerate(self.flat.uses)))}
        for parameter in sorted(parameters):
            segment = self.flat.places[parameter].segment
            for start, stop, host in self._pieces([first_use[parameter]]):
                last = result[-1] if result else None
                if last is not None and (last.segment, last.stop, last.host) == (segment, start, host):
                    result[-1] = Piece(segment, last.start, stop, host)
                else:
                    result.append(Piece(segment, start, stop, host))
        return result

    def _place(self, use: int) -> object:
        return self.flat.places[self.flat.uses[use][1]]

    def _parts(self, bucket: Bucket, uses: Sequence[int]) -> list[list[slice]]:
        result: list[list[slice]] = [[] for _ in range(self.hosts)]
        for start, stop, host in self._pieces(uses):
            assert host != EVERYWHERE, "who sums a block that all keep is not for shards to say"
            start, stop = start - bucket.start, stop - bucket.start
            parts = result[host]
            if parts and parts[-1].stop == start:
                parts[-1] = slice(parts[-1].start, stop)
            else:
                parts.append(slice(start, stop))
        return result

    def _pieces(self, uses: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """(first element, end, host) of every block of every use, padding included."""
        flat = self.flat
        for use in uses:
            parameter, offset = flat.uses[use][1], flat.use_places[use].offset
            for i in flat.blocks_of(parameter):
                block = flat.blocks[i]
                yield offset + block.start, offset + block.start + aligned(block.stop - block.start), self.of_block[i]


def state_shards(
    flat: FlatLayout,
    update: UpdateClass,
    buckets: Sequence[Bucket],
    hosts: int,
    rounds: int = 0,
    *,
    values: bool = False,
) -> StateShards:
    """Divide a state: of every bucket each host keeps a part, so that all have something to sum at any time."""
    of_block = [0] * len(flat.blocks)
    load = [0] * hosts
    for bucket in buckets if update is not UpdateClass.COUPLED else ():
        members = [flat.uses[use][1] for use in bucket.uses if flat.use_places[use] == flat.places[flat.uses[use][1]]]
        found = [i for parameter in members for i in flat.blocks_of(parameter)]
        parts = units(flat, update, found)
        costs = [sum(flat.blocks[i].stop - flat.blocks[i].start for i in unit) for unit in parts]
        shares = sorted(contiguous_shares(costs, hosts), key=lambda share: -sum(costs[share.start : share.stop]))
        for host, share in zip(sorted(range(hosts), key=load.__getitem__), shares, strict=True):
            load[host] += sum(costs[share.start : share.stop])
            for unit in parts[share.start : share.stop]:
                for i in unit:
                    of_block[i] = host
    return StateShards(flat, hosts, tuple(of_block), rounds, values)


def apart_shares(count: int, replicas: int, workers: Sequence[int]) -> tuple[range, ...]:
    """The micro-batches of each worker: its host's replicas', evenly.

    Arguments:
        count: micro-batches of a step, a multiple of the replicas.
        workers: of each host.

    >>> apart_shares(6, 3, [2, 1]), apart_shares(6, 3, [1, 1])
    ((range(0, 2), range(2, 4), range(4, 6)), (range(0, 4), range(4, 6)))
    """
    each, shares = count // replicas, list[range]()
    of = [host_of(r, replicas, len(workers)) for r in range(replicas)]
    for host, size in enumerate(workers):
        first = each * of.index(host)
        own = micro_batches(each * of.count(host), size)
        shares += [range(first + share.start, first + share.stop) for share in own]
    return tuple(shares)


def replica_shards(flat: FlatLayout, hosts: int) -> StateShards:
    """Divide a state of replicas that train apart: each host keeps its own, and all keep what they agree on."""
    replicas = (flat.parameters[block.parameter].replica for block in flat.blocks)
    of_block = (host_of(r - 1, flat.replicas, hosts) if r else EVERYWHERE for r in replicas)
    return StateShards(flat, hosts, tuple(of_block), values=True)


def server_shards(flat: FlatLayout, parts: Sequence[Sequence[Run]], hosts: int) -> StateShards:
    """Divide a state as a parameter server does: each host keeps what its servers are made of.

    Arguments:
        parts: the runs of each server.
    """
    of_block = [EVERYWHERE] * len(flat.blocks)
    for server, runs in enumerate(parts):
        for run in runs:
            for block in range(run.first, run.stop):
                of_block[block] = host_of(server, len(parts), hosts)
    return StateShards(flat, hosts, tuple(of_block), values=True)
