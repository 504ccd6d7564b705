"""Weights of several versions, of which each micro-batch uses one in its forward and its backward, as arithmetic.

A step is a sequence of *units*, a few micro-batches each, after every one of which the weights are updated: version v
is what they are after v units of the step. A parameter of delay d is used by unit j in version j - d, or in version 0
before there is another; so d + 1 versions of it are needed at a time, in as many places.

Narayanan et al., "PipeDream: Generalized pipeline parallelism for DNN training", 2019: the delay of stage s of p is
p - 1 - s. Narayanan et al., "Memory-efficient pipeline-parallel DNN training" (2BW), 2021: the delay is 1 everywhere.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


def place(version: int, delay: int) -> int:
    """Where a version lies, from 0: where the one lay that nothing uses any more.

    >>> [place(version, delay=1) for version in range(4)]
    [0, 1, 0, 1]
    """
    return version % (delay + 1)


def used(unit: int, delay: int) -> int:
    """The version that a unit is computed with.

    >>> [used(unit, delay=2) for unit in range(5)]
    [0, 0, 0, 1, 2]
    """
    return max(0, unit - delay)


def stage_delay(stage: int, stages: int) -> int:
    """How many updates of a stage its micro-batches do not see, where a pipeline never drains.

    >>> [stage_delay(stage, 4) for stage in range(4)]
    [3, 2, 1, 0]
    """
    return stages - 1 - stage


@dataclass(frozen=True, slots=True)
class Stashing:
    """How a run uses versions.

    Attributes:
        unit: micro-batches of a unit.
        units: of a step.
        delays: of each parameter, in flat order.
        kinds: of each stage, or 1 for all of them.
    """

    unit: int
    units: int
    delays: tuple[int, ...]
    kinds: tuple[int, ...]

    @property
    def versions(self) -> int:
        """Of the parameter that has most."""
        return 1 + max(self.delays, default=0)

    def __str__(self) -> str:
        least, most = (f(self.kinds) for f in (min, max))
        each = f"{most}" if least == most else f"{least} to {most}"
        return (
            f"stages are updated {self.units} times a step, by gradients that miss the last {each} of their updates: "
            "the result depends on that, not on workers"
        )

    def staleness(self) -> dict[int, int]:
        """How many updates, of each stage, were made of gradients that so many others had made old."""
        found: dict[int, int] = {}
        for delay in self.kinds:
            for unit in range(self.units):
                late = unit - used(unit, delay)
                found[late] = found.get(late, 0) + 1
        return dict(sorted(found.items()))


class StepWords:
    """What workers tell each other in a step, as words of shared memory.

    Arguments:
        memory: `size_bytes` of them.

    Attributes:
        sums: loss and weight of each unit, (units, 2); the last stage knows them first.
    """

    def __init__(self, memory: memoryview, units: int) -> None:
        words: NDArray[np.int64] = np.frombuffer(memory, dtype=np.int64)
        self._head = words[:1]
        self.sums: NDArray[np.float64] = words[1 : 1 + 2 * units].view(np.float64).reshape(units, 2)

    @staticmethod
    def size_bytes(units: int) -> int:
        """Of the words of a step with so many units."""
        return 8 * (1 + 2 * units)

    @property
    def snapshot(self) -> int:
        """The step before which the state was last copied."""
        return int(self._head[0])

    @snapshot.setter
    def snapshot(self, step: int) -> None:
        self._head[0] = step
