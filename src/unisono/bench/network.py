"""``unisono bench network``: training over a slow link between two hosts, with each way of moving gradients."""

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from statistics import mean, median
from tempfile import TemporaryFile
from typing import IO, Any

from unisono.errors import ConfigurationError, WorkerFailed
from unisono.launch.namespaces import Namespaces, unavailable

HOSTS = 2
WARMUP = 3
SMOOTHING = 10
"""Steps over whose losses a mean is taken, for "the loss that DDP reaches"."""
TOLERANCE = 1e-4
"""Relative: equal sums in another order are not another loss."""
LONGER = 3
"""How many times DDP's steps a lossy method is given to reach DDP's loss."""
AS_MANY_STEPS = ("ddp", "exact", "exact_unpacked", "bf16", "fp16", "alone")
"""What reaches DDP's loss in as many steps, or does not try."""
PEERS = ("ddp", "torch_powersgd")
ATTEMPTS = 3
"""For peers: torch's hook fails now and then, since messages in gloo are not of the size that is expected."""
PORT = 29441
DEADLINE_S = 1800.0


def bench(
    rate: str | None, steps: int, samples: int, methods: Sequence[str], rounds: int, say: Callable[[str], None] | None
) -> list[dict[str, Any]]:
    """Measure, all methods in each round, DDP first; one row for each method, of medians over the rounds.

    Arguments:
        rate: of the link.
        steps: of DDP, and of what loses nothing; others have `LONGER` times as many.
        samples: of a step on each host.

    Raises:
        ConfigurationError: where this machine cannot have several hosts, or for a method that is not known.
    """
    from unisono.bench.over_network import METHODS

    for method in methods:
        if method not in METHODS:
            raise ConfigurationError(f"--methods {method!r} is not known; use {', '.join(METHODS)}")
    reason = unavailable()
    if reason is not None:
        raise ConfigurationError(f"this machine cannot be several hosts: {reason}")
    order = ("ddp", *(m for m in methods if m != "ddp"))
    measured: dict[str, list[dict[str, Any]]] = {method: [] for method in order}
    goal = 0.0
    for number in range(rounds):
        for method in order:
            longer = steps if method in AS_MANY_STEPS else steps * LONGER
            results = _measure(rate, method, longer, samples, say, ATTEMPTS if method in PEERS else 1)
            goal = _smoothed(results, steps) if method == "ddp" else goal
            measured[method].append(summary(method, results, steps, goal))
            if say is not None:
                say(f"{number + 1}/{rounds}  {as_text(measured[method][-1], measured['ddp'][-1])}")
    return [joined(rows) for rows in measured.values()]


def _measure(
    rate: str | None, method: str, steps: int, samples: int, say: Callable[[str], None] | None, attempts: int
) -> list[dict[str, Any]]:
    """Run a method; one that fails is run again, which is said."""
    try:
        with Namespaces(HOSTS, rate) as hosts:
            return _run(hosts, method, steps, samples)
    except WorkerFailed as error:
        if attempts == 1:
            raise
        if say is not None:
            say(f"{error}\nrunning {method} again")
        return _measure(rate, method, steps, samples, say, attempts - 1)


def summary(method: str, results: Sequence[dict[str, Any]], steps: int, goal: float) -> dict[str, Any]:
    """A method's row from what its workers noted."""
    first = results[0]
    seconds = [b - a for a, b in zip(first["times"][WARMUP:], first["times"][WARMUP + 1 :], strict=False)]
    sent = [b - a for a, b in zip(first["sent"][WARMUP:], first["sent"][WARMUP + 1 :], strict=False)]
    return {
        "method": method,
        "step_s": median(seconds),
        "steps_per_s": 1 / mean(seconds),
        "bytes_per_step": round(mean(sent)),
        "final_loss": _smoothed(results, steps),
        "time_to_ddp_loss_s": _time_to(results, goal),
    }


def joined(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A method's rows of several rounds as one: medians; DDP's loss is reached if it was in every round."""
    reached = [row["time_to_ddp_loss_s"] for row in rows]
    return {
        "method": rows[0]["method"],
        "step_s": median(row["step_s"] for row in rows),
        "steps_per_s": median(row["steps_per_s"] for row in rows),
        "bytes_per_step": round(median(row["bytes_per_step"] for row in rows)),
        "final_loss": median(row["final_loss"] for row in rows),
        "time_to_ddp_loss_s": None if None in reached else median(reached),
    }


def _losses(results: Sequence[dict[str, Any]]) -> list[float]:
    """Mean over workers; those that know the mean already say the same."""
    series = [result["losses"] for result in results if result["losses"]]
    return [mean(values) for values in zip(*series, strict=True)]


def _smoothed(results: Sequence[dict[str, Any]], steps: int) -> float:
    return mean(_losses(results)[max(0, steps - SMOOTHING) : steps])


def _time_to(results: Sequence[dict[str, Any]], goal: float) -> float | None:
    """Seconds of training until the mean of the last losses is as low as ``goal``; None where it never was."""
    losses, times = _losses(results), results[0]["times"]
    step_s = median(b - a for a, b in zip(times[WARMUP:], times[WARMUP + 1 :], strict=False))
    for step in range(SMOOTHING, len(losses) + 1):
        if mean(losses[step - SMOOTHING : step]) <= goal * (1 + TOLERANCE):
            return float(step_s) + float(times[step - 1] - times[0])  # the first step has no beginning of its own
    return None


def _run(hosts: Namespaces, method: str, steps: int, samples: int) -> list[dict[str, Any]]:
    """Train on all hosts; what each worker printed."""
    argument = json.dumps({"method": method, "steps": steps, "samples": samples})
    results = []
    with ExitStack() as stack:
        running: list[tuple[subprocess.Popen[str], IO[str]]] = []
        for number in range(HOSTS):
            words = hosts.words(number, [sys.executable, "-m", "unisono.bench.over_network", argument])
            errors: IO[str] = stack.enter_context(TemporaryFile("w+"))
            environment = hosts.environment(number, PORT)
            process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
            stack.callback(process.wait)
            stack.callback(process.kill)
            running.append((process, errors))
        for process, errors in running:
            output, _ = process.communicate(timeout=DEADLINE_S)
            if process.returncode:
                errors.seek(0)
                raise WorkerFailed(f"method {method} failed:\n{errors.read().strip()[-2000:]}")
            results.append(json.loads(output.splitlines()[-1]))
    return results


def as_text(row: dict[str, Any], reference: dict[str, Any]) -> str:
    """A row for a reader."""
    reached = row["time_to_ddp_loss_s"]
    when = f"DDP's loss after {reached:7.1f} s" if reached is not None else "DDP's loss not reached"
    if reached:
        when += f" ({reference['time_to_ddp_loss_s'] / reached:.2f}x as soon)"
    return (
        f"{row['method']:<16} {row['step_s'] * 1e3:8.1f} ms a step ({reference['step_s'] / row['step_s']:5.2f}x)  "
        f"{row['steps_per_s']:6.2f} steps a second  "
        f"{row['bytes_per_step'] / 2**20:7.3f} MiB a step  loss {row['final_loss']:.4f}  {when}"
    )
