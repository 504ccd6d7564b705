"""Bytes that a worker needs, by kind: what a layout costs before it is tried.

Model-state bytes follow Rajbhandari et al., ZeRO, 2020; activations are what a rehearsal found.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from unisono.plan.outline import Outline
from unisono.plan.schedule import Action, Kind


@dataclass(frozen=True, slots=True)
class Activations:
    """What one micro-batch keeps on a stage.

    Attributes:
        kept_bytes: from its forward to its backward.
        again_bytes: on top, while a block is computed again.
    """

    kept_bytes: int
    again_bytes: int = 0


def activations(outline: Outline, units: range, recompute: str, blocks: Collection[str]) -> Activations:
    """What a micro-batch keeps on a stage that computes ``units``.

    Arguments:
        recompute: "none", "selective" or "full".
        blocks: the modules that are computed again.
    """
    found = outline.units
    if recompute == "none":
        return Activations(sum(found[i].saved_bytes for i in units))
    calls = [c for c in outline.calls if c.path in blocks and units.start <= c.first < c.stop <= units.stop]
    inside = {i for call in calls for i in range(call.first, call.stop)}
    kept = sum(found[i].saved_bytes for i in units if i not in inside) + sum(call.given_bytes for call in calls)
    if recompute == "selective":
        kept += sum(found[i].dear_bytes for i in inside)
    again = (sum(found[i].saved_bytes for i in range(call.first, call.stop)) for call in calls)
    return Activations(kept, max(again, default=0))


def most_activations(actions: Sequence[Action], stages: dict[int, Activations]) -> int:
    """The most bytes that a worker's timetable keeps at once.

    Arguments:
        stages: what a micro-batch keeps on each of the worker's stages.
    """
    split = any(action.kind is Kind.WEIGHT for action in actions)
    ends = Kind.WEIGHT if split else Kind.BACKWARD
    now = most = 0
    for action in actions:
        held = stages[action.stage]
        if action.kind is Kind.FORWARD:
            now += held.kept_bytes
            most = max(most, now)
        elif action.kind in (Kind.BACKWARD, Kind.INPUT):
            most = max(most, now + held.again_bytes)
        if action.kind is ends:
            now -= held.kept_bytes
    return most


PROCESS_BYTES = 160 << 20
"""What a worker takes before it trains anything: Python and torch, as far as they are not shared with its like."""
KINDS = ("parameters", "gradients", "optimizer", "activations", "buffers", "messages", "working", "process")


@dataclass(frozen=True, slots=True)
class ModelState:
    """What the workers of one team (see `plan.assignment.Teams`) hold of the model.

    Attributes:
        parameter_bytes: of the values, each parameter once.
        gradient_bytes: of a partial: a gradient for every use of a trained parameter.
        optimizer_bytes: of the optimizer's state.
        largest_bytes: of the largest parameter.
        buffer_bytes: of the model's buffers.
    """

    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    largest_bytes: int
    buffer_bytes: int


def worker_memory(
    state: ModelState,
    *,
    sharers: int,
    crew: int = 1,
    partials: int,
    activation_bytes: int,
    message_bytes: int,
) -> dict[str, int]:
    """Bytes of one worker, by kind (`KINDS`); what is shared is counted in equal parts.

    Arguments:
        sharers: workers of the team that share one copy of parameters and optimizer state.
        crew: tensor-parallel workers, who write into one copy of each of their partial sums.
        partials: live partial sums of the worker.
    """
    return {
        "parameters": state.parameter_bytes // sharers,
        "gradients": partials * state.gradient_bytes // crew,
        "optimizer": state.optimizer_bytes // sharers,
        "activations": activation_bytes,
        "buffers": 2 * state.buffer_bytes,
        "messages": message_bytes,
        "working": 2 * state.largest_bytes,  # a gradient as backward makes it, and what it is made of
        "process": PROCESS_BYTES,
    }
