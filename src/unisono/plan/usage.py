"""Bytes that a device needs, by kind: states as ZeRO divides them, activations in flight, logits, what is worked on.

Activations: Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, with the widths
that keys, values and MLPs really have. States: Rajbhandari et al., ZeRO, 2020. In flight: Narayanan et al., 2021, and
Qi et al., "Zero bubble pipeline parallelism", 2024.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from unisono.plan.division import RECOMPUTE, SCHEDULES
from unisono.plan.jobs import Column, Jobs, Mask

STATE_BYTES: Mapping[str, int] = {"parameters": 2, "gradients": 2, "optimizer": 12}
"""Of a parameter, with Adam in mixed precision: 16 bits to compute with, and 32-bit copy and moments."""
HALF, FULL, MASK = 2, 4, 1
"""Bytes of a number that one computes with, of one in 32 bits, and of a dropout's choice."""
KINDS = ("parameters", "gradients", "optimizer", "activations", "logits", "working", "framework")


@dataclass(frozen=True, slots=True)
class Habits:
    """What a framework does in its own way: of its code, the first five; of its memory, the rest.

    Attributes:
        gradient_bytes: that a parameter's gradient takes.
        exchanged_bytes: of it, as replicas sum it.
        hides_gradients: levels of ZeRO (0 to 2) at which that sum runs beside the backward.
        balances_output: stages are cut where the output's operations count as layers of the last one.
        selective_kept: part of a layer's activations that selective recomputation keeps, beside attention's scores.
        kept: factor on what a layer keeps beside its matrices.
        transient_bytes: of each element of an activation between layers, while one layer is computed, gathered.
        logit_bytes: that a logit takes: in 16 bits, in 32, its gradient, and copies.
        base_bytes: of the device's context, libraries and communication buffers.
        group_bytes: of each further device that one exchanges with inside a layer or between stages.
        slack: of the sum, for what the allocator cannot use.
        usable: of a device's memory, what runs that work have been predicted to need at most.
    """

    gradient_bytes: float = STATE_BYTES["gradients"]
    exchanged_bytes: float = STATE_BYTES["gradients"]
    hides_gradients: tuple[int, ...] = (0, 1, 2)
    balances_output: bool = False
    selective_kept: float = 1.0
    kept: float = 1.0
    transient_bytes: float = 0.0
    logit_bytes: float = FULL
    base_bytes: float = 0.0
    group_bytes: float = 0.0
    slack: float = 0.0
    usable: float = 1.0


PLAIN = Habits()


def is_recomputing(jobs: Jobs, what: str) -> Mask:
    """Rows that compute again so much."""
    return np.asarray(jobs.recompute == RECOMPUTE.index(what))


def layer_bytes(jobs: Jobs, habits: Habits = PLAIN) -> Column:
    """What a layer keeps of one micro-batch on one device, from its forward to its backward."""
    beside = np.where(jobs.sequence > 0, jobs.tensor, 1)
    whole = np.where(is_recomputing(jobs, "none") & (jobs.unfused > 0), _scores(jobs), 0)
    whole = whole + _layer(jobs, beside, habits)
    whole = np.where(is_recomputing(jobs, "selective"), habits.selective_kept, 1) * whole
    full = HALF * jobs.hidden / beside
    return np.where(is_recomputing(jobs, "full"), full, whole) * jobs.own_tokens


def _layer(jobs: Jobs, beside: Column, habits: Habits) -> Column:
    """Of one token, without attention's scores."""
    inputs = HALF * 4 * jobs.hidden * habits.kept  # of two norms, of attention and of the MLP
    masks = jobs.dropout * 2 * MASK * jobs.hidden
    projected = HALF * (2 * jobs.query + 2 * jobs.keys)  # queries, keys, values, and what is projected last
    mlp = HALF * jobs.matrices * (jobs.common + jobs.passed)
    chosen = HALF * jobs.routed * jobs.hidden  # a token's copies, one an expert
    return (inputs + masks + chosen) / beside + (projected + mlp) / jobs.tensor


def _scores(jobs: Jobs) -> Column:
    return (HALF + jobs.dropout * (MASK + HALF)) * jobs.heads * jobs.tokens / jobs.tensor


def stage_layers(jobs: Jobs, stage: Column, habits: Habits) -> Column:
    """How many layers a stage (from 0) has; where devices have several stages, those of the device.

    Balanced, a stage ends with the layer at which it has more than its share (nanotron, ``build_model``).
    """
    is_last = stage == jobs.pipeline - 1
    share = jobs.layers / jobs.pipeline
    even = np.floor(share * (stage + 1) + TINY) - np.floor(share * stage + TINY)
    if habits.balances_output:
        output = jobs.hidden * jobs.vocab / (jobs.attention_elements + jobs.matrices * jobs.hidden * jobs.common)
        share = (jobs.layers + output) / jobs.pipeline
        end = np.where(is_last, jobs.layers, np.minimum(jobs.layers, np.floor(share * (stage + 1)) + 1))
        begin = np.where(stage == 0, 0, np.minimum(jobs.layers, np.floor(share * stage) + 1))
        even = end - begin
    return np.where(jobs.virtual > 1, jobs.held_layers, even)


TINY = 1e-9
"""By which a quotient of whole numbers may come out too small."""


