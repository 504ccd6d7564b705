"""A simulated step as a trace that Perfetto opens: a process for each replica, a thread for each of its workers."""

import json
from pathlib import Path
from typing import Any

from unisono.errors import ConfigurationError
from unisono.plan.schedule import Kind
from unisono.plan.simulator import Step, Work

MICROSECONDS = 1e6
NAMES = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "input gradients",
    Kind.WEIGHT: "weight gradients",
}


def events(step: Step, work: Work) -> list[dict[str, Any]]:
    """Of the replicas that were simulated, in the Trace Event Format."""
    found: list[dict[str, Any]] = []
    for replica, count in step.counts.items():
        alike = f" and {count - 1} like it" if count > 1 else ""
        found.append({"name": "process_name", "ph": "M", "pid": replica, "args": {"name": f"replica {replica}{alike}"}})
        for worker in range(work.stages):
            first = work.rank(replica, worker, 0)
            ranks = f"rank {first}" if work.team == 1 else f"ranks {first} to {first + work.team - 1}"
            named = {"name": f"stage {worker}, {ranks}"}
            found.append({"name": "thread_name", "ph": "M", "pid": replica, "tid": worker, "args": named})
    for span in step.spans:
        kind, i, stage = span.action.kind, span.action.micro_batch, span.action.stage
        found.append(
            {
                "name": f"{kind.value}{i}",
                "cat": NAMES[kind],
                "ph": "X",
                "pid": span.replica,
                "tid": span.worker,
                "ts": span.begin * MICROSECONDS,
                "dur": (span.end - span.begin) * MICROSECONDS,
                "args": {"micro_batch": i, "stage": stage},
            }
        )
    ends: dict[int, float] = {}
    for span in step.spans:
        ends[span.worker] = max(ends.get(span.worker, 0.0), span.end)
    for replica, worker in sorted({(span.replica, span.worker) for span in step.spans}):
        found.append(
            {
                "name": "gradients",
                "cat": "exchange",
                "ph": "X",
                "pid": replica,
                "tid": worker,
                "ts": ends[worker] * MICROSECONDS,
                "dur": work.exchange_s[worker] * MICROSECONDS,
            }
        )
    return found


def write(step: Step, work: Work, path: Path) -> None:
    """Into a file.

    Raises:
        ConfigurationError: where it cannot be written.
    """
    try:
        path.write_text(json.dumps({"traceEvents": events(step, work), "displayTimeUnit": "ms"}), encoding="utf-8")
    except OSError as error:
        raise ConfigurationError(f"cannot write {path}: {error.strerror}; choose another") from error
