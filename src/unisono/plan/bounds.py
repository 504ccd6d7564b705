"""What no layout gets below: the memory that a model's training state takes, and the time of its operations at peak.

A layout needs more: activations, gradients that travel, waits. So what these bounds exclude is excluded for good, and
what they admit is still to be judged.
"""

import math
from dataclasses import dataclass
from typing import Any

from unisono.events import readable
from unisono.plan.hardware import Cluster
from unisono.plan.transformer import BACKWARD, Transformer
from unisono.plan.usage import STATE_BYTES


@dataclass(frozen=True, slots=True)
class Bounds:
    """Those of one model.

    Attributes:
        tokens: of a sequence.
        cluster: on which it is to be trained; None where that is not known.
    """

    model: Transformer
    tokens: int
    cluster: Cluster | None = None

    @property
    def state_bytes(self) -> int:
        """Of the training state, wherever its parts are."""
        return sum(STATE_BYTES.values()) * self.model.parameters

    @property
    def flops_per_token(self) -> float:
        """Operations of forward and backward, without what causal attention masks."""
        return (1 + BACKWARD) * self.model.least_forward_flops(self.tokens) / self.tokens

    @property
    def devices(self) -> int | None:
        """The fewest that hold the state, divided evenly."""
        return None if self.cluster is None else math.ceil(self.state_bytes / self.cluster.device.memory_bytes)

    @property
    def tokens_per_s(self) -> float | None:
        """The most, if all devices computed at their peak all the time."""
        if self.cluster is None:
            return None
        return self.cluster.devices * self.cluster.device.half_flops / self.flops_per_token

    @property
    def fits(self) -> bool | None:
        """Whether the devices hold the state; activations come on top."""
        return None if self.cluster is None or self.devices is None else self.devices <= self.cluster.devices

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        cluster = self.cluster
        return {
            "model": self.model.name,
            "parameters": self.model.parameters,
            "tokens": self.tokens,
            "flops_per_token": self.flops_per_token,
            "state_bytes": self.state_bytes,
            "cluster": None if cluster is None else str(cluster),
            "devices_at_least": self.devices,
            "tokens_per_s_at_most": self.tokens_per_s,
            "state_fits": self.fits,
        }

    def as_text(self) -> str:
        """For a reader."""
        model, state = self.model, readable(self.state_bytes)
        lines = [
            f"{model.name}: {_many(model.parameters)} parameters in {model.layers} layers of "
            f"{model.hidden}, {model.heads} heads ({model.kv_heads} of keys and values)",
            f"training state: {state} with Adam in mixed precision, {sum(STATE_BYTES.values())} bytes a parameter",
            f"operations: {_many(self.flops_per_token)} a token, in sequences of {self.tokens}, of whose attention "
            "half is masked",
        ]
        if self.cluster is not None:
            device, fewest = self.cluster.device, self.devices
            lines += [
                f"cluster: {self.cluster}, {readable(device.memory_bytes)} each",
                f"the state alone takes {fewest} of them"
                + ("" if self.fits else f": {self.cluster.devices} cannot train it, however they divide it"),
                f"at most {self.tokens_per_s:,.0f} tokens a second, at the devices' peak of "
                f"{device.half_flops / 1e12:.3g} TFLOP/s in 16 bits",
            ]
        return "\n".join(lines)


def _many(count: float) -> str:
    """A large number for a reader.

    >>> _many(8.03e9), _many(124e6)
    ('8.03 billion', '124.00 million')
    """
    return f"{count / 1e9:.2f} billion" if count >= 1e9 else f"{count / 1e6:.2f} million"
