"""What a step of a divided transformer computes and sends at least, and how long that takes at peak rates.

Narayanan et al., "Efficient large-scale language model training on GPU clusters", SC 2021, sections 2 and 3;
Rajbhandari et al., ZeRO, 2020, section 7. Devices of one layer are neighbours, then replicas, then stages.
"""

from dataclasses import dataclass
from typing import Any

from unisono.events import readable
from unisono.plan.division import HALF, STATE_BYTES, Division, layers_of, stage_bytes
from unisono.plan.hardware import Cluster, Link
from unisono.plan.transformer import BACKWARD, Transformer


def ring_bytes(devices: int, size_bytes: float) -> float:
    """What each device sends as a ring sums so much for all; gathering or scattering is half of it.

    >>> ring_bytes(4, 100), ring_bytes(1, 100)
    (150.0, 0.0)
    """
    return 2 * (devices - 1) / devices * size_bytes


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of a step, on a device of the stage that has most to do.

    Attributes:
        sequences: of a step.
        bubble: the part of the time in which stages wait.
        compute_s: the least that computing takes, waits among it.
        sent_bytes: by the reason.
        links: over which each goes.
        rates: bytes a second of that, for one device: of a group that is spread over nodes, all members in a node send.
    """

    sequences: int
    bubble: float
    compute_s: float
    sent_bytes: dict[str, float]
    links: dict[str, Link]
    rates: dict[str, float]

    @property
    def seconds(self) -> dict[str, float]:
        """That sending takes, by the reason."""
        return {reason: size / self.rates[reason] for reason, size in self.sent_bytes.items()}

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        sent = {reason: round(size) for reason, size in self.sent_bytes.items()}
        known = {"sequences": self.sequences, "bubble": self.bubble, "compute_s_at_least": self.compute_s}
        return {**known, "sent_bytes": sent, "sending_s_at_least": self.seconds}

    def as_text(self) -> str:
        """For a reader."""
        waits = f", stages wait {100 * self.bubble:.1f}% of it" if self.bubble else ""
        lines = [f"a step of {self.sequences} sequences computes for {self.compute_s:.3g} s at peak{waits}"]
        for reason, size in self.sent_bytes.items():
            link, took = self.links[reason], self.seconds[reason]
            lines.append(f"  {reason}: each device sends {readable(round(size))}, {took:.3g} s over {link.name}")
        return "\n".join(lines)


def traffic(model: Transformer, tokens: int, division: Division, cluster: Cluster) -> Traffic:
    """That of a division of a whole cluster."""
    t, p, d, count = division.tensor, division.pipeline, division.data, division.micro_batches
    again = division.recompute == "full"
    sequences = d * count * division.micro_batch
    stages = [_stage_flops(model, tokens, division, stage) for stage in range(p)]
    waits = sum(stages) + (count - 1) * max(stages)  # of p stages, each as long as the longest after the first
    compute_s = waits / (t * cluster.device.half_flops)
    bubble = 1 - count * sum(stages) / (p * waits)
    message = HALF * division.micro_batch * tokens * model.hidden
    layers = -(-model.layers // p)
    sent = {
        "tensor": count * layers * (6 if again else 5 if division.sequence else 4) * ring_bytes(t, message),
        "pipeline": count * min(2, p - 1) * message / (t if division.sequence else 1),
        "data": _of_replicas(model, tokens, division),
    }
    node = cluster.node
    inside = {"tensor": node % t == 0, "pipeline": p * t * d <= node, "data": node % (t * d) == 0}
    links = {reason: cluster.within if near else cluster.between for reason, near in inside.items()}
    ports = {"tensor": node, "pipeline": 1, "data": max(1, node // t)}  # of a group's members in a node
    rates = {
        reason: link.bytes_per_s
        if inside[reason]
        else min(cluster.within.bytes_per_s, ports[reason] * link.bytes_per_s)
        for reason, link in links.items()
    }
    return Traffic(sequences, bubble, compute_s, {reason: size for reason, size in sent.items() if size}, links, rates)


def _stage_flops(model: Transformer, tokens: int, division: Division, stage: int) -> float:
    """Operations of a stage for one micro-batch, without what causal attention masks."""
    output = 2 * tokens * model.hidden * model.vocab
    layer = (model.least_forward_flops(tokens) - output) / model.layers
    layers = layers_of(model, division, stage)
    again = layers * layer if division.recompute == "full" else 0
    forward = layers * layer + (output if stage == division.pipeline - 1 else 0)
    return division.micro_batch * ((1 + BACKWARD) * forward + again)


def _of_replicas(model: Transformer, tokens: int, division: Division) -> float:
    """Gradients are scattered, and gathered or what they led to: after each micro-batch, where none keeps the whole."""
    whole = Division(tensor=division.tensor, pipeline=division.pipeline)
    stages = (stage_bytes(model, tokens, whole, stage) for stage in range(division.pipeline))
    most = max(kinds["gradients"] for kinds in stages) * HALF / STATE_BYTES["gradients"]
    scatters = division.micro_batches if division.zero >= 2 else 1
    gathers = 2 * division.micro_batches if division.zero == 3 else 1
    return (scatters + gathers) * ring_bytes(division.data, most) / 2
