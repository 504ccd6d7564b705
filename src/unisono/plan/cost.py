"""Seconds of a training step, from first principles and the few constants of `Constants`, on columns.

A layer's matrix products run at a part of the peak rate and move their operands (a roofline whose two sides add up,
which is what makes small shapes slow); what lies beside them moves activations; nothing is faster than the launch of
its kernels. Layers of a stage, stages of a pipeline, and what replicas exchange follow from it.
"""

from dataclasses import dataclass

import numpy as np

from unisono.plan.collectives import Group, group, pass_seconds, sum_seconds
from unisono.plan.constants import FAR, Calibration, Constants
from unisono.plan.division import SCHEDULES
from unisono.plan.jobs import Column, Jobs
from unisono.plan.usage import HALF, Habits, alike, expert_share, is_recomputing, own_elements, shards, stage_layers

REASONS = (
    "compute",
    "launch",
    "tensor",
    "context",
    "expert",
    "gather",
    "bubble",
    "stages",
    "gradients",
    "optimizer",
    "other",
)
"""Why a step takes its time."""
ALIGNED, MISALIGNED = 8, 10
"""Numbers of 16 bits that tensor cores take at once (NVIDIA, "Matrix multiplication background"), and how much longer
products of other widths take: BLOOM's authors trained with heads of 104, 108 and 112 (chronicles, "NHEADs")."""
SHARPNESS = 4
"""Of the greater of two times that do not quite exclude each other."""
ENDS_LAUNCHES = 2
"""Launches of embedding, output and loss, in those of a layer."""


