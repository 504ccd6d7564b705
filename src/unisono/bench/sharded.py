"""A GPT's training step on two workers that divide its layers, or its state, by Unisono and by torch's own parts."""

import os
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    PrepareModuleOutput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from unisono.bench.variants import CONTEXT, batch, between, build, end_group, loss, optimizer, seconds_of_steps

WORKERS, MICRO_BATCHES, MICRO_BATCH_SIZE, SHAPE = 2, 2, 8, "large"
STEPS, WARMUP = 4, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero 3": {"data": WORKERS, "zero": 3},
    "tensor": {"data": 1, "tensor": WORKERS},
    "tensor, sequence": {"data": 1, "tensor": WORKERS, "sequence_parallel": True},
}


def unisono(way: str) -> list[float]:
    """Seconds of a step."""
    return seconds_of_steps(
        SHAPE,
        STEPS,
        WARMUP,
        global_batch_size=MICRO_BATCHES * MICRO_BATCH_SIZE,
        micro_batch_size=MICRO_BATCH_SIZE,
        layout=LAYOUTS[way],
    )


def torchs(way: str) -> list[float]:
    """Seconds of a step of the same work over gloo, the optimizer's included."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model: Any = build(SHAPE)
    if way == "zero 3":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    else:
        _divide(model, sequence="sequence" in way)
    kinds: dict[type, list[Any]] = {}  # the fused kernel takes one kind of tensor at once
    for parameter in model.parameters():
        kinds.setdefault(type(parameter.data), []).append(parameter)
    optim = optimizer({"params": members} for members in kinds.values())
    each = MICRO_BATCHES // WORKERS if way == "zero 3" else MICRO_BATCHES
    first = int(os.environ["RANK"]) * each if way == "zero 3" else 0
    times = []
    for step in range(STEPS + WARMUP):
        tokens, targets = batch(step, MICRO_BATCHES * MICRO_BATCH_SIZE)
        optim.zero_grad()
        for m in range(first, first + each):
            rows = slice(m * MICRO_BATCH_SIZE, (m + 1) * MICRO_BATCH_SIZE)
            (loss(model(tokens[rows]), targets[rows]) / each).backward()  # type: ignore[no-untyped-call]
        optim.step()
        dist.barrier()
        times.append(time.perf_counter())
    del optim, model
    end_group()
    return between(times, WARMUP)


def _divide(model: Any, *, sequence: bool) -> None:
    """The blocks in parts, as torch's tutorial has it."""
    mesh = init_device_mesh("cpu", (WORKERS,))
    whole, part = (Replicate(),), (Shard(1),)
    plan: dict[str, Any] = {
        "attention.qkv": ColwiseParallel(),
        "attention.out": RowwiseParallel(output_layouts=part[0] if sequence else whole[0]),
        "mlp.0": ColwiseParallel(),
        "mlp.2": RowwiseParallel(output_layouts=part[0] if sequence else whole[0]),
    }
    if sequence:
        plan |= {
            "norm1": SequenceParallel(),
            "norm2": SequenceParallel(),
            "attention": PrepareModuleInput(input_layouts=part, desired_input_layouts=whole),
            "mlp": PrepareModuleInput(input_layouts=part, desired_input_layouts=whole),
        }
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    if sequence:
        enter = PrepareModuleInput(input_layouts=whole, desired_input_layouts=part, use_local_output=True)
        leave = PrepareModuleOutput(output_layouts=part, desired_output_layouts=whole)
        parallelize_module(model.blocks[0], mesh, enter)
        parallelize_module(model.blocks[-1], mesh, leave)


WAYS: dict[str, Callable[[str], list[float]]] = {"unisono": unisono, "torch": torchs}


def measure(by: str, way: str) -> list[float]:
    """Run one of them in this worker."""
    return WAYS[by](way)


def described() -> dict[str, Any]:
    """What is measured."""
    return {
        "model": SHAPE,
        "context": CONTEXT,
        "workers": WORKERS,
        "micro_batches": MICRO_BATCHES,
        "micro_batch_size": MICRO_BATCH_SIZE,
    }
