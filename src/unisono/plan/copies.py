"""Which micro-batch a worker that idles computes a second time, in case the one whose it is comes late. Pure.

Backup tasks, as MapReduce has them (Dean and Ghemawat, 2004, section 3.6): here a copy has the same bits, so whichever
comes first counts, and two that both come can be compared.
"""

from collections.abc import Collection, Mapping, Sequence

from unisono.plan.roster import Lot


def copied_next(
    lots: Sequence[Lot], idle: int, begun: Mapping[int, int], there: Collection[int], copied: Collection[int]
) -> int | None:
    """The last micro-batch of the worker that has most to do yet; None where nobody has any that it has not begun.

    From the end, since its own worker comes there last. A worker that computes together with others is left alone:
    their sums are not one worker's to replace.

    Arguments:
        lots: who computes what in the step.
        idle: the slot that has nothing to do.
        begun: the micro-batch that each slot is at; absent where it has begun none.
        there: micro-batches that are published.
        copied: those of which somebody computes a copy.

    >>> lots = [Lot((0,), (0, 1, 2, 3)), Lot((1,), (4, 5, 6, 7)), Lot((2,), (8,))]
    >>> copied_next(lots, 2, {0: 1, 1: 4}, {8}, ())
    7
    >>> copied_next(lots, 2, {0: 1, 1: 4}, {8}, {7, 6})
    3
    >>> copied_next(lots, 2, {0: 3, 1: 7}, {8}, ())
    """
    left = [
        [m for m in lot.micro_batches if m > begun.get(lot.holders[0], -1) and m not in there and m not in copied]
        for lot in lots
        if len(lot.holders) == 1 and lot.holders[0] != idle
    ]
    most = max(left, key=len, default=[])
    return most[-1] if most else None
