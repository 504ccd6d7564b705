"""``unisono bench device``: a GPT on one accelerator, beside a plain loop: a step, snapshots, and a recovery."""

import itertools
import os
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from unisono.comm.header import Course
from unisono.errors import ConfigurationError
from unisono.events import Event, RolledBack, StepFinished
from unisono.launch.local import LocalLauncher
from unisono.launch.task import STANDARD_ERROR
from unisono.launch.worker_set import WorkerSet
from unisono.tasks.lm import GPT, VOCABULARY
from unisono.trainer import Trainer

SHAPES = {
    "tiny": {"layers": 2, "width": 64, "heads": 2, "context": 32},
    "gpt2": {"layers": 12, "width": 768, "heads": 12, "context": 512},
    "medium": {"layers": 24, "width": 1024, "heads": 16, "context": 512},
}
MICRO_BATCH, MICRO_BATCHES, WARMUP = 8, 4, 5
BATCH = MICRO_BATCH * MICRO_BATCHES
SAMPLES = 256
EVERY = 10
"""Steps from one snapshot to the next, where a worker is killed."""
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "plain deterministic": {},
    "unprotected": {"fault": {"on_loss": "stop"}},
    "protected": {},
    "every step": {"fault": {"snapshot_every": 1}},
}
TURN_S = 0.001


