"""Fit the cost model's constants on published runs, and report how well they predict runs that they have not seen.

    python calibration/fit.py            fits, writes src/unisono/plan/constants.json, calibration/report.json, and
                                         the tables of docs/cost_model.md
    python calibration/fit.py --report   leaves what is frozen as it is, and reports

Each (framework, device) has its own constants; those of runs whose group is held out come from the other groups, in
five folds. What no run tells apart stays at the value that all begin with: deviations from it cost a little.
"""

import argparse
import gzip
import json
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from unisono.plan.constants import DEFAULT, FROZEN, Calibration, Constants, calibration, family
from unisono.plan.cost import cost
from unisono.plan.jobs import Jobs, columns
from unisono.plan.published import Run, run
from unisono.plan.usage import Habits, fullest_bytes, total_bytes

HERE = Path(__file__).parent
RUNS = HERE.parent / "data" / "published-runs.json.gz"
PLACE = HERE.parent / "src" / "unisono" / "plan" / FROZEN
FOLDS = 5
PULL = 0.02
"""What a deviation from the common value by a factor of e costs, in relative errors of one run."""
SCALE = 0.05
"""Relative error from which a run counts as an outlier."""
USEFUL = 0.3
"""MFU from which runs count fully: others are what one avoids."""
LEAST_WEIGHT = 0.3
FEWEST = 5
"""Runs on which something is fitted."""
ACCEPTED = 0.985
"""Of runs that worked, the part that is to be accepted."""
LEAST_USABLE = 0.85
SWEEP, SWEEP_BATCH = "hf_ultrascale_nanotron", 256
TWIN = ("model", "num_gpus", "tp", "pp", "dp", "mbs", "num_microbatches", "sharding", "seq")
"""What two runs of one configuration share."""
DOCUMENT = HERE.parent / "docs" / "cost_model.md"
BEGIN, END = "<!-- made by calibration/fit.py -->", "<!-- end -->"
GIB = 2**30

HABITS = {
    "nanotron": Habits(gradient_bytes=6, exchanged_bytes=4, hides_gradients=(0,), balances_output=True),
    "nanotron-2024": Habits(gradient_bytes=6, exchanged_bytes=4, hides_gradients=(0,), balances_output=True),
    "megatron-deepspeed": Habits(hides_gradients=()),
    "torchtitan": Habits(gradient_bytes=4, exchanged_bytes=4, selective_kept=0.55),
    "megatron": Habits(gradient_bytes=4, exchanged_bytes=4),
    "megatron-bridge": Habits(gradient_bytes=4),
}
"""What their code does: nanotron accumulates and sums in 32 bits, and DDP alone hides it; FSDP2 reduces in 32;
torchtitan's selective recomputation drops every other matrix product too (``activation_checkpoint.py``)."""
NEAR = {"crowd_s": 2e-3, "stall_s": 0.3}
"""Where constants that are 0 for all begin, for those frameworks that have them."""
COMMON = [f.name for f in fields(Constants) if f.name not in ("crowd_s", "stall_s", "hop_s")]
FITTED = {
    "nanotron": [f.name for f in fields(Constants) if f.name not in ("attention", "overlap", "sum_s")],
    DEFAULT: [name for name in COMMON if name not in ("within", "sum_s", "update_bytes", "output_bytes")],
}
"""Twelve at the most: with nanotron's one length of sequence, attention cannot be told apart, and it hides all that it
hides; where most runs divide no layers, links inside nodes, updates and outputs cannot be told from what FSDP hides."""
FIXED = {"nanotron": {"overlap": 1.0}}
BOUNDS = {
    "matmul": (0.3, 0.95),
    "attention": (0.05, 0.9),
    "within": (0.1, 1.0),
    "between": (0.02, 1.0),
    "overlap": (0.05, 1.0),
    "crowd_s": (1e-6, 2e-2),
    "stall_s": (1e-5, 2.0),
    "step_s": (1e-3, 0.5),
    "passes": (3.0, 60.0),
    "sum_s": (5e-6, 2e-4),
    "output_bytes": (10.0, 160.0),
    "update_bytes": (14.0, 120.0),
}
MEMORY = {
    "kept": (1.5, 0.3, 5.0),
    "logit_bytes": (8.0, 2.0, 30.0),
    "base_bytes": (0.5 * GIB, 0.0, 12.0 * GIB),
    "group_bytes": (0.02 * GIB, 0.0, 1.0 * GIB),
    "slack": (0.03, 0.0, 0.4),
    "transient_bytes": (5.0, 0.0, 100.0),
}
"""Where habits begin, and their bounds."""

