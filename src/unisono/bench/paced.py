"""A run on workers whose micro-batches take a set time, as a sleep: how fast is each way of agreeing?"""

import time
from typing import Any

import torch
from torch import Tensor, nn

from unisono.events import Event, StepFinished
from unisono.launch.world import this_process
from unisono.trainer import Trainer

WORKERS, FAST_S, SLOWER, TURN = 4, 0.005, 5, 20
"""Seconds of a micro-batch; how many times as long a slow worker takes; after so many fast ones, another is slow."""
EACH, STEPS = 160, 3
"""Micro-batches between two meetings where workers do not wait for each other; and how often they meet."""
SLOW = ("none", "fixed", "moving")

SERVER = {"mode": "server", "servers": 2}
WAYS: dict[str, dict[str, Any]] = {
    "every step": {},
    "every step, with copies": {},
    "server, synchronous": {**SERVER, "staleness": 0, "accepted": WORKERS},
    "server, 1 of 4 is backup": {**SERVER, "backup": 1, "accepted": WORKERS - 1},
    "server, staleness 8": {**SERVER, "staleness": 8},
    "server, asynchronous": SERVER,
    "local, period 8": {"mode": "local", "period": 8},
}


class Paced:
    """Samples that take their time, as long as this worker takes now."""

    def __init__(self, slow: str) -> None:
        self._slow = slow

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        time.sleep(FAST_S * (SLOWER if self._is_slow() else 1))
        return torch.ones(4), torch.ones(1) * (index % 2)

    def _is_slow(self) -> bool:
        rank = this_process().rank
        turn = int(time.monotonic() / (TURN * FAST_S)) % WORKERS if self._slow == "moving" else 0
        return self._slow != "none" and rank == turn


def measure(way: str, slow: str) -> dict[str, Any]:
    """Samples a second, once training is under way, and how stale gradients were at the most."""
    torch.set_num_threads(1)
    sync = WAYS[way]
    alone = sync.get("mode") == "server"
    each = EACH if alone else WORKERS * 4
    steps = STEPS if alone else EACH * STEPS // each
    ends: list[float] = []
    late = [0]

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            ends.append(time.monotonic())
            late.extend(event.staleness or ())

    trainer = Trainer(
        model=lambda: nn.Linear(4, 1),
        loss=nn.functional.mse_loss,
        data=Paced(slow),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.01),
        sync=sync,
        fault={"copies": "always" if way.endswith("copies") else "never"},
        global_batch_size=each,
        micro_batch_size=1,
        callbacks=[note],
        observe={"progress": False},
    )
    result = trainer.fit(steps)
    if not ends:  # the first worker hears of steps
        return {}
    seconds = ends[-1] - ends[0]
    return {
        "samples_per_s": each * (steps - 1) / seconds,
        "wall_s": seconds,
        "loss": result.loss,
        "staleness_max": max(late) if alone else 0,
    }