class Tokens:
    """Random samples, the same for every variant."""

    def __init__(self, context: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self._data = torch.randint(0, VOCABULARY, (SAMPLES, context + 1), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if not 0 <= index < SAMPLES:
            raise IndexError(index)
        return self._data[index, :-1], self._data[index, 1:]


def bench(
    launcher: LocalLauncher,
    shapes: list[str],
    device: str,
    precision: str,
    steps: int,
    rounds: int,
    say: Callable[[str], None] | None,
) -> list[dict[str, Any]]:
    """Measure, interleaved; one row for each shape.

    Raises:
        ConfigurationError: for a shape that is not known.
    """
    if unknown := [shape for shape in shapes if shape not in SHAPES]:
        raise ConfigurationError(f"--models {unknown[0]!r} is not known; use {', '.join(SHAPES)}")
    rows = []
    launcher.preload([] if device == "cpu" else ["torch._inductor.config"])
    for shape in shapes:
        work = {"shape": shape, "device": device, "precision": precision}
        rows.append(_row(launcher, work, steps, rounds))
        if say is not None:
            say(as_text(rows[-1]))
    return rows


def _row(launcher: LocalLauncher, work: dict[str, str], steps: int, rounds: int) -> dict[str, Any]:
    seconds: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    digests = set()
    for _ in range(rounds):
        for variant in VARIANTS:
            given = {**work, "variant": variant, "steps": steps}
            target = {"call": "unisono.bench.device:measure", "arguments": given}
            result = launcher.run(target, 1, output=STANDARD_ERROR).result
            seconds[variant].append(median(result["step_s"]))
            digests |= {result["digest"]} - {None}
            name, state_bytes = result["device"], result["state_bytes"] or 0
    step_s = {variant: median(times) for variant, times in seconds.items()}
    recovery = _recovery(launcher, work, steps)
    return {
        **work,
        "device": name,
        "state_bytes": state_bytes,
        "rounds": rounds,
        "step_s": {variant: round(value, 5) for variant, value in step_s.items()},
        "of_plain": round(step_s["protected"] / step_s["plain"], 4),
        "of_plain_deterministic": round(step_s["protected"] / step_s["plain deterministic"], 4),
        "protection": round(step_s["protected"] / step_s["unprotected"] - 1, 4),
        "snapshot_s": round(max(0.0, step_s["every step"] - step_s["unprotected"]), 5),
        "recovery_s": round(recovery.seconds, 3),
        "lost_steps": recovery.lost_steps,
        "same_bits": digests == {recovery.digest},
    }


@dataclass(frozen=True, slots=True)
class Recovery:
    """From a kill to the first step that had not been done before; the steps that were done again."""

    seconds: float
    lost_steps: int
    digest: str


def _recovery(launcher: LocalLauncher, work: dict[str, str], steps: int) -> Recovery:
    """Kill the worker in the middle of the steps between two snapshots."""
    killed: list[tuple[int, float]] = []
    after: list[float] = []

    def turn(workers: WorkerSet) -> None:
        header, now = workers.survival.header, time.monotonic()
        if header is None or header.course is not Course.TRAINING:
            return
        committed = header.committed
        if not killed and committed >= 2 * EVERY + EVERY // 2:
            os.kill(workers.alive[0].process, signal.SIGKILL)
            killed.append((committed, now))
        elif killed and not after and committed > killed[0][0]:
            after.append(now)

    launcher.each_turn, launcher.turn_s = turn, TURN_S
    try:
        arguments = {**work, "variant": "killed", "steps": steps}
        target = {"call": "unisono.bench.device:measure", "arguments": arguments}
        result = launcher.run(target, 1, output=STANDARD_ERROR).result
    finally:
        launcher.each_turn = None
    return Recovery(after[0] - killed[0][1], result["lost_steps"], result["digest"])


def measure(variant: str, shape: str, device: str, precision: str, steps: int) -> dict[str, Any]:
    """In a worker: seconds of each step, after those that warm up, and the digest of the state that it ends with."""
    dimensions = SHAPES[shape]
    if variant.startswith("plain"):
        seconds = _plain(dimensions, device, precision, steps, deterministic=variant != "plain")
        return {"step_s": seconds, "digest": None, "device": name_of(device), "state_bytes": None}
    settings = {"fault": {"snapshot_every": EVERY}} if variant == "killed" else VARIANTS[variant]
    times: list[float] = []
    lost = 0

    def note(event: Event) -> None:
        nonlocal lost
        if isinstance(event, StepFinished):
            times.append(time.perf_counter())
        elif isinstance(event, RolledBack):
            lost = event.lost_steps

    trainer = Trainer(
        model=lambda: GPT(dropout=0.0, tied=False, **dimensions),
        loss=lambda output, target: F.cross_entropy(output.view(-1, VOCABULARY), target.reshape(-1)),
        data=Tokens(dimensions["context"]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=3e-4, fused=True),
        global_batch_size=BATCH,
        micro_batch_size=MICRO_BATCH,
        precision=precision,
        device=device,
        callbacks=[note],
        observe={"progress": False},
        **settings,
    )
    result = trainer.fit(steps + WARMUP)
    parameters = sum(p.numel() for p in GPT(dropout=0.0, tied=False, **dimensions).parameters())
    return {
        "step_s": [b - a for a, b in itertools.pairwise(times[WARMUP - 1 :])],
        "digest": result.digest,
        "lost_steps": lost,
        "device": name_of(device),
        "state_bytes": 12 * parameters,
    }


def _plain(
    dimensions: Mapping[str, int], device: str, precision: str, steps: int, *, deterministic: bool
) -> list[float]:
    """A plain loop with the same micro-batches."""
    if deterministic and device != "cpu":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT(dropout=0.0, tied=False, **dimensions).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    data = Tokens(dimensions["context"])
    times = []
    for step in range(steps + WARMUP):
        optimizer.zero_grad()
        for micro_batch in range(MICRO_BATCHES):
            first = step * BATCH + micro_batch * MICRO_BATCH
            rows = [data[(first + i) % SAMPLES] for i in range(MICRO_BATCH)]
            inputs, targets = (torch.stack(part).to(device) for part in zip(*rows, strict=True))
            with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=precision == "bf16"):
                loss = F.cross_entropy(model(inputs).view(-1, VOCABULARY), targets.reshape(-1))
            (loss / MICRO_BATCHES).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        loss.item()
        if device != "cpu":
            torch.cuda.synchronize()
        times.append(time.perf_counter())
    return [b - a for a, b in itertools.pairwise(times[WARMUP - 1 :])]


def name_of(device: str) -> str:
    """What the device is called."""
    return "cpu" if device == "cpu" else torch.cuda.get_device_name(device)


def as_text(row: Mapping[str, Any]) -> str:
    """A row for a reader."""
    steps = ", ".join(f"{variant} {1000 * seconds:.1f}" for variant, seconds in row["step_s"].items())
    return (
        f"{row['shape']}, {row['precision']}, {row['device']}; ms a step: {steps}\n"
        f"  {row['of_plain']:.3f} of the plain step, {row['of_plain_deterministic']:.3f} of the deterministic one; "
        f"protection {row['protection']:+.1%}; a snapshot of {row['state_bytes'] / 1e9:.2f} GB takes "
        f"{1000 * row['snapshot_s']:.1f} ms\n"
        f"  a worker killed: {row['recovery_s']:.2f} s to the next new step, {row['lost_steps']} steps again, "
        f"{'the same bits' if row['same_bits'] else 'OTHER BITS'}"
    )
