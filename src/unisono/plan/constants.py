"""The cost model's constants: few, named, fitted on published runs and frozen in ``constants.json``."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.resources import files
from typing import Any

from unisono.errors import ConfigurationError
from unisono.plan.usage import Habits


@dataclass(frozen=True, slots=True)
class Constants:
    """Of one framework on one kind of device.

    Attributes:
        matmul: of the peak rate, what large matrix products reach; operands come on top, at memory's rate.
        passes: times that an activation beside the matrices goes through memory, forward.
        attention: of the peak rate, what fused attention reaches; unfused: of memory's rate, what its scores do.
        launch_s: the least that a layer's forward and backward take.
        crowd_s: further least, for each device that divides a layer, where stages exchange between nodes.
        within, between: of the links' rates, what collectives reach inside a node and between nodes.
        hop_s: latency of a collective for each node that it spans.
        congestion: part of the rate between nodes that each further node costs.
        overlap: part of an exchange that hides behind computation where the framework lets it.
        stall_s: of a message between stages where a job spans `FAR` nodes and more.
        step_s: what a step takes beside all this.
        sum_s: the least that a sum inside a layer takes; kernels wait for its launch too.
        output_bytes: moved for each logit, forward and backward.
        update_bytes: moved for each parameter that is updated.
    """

    matmul: float = 0.75
    passes: float = 10.0
    attention: float = 0.5
    launch_s: float = 2e-3
    crowd_s: float = 0.0
    within: float = 0.75
    between: float = 0.75
    hop_s: float = 2e-5
    congestion: float = 0.01
    overlap: float = 0.7
    stall_s: float = 0.0
    step_s: float = 0.02
    sum_s: float = 3e-5
    output_bytes: float = 20.0
    update_bytes: float = 28.0


FAR = 64
"""Nodes."""
FROZEN = "constants.json"
DEFAULT = "default"
MEASURED = "here"
"""The device that ``unisono doctor --measure`` stores."""
REACHED = {"matmul": 1.0, "launch_s": 2e-4, "step_s": 2e-3}
"""Of such a device: its rates are what products reach, and a processor launches its kernels itself."""
KIN = {
    "H200": "H100",
    "H100-PCIe": "H100",
    "B200": "H100",
    "B300": "B200",
    "GB200": "B200",
    "GB300": "GB200",
    "V100": "A100",
}
"""Devices by the one whose constants are nearest, where their own are unknown."""


def family(device: str) -> str:
    """Devices that differ in their memory alone share constants.

    >>> family("A100-40"), family("GB200")
    ('A100', 'GB200')
    """
    return device.split("-")[0] if device.split("-")[-1].isdigit() else device


@dataclass(frozen=True, slots=True)
class Calibration:
    """All that is known of a framework on a kind of device.

    Attributes:
        name: framework and device; "default" where no run of theirs is known.
        scale: of all times, refitted on a user's own runs.
    """

    name: str = "default"
    constants: Constants = field(default_factory=Constants)
    habits: Habits = field(default_factory=Habits)
    scale: float = 1.0

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> "Calibration":
        """As `as_dict` made it."""
        habits = {**found["habits"], "hides_gradients": tuple(found["habits"]["hides_gradients"])}
        return cls(found["name"], Constants(**found["constants"]), Habits(**habits), found["scale"])

    def but(self, **values: float) -> "Calibration":
        """The same, with other constants or habits."""
        own = {f.name for f in fields(Constants)}
        constants = replace(self.constants, **{name: value for name, value in values.items() if name in own})
        habits = replace(self.habits, **{name: value for name, value in values.items() if name not in own})  # type: ignore[arg-type]
        return replace(self, constants=constants, habits=habits)


Known = Mapping[str, Calibration]
"""By framework and device, as in "nanotron/H100"."""


def frozen() -> Known:
    """What was fitted on published runs."""
    found = json.loads(files("unisono.plan").joinpath(FROZEN).read_text(encoding="utf-8"))
    return {name: Calibration.from_dict(known) for name, known in found.items()}


def refuse_unknown(known: Known, framework: str) -> None:
    """Check a framework's name.

    Raises:
        ConfigurationError: where nothing is known of it.
    """
    names = sorted({name.split("/")[0] for name in known})
    if framework not in names:
        near = get_close_matches(framework, names, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"no framework is known as {framework!r}{hint}; use one of {', '.join(names)}")


def calibration(known: Known, framework: str, device: str) -> Calibration:
    """What is known of a framework on a device; where that is nothing, of kin devices, then of all frameworks."""
    for name in (framework, DEFAULT):
        kin: str | None = family(device)
        while kin is not None:
            if f"{name}/{kin}" in known:
                return known[f"{name}/{kin}"]
            kin = KIN.get(kin)
        others = [key for key in sorted(known) if key.startswith(f"{name}/")]
        if name != DEFAULT and others:
            return known[max(others)]  # the newest by name: H100 rather than A100
    plain = known[f"{DEFAULT}/H100"]
    return plain.but(**REACHED) if device == MEASURED else plain
