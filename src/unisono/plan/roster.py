"""Who computes what in a step, and who takes over what a lost worker leaves: pure, so that all decide alike.

A lot is a number of micro-batches that a replica's workers compute together, or one worker alone. When a worker is
lost, what its lots have not published is divided among those that are left; so are the blocks that it would have
updated.
Everyone who knows the same losses, in the same order, comes to the same lots.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from unisono.plan.assignment import micro_batches, paced_micro_batches, shares_by_cost

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Lot:
    """Micro-batches, in order, and the slots of those who compute them together."""

    holders: tuple[int, ...]
    micro_batches: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Loss:
    """A worker that was lost in a step, and those that take over, in order."""

    slot: int
    heirs: tuple[int, ...]


def divided(things: Sequence[T], among: Sequence[int]) -> dict[int, Sequence[T]]:
    """Contiguous, balanced parts of ``things``, by slot.

    >>> divided("abcde", [0, 3])
    {0: 'ab', 3: 'cde'}
    """
    parts = micro_batches(len(things), len(among))
    return {slot: things[part.start : part.stop] for slot, part in zip(among, parts, strict=True)}


def consecutive(numbers: Iterable[int]) -> Iterator[range]:
    """Ascending whole numbers as ranges.

    >>> list(consecutive([1, 2, 3, 7]))
    [range(1, 4), range(7, 8)]
    """
    start = stop = None
    for number in numbers:
        if stop is not None and number == stop:
            stop += 1
            continue
        if start is not None and stop is not None:
            yield range(start, stop)
        start, stop = number, number + 1
    if start is not None and stop is not None:
        yield range(start, stop)


def whole_replicas(replicas: Sequence[Sequence[int]], members: Sequence[int]) -> list[int]:
    """The numbers of the replicas of which no worker is missing."""
    return [number for number, slots in enumerate(replicas) if set(slots) <= set(members)]


def first_lots(
    replicas: Sequence[Sequence[int]],
    members: Sequence[int],
    count: int,
    paces: Mapping[int, float] | None = None,
    before: Sequence[Lot] = (),
    costs: Sequence[float] | None = None,
) -> list[Lot]:
    """How ``count`` micro-batches are divided as a step begins.

    Whole replicas share them. Where there is none, every member computes its share of them alone: the whole model, of
    which all have the parameters.

    Arguments:
        replicas: the slots of each.
        paces: seconds a micro-batch, by slot, as far as they are known.
        before: how they were divided in the step before.
        costs: of each micro-batch, where they differ: then what was before does not matter.

    >>> first_lots([(0, 1), (2, 3)], [0, 1, 2], 2)
    [Lot(holders=(0, 1), micro_batches=(0, 1))]
    >>> first_lots([(0, 1), (2, 3)], [0, 2], 3)
    [Lot(holders=(0,), micro_batches=(0,)), Lot(holders=(2,), micro_batches=(1, 2))]
    """
    whole = whole_replicas(replicas, members)
    holders = [tuple(replicas[number]) for number in whole] or [(member,) for member in members]
    known = [max((paces or {}).get(slot, 0.0) for slot in slots) for slots in holders]
    if costs is not None:
        return [Lot(slots, tuple(share)) for slots, share in zip(holders, shares_by_cost(costs, known), strict=True)]
    same = [lot.holders for lot in before] == holders
    current = [range(lot.micro_batches[0], lot.micro_batches[-1] + 1) for lot in before if lot.micro_batches]
    shares = paced_micro_batches(count, known, current if same and len(current) == len(before) else None)
    return [Lot(slots, tuple(share)) for slots, share in zip(holders, shares, strict=True)]


class StepRoster:
    """The lots of one step, as workers are lost.

    Arguments:
        replicas: the slots of each.
        members: who begins the step, in order.
        count: micro-batches of the step.
        paces, before, costs: as of `first_lots`; without paces and costs, it is as before.

    Attributes:
        first: the lots as the step began.
    """

    def __init__(
        self,
        replicas: Sequence[Sequence[int]],
        members: Sequence[int],
        count: int,
        paces: Mapping[int, float] | None = None,
        before: Sequence[Lot] = (),
        costs: Sequence[float] | None = None,
    ) -> None:
        self.members = tuple(members)
        self.living = list(members)
        as_before = before and not paces and costs is None
        self.first = list(before) if as_before else first_lots(replicas, members, count, paces, before, costs)
        self.lots = list(self.first)
        self.losses: list[Loss] = []

    def lots_of(self, slot: int) -> list[Lot]:
        """Those that a slot's worker computes, alone or with others."""
        return [lot for lot in self.lots if slot in lot.holders]

    def mates(self, slot: int) -> list[int]:
        """Those alive who compute together with a slot's worker."""
        found = {holder for lot in self.lots_of(slot) for holder in lot.holders}
        return [other for other in self.living if other in found and other != slot]

    def lose(self, slot: int, published: Callable[[Lot], set[int]]) -> Mapping[int, Sequence[int]]:
        """A living member is lost; the micro-batches that others compute in its place, by slot.

        Arguments:
            published: those of a lot of which nothing is missing; nothing is added to them any more.
        """
        self.living.remove(slot)
        self.losses.append(Loss(slot, tuple(self.living)))
        lost = self.lots_of(slot)
        left = sorted(m for lot in lost for m in set(lot.micro_batches) - published(lot))
        self.lots = [lot for lot in self.lots if slot not in lot.holders]
        taken = divided(left, self.living) if self.living else {}
        self.lots += [Lot((heir,), tuple(part)) for heir, part in taken.items() if part]
        return taken


def next_members(
    members: Sequence[int], lost: Sequence[int], admitted: Iterable[int], leaving: Iterable[int]
) -> tuple[int, ...]:
    """Who begins the next step.

    Arguments:
        members: who began this one.
        lost: slots of the losses that became known since, in order; one may be that of a worker who was to replace
            another, and died before it was let in.
        admitted: slots whose workers are ready.

    >>> next_members([0, 1, 2], [1], [1, 3], [2])
    (0, 1, 3)
    >>> next_members([0, 1], [1, 1], [1], [])
    (0,)
    """
    deaths = {slot: list(lost).count(slot) for slot in lost}
    alive = {slot for slot in members if slot not in deaths}
    stay = alive - set(leaving) or alive  # somebody has to go on
    come = {slot for slot in admitted if deaths.get(slot, 0) == (slot in members)}
    return tuple(sorted(stay | come))