def in_flight(jobs: Jobs, stage: Column) -> Column:
    """Micro-batches whose activations a stage's device keeps, of all its layers."""
    p, m, v = jobs.pipeline, jobs.micro_batches, jobs.virtual
    turn = np.ceil(m / np.maximum(1, np.floor(m / p)))  # micro-batches that pass a stage before the device's next one
    kept = [p - stage, m, (2 * (p - stage - 1) + (v - 1) * turn + 1) / v, p + 0 * stage, p + 0 * stage]
    assert len(kept) == len(SCHEDULES)
    return np.asarray(np.minimum(m, np.choose(jobs.schedule.astype(int), kept)))


def alike(jobs: Jobs) -> Column:
    """Devices that have the same experts."""
    return np.maximum(1, jobs.data * jobs.context * jobs.tensor / jobs.expert_ways)


def shards(jobs: Jobs) -> tuple[Column, Column]:
    """Devices that divide a state, and those that divide that of experts."""
    shard = np.maximum(1, np.minimum(jobs.shard, jobs.data * jobs.context))
    return shard, np.minimum(shard, alike(jobs))


def own_elements(jobs: Jobs, stage: Column, habits: Habits = PLAIN) -> Column:
    """Parameters of a device of a stage (from 0), before replicas divide anything."""
    is_last: Mask = np.asarray(stage == jobs.pipeline - 1)
    layers = stage_layers(jobs, stage, habits)
    elements = layers * jobs.layer_elements
    elements = elements + (stage == 0) * (jobs.vocab + jobs.positions) * jobs.hidden
    # the last stage of a pipeline has a copy of tied ones
    elements = elements + (is_last & ((jobs.pipeline > 1) | (jobs.tied == 0))) * jobs.vocab * jobs.hidden
    elements = elements + is_last * jobs.hidden * (1 + jobs.biased)
    shared = layers * 2 * jobs.hidden * jobs.keys  # several devices may need the same keys and values
    copies = jobs.tensor / np.minimum(jobs.tensor, jobs.kv_heads)
    return np.asarray((elements + (copies - 1) * shared) / jobs.tensor)


def expert_share(jobs: Jobs, stage: Column, habits: Habits = PLAIN) -> Column:
    """Parameters of the experts of a device of a stage."""
    return stage_layers(jobs, stage, habits) * jobs.expert_elements / jobs.expert_ways


def stage_bytes(jobs: Jobs, stage: Column, habits: Habits = PLAIN) -> dict[str, Column]:
    """Bytes of a device of a stage (from 0), by kind."""
    is_last = stage == jobs.pipeline - 1
    own, experts = own_elements(jobs, stage, habits), expert_share(jobs, stage, habits)
    shard, shard_of_experts = shards(jobs)
    kinds: dict[str, Column] = {}
    for level, (kind, size) in zip((3, 2, 1), STATE_BYTES.items(), strict=True):
        bytes_each = habits.gradient_bytes if kind == "gradients" else size
        is_divided = jobs.zero >= level
        divided = own / np.where(is_divided, shard, 1)
        kinds[kind] = bytes_each * (divided + experts / np.where(is_divided, shard_of_experts, 1))
    layer = layer_bytes(jobs, habits)
    kinds["activations"] = stage_layers(jobs, stage, habits) * layer * in_flight(jobs, stage)
    ends = (2 * HALF * jobs.hidden + habits.logit_bytes * jobs.vocab) / jobs.tensor
    kinds["logits"] = is_last * ends * jobs.own_tokens  # the last norm's input, the output's, and logits
    kinds["working"] = _working_bytes(jobs, layer, habits)
    met = (jobs.tensor - 1) + np.where(jobs.pipeline > 1, 2, 0)
    kinds["framework"] = habits.base_bytes + habits.group_bytes * met + habits.slack * total_bytes(kinds)
    return kinds


def _working_bytes(jobs: Jobs, kept_bytes: Column, habits: Habits) -> Column:
    """What the layer takes that is being computed: again, where that is so, and two layers' gathered parameters."""
    again = layer_bytes(jobs.but(recompute=RECOMPUTE.index("none")), habits) - kept_bytes
    elements = jobs.layer_elements / jobs.tensor + jobs.expert_elements / jobs.expert_ways
    is_gathered = (jobs.zero == 3) & (jobs.data * jobs.context > 1)
    transient = habits.transient_bytes * jobs.own_tokens * jobs.hidden
    return again + transient + np.where(is_gathered, 2 * HALF * elements, 0)


def total_bytes(kinds: Mapping[str, Column]) -> Column:
    """Of all kinds."""
    return sum(kinds.values(), start=np.asarray(0.0))


def fullest_bytes(jobs: Jobs, habits: Habits = PLAIN) -> dict[str, Column]:
    """Of the device that needs most: of the first stage, the second, the first one with a layer more, or the last."""
    last = jobs.pipeline - 1
    part = np.mod(jobs.layers / jobs.pipeline, 1)
    longer = np.where(part > TINY, np.ceil(1 / np.maximum(part, TINY) - TINY) - 1, 0)
    looked_at = (0 * last, 1 + 0 * last, longer, last)
    stages = [stage_bytes(jobs, np.minimum(last, stage), habits) for stage in looked_at]
    totals = np.stack([total_bytes(kinds) + 0 * jobs.devices for kinds in stages])
    most = np.argmax(totals, axis=0)
    return {kind: np.choose(most, [kinds[kind] + 0 * jobs.devices for kinds in stages]) for kind in stages[0]}
