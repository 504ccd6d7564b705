"""One worker of ``unisono bench network``, on a host of its own: trains in one way, and prints what it measured.

``python -m unisono.bench.over_network '{"method": "exact", ...}'``, with the environment that torchrun would set.
"""

import gc
import json
import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from unisono.data.feed import Feed
from unisono.events import Event, StepFinished
from unisono.launch.namespaces import DEVICE
from unisono.launch.process import die_with_parent
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.tasks.lm import LanguageModel
from unisono.trainer import Trainer

SEED = 0
RANK, DENSITY = 4, 0.01
DILOCO = {"mode": "diloco", "period": 50}
ALONE = "alone"
UNISONO: dict[str, dict[str, Any]] = {
    "exact": {},
    "exact_unpacked": {"wire": {"lossless": "never"}},
    "bf16": {"wire": {"compression": "bf16"}},
    "fp16": {"wire": {"compression": "fp16"}},
    "int8": {"wire": {"compression": "int8"}},
    "sign": {"wire": {"compression": "sign"}},
    "top_k": {"wire": {"compression": "top_k", "density": DENSITY, "warmup_steps": 0}},
    "powersgd": {"wire": {"compression": "powersgd", "rank": RANK}},
    "diloco": {"sync": DILOCO},
    "diloco_bf16": {"sync": {**DILOCO, "compression": "bf16"}},
    "diloco_int8": {"sync": {**DILOCO, "compression": "int8"}},
    "diloco_streaming": {"sync": {**DILOCO, "compression": "bf16", "fragments": 2, "delay": 10}},
    "diloco_streaming_int8": {"sync": {**DILOCO, "compression": "int8", "fragments": 2, "delay": 10}},
    "server": {"sync": {"mode": "server"}},
    "server_bounded": {"sync": {"mode": "server", "staleness": 1}},
    ALONE: {},
}
UNITS = 8
"""Pushes of each worker between two meetings of a parameter server's; a step of the others is as one push of each."""
METHODS = ("ddp", *UNISONO, "torch_powersgd")


def task() -> LanguageModel:
    """The 3.3 M-parameter GPT on the default corpus."""
    return LanguageModel(layers=4, width=256, heads=4, context=128, lr=1e-3)


class Meter:
    """Notes the clock and the bytes that this host has sent, after every step, or for each of several at once."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.sent: list[int] = []
        self.losses: list[float] = []

    def note(self, loss: float, steps: int = 1) -> None:
        """So many steps are over."""
        now = time.perf_counter()
        with open(f"/sys/class/net/{DEVICE}/statistics/tx_bytes") as counter:
            sent = int(counter.read())
        then, before = (self.times[-1], self.sent[-1]) if self.times else (now, sent)
        for number in range(1, steps + 1) if self.times else [steps]:  # what was before the first has no beginning
            self.times.append(then + (now - then) * number / steps)
            self.sent.append(before + (sent - before) * number // steps)
            self.losses.append(loss)


def unisono(method: str, steps: int, samples: int, meter: Meter) -> None:
    """Unisono, as a user would call it."""
    subject = task()
    if method == ALONE:
        del os.environ["WORLD_SIZE"], os.environ["RANK"]
    world = int(os.environ.get("WORLD_SIZE", "1"))
    together = UNITS if UNISONO[method].get("sync", {}).get("mode") == "server" else 1

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            meter.note(event.loss, together)

    trainer = Trainer(
        model=subject.model,
        loss=subject.loss,
        data=subject.dataset("train"),
        optimizer=subject.optimizer,
        callbacks=[note],
        global_batch_size=samples * world * together,
        micro_batch_size=samples,
        seed=SEED,
        **UNISONO[method],
        observe={"progress": False},
    )
    trainer.fit(-(-steps // together) + (together > 1))


def ddp(method: str, steps: int, samples: int, meter: Meter) -> None:
    """DistributedDataParallel over gloo, on the same samples, from the same initial values, with or without a hook."""
    torch.set_num_threads(1)
    subject = task()
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    with Isolation() as random:
        random.seed(derive(SEED, "init"))
        inner = subject.model()
    model = nn.parallel.DistributedDataParallel(inner)
    if method == "torch_powersgd":
        state = PowerSGDState(None, matrix_approximation_rank=RANK, start_powerSGD_iter=2)
        model.register_comm_hook(state, powerSGD_hook)
    optimizer = subject.optimizer(model.parameters())
    data = subject.dataset("train")
    feed = Feed(data, SEED, "training", None, torch.device("cpu"))
    sampler = Sampler(feed.size, SEED, samples * world, samples)
    for step in range(steps):
        batch: Any = feed.load(sampler.indices(step, rank).tolist(), 0, "benchmark")
        inputs, target = batch
        optimizer.zero_grad()
        loss = subject.loss(model(inputs), target)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        meter.note(float(loss.detach()))
    del model, optimizer
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    """Run what the argument says."""
    die_with_parent(os.getppid())
    wanted: dict[str, Any] = json.loads(sys.argv[1])
    meter = Meter()
    run = unisono if wanted["method"] in UNISONO else ddp
    run(wanted["method"], wanted["steps"], wanted["samples"], meter)
    sys.stdout.write(json.dumps({"times": meter.times, "sent": meter.sent, "losses": meter.losses}) + "\n")


if __name__ == "__main__":
    main()