@dataclass(frozen=True, slots=True)
class Layer:
    """Seconds of one layer for one micro-batch on one device.

    Attributes:
        compute: of its kernels, forward and backward.
        tensor, context, expert, gather: of exchanges that nothing hides.
        launch: that all this is exceeded by, because kernels are not launched faster.
        forward: the part of the whole that is the forward's.
    """

    compute: Column
    tensor: Column
    context: Column
    expert: Column
    gather: Column
    launch: Column
    forward: Column

    @property
    def seconds(self) -> Column:
        """All of it."""
        return self.compute + self.tensor + self.context + self.expert + self.gather + self.launch


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds of a step.

    Attributes:
        reasons: by `REASONS`, of the stage that has most to do.
        layer: of which it is made.
        stage: seconds of a stage for one micro-batch, and of the output, where there is one.
    """

    reasons: dict[str, Column]
    layer: Layer
    stage: Column
    output: Column

    @property
    def seconds(self) -> Column:
        """All of them."""
        return sum(self.reasons.values(), start=np.asarray(0.0))


def cost(jobs: Jobs, known: Calibration) -> Cost:
    """Of all rows."""
    constants = known.constants
    layer = layer_cost(jobs, known)
    passed = _passing(jobs, constants)
    whole_output = _output(jobs, constants)
    layers, output = _slowest(jobs, known, layer.seconds, whole_output)
    stage = layers * layer.seconds + passed
    m, p = jobs.micro_batches, jobs.pipeline
    reasons = {
        "compute": m * (layers * layer.compute + output),
        "launch": m * layers * layer.launch,
        "tensor": m * layers * layer.tensor,
        "context": m * layers * layer.context,
        "expert": m * layers * layer.expert,
        "gather": m * layers * layer.gather,
        "bubble": waits(jobs) * (stage + output / np.maximum(1, p)),
        "stages": m * passed,
        "gradients": _gradients(jobs, known, layers * layer.seconds),
        "optimizer": _update(jobs, known),
        "other": constants.step_s + 0 * m,
    }
    every = 0 * jobs.devices + 0 * stage
    scaled = {reason: known.scale * seconds + every for reason, seconds in reasons.items()}
    return Cost(scaled, layer, stage + every, whole_output + every)


def waits(jobs: Jobs) -> Column:
    """Slots of a stage in which it waits, by the timetable; equal stages, and a backward's parts as long as a forward.

    Narayanan et al., 2021; Qi et al., 2024, where micro-batches are as many as stages or more; where fewer, what the
    timetables of `plan.schedule` give: one alone passes all stages there and back.
    """
    p, m, v = jobs.pipeline, np.minimum(jobs.micro_batches, jobs.pipeline), jobs.virtual
    most = np.where(p > 1, (4 * p - 5) / 6, 0)
    by_name = {
        "1f1b": p - 1,
        "gpipe": p - 1,
        "interleaved": p - m + (m - 1) / v,
        "zb_h1": (2 * p - m - 1) / 3,
        "zb_v": np.maximum(most - (m - 1) * 2 / 3, (p - 1) / 6 + (p - m) / 3),
    }
    return np.choose(jobs.schedule.astype(int), [by_name[name] + 0.0 * v for name in SCHEDULES])


def _slowest(jobs: Jobs, known: Calibration, layer: Column, output: Column) -> tuple[Column, Column]:
    """Layers of the stage that has most to do, and what the output adds to them there."""
    end = jobs.pipeline - 1
    if not known.habits.balances_output:
        return jobs.held_layers, output
    first, last = (stage_layers(jobs, stage, known.habits) for stage in (0 * end, end))
    is_last = last * layer + output >= first * layer
    return np.where(is_last, last, first), np.where(is_last, output, 0)


def layer_cost(jobs: Jobs, known: Calibration) -> Layer:
    """Of one layer for one micro-batch."""
    constants = known.constants
    products, beside, attention = _products(jobs, constants), _beside(jobs, constants), _attention(jobs, constants)
    is_full = np.where(is_recomputing(jobs, "full"), 1, 0)
    is_some = np.where(is_recomputing(jobs, "selective"), 1, is_full)
    backward_attention = np.where(jobs.unfused > 0, 2.0, 2.5)  # fused attention computes its scores once more
    forward = products + beside + attention
    backward = 2 * products + 1.5 * beside + backward_attention * attention
    compute = forward + backward + is_full * (products + beside) + is_some * attention
    message = HALF * jobs.own_tokens * jobs.hidden
    sums = 4 + 2 * is_full  # two forward, two backward: Shoeybi et al., Megatron-LM, 2019
    inside = group(jobs, jobs.tensor, np.asarray(1.0))
    launched = np.where(jobs.tensor > 1, sums * constants.sum_s, 0)
    tensor = np.where(jobs.tensor > 1, sums * sum_seconds(jobs, constants, inside, message), 0) + launched
    context = _context(jobs, constants, attention * (1 + backward_attention))
    expert = _experts(jobs, constants, message * (1 + is_full / 2))
    gather = _gathers(jobs, known, compute)
    busy = compute + tensor + context + expert + gather
    is_crowded = (jobs.pipeline > 1) & (jobs.devices > jobs.node)
    least = constants.launch_s * (1 + is_full / 3) + launched
    seconds = (busy**SHARPNESS + least**SHARPNESS) ** (1 / SHARPNESS)
    seconds = np.maximum(seconds, np.where(is_crowded, least + constants.crowd_s * jobs.tensor, 0))
    return Layer(compute, tensor, context, expert, gather, seconds - busy, seconds * forward / compute)


def product_seconds(
    jobs: Jobs, constants: Constants, rows: Column, inner: Column, outer: Column, flops: Column
) -> Column:
    """Of the product of two matrices, (rows, inner) and (inner, outer)."""
    moved = HALF * (rows * inner + inner * outer + rows * outer)
    return 2 * rows * inner * outer / (flops * constants.matmul) + moved / jobs.memory_bytes_per_s


def _products(jobs: Jobs, constants: Constants) -> Column:
    """Matrix products of a layer's forward."""
    n, h, t = jobs.own_tokens, jobs.hidden, jobs.tensor
    wide = jobs.matrices - 1

    def of(rows: Column, inner: Column, outer: Column) -> Column:
        return product_seconds(jobs, constants, rows, inner, outer, jobs.flops)

    seconds = of(n, h, (jobs.query + 2 * jobs.keys) / t) + of(n, jobs.query / t, h)
    seconds = seconds + of(n, h, wide * jobs.common / t) + of(n, jobs.common / t, h)
    is_sparse = jobs.routed > 0
    width = np.where(is_sparse, jobs.passed / np.maximum(1, jobs.routed), 0)
    local = np.where(is_sparse, np.maximum(1, jobs.choices / jobs.expert), 1)
    width = np.where(jobs.expert > 1, width, width / t)  # tensor's devices divide experts that nobody else does
    rows = n * jobs.routed / np.where(jobs.expert > 1, t, 1) / local  # of each of a device's experts
    experts = local * (of(rows, h, wide * width) + of(rows, width, h))
    return seconds + np.where(is_sparse, experts, 0)


