"""A step's timetable as data: the engine runs it, `plan.timing` times it, a test draws it.

Letters of a timetable: F forward, B backward; a backward in two parts is I (gradients of the inputs) and W (gradients
of the weights). ``F>`` and ``I>`` send what an F or a backward made to the stage that waits for it; ``>F`` and ``>I``
take it there. Formulas count p workers of a pipeline, m micro-batches and v stages a worker.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum

from unisono.errors import ConfigurationError

WHOLE = -1
"""In place of a stage's number: all of the model, as a worker computes it that takes over from a pipeline."""

SCHEDULES = ("gpipe", "1f1b", "interleaved", "zb_h1", "zb_v")


class Kind(StrEnum):
    """What an action does."""

    FORWARD = "F"
    BACKWARD = "B"
    INPUT = "I"
    WEIGHT = "W"
    TAKE_ACTIVATION = ">F"
    GIVE_ACTIVATION = "F>"
    TAKE_GRADIENT = ">I"
    GIVE_GRADIENT = "I>"

    @property
    def computes(self) -> bool:
        """Whether it computes, or moves what was computed."""
        return len(self.value) == 1


@dataclass(frozen=True, slots=True)
class Action:
    """One thing to do for one micro-batch, on one stage of the model."""

    kind: Kind
    micro_batch: int
    stage: int = 0

    def __str__(self) -> str:
        kind = self.kind.value
        return kind.replace(kind.strip(">"), f"{kind.strip('>')}{self.micro_batch}")


@dataclass(frozen=True, slots=True)
class Timetable:
    """What every worker of a pipeline does in a step, in order.

    Attributes:
        workers: the actions of each worker.
        placement: the worker of each stage.
    """

    workers: tuple[tuple[Action, ...], ...]
    placement: tuple[int, ...]

    @property
    def stages(self) -> int:
        """Parts into which the model is cut."""
        return len(self.placement)


def virtual(schedule: str, virtual_stages: int) -> int:
    """Stages that each worker holds.

    Raises:
        ConfigurationError: where the schedule cannot have so many.
    """
    if schedule not in SCHEDULES:
        raise ConfigurationError(f"schedule {schedule!r} is not known; choose one of {', '.join(SCHEDULES)}")
    if schedule == "zb_v":
        if virtual_stages not in (1, 2):
            raise ConfigurationError(f"virtual_stages is {virtual_stages}; zb_v has always 2 stages a worker")
        return 2
    if schedule == "interleaved":
        return 2 if virtual_stages == 1 else virtual_stages
    if virtual_stages != 1:
        raise ConfigurationError(
            f"virtual_stages is {virtual_stages} and schedule {schedule} has 1 stage a worker; use schedule interleaved"
        )
    return 1


def placement(schedule: str, workers: int, virtual_stages: int = 1) -> tuple[int, ...]:
    """The worker of each stage: round and round, or there and back for ``zb_v``.

    >>> placement("interleaved", 2, 2), placement("zb_v", 2)
    ((0, 1, 0, 1), (0, 1, 1, 0))
    """
    there = tuple(range(workers))
    if schedule == "zb_v":
        return (*there, *reversed(there))
    return there * virtual(schedule, virtual_stages)


