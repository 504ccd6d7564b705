"""A plan for a reader, as data, and as the part of a configuration that asks for it."""

from dataclasses import asdict
from typing import Any

from unisono.plan.division import Division
from unisono.plan.hardware import GIB
from unisono.plan.planner import FASTER, Candidate, Plan, words

NOTICED = 0.001
"""Of a step: smaller differences are not told."""
BAR = 40
"""Characters of a whole bar."""
TRILLION = 10**12
HOUR_S = 3600.0
OURS = ("pipeline", "tensor", "zero", "schedule", "virtual", "recompute", "sequence")
"""Parts of a division that a configuration of ours has, beside data."""


def as_dict(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """As data.

    Arguments:
        price: of a device for an hour.
    """
    question = plan.question
    return {
        "model": question.model.name,
        "cluster": str(question.cluster),
        "tokens": question.tokens,
        "sequences": question.sequences,
        "calibration": question.known.name,
        "judged": plan.judged,
        "fit": plan.fitting,
        "best": [_candidate(plan, one, price) for one in plan.best],
        "changes": [{"change": what, "times_faster": round(factor, 4)} for what, factor in plan.changes],
        "layout": layout(plan.best[0].division),
    }


def _candidate(plan: Plan, one: Candidate, price: float | None) -> dict[str, Any]:
    question = plan.question
    tokens = question.sequences * question.tokens
    known: dict[str, Any] = {
        "division": asdict(one.division),
        "step_s": one.step_s,
        "tokens_per_s_per_device": tokens / one.step_s / question.cluster.devices,
        "mfu": one.mfu,
        "seconds": dict(one.seconds),
        "needed_gib": {kind: size / GIB for kind, size in one.needed.items()},
        "most_gib": one.needed_bytes / GIB,
        "limit": one.limit,
    }
    if price is not None:
        known["cost_per_trillion_tokens"] = _price(plan, one, price)
    return known


def _price(plan: Plan, one: Candidate, price: float) -> float:
    steps = TRILLION / (plan.question.sequences * plan.question.tokens)
    return steps * one.step_s / HOUR_S * plan.question.cluster.devices * price


def layout(division: Division) -> dict[str, Any]:
    """The part of a configuration that asks for a division, as far as training here can be so divided.

    >>> layout(Division(tensor=2, data=4, zero=1))
    {'layout': {'data': 4, 'tensor': 2, 'zero': 1}, 'micro_batch_size': 1, 'global_batch_size': 4}
    """
    found: dict[str, Any] = {"data": division.data}
    names = {"virtual": "virtual_stages", "sequence": "sequence_parallel"}
    for name in OURS:
        value, plain = getattr(division, name), getattr(Division(), name)
        if value != plain and not (name == "virtual" and division.schedule == "zb_v"):
            found[names.get(name, name)] = value
    return {
        "layout": found,
        "micro_batch_size": division.micro_batch,
        "global_batch_size": division.sequences,
    }


def as_text(plan: Plan, price: float | None = None) -> str:
    """For a reader: a table, why, what else there is, and what to paste."""
    question, best = plan.question, plan.best[0]
    lines = [
        f"{question.sequences} sequences of {question.tokens} tokens a step; {plan.judged:,} divisions judged, "
        f"{plan.fitting:,} of those that can be best fit; calibration {question.known.name}",
        "",
        *_table(plan),
        "",
        *_why(best),
        "",
        *_room(plan, best),
        "",
        *_trades(plan),
        *_advice(plan),
    ]
    if price is not None:
        lines += ["", f"a trillion tokens cost {_price(plan, best, price):,.0f} at {price:g} a device and hour"]
    return "\n".join([*lines, "", *_paste(best)])


def _table(plan: Plan) -> list[str]:
    question = plan.question
    tokens = question.sequences * question.tokens / question.cluster.devices
    rows = [("", "division", "step", "tokens/s each", "MFU", "memory")]
    for number, one in enumerate(plan.best, 1):
        rows.append(
            (
                str(number),
                words(one.division),
                f"{one.step_s:.4g} s",
                f"{tokens / one.step_s:,.0f}",
                f"{one.mfu:.1%}",
                f"{one.needed_bytes / GIB:.1f} GiB",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    left = (0, 1)
    return [
        "  ".join(
            cell.ljust(width) if column in left else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _why(best: Candidate) -> list[str]:
    """Where the first one's time goes."""
    lines = ["where a step's time goes:"]
    for reason, seconds in sorted(best.seconds.items(), key=lambda item: -item[1]):
        share = seconds / best.step_s
        if share >= 0.001:
            lines.append(f"  {reason:<10} {share:6.1%}  {'#' * round(BAR * share)}")
    return [*lines, f"beside computing, most goes to {_LIMITS[best.limit]}"]


_LIMITS = {
    "launch": "launching kernels: larger micro-batches, or fewer devices a layer, would fill the devices",
    "tensor": "sums inside layers, over the links that join the devices of a layer",
    "context": "keys and values that go around the devices of a sequence",
    "expert": "tokens that travel to their experts and back",
    "gather": "parameters that are gathered for each layer",
    "bubble": "stages that wait for each other: more micro-batches would hide it",
    "stages": "activations that stages hand on",
    "gradients": "the exchange of gradients between replicas",
    "optimizer": "the update, bound by the devices' memory",
    "other": "what a step takes whatever it computes: larger batches would hide it",
}


def _room(plan: Plan, best: Candidate) -> list[str]:
    """Memory of the fullest device."""
    whole = plan.question.cluster.device.memory_bytes
    lines = [f"memory of the fullest device, of {whole / GIB:.0f} GiB:"]
    for kind, size in best.needed.items():
        if size >= 0.001 * whole:
            lines.append(f"  {kind:<12} {size / GIB:6.1f} GiB  {'#' * round(BAR * size / whole)}")
    return lines


def _trades(plan: Plan) -> list[str]:
    """What the next ones trade."""
    best = plan.best[0]
    lines = ["the next ones, beside the first:"] if len(plan.best) > 1 else []
    for number, one in enumerate(plan.best[1:], 2):
        shifts = {reason: one.seconds[reason] - best.seconds[reason] for reason in best.seconds}
        more = max(shifts, key=lambda reason: shifts[reason])
        less = min(shifts, key=lambda reason: shifts[reason])
        said = [f"{one.step_s / best.step_s - 1:+.1%} time"]
        least = NOTICED * best.step_s
        said += [f"{more} {shifts[more]:+.3g} s"] if shifts[more] > least else []
        said += [f"{less} {shifts[less]:+.3g} s"] if shifts[less] < -least else []
        room = (one.needed_bytes - best.needed_bytes) / GIB
        lines.append(f"  {number}: {', '.join(said)}, {room:+.1f} GiB")
    return lines


def _advice(plan: Plan) -> list[str]:
    """What would make it faster."""
    if not plan.changes:
        return []
    enough = [change for change in plan.changes if change[1] >= FASTER]
    head = (
        f"what would make it {FASTER:g} times as fast:"
        if enough
        else f"nothing of this makes it {FASTER:g} times as fast:"
    )
    return ["", head, *(f"  {what}: {factor:.2f} times" for what, factor in enough or plan.changes)]


def _paste(best: Candidate) -> list[str]:
    found = layout(best.division)
    inner = ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}" for key, value in found["layout"].items()
    )
    lines = [
        "for a configuration:",
        f"  global_batch_size: {found['global_batch_size']}",
        f"  micro_batch_size: {found['micro_batch_size']}",
        f"  layout: {{{inner}}}",
    ]
    foreign = [name for name in ("context", "expert", "period", "shard") if getattr(best.division, name) > 1]
    if foreign:
        without = " ".join(f"{name}={getattr(Division(), name)}" for name in foreign)
        lines.append(f"  # {' and '.join(foreign)}: planned, not yet trained by this library; without: {without}")
    return lines
