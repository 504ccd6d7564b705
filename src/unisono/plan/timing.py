"""How long a timetable takes: every action begins when its worker is free and what it needs has arrived."""

from collections.abc import Mapping
from dataclasses import dataclass

from unisono.errors import ConfigurationError
from unisono.plan.schedule import Action, Kind, Timetable

EQUAL_PARTS: Mapping[Kind, float] = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.INPUT: 1.0, Kind.WEIGHT: 1.0}
"""A forward takes as long as either part of a backward: what the theory of bubbles assumes."""


@dataclass(frozen=True, slots=True)
class Timing:
    """When a timetable's actions begin and end, in seconds or whatever its parts are counted in.

    Attributes:
        spans: (begin, end) of each worker's computations, in their order.
    """

    spans: tuple[tuple[tuple[float, float], ...], ...]

    @property
    def total(self) -> float:
        """From the beginning to the end of the last action."""
        return max((worker[-1][1] for worker in self.spans if worker), default=0.0)

    @property
    def bubble(self) -> float:
        """The part of all workers' time in which they wait."""
        busy = sum(end - begin for worker in self.spans for begin, end in worker)
        return 1.0 - busy / (len(self.spans) * self.total) if self.total else 0.0


def timing(table: Timetable, parts: Mapping[Kind, float] = EQUAL_PARTS, latency: float = 0.0) -> Timing:
    """Time a timetable.

    Arguments:
        parts: what each kind of computation takes; divided by the stages a worker holds, who share its layers.
        latency: of a message.

    Raises:
        ConfigurationError: for a timetable whose workers would wait for each other for ever.

    >>> from unisono.plan.schedule import timetable
    >>> timing(timetable("1f1b", 2, range(3))).bubble
    0.25
    """
    last = table.stages - 1
    held = table.stages / len(table.workers)
    computations = [[action for action in worker if action.kind.computes] for worker in table.workers]
    ends: dict[Action, float] = {}
    spans: list[list[tuple[float, float]]] = [[] for _ in table.workers]

    def needed(action: Action) -> list[Action]:
        kind, i, s = action.kind, action.micro_batch, action.stage
        if kind is Kind.FORWARD:
            return [Action(Kind.FORWARD, i, s - 1)] if s else []
        if kind is Kind.WEIGHT:
            return [Action(Kind.INPUT, i, s)]
        return [Action(Kind.FORWARD, i, s), *([Action(kind, i, s + 1)] if s < last else [])]

    moved = True
    while moved:
        moved = False
        for own, worker in zip(spans, computations, strict=True):
            while len(own) < len(worker):
                action = worker[len(own)]
                before = needed(action)
                if any(other not in ends for other in before):
                    break
                begin = own[-1][1] if own else 0.0
                for other in before:
                    travels = table.placement[other.stage] != table.placement[action.stage]
                    begin = max(begin, ends[other] + latency * travels)
                ends[action] = begin + parts[action.kind] / held
                own.append((begin, ends[action]))
                moved = True
    stuck = [w for w, (own, worker) in enumerate(zip(spans, computations, strict=True)) if len(own) < len(worker)]
    if stuck:
        raise ConfigurationError(f"the timetable never ends: workers {stuck} wait for each other")
    return Timing(tuple(tuple(worker) for worker in spans))


def bubble_theory(schedule: str, workers: int, micro_batches: int, virtual_stages: int = 1) -> float | None:
    """The published bubble, with as many micro-batches as workers or more; None where there is no formula.

    Sources: Narayanan et al., Efficient Large-Scale Language Model Training, 2021; Qi et al., 2024.
    """
    if micro_batches < workers:
        return None
    bubble = {"gpipe": 3.0, "1f1b": 3.0, "interleaved": 3.0 / virtual_stages, "zb_h1": 1.0, "zb_v": 0.5}[schedule]
    return (workers - 1) * bubble / (3.0 * micro_batches + (workers - 1) * bubble)