def timetable(schedule: str, workers: int, micro_batches: Sequence[int], virtual_stages: int = 1) -> Timetable:
    """The timetable of a pipeline of ``workers`` for the given micro-batches.

    Raises:
        ConfigurationError: for a schedule that is not known, or a number of stages that it cannot have.

    >>> print(draw(timetable("1f1b", 2, range(3))))
    F0 F1 B0 F2 B1 B2
    F0 B0 F1 B1 F2 B2
    """
    virtual(schedule, virtual_stages)
    m, places = len(micro_batches), placement(schedule, workers, virtual_stages)
    if schedule == "gpipe":
        lists = [_gpipe(r, m) for r in range(workers)]
    elif schedule == "1f1b":
        lists = [_one_forward_one_backward(r, workers, m) for r in range(workers)]
    elif schedule == "interleaved":
        lists = [_interleaved(r, workers, m, len(places) // workers) for r in range(workers)]
    elif schedule == "zb_h1":
        lists = [_zero_bubble(r, workers, m) for r in range(workers)]
    else:
        lists = _zero_bubble_v(workers, m)
    numbered = ([Action(a.kind, micro_batches[a.micro_batch], a.stage) for a in actions] for actions in lists)
    return Timetable(tuple(tuple(_with_messages(actions, len(places))) for actions in numbered), places)


def _gpipe(r: int, m: int) -> list[Action]:
    """All forwards, then all backwards. Huang et al., GPipe, 2019."""
    return [Action(kind, i, r) for kind in (Kind.FORWARD, Kind.BACKWARD) for i in range(m)]


def _one_forward_one_backward(r: int, p: int, m: int) -> list[Action]:
    """A backward as soon as it can be, so that at most p - r micro-batches are in flight. Narayanan et al., 2021."""
    ahead = min(m, p - 1 - r)
    return _alternating(
        [Action(Kind.FORWARD, i, r) for i in range(m)], [Action(Kind.BACKWARD, i, r) for i in range(m)], ahead
    )


def _alternating(forwards: Sequence[Action], backwards: Sequence[Action], ahead: int) -> list[Action]:
    """``ahead`` forwards, then one of each in turn."""
    result = list(forwards[:ahead])
    for k, backward in enumerate(backwards):
        result += forwards[k + ahead : k + ahead + 1]
        result.append(backward)
    return result


def _interleaved(r: int, p: int, m: int, v: int) -> list[Action]:
    """v stages a worker, in turns of p micro-batches or some more: a v-th of the bubble. Narayanan et al., 2021."""
    rounds = max(1, m // p)
    turns = [range(k * m // rounds, (k + 1) * m // rounds) for k in range(rounds)]
    order = [(c, i) for turn in turns for c in range(v) for i in turn]
    forwards = [Action(Kind.FORWARD, i, c * p + r) for c, i in order]
    backwards = [Action(Kind.BACKWARD, i, (v - 1 - c) * p + r) for c, i in order]
    return _alternating(forwards, backwards, min(m * v, 2 * (p - r - 1) + (v - 1) * max(map(len, turns))))


def _zero_bubble(r: int, p: int, m: int) -> list[Action]:
    """ZB-H1: the memory of 1F1B and a third of its bubble; worker r lets weights' gradients wait for r micro-batches.

    Source: Qi et al., Zero Bubble Pipeline Parallelism, 2024.
    """
    ahead, weights = min(m, p - r), iter(range(m))
    result = [Action(Kind.FORWARD, i, r) for i in range(ahead)]
    for j in range(m):
        result.append(Action(Kind.INPUT, j, r))
        more = j + ahead < m
        if (more and j >= r) or (not more and j < m - 1):  # in the end they fill the gaps between backwards
            result += [Action(Kind.WEIGHT, next(weights), r)]
        if more:
            result.append(Action(Kind.FORWARD, j + ahead, r))
    return result + [Action(Kind.WEIGHT, i, r) for i in weights]


def _zero_bubble_v(p: int, m: int) -> list[list[Action]]:
    """ZB-V: worker r has stages r and 2p - 1 - r, so the first to begin is the last to end; the memory of 1F1B.

    Found by letting equal parts of work run: of what a worker can do, inputs' gradients come first, then forwards, and
    weights' gradients where nothing else can be done; the oldest micro-batch first.

    Source: Qi et al., Pipeline Parallelism with Controllable Memory, 2024.
    """
    stages = 2 * p
    places = placement("zb_v", p)
    done: dict[Action, int] = {}
    result: list[list[Action]] = [[] for _ in range(p)]
    counts = {kind: [0] * stages for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT)}
    time = 0
    while sum(counts[Kind.WEIGHT]) < m * stages:

        def over(kind: Kind, i: int, stage: int, now: int = time) -> bool:
            return done.get(Action(kind, i, stage), now + 1) <= now

        for r in range(p):
            mine = [s for s in range(stages) if places[s] == r]
            held = sum(counts[Kind.FORWARD][s] - counts[Kind.WEIGHT][s] for s in mine)
            ready: list[tuple[int, int, int, Action]] = []
            for s in mine:
                f, i, w = (counts[kind][s] for kind in (Kind.FORWARD, Kind.INPUT, Kind.WEIGHT))
                if i < f and over(Kind.FORWARD, i, s) and (s == stages - 1 or over(Kind.INPUT, i, s + 1)):
                    ready.append((0, i, -s, Action(Kind.INPUT, i, s)))
                if f < m and held < 2 * p and (s == 0 or over(Kind.FORWARD, f, s - 1)):
                    ready.append((1, f, -s, Action(Kind.FORWARD, f, s)))
                if w < i and over(Kind.INPUT, w, s):
                    ready.append((2, w, -s, Action(Kind.WEIGHT, w, s)))
            if ready:
                action = min(ready, key=lambda item: item[:3])[3]
                result[r].append(action)
                done[action] = time + 1
                counts[action.kind][action.stage] += 1
        time += 1
    return result


def _with_messages(actions: Iterable[Action], stages: int) -> Iterator[Action]:
    """A worker's computations, with what it takes before and gives after each."""
    for action in actions:
        kind, i, s = action.kind, action.micro_batch, action.stage
        backward = kind in (Kind.BACKWARD, Kind.INPUT)
        if kind is Kind.FORWARD and s > 0:
            yield Action(Kind.TAKE_ACTIVATION, i, s)
        elif backward and s < stages - 1:
            yield Action(Kind.TAKE_GRADIENT, i, s)
        yield action
        if kind is Kind.FORWARD and s < stages - 1:
            yield Action(Kind.GIVE_ACTIVATION, i, s)
        elif backward and s > 0:
            yield Action(Kind.GIVE_GRADIENT, i, s)


def in_flight(actions: Iterable[Action]) -> int:
    """The most forwards of a worker, over all its stages, whose backward is not over.

    >>> [in_flight(actions) for actions in timetable("zb_h1", 3, range(8)).workers]
    [3, 3, 3]
    """
    actions = list(actions)
    ends = Kind.WEIGHT if any(action.kind is Kind.WEIGHT for action in actions) else Kind.BACKWARD
    now = most = 0
    for action in actions:
        now += (action.kind is Kind.FORWARD) - (action.kind is ends)
        most = max(most, now)
    return most


def draw(table: Timetable, *, messages: bool = False) -> str:
    """A line for every worker; of several stages a worker, a later one is marked by primes."""
    p = max(table.placement) + 1

    def name(action: Action) -> str:
        return str(action) + "'" * (action.stage // p)

    return "\n".join(
        " ".join(name(action) for action in actions if messages or action.kind.computes) for actions in table.workers
    )
