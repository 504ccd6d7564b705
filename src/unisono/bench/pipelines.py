"""A GPT's training step in two stages, by Unisono and by torch.distributed.pipelining, and on one worker alone."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unisono.bench.variants import CONTEXT, batch, between, build, end_group, loss, optimizer, seconds_of_steps
from unisono.config import Layout, Schedule

STAGES, MICRO_BATCHES, MICRO_BATCH_SIZE, SHAPE = 2, 8, 2, "large"
STEPS, WARMUP = 4, 2
TORCHS = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
"""Those that torch.distributed.pipelining has too, with one stage a worker."""


def unisono(schedule: Schedule, stages: int) -> list[float]:
    """Seconds of a step; on one worker, of the same work without a pipeline."""
    return seconds_of_steps(
        SHAPE,
        STEPS,
        WARMUP,
        global_batch_size=MICRO_BATCHES * MICRO_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        layout=Layout(data=1, pipeline=stages, schedule=schedule),
    )


class _First(nn.Module):
    """The first half of a GPT."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        self.tokens, self.positions, self.dropout = model.tokens, model.positions, model.dropout
        self.blocks = model.blocks[:blocks]

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.dropout(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
        for block in self.blocks:
            x = block(x)
        return x


class _Second(nn.Module):
    """The rest of it."""

    def __init__(self, model: Any, blocks: int) -> None:
        super().__init__()
        self.blocks, self.norm, self.head = model.blocks[blocks:], model.norm, model.head

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


def torchs(schedule: str) -> list[float]:
    """Seconds of a step of torch's schedule of the same name over gloo, its optimizer's step included."""
    from torch.distributed import pipelining

    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    rank = int(os.environ["RANK"])
    model: Any = build(SHAPE)
    half = len(model.blocks) // 2
    part = _First(model, half) if rank == 0 else _Second(model, half)
    stage = pipelining.PipelineStage(part, rank, STAGES, torch.device("cpu"))
    timetable = getattr(pipelining, TORCHS[schedule])(stage, n_microbatches=MICRO_BATCHES, loss_fn=loss)
    optim = optimizer(part.parameters())
    size = MICRO_BATCHES * MICRO_BATCH_SIZE
    times = []
    for step in range(STEPS + WARMUP):
        tokens, targets = batch(step, size)
        optim.zero_grad()
        if rank == 0:
            timetable.step(tokens)
        else:
            timetable.step(target=targets, losses=[])
        optim.step()
        dist.barrier()
        times.append(time.perf_counter())
    end_group()
    return between(times, WARMUP)


WAYS: dict[str, Callable[..., list[float]]] = {"unisono": unisono, "torch": torchs}


def measure(way: str, **arguments: Any) -> list[float]:
    """Run one of them in this worker."""
    return WAYS[way](**arguments)


def described() -> dict[str, Any]:
    """What is measured."""
    return {
        "model": SHAPE,
        "context": CONTEXT,
        "stages": STAGES,
        "micro_batches": MICRO_BATCHES,
        "micro_batch_size": MICRO_BATCH_SIZE,
    }
