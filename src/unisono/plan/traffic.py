"""What a step of a divided transformer computes and sends at least, and how long that takes at peak rates.

Narayanan et al., "Efficient large-scale language model training on GPU clusters", SC 2021, sections 2 and 3;
Rajbhandari et al., ZeRO, 2020, section 7. Devices of one layer are neighbours, then replicas, then stages.
"""

from dataclasses import dataclass
from typing import Any

from unisono.events import readable
from unisono.plan.division import HALF, STATE_BYTES, Division, stage_bytes
from unisono.plan.hardware import Cluster, Link
from unisono.plan.transformer import Transformer


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
    """

    sequences: int
    bubble: float
    compute_s: float
    sent_bytes: dict[str, float]
    links: dict[str, Link]

    @property
    def seconds(self) -> dict[str, float]:
        """That sending takes, by the reason."""
        return {reason: size / self.links[reason].bytes_per_s for reason, size in self.sent_bytes.items()}

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
            lines.append(
                f"  {reason}: each device sends {readable(round(size))} over {link.name}, {took:.3g} s at its rate"
            )
        return "\n".join(lines)


def traffic(model: Transformer, tokens: int, division: Division, cluster: Cluster) -> Traffic:
    """That of a division of a whole cluster."""
    t, p, d, count = division.tensor, division.pipeline, division.data, division.micro_batches
    again = division.recompute == "full"
    sequences = d * count * division.micro_batch
    bubble = (p - 1) / (count + p - 1)
    flops = model.step_flops(sequences, tokens, again=again)
    compute_s = flops / (division.devices * cluster.device.half_flops) / (1 - bubble)
    message = HALF * division.micro_batch * tokens * model.hidden
    layers = -(-model.layers // p)
    sent = {
        "tensor": count * layers * (6 if again else 4) * ring_bytes(t, message),
        "pipeline": count * 2 * message / (t if division.sequence else 1) if p > 1 else 0.0,
        "data": _of_replicas(model, tokens, division),
    }
    node = cluster.node
    inside = {"tensor": t <= node, "pipeline": 2 * t * d <= node, "data": t * d <= node}
    links = {reason: cluster.within if near else cluster.between for reason, near in inside.items()}
    return Traffic(sequences, bubble, compute_s, {reason: size for reason, size in sent.items() if size}, links)


def _of_replicas(model: Transformer, tokens: int, division: Division) -> float:
    """Gradients are summed; where parameters are divided, each micro-batch gathers them twice."""
    whole = Division(tensor=division.tensor, pipeline=division.pipeline)
    stages = (stage_bytes(model, tokens, whole, stage) for stage in range(division.pipeline))
    most = max(kinds["gradients"] for kinds in stages) * HALF / STATE_BYTES["gradients"]
    gathers = 2 * division.micro_batches if division.zero == 3 else 1
    return (1 + gathers) * ring_bytes(division.data, most) / 2