POOLED = {"H100": ("llm-foundry", "torchtitan", "megatron-bridge"), "A100": ("llm-foundry", "internlm", "torchtitan")}
"""Frameworks of today, of which a default is made."""
PLANNED = Habits(gradient_bytes=4, kept=1.3, logit_bytes=10, base_bytes=1.5 * GIB, slack=0.05, usable=0.92)
"""What a default takes of memory: gradients in 32 bits, and room for what a framework may do."""
LEAN = Habits(gradient_bytes=2, kept=1.0, logit_bytes=6, base_bytes=0.5 * GIB)
"""Where runs worked that would not fit with that: as little as can be."""

Numbers = NDArray[np.float64]


@dataclass
class Runs:
    """Published runs of one framework on one device, and what was measured of each."""

    jobs: Jobs
    measured: Numbers
    rows: list[dict[str, Any]]

    def take(self, which: NDArray[np.bool_]) -> "Runs":
        """Some of them."""
        rows = [row for row, is_one in zip(self.rows, which, strict=True) if is_one]
        return Runs(self.jobs.take(which), self.measured[which], rows)

    def words(self, key: str) -> list[str]:
        """A value of each."""
        return [row[key] for row in self.rows]


def seconds_of(row: dict[str, Any]) -> float | None:
    """Of a published step."""
    if "time" not in row["use"] or "weak" in row["use"] or row["status"] != "ok":
        return None
    return row.get("iter_time_s") or row.get("derived_iter_time_s")


def bytes_of(row: dict[str, Any]) -> float | None:
    """Of a device, as published: some count a GB as a GiB."""
    if "memory" not in row["use"] or row.get("mem_gib") is None:
        return None
    return float(row["mem_gib"]) * GIB


def gathered(pairs: Sequence[tuple[Run, dict[str, Any]]], measure: Callable[[dict[str, Any]], float | None]) -> Runs:
    """Those rows that have such a measurement."""
    chosen = [(known, row, value) for known, row in pairs if (value := measure(row)) is not None]
    return Runs(
        columns([known.job for known, _, _ in chosen]),
        np.array([value for _, _, value in chosen]),
        [row for _, row, _ in chosen],
    )


def fitted(runs: Runs, start: Calibration) -> Calibration:
    """Constants that make the times of runs least wrong."""
    framework = start.name.split("/")[0]
    names = FITTED.get(framework, COMMON)
    begin = np.array([getattr(start.constants, name) or NEAR[name] for name in names])
    bounds = np.array([BOUNDS.get(name, (value / 30, value * 30)) for name, value in zip(names, begin, strict=True)]).T
    weights = np.clip(utilisation(runs.jobs, runs.measured) / USEFUL, LEAST_WEIGHT, 1)

    def made(values: Numbers) -> Calibration:
        return start.but(**{name: float(f"{value:.4g}") for name, value in zip(names, np.exp(values), strict=True)})

    def wrong(values: Numbers) -> Numbers:
        given = start.but(**dict(zip(names, np.exp(values), strict=True)))
        errors = np.log(cost(runs.jobs, given).seconds / runs.measured)
        return np.concatenate([weights * tamed(errors), PULL * (values - np.log(begin))])

    starts = (np.clip(np.log(begin) + shift, *np.log(bounds)) for shift in (0.0, -0.3, 0.3))
    found = [least_squares(wrong, at, bounds=np.log(bounds)) for at in starts]
    return made(min(found, key=lambda result: result.cost).x)


def tamed(errors: Numbers) -> Numbers:
    """Cauchy's loss: an outlier counts little more than half of one."""
    return np.asarray(SCALE * np.sign(errors) * np.sqrt(np.log1p((errors / SCALE) ** 2)))


def fitted_habits(runs: Runs, start: Habits) -> Habits:
    """Habits that make the memory of runs least wrong."""
    begin, low, high = (np.array([spec[i] for spec in MEMORY.values()]) for i in range(3))
    unit = high - low

    def made(values: Numbers) -> Habits:
        given = {name: float(f"{v:.4g}") for name, v in zip(MEMORY, low + values * unit, strict=True)}
        return Calibration(habits=start).but(**given).habits

    def wrong(values: Numbers) -> Numbers:
        errors = np.log(total_bytes(fullest_bytes(runs.jobs, made(values))) / runs.measured)
        return np.concatenate([tamed(errors), PULL * (values - (begin - low) / unit)])

    found = least_squares(wrong, (begin - low) / unit, bounds=(0, 1), diff_step=1e-3)
    return made(found.x)


