"""The best divisions of a model over a cluster: all that are legal, judged by the cost model, ranked, and explained."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from unisono.errors import ConfigurationError
from unisono.plan.constants import Calibration
from unisono.plan.cost import cost
from unisono.plan.division import Division, refuse_impossible
from unisono.plan.hardware import GIB, Cluster, Link
from unisono.plan.jobs import Column, Job, Jobs, Mask, columns
from unisono.plan.space import Fixed, division_of, space
from unisono.plan.transformer import Transformer
from unisono.plan.usage import fullest_bytes, total_bytes

SHOWN = 6
"""Divisions that a plan holds: the best, and the next five."""
LEAST_BATCH = 1 << 22
TOKENS_EACH = 1 << 10
"""Tokens of a step where nothing is said: this many, or so many a device."""
FACTORS = (2, 4, 8, 16, 32, 64)
"""Of devices, among which the fewest are looked for on which something fits."""
MOST_USED = 0.97
"""Of a device's memory, at the most, whatever a framework's runs are said to have needed."""
FASTER = 1.2
SLOW_BYTES_PER_S = 25e9 / 8
"""Of links between nodes over which replicas had better not meet at each step."""
PERIOD = 50
"""Steps between meetings, where replicas train on their own (Douillard et al., DiLoCo, 2023)."""


@dataclass(frozen=True, slots=True)
class Question:
    """What is to be trained, on what.

    Attributes:
        tokens: of a sequence.
        sequences: of a step.
        fixed: parts of the division that are given.
    """

    model: Transformer
    tokens: int
    cluster: Cluster
    sequences: int
    known: Calibration
    fixed: Fixed

    def space(self, *, pruned: bool = True) -> Jobs:
        """Its divisions."""
        saves = self.known.habits.selective_kept < 1
        return space(
            self.model, self.tokens, self.cluster, self.sequences, self.fixed, pruned=pruned, selective_saves=saves
        )

    @property
    def room_bytes(self) -> float:
        """Of a device's memory, what a division may need."""
        return min(MOST_USED, self.known.habits.usable) * self.cluster.device.memory_bytes


@dataclass(frozen=True, slots=True)
class Candidate:
    """A division, judged.

    Attributes:
        seconds: of a step, by the reason.
        needed: bytes of the fullest device, by the kind.
        mfu: model operations a second, of the peak in 16 bits.
    """

    division: Division
    seconds: Mapping[str, float]
    needed: Mapping[str, float]
    mfu: float

    @property
    def step_s(self) -> float:
        """Of a step."""
        return sum(self.seconds.values())

    @property
    def needed_bytes(self) -> float:
        """Of the fullest device."""
        return sum(self.needed.values())

    @property
    def limit(self) -> str:
        """What takes most of its time beside computing."""
        return max((reason for reason in self.seconds if reason != "compute"), key=lambda reason: self.seconds[reason])


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        best: the fastest that fit, first the fastest; of those that differ in what costs nothing, the simplest.
        judged, fitting: divisions of the space, and those that fit.
        changes: what would make it faster, and how many times.
    """

    question: Question
    best: tuple[Candidate, ...]
    judged: int
    fitting: int
    changes: tuple[tuple[str, float], ...]


def default_sequences(cluster: Cluster, tokens: int) -> int:
    """Of a step, where nothing is said: a power of two times the devices' largest odd part."""
    wanted = max(LEAST_BATCH, TOKENS_EACH * cluster.devices) / tokens
    odd = cluster.devices // (cluster.devices & -cluster.devices)
    return int(odd * 2 ** max(0, round(np.log2(max(1.0, wanted / odd)))))


def plan(question: Question, *, pruned: bool = True, advised: bool = True) -> Plan:
    """The best divisions.

    Arguments:
        pruned: what cannot be best is not judged; the answer is the same.
        advised: say what would make it faster, which is a search for each change.

    Raises:
        ConfigurationError: where none is legal, or none fits: then with the smallest change with which one would.
    """
    jobs = question.space(pruned=pruned)
    needed, seconds = _judged(jobs, question.known)
    fits = needed <= question.room_bytes
    if not fits.any():
        raise ConfigurationError(_fits_nowhere(question, jobs, needed))
    if pruned:
        fits &= ~_needlessly_recomputing(jobs, fits)
    order = np.lexsort((_complexity(jobs), np.round(seconds, 9)))
    rows = _different(jobs, order[fits[order]])
    best = tuple(candidate(question, division_of(jobs, row, _attention(question))) for row in rows)
    changes = _changes(question, best[0].step_s) if advised else ()
    return Plan(question, best, len(jobs), int(fits.sum()), changes)


def _attention(question: Question) -> str:
    return str(question.fixed.get("attention", "flash"))


def _judged(jobs: Jobs, known: Calibration) -> tuple[Column, Column]:
    rows = 0 * jobs.tensor
    return total_bytes(fullest_bytes(jobs, known.habits)) + rows, cost(jobs, known).seconds + rows


