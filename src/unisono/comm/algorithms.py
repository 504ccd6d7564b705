"""Collectives as sequences of messages, point to point: ring, tree, halving and doubling; broadcast and gather.

Each is a generator (see `comm.exchange`): it posts messages, yields them, and goes on once they have arrived; it yields
once a round on every member, also where that has nothing to send. Tensors are flat and contiguous, and are reduced in
place. These sums are not canonical: each adds in an order of its own that depends on the number of members, so an exact
run does not use them.
"""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
import torch
from torch import Tensor

from unisono.comm.wire import Pending, Wire
from unisono.plan.exchange import slices

Collective = Iterator[Pending]
AllReduce = Callable[[Wire, Tensor, int], Collective]


def drive(collective: Collective, operation: str) -> None:
    """Run a collective to its end."""
    for pending in collective:
        pending.wait(operation)


def ring(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Sum by passing slices around a ring: each member sends 2 (n - 1) / n of the tensor, which is the least possible.

    Source: Patarasuk and Yuan, Bandwidth optimal all-reduce algorithms for clusters of workstations, JPDC 2009.
    """
    n, rank = wire.size, wire.rank
    parts = [tensor[cut.start : cut.stop] for cut in slices(0, tensor.numel(), n)]
    incoming = torch.empty_like(parts[0])
    right, left = (rank + 1) % n, (rank - 1) % n
    for i in range(n - 1):
        give, take = parts[(rank - i) % n], parts[(rank - i - 1) % n]
        into = incoming[: take.numel()]
        yield wire.post([(give, right)], [(into, left)], tag)
        take.add_(into)
    for i in range(n - 1):
        give, take = parts[(rank + 1 - i) % n], parts[(rank - i) % n]
        yield wire.post([(give, right)], [(take, left)], tag)


def tree(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Sum up a binomial tree to member 0 and back: 2 log2 n messages one after another, good for small tensors.

    Source: Thakur, Rabenseifner and Gropp, Optimization of collective communication operations in MPICH, IJHPCA 2005.
    """
    rank, distance = wire.rank, 1
    incoming = torch.empty_like(tensor)
    while distance < wire.size:
        if rank % (2 * distance) == distance:
            yield wire.post([(tensor, rank - distance)], [], tag)
        elif rank % (2 * distance) == 0 and rank + distance < wire.size:
            yield wire.post([], [(incoming, rank + distance)], tag)
            tensor.add_(incoming)
        else:
            yield wire.post([], [], tag)
        distance *= 2
    yield from broadcast(wire, tensor, tag)


def direct(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Sum what every member sends to all others, in order of member: one message one after another, n - 1 at once."""
    others = [peer for peer in range(wire.size) if peer != wire.rank]
    received = {peer: torch.empty_like(tensor) for peer in others}
    yield wire.post([(tensor, peer) for peer in others], [(received[peer], peer) for peer in others], tag)
    received[wire.rank] = tensor.clone()
    tensor.copy_(received[0])
    for peer in range(1, wire.size):
        tensor.add_(received[peer])


def scattered(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Sum a slice of each member's at its owner, in order of member, and send the sums to all.

    As many bytes as a ring, in two rounds of messages for any n; the sums are the same on all members.
    """
    n, rank = wire.size, wire.rank
    parts = [tensor[cut.start : cut.stop] for cut in slices(0, tensor.numel(), n)]
    others = [peer for peer in range(n) if peer != rank]
    received = {peer: torch.empty_like(parts[rank]) for peer in others}
    yield wire.post([(parts[peer], peer) for peer in others], [(received[peer], peer) for peer in others], tag)
    received[rank] = parts[rank].clone()
    parts[rank].copy_(received[0])
    for peer in range(1, n):
        parts[rank].add_(received[peer])
    yield wire.post([(parts[rank], peer) for peer in others], [(parts[peer], peer) for peer in others], tag)


def halving_doubling(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Sum by exchanging halves with ever nearer partners, and gather by doubling: few messages and few bytes.

    Where the number of members is no power of two, the first ones meet in pairs, and one of each sits out between.

    Source: Rabenseifner, Optimization of collective reduction operations, ICCS 2004.
    """
    n, rank = wire.size, wire.rank
    power = 1 << (n.bit_length() - 1)
    extra = n - power  # so many pairs of members, the first 2 * extra, act as one each
    paired, sits_out = rank < 2 * extra, rank < 2 * extra and rank % 2 == 0
    if sits_out:
        yield wire.post([(tensor, rank + 1)], [], tag)
        for _ in range(2 * (power.bit_length() - 1)):
            yield wire.post([], [], tag)
        yield wire.post([], [(tensor, rank + 1)], tag)
        return
    if paired:
        incoming = torch.empty_like(tensor)
        yield wire.post([], [(incoming, rank - 1)], tag)
        tensor.add_(incoming)
    elif extra:
        yield wire.post([], [], tag)

    place = rank // 2 if paired else rank - extra
    cuts = slices(0, tensor.numel(), power)
    edges = [cut.start for cut in cuts] + [tensor.numel()]
    first, last = 0, power  # slices that this member still sums
    halves: list[tuple[int, tuple[int, int], tuple[int, int]]] = []  # (partner, mine, theirs) of each round
    distance = power // 2
    while distance:
        partner = _member(place ^ distance, extra)
        middle = (first + last) // 2
        mine, theirs = ((first, middle), (middle, last)) if not place & distance else ((middle, last), (first, middle))
        incoming = torch.empty_like(tensor[edges[mine[0]] : edges[mine[1]]])
        yield wire.post([(tensor[edges[theirs[0]] : edges[theirs[1]]], partner)], [(incoming, partner)], tag)
        tensor[edges[mine[0]] : edges[mine[1]]].add_(incoming)
        halves.append((partner, mine, theirs))
        (first, last), distance = mine, distance // 2
    for partner, mine, theirs in reversed(halves):
        give, take = (tensor[edges[a] : edges[b]] for a, b in (mine, theirs))
        yield wire.post([(give, partner)], [(take, partner)], tag)

    if extra:
        yield wire.post([(tensor, rank - 1)] if paired else [], [], tag)


def _member(place: int, extra: int) -> int:
    """The member at a place among those that take part."""
    return 2 * place + 1 if place < extra else place + extra


ALGORITHMS: Mapping[str, AllReduce] = {
    "ring": ring,
    "tree": tree,
    "halving_doubling": halving_doubling,
    "direct": direct,
}


def broadcast(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """Member 0's values for all, down a binomial tree."""
    rank = wire.rank
    distance = 1 << (wire.size - 1).bit_length()
    while distance := distance // 2:
        if rank % (2 * distance) == 0 and rank + distance < wire.size:
            yield wire.post([(tensor, rank + distance)], [], tag)
        elif rank % (2 * distance) == distance:
            yield wire.post([], [(tensor, rank - distance)], tag)
        else:
            yield wire.post([], [], tag)


def as_tensor(payload: bytes) -> Tensor:
    """Bytes as a tensor of their own."""
    return torch.from_numpy(np.frombuffer(payload, dtype=np.uint8).copy())


def gather_bytes(wire: Wire, payload: bytes, tag: int, operation: str) -> list[bytes]:
    """Everyone's payload, in order of number: lengths first, then contents."""
    others = [peer for peer in range(wire.size) if peer != wire.rank]
    lengths = torch.zeros(wire.size, dtype=torch.int64)
    lengths[wire.rank] = len(payload)
    own = lengths[wire.rank : wire.rank + 1].clone()
    wire.post([(own, p) for p in others], [(lengths[p : p + 1], p) for p in others], tag).wait(operation)
    contents = {p: torch.empty(int(lengths[p]), dtype=torch.uint8) for p in others}
    data = as_tensor(payload)
    wire.post([(data, p) for p in others], [(contents[p], p) for p in others], tag + 1).wait(operation)
    return [payload if p == wire.rank else contents[p].numpy().tobytes() for p in range(wire.size)]
