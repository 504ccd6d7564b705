"""How often to write a checkpoint: what writing costs against what a failure loses."""

import math


def best_interval_s(cost_s: float, mtbf_s: float) -> float:
    """Seconds of training between two checkpoints that lose the least time to writing and to failures.

    Half of an interval is lost with a failure, on the average, and ``cost_s`` once an interval.

    Arguments:
        cost_s: of one checkpoint.
        mtbf_s: the mean time between failures.

    Source: Young, "A first order approximation to the optimum checkpoint interval", 1974; the correction for intervals
    that are not short is Daly's, "A higher order estimate of the optimum checkpoint interval for restart dumps", 2006.

    >>> round(best_interval_s(2.0, 3600.0))
    119
    """
    if cost_s >= mtbf_s / 2:
        return mtbf_s
    root = math.sqrt(2 * cost_s * mtbf_s)
    ratio = math.sqrt(cost_s / (2 * mtbf_s))
    return root * (1 + ratio / 3 + ratio * ratio / 9) - cost_s
