"""All legal divisions of a model over a cluster, as columns: what a planner searches.

The pruned space leaves out what another division is never slower than and never larger than: GPipe beside 1F1B,
sequences undivided between divided layers, selective recomputation where attention keeps no scores anyway, and layers
computed again where their activations fit.
"""

from collections.abc import Iterator, Mapping
from dataclasses import fields
from typing import Any

import numpy as np

from unisono.errors import ConfigurationError
from unisono.plan.division import ENDS, RECOMPUTE, SCHEDULES, Division
from unisono.plan.hardware import Cluster
from unisono.plan.jobs import Jobs, of_cluster, of_model
from unisono.plan.transformer import Transformer

LARGEST_MICRO_BATCH = 64
SHORTEST_PART = 1024
"""Tokens of a sequence's part on one of the devices that divide it."""
MOST_VIRTUAL = 8
Fixed = Mapping[str, Any]
"""Parts of a division that are given."""


def divisors(number: int, most: int | None = None) -> list[int]:
    """Of a number, from 1 on.

    >>> divisors(12), divisors(12, most=4)
    ([1, 2, 3, 4, 6, 12], [1, 2, 3, 4])
    """
    small = [n for n in range(1, int(number**0.5) + 1) if number % n == 0]
    every = sorted({*small, *(number // n for n in small)})
    return [n for n in every if most is None or n <= most]


def _meshes(model: Transformer, tokens: int, devices: int, fixed: Fixed) -> Iterator[tuple[int, int, int, int]]:
    """Tensor, pipeline, context, data."""
    for t in _of("tensor", divisors(int(np.gcd(model.heads, model.ffn)), devices), fixed):
        for p in _of("pipeline", divisors(devices // t if devices % t == 0 else 0, model.layers), fixed):
            for c in _of("context", divisors(tokens, tokens // SHORTEST_PART or 1), fixed):
                if devices % (t * p * c) == 0 and fixed.get("data", d := devices // (t * p * c)) == d:
                    yield t, p, c, d


def _of(name: str, values: list[int], fixed: Fixed) -> list[int]:
    return [fixed[name]] if name in fixed else values or [1]


def _timetables(model: Transformer, p: int, fixed: Fixed, pruned: bool) -> list[tuple[int, int]]:
    """Schedules by their index, and stages of a device."""
    if p == 1:
        found = [("1f1b", 1)]
    else:
        found = [("1f1b", 1), ("zb_h1", 1), *([] if pruned else [("gpipe", 1)])]
        found += [("interleaved", v) for v in range(2, MOST_VIRTUAL + 1) if p * v <= model.layers + ENDS]
        found += [("zb_v", 2)] if model.layers >= 2 * p else []
    if fixed.get("schedule") == "gpipe" and pruned and p > 1:
        found.append(("gpipe", 1))
    several = fixed.get("virtual", 1)
    if several > MOST_VIRTUAL and p > 1 and p * several <= model.layers + ENDS:
        found.append(("interleaved", several))
    return [
        (SCHEDULES.index(name), v)
        for name, v in found
        if fixed.get("schedule", name) == name and fixed.get("virtual", v) == v
    ]


def _shardings(data: int, node: int, t: int, fixed: Fixed) -> list[tuple[int, int]]:
    """Levels of ZeRO and sizes of groups; groups of a node beside groups of all, or those that are given."""
    inside, given = max(1, node // t), fixed.get("shard")
    groups = (
        {given or data}
        if given is not None
        else {data, *([inside] if 1 < inside < data and data % inside == 0 else [])}
    )
    found = [(0, data)]
    if data > 1:
        found += [
            (z, size) for z in (1, 2, 3) for size in sorted(groups) if data % size == 0 and (z == 3 or size == data)
        ]
    if given:
        found = [(z, size) for z, size in found if size == given and z > 0]
    if fixed.get("period", 1) > 1:  # replicas that train on their own have states of their own
        found = [(z, size) for z, size in found if z == 0 or (z == 3 and size < data)]
    return [(z, size) for z, size in found if fixed.get("zero", z) == z]


def space(
    model: Transformer,
    tokens: int,
    cluster: Cluster,
    sequences: int,
    fixed: Fixed,
    *,
    pruned: bool = True,
    selective_saves: bool = False,
) -> Jobs:
    """All divisions of so many sequences a step over all devices.

    Arguments:
        pruned: leave out what cannot be best.
        selective_saves: selective recomputation saves memory though attention keeps no scores.

    Raises:
        ConfigurationError: where there is none.
    """
    parts: list[np.ndarray[Any, np.dtype[np.float64]]] = []
    recompute = [RECOMPUTE.index(name) for name in RECOMPUTE if fixed.get("recompute", name) == name]
    unfused = fixed.get("attention", "flash") == "unfused"
    if pruned and not unfused and not selective_saves and len(recompute) > 1:
        recompute.remove(RECOMPUTE.index("selective"))
    for t, p, c, d in _meshes(model, tokens, cluster.devices, fixed):
        if sequences % d:
            continue
        micro = [b for b in divisors(sequences // d, LARGEST_MICRO_BATCH) if fixed.get("micro_batch", b) == b]
        count = fixed.get("micro_batches")
        micro = [b for b in micro if count in (None, sequences // (d * b))]
        experts = [e for e in divisors(model.experts) if (t * c * d) % e == 0] if model.experts else [1]
        even = [False] if t == 1 else [True] if pruned else [True, False]
        if "sequence" in fixed:
            even = [fixed["sequence"]] if t > 1 or not fixed["sequence"] else []
        tables, shards = _timetables(model, p, fixed, pruned), _shardings(d * c, cluster.node, t, fixed)
        chosen = [e for e in experts if fixed.get("expert", e) == e and (e > 1 or model.expert_ffn % t == 0)]
        if micro and tables and shards and chosen and even:
            parts.append(_product((t, p, c, d), np.array(micro), tables, shards, chosen, even, recompute))
    if not parts:
        words = " ".join(f"{key}={value}" for key, value in fixed.items())
        raise ConfigurationError(
            f"no division of {model.name} over {cluster.devices} devices has {sequences} sequences a step"
            + (f" and {words}" if words else "")
            + "; give another --batch, or leave something open"
        )
    table = dict(zip(_COLUMNS, np.concatenate(parts, axis=1), strict=True))
    table["micro_batches"] = sequences / (table["data"] * table["micro_batch"])
    whole = {**of_model(model, tokens), **of_cluster(cluster)}
    whole |= {"unfused": float(unfused), "period": float(fixed.get("period", 1))}
    return Jobs(**table, **{name: np.asarray(value, float) for name, value in whole.items()})


_COLUMNS = (
    "tensor",
    "pipeline",
    "context",
    "data",
    "micro_batch",
    "schedule",
    "virtual",
    "zero",
    "shard",
    "expert",
    "sequence",
    "recompute",
)


def _product(
    mesh: tuple[int, int, int, int],
    micro: np.ndarray[Any, np.dtype[np.int64]],
    tables: list[tuple[int, int]],
    shards: list[tuple[int, int]],
    experts: list[int],
    even: list[bool],
    recompute: list[int],
) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Every combination, a column each."""
    which = np.meshgrid(micro, range(len(tables)), range(len(shards)), experts, even, recompute, indexing="ij")
    b, table, shard, expert, sequence, again = (axis.ravel() for axis in which)
    schedule, virtual = np.array(tables)[table].T
    zero, size = np.array(shards)[shard].T
    whole = [np.full(b.size, value) for value in mesh]
    return np.stack([*whole, b, schedule, virtual, zero, size, expert, sequence, again]).astype(float)


def division_of(jobs: Jobs, row: int, attention: str = "flash") -> Division:
    """One row as a division."""
    one = jobs.take(np.array([row]))
    values: dict[str, Any] = {}
    for field in fields(Division):
        if field.name == "attention":
            values["attention"] = attention
            continue
        value = int(np.ravel(getattr(one, field.name))[0])
        values[field.name] = value
    values["sequence"] = bool(values["sequence"])
    values["recompute"] = RECOMPUTE[values["recompute"]]
    values["schedule"] = SCHEDULES[values["schedule"]]
    if values["zero"] == 0 or values["shard"] == values["data"] * values["context"]:
        values["shard"] = 0
    return Division(**values)
