"""``unisono bench comm``: collectives of the arena, of gloo, of our algorithms over gloo, and of MPI, interleaved."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

from unisono.comm.tuning import Measured, table_path, write_table
from unisono.launch.launcher import Launcher
from unisono.launch.task import STANDARD_ERROR

SIZES = (1 << 10, 1 << 16, 1 << 20, 25 << 20, 100 << 20)
TUNED_SIZES = tuple(1 << power for power in range(10, 25, 2))
TUNED = ("ring", "tree", "halving_doubling")
BUDGET_BYTES = 64 << 20
"""So many bytes are reduced in a round, or one tensor, at most `MOST` times."""
MOST = 100
DEADLINE_S = 120.0


def bench(
    launcher: Launcher, ranks: Sequence[int], rounds: int, say: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """Measure; a row for each operation, number of ranks, size and transport."""
    rows: list[dict[str, Any]] = []
    for count in ranks:
        arguments = {"sizes": SIZES, "rounds": rounds}
        results = launcher.run(
            {"call": "unisono.bench.comm:measure", "arguments": arguments}, count, output=STANDARD_ERROR
        )
        rows += results.results[0]
        if say is not None:
            say(as_text(results.results[0]))
    return rows


def tune(launcher: Launcher, workers: int, rounds: int, *, writes: bool) -> list[dict[str, Any]]:
    """Measure the algorithms between hosts, one worker on each, and write the table that algorithm "auto" reads.

    Arguments:
        workers: on this machine; as many hosts where it is the only one.
        writes: whether this launcher writes the table.
    """
    arguments = {"sizes": TUNED_SIZES, "rounds": rounds, "only": TUNED}
    target = {"call": "unisono.bench.comm:measure", "arguments": arguments}
    rows: list[dict[str, Any]] = launcher.run(target, workers, output=STANDARD_ERROR).results[0]
    if writes:
        table = [Measured(r["transport"], r["ranks"], r["size_bytes"], r["median_s"]) for r in rows]
        write_table(table, table_path())
    return rows


def measure(sizes: Sequence[int], rounds: int, only: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """In every worker: median seconds of each transport, the slowest rank's; the rows are rank 0's."""
    import torch

    from unisono.bench.transports import Operation, limit_s, operations

    torch.set_num_threads(1)
    rows = []
    with operations(only, DEADLINE_S) as (available, members):
        for size_bytes in sizes:
            values = torch.ones(size_bytes // 4)
            times = max(1, min(MOST, BUDGET_BYTES // size_bytes))
            seconds: dict[Operation, list[float]] = {operation: [] for operation in available}
            for round_number in range(rounds + 1):
                for operation in available:
                    values.fill_(1.0)
                    members.slowest(0.0)
                    operation.run(values)  # members leave each meeting at different times, this one together
                    started = time.perf_counter()
                    for _ in range(times):
                        operation.run(values)
                    slowest = members.slowest((time.perf_counter() - started) / times)
                    if round_number:  # the first warms up
                        seconds[operation].append(slowest)
            for operation, found in seconds.items():
                rows.append(_row(operation.name, members.count, size_bytes, operation.transport, median(found)))
            if only is None:
                rows.append(_row("all_reduce", members.count, size_bytes, "limit", limit_s(size_bytes, members)))
    return rows if members.rank == 0 else []


def _row(operation: str, ranks: int, size_bytes: int, transport: str, seconds: float) -> dict[str, Any]:
    return {"op": operation, "ranks": ranks, "size_bytes": size_bytes, "transport": transport, "median_s": seconds}


def as_text(rows: Sequence[dict[str, Any]]) -> str:
    """The rows for a reader: microseconds, and how many times as quick as gloo."""
    from unisono.events import readable

    lines = []
    reference = {(r["op"], r["ranks"], r["size_bytes"]): r["median_s"] for r in rows if r["transport"] == "gloo"}
    for row in rows:
        gloo = reference.get((row["op"], row["ranks"], row["size_bytes"]))
        against = f"  {gloo / row['median_s']:6.2f}x gloo" if gloo is not None and row["transport"] != "gloo" else ""
        where = f"{row['op']:<14} {row['ranks']} ranks {readable(row['size_bytes']):>10}"
        lines.append(f"{where}  {row['transport']:<16} {row['median_s'] * 1e6:12.1f} us{against}")
    return "\n".join(lines)
