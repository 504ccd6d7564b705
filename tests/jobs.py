"""What the pool's workers run in tests: called by name, arguments and results are JSON."""

import gc
import os
import signal
import time
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from tests import toys
from unisono import Trainer
from unisono.events import Event, PhaseEntered, StepFinished, ValidationFinished


def trainer(
    model: str = "mlp",
    optimizer: str = "adamw",
    loss: str = "mse",
    augment: bool = False,
    fail_at: int | None = None,
    **settings: Any,
) -> Trainer:
    """A trainer over toys; micro-batches are not a multiple of most numbers of workers."""
    defaults: dict[str, Any] = {
        "global_batch_size": 28,
        "micro_batch_size": 4,
        "observe": {"progress": False, "tensorboard": False, "report": False},
        "deadline_s": 30.0,
    }
    return Trainer(
        model=toys.MODELS[model],
        loss=toys.LOSSES[loss],
        data=toys.Samples(augment, fail_at),
        optimizer=toys.OPTIMIZERS[optimizer],
        **{**defaults, **settings},
    )


def small_trainer(**options: Any) -> Trainer:
    """A linear model, whose parts can be replaced one by one."""
    parts: dict[str, Any] = {
        "model": lambda: nn.Linear(6, 4),
        "loss": nn.functional.mse_loss,
        "data": toys.Samples(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "observe": {"progress": False},
    }
    return Trainer(**{**parts, **options})


def train(steps: int = 6, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Train toys; the result, with every step's loss."""
    losses: list[float] = []
    validations: list[dict[str, float]] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            losses.append(event.loss)
        elif isinstance(event, ValidationFinished):
            validations.append(dict(event.metrics))

    if options.pop("validated", False):
        options["validation"] = toys.Samples()
    result = trainer(callbacks=[note], **options).fit(steps, resume=resume)
    return {**asdict(result), "losses": losses, "validations": validations}


def fail(rank: int, how: str, step: int = 2, phase: str = "compute", **options: Any) -> dict[str, Any]:
    """Train toys; the worker of a rank meets with a fault at (step, phase)."""

    struck = False

    def strike(event: Event) -> None:
        nonlocal struck
        here = isinstance(event, PhaseEntered) and (event.rank, event.step, event.phase) == (rank, step, phase)
        if here and not struck:
            struck = True
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "raise":
                raise RuntimeError("struck on purpose")
            elif how == "sleep":
                time.sleep(60)
            elif how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)

    subject = trainer(**options)
    subject.probe(strike)
    return asdict(subject.fit(10))


def rank_and_world() -> list[str]:
    """What a worker sees of its place."""
    return [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]


def leave_child() -> int:
    """Start a process that outlives the function; its id."""
    import subprocess

    return subprocess.Popen(["sleep", "300"]).pid


def train_twice() -> list[str]:
    """Two trainers of different sizes in one process."""
    return [trainer(model=model).fit(3).digest for model in ("mlp", "norm")]


def descriptors_before_and_after() -> tuple[int, int]:
    """Open descriptors after one training, and after three more."""
    small_trainer().fit(1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        small_trainer().fit(1)
        gc.collect()
    return before, len(os.listdir("/proc/self/fd"))
