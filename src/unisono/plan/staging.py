"""A judged division as what the simulator runs: seconds of each action of each stage, messages, exchanges, wires."""

import numpy as np

from unisono.plan.constants import Calibration
from unisono.plan.cost import cost
from unisono.plan.division import Division
from unisono.plan.hardware import DEVICES, Cluster, alone
from unisono.plan.jobs import Job, columns
from unisono.plan.schedule import Kind, placement
from unisono.plan.simulator import Wires, Work
from unisono.plan.transformer import Transformer
from unisono.plan.usage import HALF, Habits, stage_layers


def work_of(model: Transformer, tokens: int, division: Division, cluster: Cluster, known: Calibration) -> Work:
    """Of a division: a layer's seconds and the output's, as many as each stage has.

    The exchange of gradients and all that a step takes besides are as the cost model has them.
    """
    job = columns([Job(model, tokens, division, cluster)])
    found = cost(job, known)
    layer, forward = known.scale * found.layer.seconds[0], known.scale * found.layer.forward[0]
    output = known.scale * float(found.output[0])
    places = placement(division.schedule, division.pipeline, division.virtual)
    layers = chunk_layers(model, division, known.habits)
    seconds: dict[tuple[Kind, int], float] = {}
    for stage, count in enumerate(layers):
        is_last = stage == len(places) - 1
        ahead = count * forward + (output / 3 if is_last else 0.0)
        back = count * (layer - forward) + (output * 2 / 3 if is_last else 0.0)
        seconds[Kind.FORWARD, stage], seconds[Kind.BACKWARD, stage] = float(ahead), float(back)
        seconds[Kind.INPUT, stage] = seconds[Kind.WEIGHT, stage] = float(back / 2)
    size = HALF * division.micro_batch * tokens / division.context * model.hidden
    return Work(
        division.schedule,
        division.virtual if division.schedule == "interleaved" else 1,
        division.tensor * division.context,
        division.pipeline,
        division.data,
        division.micro_batches,
        seconds,
        size / (division.tensor if division.sequence else 1),
        (float(found.reasons["gradients"][0]),) * division.pipeline,
        float(found.reasons["optimizer"][0] + found.reasons["other"][0]),
    )


def chunk_layers(model: Transformer, division: Division, habits: Habits) -> list[int]:
    """Layers of each stage of the model, of which a device may have several."""
    stages = len(placement(division.schedule, division.pipeline, division.virtual))
    if stages == division.pipeline:
        job = columns([Job(model, 1, division, alone(next(iter(DEVICES.values()))))])
        return [int(n) for n in stage_layers(job, np.arange(stages, dtype=float), habits)]
    return [model.layers * (stage + 1) // stages - model.layers * stage // stages for stage in range(stages)]


def wires_of(cluster: Cluster, known: Calibration, ports: int | None = None, oversubscribed: float = 1.0) -> Wires:
    """What joins the ranks of a cluster, at the rates that are reached.

    Arguments:
        ports: of a node between nodes; default: one a device.
        oversubscribed: how many times less the spine carries than all ports together.
    """
    port = cluster.between.bytes_per_s * known.constants.between
    wires = Wires(cluster.node, cluster.within.bytes_per_s * known.constants.within, port, ports)
    if oversubscribed == 1.0:
        return wires
    return Wires(wires.node, wires.within, port, ports, cluster.nodes * wires.node_rate / oversubscribed)