def folds(groups: Sequence[str]) -> NDArray[np.int64]:
    """The fold of each run: groups go to folds in turn, the largest first."""
    sizes = {group: groups.count(group) for group in set(groups)}
    room = [0] * FOLDS
    fold_of: dict[str, int] = {}
    for group in sorted(sizes, key=lambda group: (-sizes[group], group)):
        fold_of[group] = room.index(min(room))
        room[fold_of[group]] += sizes[group]
    return np.array([fold_of[group] for group in groups])


def held_out(runs: Runs, fit: Callable[[Runs], Callable[[Jobs], Numbers]]) -> Numbers:
    """What is predicted of each run by a fit to other groups; 0 where there is no other group."""
    predicted = np.zeros_like(runs.measured)
    which = folds(runs.words("group"))
    for fold in range(FOLDS):
        others, own = which != fold, which == fold
        if own.any() and others.any():
            predicted[own] = fit(runs.take(others))(runs.jobs.take(own))
    return predicted


def utilisation(jobs: Jobs, seconds: Numbers) -> Numbers:
    """Model operations a second, of the peak in 16 bits."""
    return np.asarray(jobs.model_flops / seconds / jobs.devices / jobs.slow_flops)


def one_mfu(runs: Runs) -> Numbers:
    """The baseline: times by one MFU for all, the median."""
    found = utilisation(runs.jobs, runs.measured)
    return np.asarray(runs.measured * found / np.median(found))


def summary(predicted: Numbers, measured: Numbers) -> dict[str, float]:
    """Number, median and 90th percentile of relative errors."""
    if not predicted.size:
        return {"n": 0}
    errors = np.abs(predicted / measured - 1)
    return {
        "n": int(errors.size),
        "median": round(float(np.median(errors)), 4),
        "p90": round(float(np.quantile(errors, 0.9)), 4),
    }


def start_of(name: str) -> Calibration:
    """Before anything is fitted."""
    framework = name.split("/")[0]
    return Calibration(name, habits=HABITS.get(framework, Habits())).but(**FIXED.get(framework, {}))


def by_name(rows: Sequence[dict[str, Any]]) -> dict[str, list[tuple[Run, dict[str, Any]]]]:
    """Rows that can be judged, by framework and device."""
    found: dict[str, list[tuple[Run, dict[str, Any]]]] = defaultdict(list)
    for row in rows:
        known = run(row)
        if not isinstance(known, str):
            found[f"{known.framework}/{family(known.job.cluster.device.name)}"].append((known, row))
    return dict(sorted(found.items(), key=lambda item: (-len(item[1]), item[0])))


def calibrate(named: dict[str, list[tuple[Run, dict[str, Any]]]]) -> dict[str, Calibration]:
    """All frameworks and devices of which there are runs enough."""
    habits: dict[str, Habits] = {}
    for framework in {name.split("/")[0] for name in named}:
        pairs = [pair for name, own in named.items() if name.startswith(f"{framework}/") for pair in own]
        habits[framework] = habits_of(framework, pairs)
    known = {}
    for device, frameworks in POOLED.items():
        pairs = [pair for framework in frameworks for pair in named[f"{framework}/{device}"]]
        name = f"{DEFAULT}/{device}"
        known[name] = fitted(gathered(pairs, seconds_of), replace(start_of(name), habits=PLANNED))
    for name, pairs in named.items():
        runs, (framework, device) = gathered(pairs, seconds_of), name.split("/")
        start = replace(start_of(name), habits=habits[framework])
        if runs.measured.size >= FEWEST:
            known[name] = fitted(runs, start)
        elif any(bytes_of(row) is not None for _, row in pairs):
            known[name] = replace(start, constants=calibration(known, DEFAULT, device).constants)
    return known


def habits_of(framework: str, pairs: Sequence[tuple[Run, dict[str, Any]]]) -> Habits:
    """Of a framework on all its devices; where no memory was published, those of `PLANNED`.

    A device's usable part is what nearly all runs that worked are said to need.
    """
    start = HABITS.get(framework, Habits())
    runs = gathered(pairs, bytes_of)
    worked = [known.ways[-1] for known, row in pairs if row["status"] == "ok"]

    def asked(habits: Habits) -> float:
        """The part of a device's memory that nearly all that worked are said to need."""
        return float(np.quantile(needs(columns(worked), habits), ACCEPTED)) if worked else 0.0

    if runs.measured.size >= FEWEST:
        found = fitted_habits(runs, start)
    else:
        plans = [replace(start, **{name: getattr(plan, name) for name in MEMORY}) for plan in (PLANNED, LEAN)]
        found = plans[0] if asked(plans[0]) <= 1 else plans[1]
    return replace(found, usable=round(min(1.0, max(LEAST_USABLE, asked(found))), 3))


