"""Sums across hosts that are not exact: a named algorithm's order of additions, or compressed gradients.

Each is a generator, as `comm.exchange.Canonical` is. Gradients that no micro-batch touched count as zeros here.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.algorithms import AllReduce, Collective, direct, scattered
from unisono.comm.bundle import Bundle, together
from unisono.comm.compression import CODECS, Codec, Compression
from unisono.comm.exchange import TAGS_A_BUCKET, HostSums, Reduction
from unisono.comm.partial import Partial
from unisono.comm.wire import Wire
from unisono.comm.wire_state import WireState
from unisono.plan.blocks import FlatLayout
from unisono.plan.exchange import Bucket, slices
from unisono.run.rng import derive


@dataclass(frozen=True, slots=True)
class Ends:
    """What every reduction works on.

    Attributes:
        data, control: wires for gradients, and for what lies in the host's memory.
        flat: where gradients lie.
        sums: this host's part.
        total: receives the sum.
    """

    data: Wire
    control: Wire
    flat: FlatLayout
    sums: HostSums
    total: Partial

    def own(self, bucket: Bucket) -> tuple[Tensor, Tensor]:
        """This host's sum over a bucket, in the total's memory, and how many micro-batches touched each use."""
        out = self.total.segments[bucket.segment][bucket.start : bucket.stop]
        host = self.sums(bucket)
        first, *others = host.values.values()
        if first.data_ptr() != out.data_ptr():
            out.copy_(first)
        untouched = (host.counts == 0).tolist()
        for i, (rows, value) in enumerate(zip(untouched, (first, *others), strict=True)):
            held = value if i else out
            for piece, missing in zip(self.pieces(bucket), rows, strict=True):
                if missing and not i:
                    held[piece].zero_()
                elif not missing and i:
                    out[piece].add_(value[piece])
        return out, host.counts.sum(0, dtype=torch.int32)

    def pieces(self, bucket: Bucket) -> list[slice]:
        """Where each use lies inside a bucket."""
        places = [self.flat.use_places[use] for use in bucket.uses]
        return [slice(p.offset - bucket.start, p.offset - bucket.start + p.numel) for p in places]

    def bundles(self, bucket: Bucket) -> tuple[Bundle, Bundle, list[Bundle]]:
        """Wires for gradients and for what lies in the host's memory, and the bundles that these are."""
        tag = bucket.index * TAGS_A_BUCKET
        data = Bundle(self.data, tag)
        if self.control is self.data:
            return data, data, [data]
        control = Bundle(self.control, tag)
        return data, control, [data, control]

    def keep_counts(self, bucket: Bucket, counts: Tensor) -> None:
        """How many micro-batches of all hosts touched each use."""
        for use, number in zip(bucket.uses, counts.tolist(), strict=True):
            self.total.counts[use] = number


class Algorithm:
    """Sums by a named algorithm.

    Arguments:
        choose: bytes of a bucket -> the algorithm to use.
    """

    def __init__(self, ends: Ends, choose: Callable[[int], AllReduce]) -> None:
        self._ends = ends
        self._choose = choose

    def __call__(self, bucket: Bucket, step: int) -> Reduction:
        """Sum one bucket over all hosts, into the total."""
        ends = self._ends
        value, counts = ends.own(bucket)
        algorithm = self._choose(value.numel() * value.element_size())
        data, control, bundles = ends.bundles(bucket)
        yield from together([algorithm(data, value, 0), direct(control, counts, 0)], bundles)
        ends.keep_counts(bucket, counts)


