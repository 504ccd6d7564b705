"""What a transformer's division over devices takes of their memory, stage by stage, and whether they have it."""

from dataclasses import asdict, dataclass
from typing import Any

from unisono.errors import ConfigurationError
from unisono.events import readable
from unisono.plan.division import Division, refuse_impossible, stage_bytes
from unisono.plan.hardware import Cluster
from unisono.plan.transformer import Transformer

MOST_LINES = 8
"""Of stages."""


@dataclass(frozen=True, slots=True)
class Occupancy:
    """Of one division.

    Attributes:
        tokens: of a sequence.
        cluster: whose devices they are; None where that is not known.
        stages: of each, the bytes of a device, by kind.
    """

    model: Transformer
    tokens: int
    division: Division
    cluster: Cluster | None
    stages: tuple[dict[str, float], ...]

    @property
    def most_bytes(self) -> int:
        """Of the fullest device."""
        return round(max(sum(kinds.values()) for kinds in self.stages))

    @property
    def fits(self) -> bool | None:
        """Whether the fullest device holds it."""
        return None if self.cluster is None else self.most_bytes <= self.cluster.device.memory_bytes

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        stages = [{kind: round(size) for kind, size in kinds.items()} for kinds in self.stages]
        known = {"division": asdict(self.division), "stages": stages}
        return {**known, "most_bytes": self.most_bytes, "fits": self.fits}

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
        lines = [f"each of {self.division.devices} devices needs, in sequences of {self.tokens}:", *lines]
        if self.cluster is not None:
            device, holds = self.cluster.device, "holds" if self.fits else "does not hold"
            room = readable(device.memory_bytes)
            lines.append(f"the fullest needs {readable(self.most_bytes)}, which {device.name} with {room} {holds}")
        return "\n".join(lines)


def occupancy(model: Transformer, tokens: int, division: Division, cluster: Cluster | None) -> Occupancy:
    """That of a division.

    Raises:
        ConfigurationError: where it cannot be, or the cluster has other devices.
    """
    refuse_impossible(model, division)
    if cluster is not None and cluster.devices != division.devices:
        raise ConfigurationError(
            f"tensor x pipeline x data is {division.devices}, and the cluster has {cluster.devices} devices; give "
            "numbers whose product that is"
        )
    stages = tuple(stage_bytes(model, tokens, division, stage) for stage in range(division.pipeline))
    return Occupancy(model, tokens, division, cluster, stages)