def needs(jobs: Jobs, habits: Habits) -> Numbers:
    """Of a device's memory."""
    return np.asarray(total_bytes(fullest_bytes(jobs, habits)) / jobs.memory_bytes)


def time_report(named: dict[str, list[tuple[Run, dict[str, Any]]]], known: dict[str, Calibration]) -> dict[str, Any]:
    """Errors of times: held-out groups, sources left out whole, the baseline."""
    report: dict[str, Any] = {}
    for name, own in known.items():
        runs = gathered(named.get(name, []), seconds_of)
        if runs.measured.size < FEWEST:
            continue
        start = replace(start_of(name), habits=own.habits)
        predicted = held_out(runs, lambda others, start=start: lambda jobs: cost(jobs, fitted(others, start)).seconds)  # type: ignore[misc]
        was, flat = predicted > 0, one_mfu(runs)
        good = was & (utilisation(runs.jobs, np.where(was, predicted, 1)) >= 0.2)
        inside = good & (runs.jobs.tensor <= runs.jobs.node)
        poor = was & ~good
        report[name] = {
            "runs": int(runs.measured.size),
            "constants": len(FITTED.get(name.split("/")[0], COMMON)),
            "held_out": summary(predicted[inside], runs.measured[inside]),
            "held_out_below_20_mfu": summary(predicted[poor], runs.measured[poor]),
            "one_mfu": summary(flat[inside], runs.measured[inside]),
            "one_mfu_below_20_mfu": summary(flat[poor], runs.measured[poor]),
            "seen": summary(cost(runs.jobs, own).seconds[inside], runs.measured[inside]),
            "sources_left_out": left_out(runs, start),
        }
    return report


