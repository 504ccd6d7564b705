"""How much a push counts whose values others have made old since: its rate and momentum are lower the staler it is.

Zhang et al., "Staleness-aware async-SGD", 2016; Mitliagkas et al., "Asynchrony begets momentum", 2016.
"""

from unisono.optim.blockwise import BlockOptimizer
from unisono.optim.schedules import Schedule


class DampedRates:
    """Those of one optimizer.

    Arguments:
        optimizer: whose rates they are.
        schedule, scale: the course of the rate, and the factor of the batch size.
        damping: what is lower: "none", "rate", "momentum" or "both".
    """

    def __init__(self, optimizer: BlockOptimizer, schedule: Schedule, scale: float, damping: str) -> None:
        self._optimizer = optimizer
        self._schedule = schedule
        self._scale = scale
        self._damps = [name for name in ("rate", "momentum") if damping in (name, "both")]

    def set(self, step: int, late: int) -> None:
        """Set those of a push in a step (from 1) whose values ``late`` updates have made old.

        Damped, the rate is divided by 1 + late. Updates that come late have a momentum of their own, 1 - 1/(1 + late)
        where that is so of all; damped, the optimizer's is less by as much.
        """
        scale = self._scale / (1 + late) if "rate" in self._damps else self._scale
        self._optimizer.set_rate(self._schedule, scale, step - 1)
        if "momentum" in self._damps:
            self._optimizer.lower_momentum(late / (1 + late))

    def of_group(self, group: int) -> float:
        """The rate of a group, as last set."""
        return self._optimizer.rate_of(group)

    def undamped(self, step: int) -> float:
        """The first group's in a step."""
        self.set(step, 0)
        return self._optimizer.learning_rate