def _beside(jobs: Jobs, constants: Constants) -> Column:
    """Norms, activation functions, residual paths: they only move activations."""
    shared = jobs.hidden / np.where(jobs.sequence > 0, jobs.tensor, 1)
    wide = (jobs.matrices - 1) * (jobs.common + jobs.passed) / jobs.tensor
    return constants.passes * HALF * jobs.own_tokens * (shared + wide / 4) / jobs.memory_bytes_per_s


def _attention(jobs: Jobs, constants: Constants) -> Column:
    """Of a layer's forward: fused, half of the scores is never computed; unfused, they go through memory."""
    products = 4 * jobs.own_tokens * jobs.tokens * jobs.query / jobs.tensor
    odd = np.mod(jobs.query / jobs.heads, ALIGNED) > 0  # unfused, such products miss the tensor cores
    products = np.where((jobs.unfused > 0) & odd, MISALIGNED, 1) * products
    moved = HALF * 5 * jobs.heads * jobs.own_tokens * jobs.tokens / jobs.tensor
    unfused = products / (jobs.slow_flops * constants.matmul) + moved / (jobs.memory_bytes_per_s * constants.attention)
    return np.where(jobs.unfused > 0, unfused, products / 2 / (jobs.slow_flops * constants.attention))


def _output(jobs: Jobs, constants: Constants) -> Column:
    """Of the last matrix, to the vocabulary, and its loss, forward and backward."""
    n, share = jobs.own_tokens, jobs.vocab / jobs.tensor
    product = product_seconds(jobs, constants, n, jobs.hidden, share, jobs.slow_flops)
    busy = 3 * product + constants.output_bytes * n * share / jobs.memory_bytes_per_s
    return (busy**SHARPNESS + (ENDS_LAUNCHES * constants.launch_s) ** SHARPNESS) ** (1 / SHARPNESS)


def hidden_behind(computing: Column, exchange: Column, overlap: float) -> Column:
    """What is left of an exchange that runs beside a computation."""
    return np.maximum(exchange - overlap * np.minimum(computing, exchange), 0)


def _context(jobs: Jobs, constants: Constants, attention: Column) -> Column:
    """Keys and values go around (Liu et al., Ring attention, 2023), and their gradients with them."""
    ring = group(jobs, jobs.context, jobs.tensor)
    passed = 3 * 2 * HALF * jobs.own_tokens * jobs.keys / jobs.tensor * (jobs.context - 1)
    seconds = pass_seconds(jobs, constants, np.asarray(ring.nodes == 1), passed)
    launched = 3 * (jobs.context - 1) * constants.sum_s
    return np.where(jobs.context > 1, hidden_behind(attention, seconds, constants.overlap) + launched, 0)


def _experts(jobs: Jobs, constants: Constants, message: Column) -> Column:
    """Tokens go to their experts and back, forward and backward (Lepikhin et al., GShard, 2020)."""
    others = group(jobs, jobs.expert, np.asarray(1.0))
    sent = message * jobs.routed / jobs.tensor
    near = sent * (others.inside - 1) / others.size / (jobs.within * constants.within)
    far = sent * (1 - others.inside / others.size) / (jobs.between * constants.between)
    return np.where(jobs.expert > 1, 4 * (near + far), 0)


