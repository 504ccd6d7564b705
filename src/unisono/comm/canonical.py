"""Sums of tensors in the canonical order: of whole tensors, and of gradients that not every subtree touched."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from unisono.comm.partial import Partial
from unisono.run.summation import Node, finish

Cover = Sequence[tuple[Node, Partial]]
"""Partials of subtrees that together cover the whole tree, or one subtree of it."""


def canonical_sum(
    values: Mapping[Node, Tensor | None], count: int, top: Node | None = None, out: Tensor | None = None
) -> Tensor | None:
    """The sum of subtrees that cover ``top`` (default: all ``count`` leaves); None stands for one without a value.

    The given tensors stay as they are. The last addition goes to ``out`` where that is given, others to new memory;
    a sum of one value is that tensor itself.
    """
    left_to_add = len(values) - 1

    def add(left: tuple[Tensor | None, bool], right: tuple[Tensor | None, bool]) -> tuple[Tensor | None, bool]:
        nonlocal left_to_add
        left_to_add -= 1
        (a, a_mine), (b, b_mine) = left, right
        if a is None or b is None:
            return right if a is None else left
        if left_to_add == 0 and out is not None:
            return torch.add(a, b, out=out), True
        if a_mine:
            return a.add_(b), True
        if b_mine:
            return b.add_(a), True
        return torch.add(a, b), True

    return finish({node: (value, False) for node, value in values.items()}, count, add, top)[0]


def sum_touched(
    values: Mapping[Node, Tensor],
    touched: Mapping[Node, Sequence[bool]],
    pieces: Sequence[slice],
    count: int,
    out: Tensor,
    top: Node | None = None,
) -> None:
    """The canonical sum of flat gradients into ``out``, piece by piece where some subtree did not touch a piece.

    Arguments:
        values: a flat tensor for every subtree, all of one length.
        touched: whether each subtree has a value in each piece; what has none is not read.
        pieces: where each piece lies; a piece that nobody touched is left as it is.
    """
    if all(all(flags) for flags in touched.values()):
        _into(canonical_sum(values, count, top, out), out)
        return
    for i, piece in enumerate(pieces):
        held = {node: value[piece] if touched[node][i] else None for node, value in values.items()}
        _into(canonical_sum(held, count, top, out[piece]), out[piece])


def sum_scalars(cover: Cover, count: int, top: Node | None = None) -> tuple[float, ...]:
    """Loss, weight, and the weights of replicas that train apart."""

    def add(a: tuple[float, ...], b: tuple[float, ...]) -> tuple[float, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    return finish({node: tuple(p.scalars) for node, p in cover}, count, add, top)


def sum_buffer(cover: Cover, buffer: int, count: int, top: Node | None = None) -> Tensor | None:
    """A buffer's sum over the micro-batches that wrote it; a counter's value after the first of them; None for none."""
    held = {node: p.entries[p.uses + buffer] if p.counts[p.uses + buffer] else None for node, p in cover}
    first = cover[0][1]
    if first.first_wins[first.uses + buffer]:
        return finish(held, count, lambda a, b: b if a is None else a, top)
    return canonical_sum(held, count, top)


def sum_heads(loss: Cover, buffers: Sequence[Cover], count: int, into: Partial, top: Node | None = None) -> None:
    """All that is no gradient: scalars, and buffers with how many micro-batches wrote them.

    Arguments:
        loss: the partials that hold the scalars.
        buffers: those that hold each buffer.
    """
    for i, value in enumerate(sum_scalars(loss, count, top)):
        into.scalars[i] = value
    for b, cover in enumerate(buffers):
        total = sum_buffer(cover, b, count, top)
        into.counts[into.uses + b] = sum(int(p.counts[p.uses + b]) for _, p in cover)
        if total is not None and total.data_ptr() != into.entries[into.uses + b].data_ptr():
            into.entries[into.uses + b].copy_(total)


def _into(result: Tensor | None, out: Tensor) -> None:
    if result is not None and result.data_ptr() != out.data_ptr():
        out.copy_(result)
