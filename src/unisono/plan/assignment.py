"""Who does what: micro-batches -> workers, blocks -> owners. Pure functions, so that everyone computes the same."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from unisono.plan.blocks import Block, FlatLayout

RUN_ELEMENTS = 4 * 65_536
"""Elements that an owner sums, protects and updates in one go: what keeps them in cache (measured, see docs)."""


class UpdateClass(StrEnum):
    """What an optimizer's update of one element depends on."""

    ELEMENT = "element-wise"
    PARAMETER = "per parameter"
    COUPLED = "coupled"


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [first, stop) of the flat order, updated together by one owner: one optimizer group, one segment."""

    first: int
    stop: int


def micro_batches(count: int, workers: int) -> tuple[range, ...]:
    """Contiguous, balanced shares of ``count`` micro-batches; sizes differ by at most one.

    >>> micro_batches(7, 3)
    (range(0, 2), range(2, 4), range(4, 7))
    """
    return tuple(range(w * count // workers, (w + 1) * count // workers) for w in range(workers))


def contiguous_shares(costs: Sequence[int], workers: int) -> tuple[range, ...]:
    """Cut a sequence into contiguous shares so that the dearest share is as cheap as possible.

    >>> contiguous_shares([5, 1, 1, 1, 5], 2)
    (range(0, 3), range(3, 5))
    """

    def cut(limit: int) -> list[int] | None:
        ends, load = [], 0
        for i, cost in enumerate(costs):
            if load and load + cost > limit:
                ends.append(i)
                load = 0
            load += cost
        return [*ends, len(costs)] if len(ends) < workers else None

    low, high = max(costs, default=0), sum(costs)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if cut(middle) is not None else (middle + 1, high)
    ends = cut(low) or [len(costs)]
    ends += [len(costs)] * (workers - len(ends))
    return tuple(range(a, b) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def owners(layout: FlatLayout, update: UpdateClass, workers: int) -> tuple[range, ...]:
    """The blocks that each worker reduces and updates, as contiguous ranges of the flat order."""
    count = len(layout.blocks)
    if update is UpdateClass.COUPLED:
        return (range(count), *([range(count, count)] * (workers - 1)))
    units: list[range] = []
    for i, block in enumerate(layout.blocks):
        if update is UpdateClass.PARAMETER and block.index > 0:
            units[-1] = range(units[-1].start, i + 1)
        else:
            units.append(range(i, i + 1))
    costs = [sum(layout.blocks[i].stop - layout.blocks[i].start for i in unit) for unit in units]
    edges = [unit.start for unit in units] + [count]
    return tuple(range(edges[share.start], edges[share.stop]) for share in contiguous_shares(costs, workers))


def runs(layout: FlatLayout, update: UpdateClass, share: range) -> tuple[Run, ...]:
    """Cut an owner's blocks into the runs that it updates one after another."""
    if not share:
        return ()
    if update is UpdateClass.COUPLED:
        return (Run(share.start, share.stop),)
    result: list[Run] = []
    start, elements = share.start, 0

    def joins(previous: Block, block: Block) -> bool:
        if update is UpdateClass.PARAMETER:
            return block.parameter == previous.parameter
        a, b = layout.parameters[previous.parameter], layout.parameters[block.parameter]
        same = a.group == b.group and a.tensor.dtype == b.tensor.dtype
        adjacent = block.parameter - previous.parameter <= 1
        return same and adjacent and elements + block.stop - block.start <= RUN_ELEMENTS

    for i in share:
        block = layout.blocks[i]
        if i > share.start and not joins(layout.blocks[i - 1], block):
            result.append(Run(start, i))
            start, elements = i, 0
        elements += block.stop - block.start
    result.append(Run(start, share.stop))
    return tuple(result)
