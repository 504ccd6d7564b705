"""Runs, as rows of the published ones' schema, and what the cost model says of each: seconds, bytes, does it fit."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from unisono.errors import ConfigurationError
from unisono.plan.constants import Calibration, Known, calibration
from unisono.plan.cost import cost
from unisono.plan.hardware import GIB
from unisono.plan.jobs import columns
from unisono.plan.published import Run, run
from unisono.plan.usage import fullest_bytes, total_bytes

MEASURED = ("iter_time_s", "derived_iter_time_s")
FEWEST = 3
"""Rows from which a scalar is refitted."""


def predict(rows: Sequence[Mapping[str, Any]], known: Known) -> list[dict[str, Any]]:
    """An answer for each row; of one that cannot be judged, the reason."""
    whole = [row if isinstance(row, Mapping) else {} for row in rows]
    return [_answer(row, known) for row in whole]


def rescaled(rows: Sequence[Mapping[str, Any]], known: Known) -> Known:
    """Calibrations whose times fit a handful of a user's own rows: one scalar for each framework and device.

    Raises:
        ConfigurationError: where too few rows have a time and can be judged.
    """
    ratios: dict[str, list[float]] = {}
    for row in (row for row in rows if isinstance(row, Mapping)):
        judged, measured = run(row), next((row[name] for name in MEASURED if row.get(name)), None)
        if isinstance(judged, Run) and isinstance(measured, (int, float)) and measured > 0:
            own = _calibration(judged, known)
            seconds = cost(columns([judged.job]), own).seconds[0]
            ratios.setdefault(own.name, []).append(float(measured / seconds))
    many = {name: values for name, values in ratios.items() if len(values) >= FEWEST}
    if not many:
        most = max(map(len, ratios.values()), default=0)
        raise ConfigurationError(
            f"of {len(rows)} rows, at most {most} of one framework and device have iter_time_s and can be judged; give "
            f"{FEWEST} or more"
        )
    scales = {name: float(np.median(values)) for name, values in many.items()}
    return {name: replace(own, scale=own.scale * scales.get(own.name, 1.0)) for name, own in known.items()}


def _calibration(judged: Run, known: Known) -> Calibration:
    return calibration(known, judged.framework, judged.job.cluster.device.name)


def _answer(row: Mapping[str, Any], known: Known) -> dict[str, Any]:
    judged = run(row)
    if not isinstance(judged, Run):
        return {"id": row.get("id"), "reason": judged}
    own, ways = _calibration(judged, known), columns(judged.ways)
    jobs, kinds = columns([judged.job]), fullest_bytes(ways, own.habits)
    room = own.habits.usable * float(jobs.memory_bytes[0])
    fitting = np.flatnonzero(total_bytes(kinds) <= room)
    way = int(fitting[0]) if fitting.size else len(judged.ways) - 1
    found, needed = cost(jobs, own), float(total_bytes(kinds)[way])
    seconds = float(found.seconds[0])
    division = judged.job.division
    tokens = division.sequences * judged.job.tokens
    return {
        "id": row.get("id"),
        "iter_time_s": seconds,
        "tokens_per_s_per_gpu": tokens / seconds / division.devices,
        "mfu": float(jobs.model_flops[0] / seconds / division.devices / jobs.slow_flops[0]),
        "mem_gib": needed / GIB,
        "fits": needed <= room,
        "breakdown": {reason: float(column[0]) for reason, column in found.reasons.items()},
        "memory": {kind: float(column[way]) / GIB for kind, column in kinds.items()},
        "calibration": own.name,
        "assumed": list(judged.assumed),
    }


def as_text(answers: Sequence[Mapping[str, Any]]) -> str:
    """For a reader: a line for each."""
    lines = []
    for answer in answers:
        if "reason" in answer:
            lines.append(f"{answer['id']}: cannot be judged: {answer['reason']}")
            continue
        fits = "fits" if answer["fits"] else "DOES NOT FIT"
        lines.append(
            f"{answer['id']}: {answer['iter_time_s']:.4g} s a step, {answer['tokens_per_s_per_gpu']:,.0f} tokens a "
            f"second and device, MFU {answer['mfu']:.1%}, {answer['mem_gib']:.1f} GiB, {fits}"
        )
    return "\n".join(lines)
