"""Learning rates over time, as pure functions of the step: what multiplies the optimizer's own rate.

Warm-up and the linear scaling rule: Goyal et al., "Accurate, Large Minibatch SGD", 2017. Square-root scaling:
Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014; Hoffer et al., 2017. Cosine:
Loshchilov and Hutter, "SGDR", 2017.
"""

import math
from collections.abc import Callable

from unisono.config import ScalingConfig, ScheduleConfig

Schedule = Callable[[int], float]
"""Step (from 0) -> factor on the optimizer's learning rate."""


def schedule(config: ScheduleConfig, steps: int) -> Schedule:
    """The schedule that a configuration describes, for a run of ``steps`` steps.

    >>> warm = schedule(ScheduleConfig(name="linear", warmup_steps=2, final=0.0), steps=6)
    >>> [round(warm(step), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    """
    warmup = config.warmup_steps
    length = max(1, (config.decay_steps or steps) - warmup)

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        progress = min(1.0, (step - warmup) / length)
        if config.name == "linear":
            return 1.0 + (config.final - 1.0) * progress
        if config.name == "cosine":
            return config.final + (1.0 - config.final) * 0.5 * (1.0 + math.cos(math.pi * progress))
        return 1.0

    return factor


def scale(config: ScalingConfig, global_batch_size: int) -> float:
    """The factor that the batch size puts on the learning rate.

    >>> scale(ScalingConfig(rule="linear", base_batch_size=256), 1024)
    4.0
    >>> scale(ScalingConfig(rule="sqrt", base_batch_size=256), 1024)
    2.0
    """
    ratio = global_batch_size / config.base_batch_size
    return {"none": 1.0, "linear": ratio, "sqrt": math.sqrt(ratio)}[config.rule]