def left_out(runs: Runs, start: Calibration) -> dict[str, Any]:
    """Of each source, predicted by the others alone, and after one scalar from five of its rows."""
    report = {}
    sources = np.array(runs.words("source"))
    for source in sorted(set(sources)):
        own = runs.take(sources == source)
        others = runs.take(sources != source)
        if others.measured.size < FEWEST or own.measured.size < FEWEST:
            continue
        predicted = cost(own.jobs, fitted(others, start)).seconds
        five = np.arange(own.measured.size)[:: max(1, own.measured.size // 5)][:5]
        rest = np.setdiff1d(np.arange(own.measured.size), five)
        scale = np.median((own.measured / predicted)[five])
        report[source] = {
            "alone": summary(predicted, own.measured),
            "after_one_scalar": summary(predicted[rest] * scale, own.measured[rest]),
        }
    return report


def ranking_report(pairs: Sequence[tuple[Run, dict[str, Any]]], known: Calibration) -> dict[str, Any]:
    """In each cell of nanotron's sweep (a model on a number of devices): how much slower the choice is than the best.

    Times are those predicted with the cell's group held out. Configurations that were run twice tell how far two
    measurements of one thing are apart.
    """
    runs = gathered(pairs, seconds_of)
    runs = runs.take(np.array([row["source"] == SWEEP and row["gbs"] == SWEEP_BATCH for row in runs.rows]))
    start = replace(start_of(known.name), habits=known.habits)
    predicted = held_out(runs, lambda others: lambda jobs: cost(jobs, fitted(others, start)).seconds)
    twins: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for row, seconds in zip(runs.rows, runs.measured, strict=True):
        twins[tuple(str(row.get(key)) for key in TWIN)].append(float(seconds))
    spread = sorted(max(own) / min(own) - 1 for own in twins.values() if len(own) > 1)
    cells = {}
    groups = np.array(runs.words("group"))
    for group in sorted(set(groups)):
        own = np.flatnonzero(groups == group)
        order = own[np.argsort(predicted[own])]
        best = runs.measured[own].min()
        first, five = runs.measured[order[0]] / best - 1, runs.measured[order[:5]].min() / best - 1
        cells[str(group)] = {"runs": int(own.size), "regret": round(float(first), 4), "of_five": round(float(five), 4)}
    regrets, fives = ([cell[key] for cell in cells.values()] for key in ("regret", "of_five"))
    usual = float(np.median(spread))
    beyond = np.maximum(0, np.array(regrets) - usual)
    return {
        "repeated": [round(value, 4) for value in spread],
        "regret": {"median": float(np.median(regrets)), "p90": float(np.quantile(regrets, 0.9))},
        "regret_beyond_spread": {"median": float(np.median(beyond)), "p90": float(np.quantile(beyond, 0.9))},
        "best_of_five": {"median": float(np.median(fives)), "p90": float(np.quantile(fives, 0.9))},
        "cells": cells,
    }


def table(report: dict[str, Any]) -> str:
    """The report as the documentation shows it."""

    def cells(found: dict[str, float]) -> str:
        return f"{found['n']} | {found['median']:.1%} | {found['p90']:.1%}" if found["n"] else "0 | |"

    lines = [
        "| framework / device | runs | n | median | p90 | one MFU for all: median | below 20% MFU: n | median | p90 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in report["times"].items():
        flat = f"{own['one_mfu']['median']:.1%}" if own["one_mfu"]["n"] else ""
        poor = cells(own["held_out_below_20_mfu"])
        lines.append(f"| {name} | {own['runs']} | {cells(own['held_out'])} | {flat} | {poor} |")
    lines += [
        "",
        "| source left out whole | framework / device | n | median | p90 | the others after one scalar from 5 rows |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name, own in report["times"].items():
        for source, left in own["sources_left_out"].items():
            after = f"{left['after_one_scalar']['median']:.1%}" if left["after_one_scalar"]["n"] else ""
            lines.append(f"| {source} | {name} | {cells(left['alone'])} | {after} |")
    lines += [
        "",
        "| memory | n | median | p90 | accepted of those that worked (fitted) | refused of those that failed |",
    ]
    lines += ["|---|---|---|---|---|---|"]
    for name, own in report["memory"].items():
        shares = [own.get(key) for key in ("accepted_of_worked", "refused_of_failed")]
        told = " | ".join("" if share is None else f"{share['share']:.1%} of {share['n']}" for share in shares)
        lines.append(f"| {name} | {cells(own.get('held_out', {'n': 0}))} | {told} |")
    rank = report["ranking"]
    lines += [
        "",
        f"Ranking, in the {len(rank['cells'])} cells of nanotron's sweep: the first choice is "
        f"{rank['regret']['median']:.1%} slower than the best (median; p90 {rank['regret']['p90']:.0%}), the best of "
        f"the first five {rank['best_of_five']['median']:.1%} (p90 {rank['best_of_five']['p90']:.1%}). Configurations "
        f"that were run twice differ by {', '.join(f'{value:.0%}' for value in rank['repeated'])}.",
    ]
    return "\n".join(lines)


def memory_report(named: dict[str, list[tuple[Run, dict[str, Any]]]]) -> dict[str, Any]:
    """Errors of memory in held-out groups, and what is refused."""
    report: dict[str, Any] = {}
    for framework in sorted({name.split("/")[0] for name in named}):
        pairs = [pair for name, own in named.items() if name.startswith(f"{framework}/") for pair in own]
        runs = gathered(pairs, bytes_of)
        start = HABITS.get(framework, Habits())

        def fit(others: Runs, start: Habits = start) -> Callable[[Jobs], Numbers]:
            found = fitted_habits(others, start)
            return lambda jobs: total_bytes(fullest_bytes(jobs, found))

        report[framework] = {}
        if runs.measured.size >= FEWEST:
            predicted = held_out(runs, fit)
            was = predicted > 0
            report[framework]["held_out"] = summary(predicted[was], runs.measured[was])
        habits = habits_of(framework, pairs)
        failed = [known for known, row in pairs if row["status"] in ("failed", "oom")]
        worked = [known for known, row in pairs if row["status"] == "ok"]
        for label, chosen in (("accepted_of_worked", worked), ("refused_of_failed", failed)):
            if chosen:
                fits = needs(columns([known.ways[-1] for known in chosen]), habits) <= habits.usable
                share = np.mean(fits if label.startswith("accepted") else ~fits)
                report[framework][label] = {"n": len(chosen), "share": round(float(share), 4)}
    return report


def main() -> None:
    """Fit, freeze and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="report only")
    wanted = parser.parse_args()
    rows = json.loads(gzip.decompress(RUNS.read_bytes()))["rows"]
    named = by_name(rows)
    known = calibrate(named)
    report = {"times": time_report(named, known), "memory": memory_report(named)}
    report["ranking"] = ranking_report(named["nanotron/H100"], known["nanotron/H100"])
    if not wanted.report:
        frozen = {name: calibration.as_dict() for name, calibration in sorted(known.items())}
        PLACE.write_text(json.dumps(frozen, indent=1) + "\n")
        (HERE / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        before, _, rest = DOCUMENT.read_text().partition(BEGIN)
        DOCUMENT.write_text(f"{before}{BEGIN}\n{table(report)}\n{END}{rest.partition(END)[2]}")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
