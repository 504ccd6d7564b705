"""Who does what: micro-batches -> workers, blocks -> owners. Pure functions, so that everyone computes the same."""

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from unisono.plan.blocks import Block, FlatLayout

RUN_ELEMENTS = 4 * 65_536
"""Elements that an owner sums, protects and updates in one go: what keeps them in cache (measured, see docs)."""

DEVICE_RUN_ELEMENTS = 64 * 65_536
"""The same on a device, where each kernel takes longer to start than it takes for a few of them."""


class UpdateClass(StrEnum):
    """What an optimizer's update of one element depends on."""

    ELEMENT = "element-wise"
    PARAMETER = "per parameter"
    COUPLED = "coupled"


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks [first, stop) of the flat order, updated together by one owner: of one segment, and one optimizer group
    unless they are one unit."""

    first: int
    stop: int


def micro_batches(count: int, workers: int) -> tuple[range, ...]:
    """Contiguous, balanced shares of ``count`` micro-batches; sizes differ by at most one.

    >>> micro_batches(7, 3)
    (range(0, 2), range(2, 4), range(4, 7))
    """
    return tuple(range(w * count // workers, (w + 1) * count // workers) for w in range(workers))


HALVINGS = 40
"""Of an interval of time, to its last micro-second in a week."""
WORTH = 1.1
"""How many times quicker another assignment has to be for workers to change to it."""


def paced_micro_batches(
    count: int, paces: Sequence[float], current: Sequence[range] | None = None
) -> tuple[range, ...]:
    """Contiguous shares of ``count`` micro-batches for workers that differ in speed: all are done as early as can be.

    Everyone has at least one where there are enough, so that nobody's speed is forgotten.

    Arguments:
        paces: seconds that each takes for one micro-batch; 0 where that is not known.
        current: shares that are kept unless others are `WORTH` it.

    >>> paced_micro_batches(16, [1.0, 5.0, 1.0, 1.0])
    (range(0, 5), range(5, 6), range(6, 11), range(11, 16))
    >>> paced_micro_batches(4, [1.0, 1.2], [range(0, 2), range(2, 4)])
    (range(0, 2), range(2, 4))
    """
    workers = len(paces)
    even = micro_batches(count, workers)
    kept = tuple(current) if current is not None else even
    if not all(paces):
        return kept
    sizes = _paced_sizes(count, paces, min(1, count // workers))

    def seconds(numbers: Sequence[int]) -> float:
        return max(n * pace for n, pace in zip(numbers, paces, strict=True))

    if seconds([len(share) for share in kept]) < WORTH * seconds(sizes):
        return kept
    stops = list(itertools.accumulate(sizes))
    return tuple(range(stop - size, stop) for stop, size in zip(stops, sizes, strict=True))


def _paced_sizes(count: int, paces: Sequence[float], least: int) -> list[int]:
    """How many of ``count`` each worker has, at least ``least``, so that the last is done as early as can be."""

    def done_by(seconds: float) -> list[int]:
        return [max(least, int(seconds / pace + 1e-9)) for pace in paces]

    early, late = 0.0, count * max(paces)
    for _ in range(64):  # halvings, to the last bit
        middle = (early + late) / 2
        early, late = (early, middle) if sum(done_by(middle)) >= count else (middle, late)
    sizes = done_by(late)
    for _ in range(sum(sizes) - count):
        latest = max((w for w in range(len(paces)) if sizes[w] > least), key=lambda w: sizes[w] * paces[w])
        sizes[latest] -= 1
    return sizes


def shares_by_cost(costs: Sequence[float], paces: Sequence[float]) -> tuple[range, ...]:
    """Contiguous shares of micro-batches that differ in what they take: all are done as early as can be.

    Where that makes nobody later, everyone has at least one, so that nobody's speed is forgotten.

    Arguments:
        costs: of each micro-batch, positive.
        paces: seconds that each worker takes for a cost of 1; 0 where that is not known: then all are taken as alike.

    >>> shares_by_cost([1, 1, 1, 1, 4], [1.0, 1.0])
    (range(0, 4), range(4, 5))
    >>> shares_by_cost([1, 1, 1, 1, 4], [3.0, 1.0])
    (range(0, 2), range(2, 5))
    >>> shares_by_cost([1, 1, 1, 1, 1], [1.0] * 4)
    (range(0, 2), range(2, 3), range(3, 4), range(4, 5))
    """
    count, workers = len(costs), len(paces)
    known = paces if all(paces) else [1.0] * workers
    until = [0.0, *itertools.accumulate(costs)]

    def stops(seconds: float) -> list[int]:
        """Where shares end that are done by then, each as large as can be; the last micro-batches may be left."""
        found, start = [], 0
        for pace in known:
            start = bisect.bisect_right(until, until[start] + seconds / pace * (1 + 1e-9)) - 1
            found.append(start)
        return found

    early, late = 0.0, until[-1] * max(known)
    for _ in range(HALVINGS):
        middle = (early + late) / 2
        early, late = (early, middle) if stops(middle)[-1] == count else (middle, late)
    bounds = [0, *stops(late)]
    for worker in range(workers - 1, 0, -1):
        end = bounds[worker + 1]
        if bounds[worker] >= end:  # it idles; those before it have one each without their last
            takes = end > worker and costs[end - 1] * known[worker] <= late * (1 + 1e-9)
            bounds[worker] = end - takes
    return tuple(range(a, b) for a, b in itertools.pairwise(bounds))


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


@dataclass(frozen=True, slots=True)
class Teams:
    """Which workers compute which part of the model: a team for each worker of a pipeline.

    Attributes:
        count: how many there are.
        uses, buffers: the team of each.
        loss: the team that computes it.
    """

    count: int
    uses: tuple[int, ...]
    buffers: tuple[int, ...]
    loss: int

    def of_blocks(self, layout: FlatLayout) -> list[int]:
        """The team of each block: that of its parameter's first use."""
        of_parameter: dict[int, int] = {}
        for team, (_, parameter) in zip(self.uses, layout.uses, strict=True):
            of_parameter.setdefault(parameter, team)
        return [of_parameter[block.parameter] for block in layout.blocks]