class Compressed:
    """Sums compressed gradients; small tensors and counts travel as they are."""

    def __init__(self, ends: Ends, compression: Compression, state: WireState) -> None:
        self._ends = ends
        self._compression = compression
        self._state = state
        self.error_squares: dict[int, float] = {}

    def __call__(self, bucket: Bucket, step: int) -> Reduction:
        """Sum one bucket over all hosts, into the total."""
        ends, state = self._ends, self._state
        out, counts = ends.own(bucket)
        pieces = dict(zip(bucket.uses, ends.pieces(bucket), strict=True))
        large = [use for use in bucket.uses if use in state.error]
        small = [use for use in bucket.uses if use not in state.error]
        raw = _joined([out[pieces[use]] for use in small], out)
        values = [out[pieces[use]].float() for use in large]
        data, control, bundles = ends.bundles(bucket)
        collectives = [direct(control, counts, 0), _all_sum(data, raw, 0)]
        if large:
            collectives.append(self._sum(data, large, values, (step, bucket.index)))
        yield from together(collectives, bundles)
        _share(raw, [out[pieces[use]] for use in small])
        for use, value in zip(large, values, strict=True):
            out[pieces[use]].copy_(value)
        for i, use in enumerate(bucket.uses):  # what is sent of an old error must reach the optimizer
            if use in state.error:
                counts[i].clamp_(min=1)
        ends.keep_counts(bucket, counts)
        self.error_squares[bucket.index] = state.norm(large) ** 2

    def _sum(self, wire: Wire, uses: Sequence[int], values: list[Tensor], key: tuple[int, int]) -> Collective:
        """Put the sums over all hosts in place of this host's ``values``, and keep what was lost."""
        state, compression, tag = self._state, self._compression, 0
        errors = [state.error[use] for use in uses]
        if compression.name == "top_k":
            velocities = [state.velocity[use] for use in uses] if state.velocity else None
            density, momentum = compression.density_at(key[0]), compression.momentum
            return top_k(wire, values, errors, velocities, density, momentum, tag)
        if compression.name == "powersgd":
            bases = [state.basis[use] for use in uses]
            return power_sgd(wire, values, errors, bases, tag)
        seed = derive(compression.seed, "wire", *key, wire.rank)
        return sharded(CODECS[compression.name], wire, values, errors, tag, torch.Generator().manual_seed(seed))


def sharded(
    codec: Codec, wire: Wire, values: list[Tensor], errors: list[Tensor], tag: int, generator: torch.Generator
) -> Collective:
    """Encoded slices to their owners, sums, and encoded sums to all: 2 (n - 1)/n of the encoded size.

    An owner adds its own slice as it is; what its sum loses on the way back is added to its error too. So the errors
    of all members together always are what the sums of all steps together lack.
    """
    me = wire.rank
    others = [h for h in range(wire.size) if h != me]
    value = _joined(values, errors[0])
    value += _joined(errors, errors[0])
    error = torch.zeros_like(value)
    cuts = [slice(cut.start, cut.stop) for cut in slices(0, value.numel(), wire.size)]
    lengths = [cut.stop - cut.start for cut in cuts]
    payloads = {h: codec.encode(value[cuts[h]], generator) for h in others if lengths[h]}
    for h, payload in payloads.items():
        error[cuts[h]] = value[cuts[h]] - codec.decode(payload, lengths[h])
    mine = codec.size_bytes(lengths[me]) if lengths[me] else 0
    received = {h: torch.empty(mine, dtype=torch.uint8) for h in others}
    yield wire.post([(payload, h) for h, payload in payloads.items()], list(_turned(received)), tag)

    own = torch.empty(0, dtype=torch.uint8)
    if lengths[me]:
        total = torch.zeros(lengths[me])
        for h in range(wire.size):
            total += value[cuts[me]] if h == me else codec.decode(received[h], lengths[me])
        own = codec.encode(total, generator)
        value[cuts[me]] = codec.decode(own, lengths[me])
        error[cuts[me]] = total - value[cuts[me]]
    sums = {h: torch.empty(codec.size_bytes(lengths[h]), dtype=torch.uint8) for h in others if lengths[h]}
    yield wire.post([(own, h) for h in others], list(_turned(sums)), tag)
    for h, data in sums.items():
        value[cuts[h]] = codec.decode(data, lengths[h])
    _share(value, values)
    _share(error, errors)


