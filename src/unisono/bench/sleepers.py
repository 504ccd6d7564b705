"""A model whose layers sleep: what a pipeline's timetable costs, whatever the number of cores."""

import time
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from unisono.config import Layout, Schedule
from unisono.events import Event, StepFinished
from unisono.plan.schedule import virtual
from unisono.trainer import Trainer

WIDTH = 4
WARMUP, STEPS = 1, 2


class _Sleeping(torch.autograd.Function):
    """Passes a tensor on, and its gradient back; either takes the given seconds."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, forward_s: float, backward_s: float) -> Tensor:
        ctx.backward_s = backward_s
        time.sleep(forward_s)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        time.sleep(ctx.backward_s)
        return gradients[0], None, None


class Sleeper(nn.Module):
    """A layer whose forward, and the gradients of its input and of its weight, take ``part_s`` seconds each."""

    def __init__(self, part_s: float) -> None:
        super().__init__()
        self.part_s = part_s
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, WIDTH) -> the same."""
        y: Tensor = _Sleeping.apply(x, self.part_s, self.part_s)  # type: ignore[no-untyped-call]
        z: Tensor = _Sleeping.apply(self.weight, 0.0, self.part_s)  # type: ignore[no-untyped-call]
        return y * z


class Beginning(nn.Module):
    """What an embedding is to a model: something in front of the layers that has a weight too, and takes no time."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, WIDTH) -> the same."""
        return x * self.weight


class _Zeros:
    """Samples of nothing."""

    def __init__(self, size: int) -> None:
        self._size = size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < self._size:
            raise IndexError(index)
        return torch.zeros(WIDTH), torch.zeros(WIDTH)


def measure(
    schedule: Schedule, stages: int, micro_batches: int, part_s: float, virtual_stages: int, updates: int = 1
) -> float:
    """The bubble of a schedule in this worker's pipeline, by the time that all its workers wait.

    Arguments:
        stages: workers of the pipeline; each holds two layers.
        micro_batches: of an update.
        part_s: seconds of a worker's forward of a micro-batch, and of either part of its backward.
        updates: in a step; for more than one the pipeline does not drain.
    """
    bubbles: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished) and event.step > WARMUP:
            busy = sum(worker["compute"] for worker in event.phases)
            bubbles.append(1.0 - busy / (len(event.phases) * event.seconds))

    layers, held = 2 * stages, virtual(schedule, virtual_stages)
    cuts = [str(1 + layer) for layer in range(2 // held, layers, 2 // held)]
    layout = Layout(data=1, pipeline=stages, schedule=schedule, virtual_stages=virtual_stages, cuts=cuts)
    trainer = Trainer(
        model=lambda: nn.Sequential(Beginning(), *(Sleeper(part_s / 2) for _ in range(layers))),
        loss=nn.functional.mse_loss,
        data=_Zeros(updates * micro_batches),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0),
        callbacks=[note],
        global_batch_size=updates * micro_batches,
        micro_batch_size=1,
        layout=layout,
        sync={} if updates == 1 else {"mode": "pipedream", "push": micro_batches},
        observe={"progress": False},
    )
    trainer.fit(WARMUP + STEPS)
    return median(bubbles) if bubbles else 0.0