def one_team(layout: FlatLayout, buffers: int) -> Teams:
    """Everyone computes all of the model."""
    return Teams(1, (0,) * len(layout.uses), (0,) * buffers, 0)


def apart_teams(layout: FlatLayout, buffers: int) -> Teams:
    """Over several hosts whose replicas train apart: gradients come from the first cover, all else from the second."""
    return Teams(2, (0,) * len(layout.uses), (1,) * buffers, 1)


def owners(
    layout: FlatLayout,
    update: UpdateClass,
    members: Sequence[Sequence[int]],
    teams: Teams,
    kept: Sequence[int] | None = None,
) -> tuple[tuple[int, ...], ...]:
    """The blocks that each worker reduces and updates, in flat order: some of those that its team computes with.

    Arguments:
        members: the ranks of each team.
        kept: the blocks that this host keeps; None for all.
    """
    total = sum(map(len, members))
    here = range(len(layout.blocks)) if kept is None else kept
    if update is UpdateClass.COUPLED:
        return (tuple(here), *([()] * (total - 1)))
    result: list[tuple[int, ...]] = [()] * total
    team_of = teams.of_blocks(layout)
    replica_of = [layout.parameters[block.parameter].replica for block in layout.blocks]
    for replica in range(1 + layout.replicas):  # the same of each, so that nobody waits where they agree
        for team, ranks in enumerate(members):
            blocks = [i for i in here if (team_of[i], replica_of[i]) == (team, replica)]
            for rank, share in zip(ranks, _shares(layout, update, blocks, len(ranks)), strict=True):
                result[rank] += share
    return tuple(result)


def units(layout: FlatLayout, update: UpdateClass, blocks: Sequence[int]) -> list[list[int]]:
    """Blocks, in flat order, that one worker has to update together."""
    result: list[list[int]] = []
    for i in blocks:
        if update is UpdateClass.PARAMETER and _goes_on(layout, layout.blocks[i]):
            result[-1].append(i)
        else:
            result.append([i])
    return result


def _goes_on(layout: FlatLayout, block: Block) -> bool:
    """Whether the block before it belongs to the same unit of an optimizer that updates whole parameters."""
    return block.index > 0 or layout.parameters[block.parameter].joined


def _shares(layout: FlatLayout, update: UpdateClass, blocks: Sequence[int], workers: int) -> list[tuple[int, ...]]:
    parts = units(layout, update, blocks)
    factors: list[list[int]] = []
    others: list[list[int]] = []
    for unit in parts:
        is_factor = layout.parameters[layout.blocks[unit[0]].parameter].is_factor
        (factors if is_factor else others).append(unit)
    costs = [sum(layout.blocks[i].stop - layout.blocks[i].start for i in unit) for unit in others]
    shares = [[i for unit in others[s.start : s.stop] for i in unit] for s in contiguous_shares(costs, workers)]
    cubes = [layout.parameters[layout.blocks[unit[0]].parameter].tensor.shape[0] ** 3 for unit in factors]
    for unit, worker in zip(factors, shared_out(cubes, workers), strict=True):
        shares[worker] += unit
    return [tuple(sorted(share)) for share in shares]


def shared_out(costs: Sequence[int], workers: int) -> list[int]:
    """The worker of each of some pieces of work: the dearest first, always to the one that has least.

    Graham, "Bounds on multiprocessing timing anomalies", 1969.

    >>> shared_out([8, 27, 1, 27], 2)
    [0, 0, 1, 1]
    """
    load, owners = [0] * workers, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[number] = min(range(workers), key=lambda worker: (load[worker], worker))
        load[owners[number]] += costs[number]
    return owners


def runs(layout: FlatLayout, update: UpdateClass, share: Sequence[int], most: int = RUN_ELEMENTS) -> tuple[Run, ...]:
    """Cut an owner's blocks into the runs that it updates one after another.

    Arguments:
        most: elements of a run, where an optimizer updates element by element.
    """
    if not share:
        return ()
    if update is UpdateClass.COUPLED:
        return (Run(share[0], share[-1] + 1),)
    result: list[Run] = []
    start, elements = share[0], 0

    def joins(previous: Block, block: Block) -> bool:
        if update is UpdateClass.PARAMETER:
            return _goes_on(layout, block)
        a, b = layout.parameters[previous.parameter], layout.parameters[block.parameter]
        same = a.group == b.group and a.tensor.dtype == b.tensor.dtype
        adjacent = block.parameter - previous.parameter <= 1
        return same and adjacent and elements + block.stop - block.start <= most

    for last, i in zip([share[0] - 1, *share], share, strict=False):
        block = layout.blocks[i]
        if i > start and (i != last + 1 or not joins(layout.blocks[last], block)):
            result.append(Run(start, last + 1))
            start, elements = i, 0
        elements += block.stop - block.start
    result.append(Run(start, share[-1] + 1))
    return tuple(result)