def candidate(question: Question, division: Division) -> Candidate:
    """One division, judged.

    Raises:
        ConfigurationError: where it cannot be.
    """
    refuse_impossible(question.model, division)
    jobs = columns([Job(question.model, question.tokens, division, question.cluster)])
    found, kinds = cost(jobs, question.known), fullest_bytes(jobs, question.known.habits)
    seconds = {reason: float(column[0]) for reason, column in found.reasons.items()}
    mfu = float(jobs.model_flops[0] / sum(seconds.values()) / division.devices / jobs.slow_flops[0])
    return Candidate(division, seconds, {kind: float(size[0]) for kind, size in kinds.items()}, mfu)


def _needlessly_recomputing(jobs: Jobs, fits: Mask) -> Mask:
    """Rows whose twin, which computes less again, fits too: rows of a division lie side by side."""
    levels = len(np.unique(jobs.recompute))
    table = fits.reshape(-1, levels)
    before: Column = np.cumsum(table, axis=1) - table
    return np.asarray(np.ravel(before > 0))


def _complexity(jobs: Jobs) -> Column:
    """Of divisions that take equally long, the simplest comes first."""
    return np.asarray(
        np.log2(jobs.tensor * jobs.pipeline * jobs.context * jobs.virtual * jobs.expert)
        + jobs.zero / 4
        + jobs.schedule / 8
        + jobs.recompute / 2
    )


def _different(jobs: Jobs, order: np.ndarray[Any, np.dtype[np.intp]]) -> list[int]:
    """The first rows, of which each differs from those before in more than its timetable or how states are shared."""
    seen: set[tuple[float, ...]] = set()
    rows: list[int] = []
    for row in order:
        key = tuple(
            float(getattr(jobs, name)[row]) for name in ("tensor", "pipeline", "context", "expert", "recompute")
        )
        if key not in seen:
            seen.add(key)
            rows.append(int(row))
        if len(rows) == SHOWN:
            break
    return rows


def _changes(question: Question, seconds: float) -> tuple[tuple[str, float], ...]:
    """Other questions, and how many times faster their answers are; per sequence, where these are more."""
    cluster, device = question.cluster, question.cluster.device
    others: list[tuple[str, Question]] = [
        ("twice the batch", replace(question, sequences=2 * question.sequences)),
        (
            f"links between nodes twice as fast as {cluster.between.name}",
            _with(question, between=_twice(cluster.between)),
        ),
        (f"links inside nodes twice as fast as {cluster.within.name}", _with(question, within=_twice(cluster.within))),
        ("twice the memory a device", _with(question, device=replace(device, memory_bytes=2 * device.memory_bytes))),
    ]
    if cluster.nodes > 1 and cluster.between.bytes_per_s <= SLOW_BYTES_PER_S and "period" not in question.fixed:
        fixed = {**question.fixed, "period": PERIOD}
        others.append(
            (f"replicas that meet every {PERIOD} steps (period={PERIOD}, not exact)", replace(question, fixed=fixed))
        )
    found = []
    for what, other in others:
        try:
            best = plan(other, advised=False).best[0]
        except ConfigurationError:
            continue
        found.append((what, seconds / question.sequences / (best.step_s / other.sequences)))
    return tuple(sorted(found, key=lambda change: -change[1]))


def _with(question: Question, **parts: Any) -> Question:
    return replace(question, cluster=replace(question.cluster, **parts))


def _twice(link: Link) -> Link:
    return replace(link, bytes_per_s=2 * link.bytes_per_s)


def _fits_nowhere(question: Question, jobs: Jobs, needed: Column) -> str:
    """What is lacking, and the least change with which it would fit."""
    least = int(np.argmin(needed))
    room = question.room_bytes
    device = question.cluster.device
    best = division_of(jobs, least, _attention(question))
    asked = f"{question.model.name} fits nowhere on {question.cluster}: its smallest division needs "
    asked += f"{needed[least] / GIB:.1f} GiB a device, and {room / GIB:.1f} of {device.name} can be used"
    for factor in FACTORS:
        cluster = replace(question.cluster, devices=factor * question.cluster.devices)
        open_ = {name: value for name, value in question.fixed.items() if name not in ("data", "micro_batches")}
        wider = replace(question, cluster=cluster, sequences=max(question.sequences, cluster.devices), fixed=open_)
        try:
            others = wider.space()
        except ConfigurationError:
            continue
        needs = _judged(others, question.known)[0]
        if needs.min() <= room:
            smallest = division_of(others, int(np.argmin(needs)), _attention(question))
            return f"{asked}; it fits on {cluster.devices} of them ({words(smallest)})"
    return f"{asked} ({words(best)}); use shorter sequences, or devices with more memory"


def words(division: Division) -> str:
    """What differs from one device alone, as KEY=VALUE.

    >>> words(Division(tensor=8, data=2, zero=1))
    'tensor=8 data=2 zero=1'
    """
    plain, parts = Division(), []
    for name in Division.__dataclass_fields__:
        value = getattr(division, name)
        if value != getattr(plain, name):
            parts.append(f"{name}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(parts) or "one device"
