"""What a transformer's division over devices takes of their memory, stage by stage, whatever the devices are."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from unisono.events import readable
from unisono.plan.division import Division, refuse_impossible
from unisono.plan.hardware import DEVICES, alone
from unisono.plan.jobs import Job, columns
from unisono.plan.transformer import Transformer
from unisono.plan.usage import stage_bytes

MOST_LINES = 8
"""Of stages."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one division.

    Attributes:
        tokens: of a sequence.
        stages: of each, the bytes of a device, by kind.
    """

    model: Transformer
    tokens: int
    division: Division
    stages: tuple[dict[str, float], ...]

    @property
    def most_bytes(self) -> int:
        """Of the fullest device."""
        return round(max(sum(kinds.values()) for kinds in self.stages))

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        stages = [{kind: round(size) for kind, size in kinds.items()} for kinds in self.stages]
        return {"division": asdict(self.division), "stages": stages, "most_bytes": self.most_bytes}

    def as_text(self) -> str:
        """For a reader: stages that are alike stand once, and of many the first ones and the last."""
        lines: list[str] = []
        first = 0
        for stage, kinds in enumerate(self.stages):
            if stage + 1 < len(self.stages) and self.stages[stage + 1] == kinds:
                continue
            which = f"stage {first}" if first == stage else f"stages {first} to {stage}"
            what = ", ".join(f"{kind} {readable(round(size))}" for kind, size in kinds.items() if size)
            lines.append(f"  {which}: {readable(round(sum(kinds.values())))} ({what})")
            first = stage + 1
        if len(lines) > MOST_LINES:
            lines = [*lines[: MOST_LINES // 2], "  ...", lines[-1]]
        return "\n".join([f"each of {self.division.devices} devices needs, in sequences of {self.tokens}:", *lines])


def occupancy(model: Transformer, tokens: int, division: Division) -> Occupancy:
    """That of a division, by the formulas alone: what a framework takes besides is not in it.

    Raises:
        ConfigurationError: where it cannot be.
    """
    refuse_impossible(model, division)
    job = columns([Job(model, tokens, division, alone(next(iter(DEVICES.values()))))])  # whatever the device is
    kinds = stage_bytes(job, np.arange(division.pipeline, dtype=float))
    sizes = {kind: np.broadcast_to(size, division.pipeline) for kind, size in kinds.items()}
    stages = tuple({kind: float(size[i]) for kind, size in sizes.items()} for i in range(division.pipeline))
    return Occupancy(model, tokens, division, stages)