def top_k(
    wire: Wire,
    values: list[Tensor],
    errors: list[Tensor],
    velocities: list[Tensor] | None,
    density: float,
    momentum: float,
    tag: int,
) -> Collective:
    """The largest values of every tensor to all, with their places: 8 (n - 1) bytes for each value that is sent.

    With momentum, what is accumulated is the velocity, and a value that was sent loses both its error and its velocity.

    Source: Lin et al., Deep gradient compression, ICLR 2018 (momentum correction, momentum factor masking;
    the density falls during a warm-up, see `Compression.density_at`).
    """
    others = [h for h in range(wire.size) if h != wire.rank]
    if velocities is not None:
        for value, velocity in zip(values, velocities, strict=True):
            velocity.mul_(momentum).add_(value)
            value.copy_(velocity)
    indices, offset = [], 0
    for value, error in zip(values, errors, strict=True):
        value += error
        kept = torch.topk(value.abs(), _kept(value.numel(), density), sorted=False).indices
        indices.append(kept + offset)
        offset += value.numel()
    joined = _joined(values, errors[0])
    places = torch.cat(indices)
    sent = joined[places]
    joined[places] = 0
    _share(joined, errors)
    if velocities is not None:
        flat = _joined(velocities, errors[0])
        flat[places] = 0
        _share(flat, velocities)
    payload = torch.cat([places.int().view(torch.uint8), sent.view(torch.uint8)])
    received = {h: torch.empty_like(payload) for h in others}
    yield wire.post([(payload, h) for h in others], list(_turned(received)), tag)
    total = torch.zeros_like(joined)
    for h in range(wire.size):  # in order of member: the same sums everywhere
        data = payload if h == wire.rank else received[h]
        half = data.numel() // 2
        total.index_add_(0, data[:half].view(torch.int32).long(), data[half:].view(torch.float32))
    _share(total, values)


def _kept(elements: int, density: float) -> int:
    """How many values of a tensor are sent."""
    return max(1, min(elements, round(density * elements)))


def power_sgd(wire: Wire, values: list[Tensor], errors: list[Tensor], bases: list[Tensor], tag: int) -> Collective:
    """Two thin factors of every matrix, of r (rows + columns) values; the first from the last step's second.

    With M a member's gradient plus its error, and Q the basis: P = sum of M Q, made orthonormal; Q = sum of M' P; the
    result is P Q'. What a member keeps is M - P (its own M' P)', its local input minus its *local* reconstruction.

    Source: Vogels et al., PowerSGD: Practical low-rank gradient compression for distributed optimization, NeurIPS 2019.
    """
    matrices = []
    for value, error, basis in zip(values, errors, bases, strict=True):
        value += error
        matrices.append(value.view(-1, basis.shape[0]))
    left = [matrix @ basis for matrix, basis in zip(matrices, bases, strict=True)]
    joined = _joined([p.reshape(-1) for p in left], errors[0])
    yield from _all_sum(wire, joined, tag)
    _share(joined, left)
    left = [torch.linalg.qr(p).Q for p in left]
    right = [matrix.T @ p for matrix, p in zip(matrices, left, strict=True)]
    for matrix, p, q, error in zip(matrices, left, right, errors, strict=True):
        torch.addmm(matrix, p, q.T, alpha=-1, out=error.view(matrix.shape))
    joined = _joined([q.reshape(-1) for q in right], errors[0])
    yield from _all_sum(wire, joined, tag + 1)
    _share(joined, bases)
    for matrix, p, basis in zip(matrices, left, bases, strict=True):
        torch.mm(p, basis.T, out=matrix)  # in place of the gradient


def _all_sum(wire: Wire, tensor: Tensor, tag: int) -> Collective:
    """As few bytes as possible in as few rounds as possible: between two members, everything at once."""
    return direct(wire, tensor, tag) if wire.size <= 2 else scattered(wire, tensor, tag)


def _joined(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """Flat tensors behind each other, in new memory."""
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _share(joined: Tensor, parts: Sequence[Tensor]) -> None:
    """Copy a joined tensor back into its parts."""
    at = 0
    for part in parts:
        part.copy_(joined[at : at + part.numel()].view(part.shape))
        at += part.numel()


def _turned(tensors: dict[int, Tensor]) -> Iterable[tuple[Tensor, int]]:
    return ((tensor, member) for member, tensor in tensors.items())