def _replicas(jobs: Jobs, size: Column) -> Group:
    return group(jobs, size, jobs.tensor)


def _gathers(jobs: Jobs, known: Calibration, compute: Column) -> Column:
    """ZeRO-3: a layer's parameters are gathered twice, its gradients scattered, beside its neighbours' computation."""
    shard, shard_of_experts = shards(jobs)
    moved = 2 * HALF + known.habits.exchanged_bytes

    def of(elements: Column, members: Column) -> Column:
        return sum_seconds(jobs, known.constants, _replicas(jobs, members), moved * elements) / 2

    seconds = of(jobs.layer_elements / jobs.tensor, shard)
    seconds = seconds + of(jobs.expert_elements / jobs.expert_ways, shard_of_experts)
    return np.where((jobs.zero == 3) & (shard > 1), hidden_behind(compute, seconds, known.constants.overlap), 0)


def _passing(jobs: Jobs, constants: Constants) -> Column:
    """What stages hand on of a micro-batch, forward and backward, as often as it comes by."""
    size = HALF * jobs.own_tokens * jobs.hidden / np.where(jobs.sequence > 0, jobs.tensor, 1)
    is_near = jobs.devices <= jobs.node
    far = np.where(jobs.devices >= FAR * jobs.node, constants.stall_s * np.minimum(2, jobs.pipeline - 1), 0)
    return np.where(jobs.pipeline > 1, jobs.virtual * 2 * pass_seconds(jobs, constants, is_near, size) + far, 0)


def _gradients(jobs: Jobs, known: Calibration, slot: Column) -> Column:
    """What replicas exchange in a step, less what the last micro-batch's backward hides.

    With ZeRO-2 gradients are scattered after each micro-batch; with ZeRO-3 that is a layer's matter, but for groups of
    shards, which sum among them.
    """
    habits, every = known.habits, jobs.data * jobs.context
    own, experts = _first_elements(jobs, habits)
    seconds = _replicated(jobs, known, own, every) + _replicated(jobs, known, experts, alike(jobs))
    scatters = np.where(jobs.zero == 2, jobs.micro_batches, 1)
    hidden = np.zeros(4)
    hidden[list(habits.hides_gradients)] = known.constants.overlap
    left = np.maximum(0, seconds - hidden[jobs.zero.astype(int)] * slot * scatters * 2 / 3)
    return np.where(every > 1, left, 0)


def _replicated(jobs: Jobs, known: Calibration, elements: Column, replicas: Column) -> Column:
    """Of the exchange of so many parameters among those who have them."""
    each = known.habits.exchanged_bytes
    sent = each * np.where(jobs.zero == 2, jobs.micro_batches, 1) + np.where(jobs.zero > 0, HALF, each)
    whole = sum_seconds(jobs, known.constants, _replicas(jobs, replicas), sent / 2 * elements)
    shard = np.maximum(1, np.minimum(jobs.shard, replicas))
    groups = group(jobs, replicas / shard, jobs.tensor * shard)
    across = sum_seconds(jobs, known.constants, groups, each * elements / shard)
    return np.where(replicas > 1, np.where(jobs.zero == 3, across, whole) / jobs.period, 0)


def _update(jobs: Jobs, known: Calibration) -> Column:
    (own, experts), (shard, shard_of_experts) = _first_elements(jobs, known.habits), shards(jobs)
    share = np.where(jobs.zero > 0, own / shard + experts / shard_of_experts, own + experts)
    return known.constants.update_bytes * share / jobs.memory_bytes_per_s


def _first_elements(jobs: Jobs, habits: Habits) -> tuple[Column, Column]:
    """Parameters of a device of the first stage, which has the embedding; and of its experts."""
    stage = 0 * jobs.pipeline
    return own_elements(jobs, stage, habits), expert_share(jobs, stage, habits)
