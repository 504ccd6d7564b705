"""``unisono bench memory``: what a worker keeps of the model's state where hosts share it, beside the formula."""

from collections.abc import Callable, Sequence
from typing import Any

from unisono.bench.states import described
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

BYTES = 4  # of a value, of a gradient; AdamW's state takes two of them


def formula(zero: int, hosts: int, partials: int, bucket: float, layer: float) -> float:
    """Bytes a parameter: Rajbhandari et al., ZeRO, 2020, with the live partial sums of the canonical tree.

    Arguments:
        partials: live partial sums.
        bucket, layer: of the largest bucket of gradients, and of the largest layer's parameters, bytes a parameter.

    >>> formula(1, 2, 1, 0.0, 0.0), formula(2, 2, 1, 0.0, 0.0), formula(3, 2, 1, 0.0, 0.0)
    (12.0, 10.0, 8.0)
    """
    state = 2 * BYTES / hosts
    if zero == 1:
        return BYTES + BYTES * partials + state
    if zero == 2:
        return BYTES + BYTES * partials / hosts + state + bucket
    return (BYTES + BYTES * partials) / hosts + state + layer


def bench(launcher: Launcher, hosts: Sequence[int], say: Callable[[str], None] | None) -> dict[str, Any]:
    """Measure; a row for each stage of ZeRO, number of hosts, and number of live partial sums."""
    rows = []
    for count in hosts:
        for zero in (1, 2, 3):
            for micro_batches in (1, 4):
                arguments = {"zero": zero, "hosts": count, "micro_batches": micro_batches * count}
                target = {"call": "unisono.bench.states:measure", "arguments": arguments}
                results = launcher.run(target, count, hosts=count, output=STANDARD_ERROR).results
                found = max(results, key=lambda result: result["most_bytes"])
                each = found["parameters"]
                measured = found["most_bytes"] / each
                sizes = found["bucket_bytes"] / each, found["layer_bytes"] / each
                expected = formula(zero, count, int(found["partials"]), *sizes)
                rows.append(
                    {
                        "zero": zero,
                        "hosts": count,
                        "partials": int(found["partials"]),
                        "bytes_per_parameter": round(measured, 3),
                        "formula": round(expected, 3),
                        "ratio": round(measured / expected, 3),
                    }
                )
                if say is not None:
                    say(as_text(rows[-1]))
    return {**described(), "rows": rows}


def as_text(row: dict[str, Any]) -> str:
    """A row for a reader."""
    return (
        f"ZeRO-{row['zero']} on {row['hosts']} hosts, {row['partials']} live partial sums: "
        f"{row['bytes_per_parameter']:.2f} bytes a parameter, formula {row['formula']:.2f}, ratio {row['ratio']:.3f}"
    )
