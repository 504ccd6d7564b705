"""A large GPT trained on hosts that share its state, and the memory that its state takes on this one."""

import threading
import time
from typing import Any

import torch

from unisono.bench.variants import Bytes, loss
from unisono.config import TrainingConfig
from unisono.launch.membership import way
from unisono.parallel.bind import model_tensors
from unisono.parallel.initial import without_values
from unisono.parallel.recompute import blocks
from unisono.plan.assignment import one_team
from unisono.plan.blocks import flat_layout
from unisono.run.summation import accumulation
from unisono.tasks.lm import GPT
from unisono.trainer import Trainer

LAYERS, WIDTH, HEADS, CONTEXT = 26, 576, 8, 128
STEPS = 3
SHARED = ("/dev/zero", "memfd:")
"""What the arena's mapping is called: private to a worker that is alone on its host, or shared."""


def model() -> GPT:
    """A hundred million parameters, nearly all of them in layers."""
    return GPT(LAYERS, WIDTH, HEADS, CONTEXT, dropout=0.0, tied=False)


def measure(zero: int, hosts: int, micro_batches: int) -> dict[str, float]:
    """The most bytes a parameter that values, live partial sums and the optimizer's state took here."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {
        "global_batch_size": micro_batches,
        "micro_batch_size": 1,
        "layout": {"zero": zero},
        "init": "by_name",
        "observe": {"progress": False},
    }
    trainer = Trainer(
        model=model,
        loss=loss,
        data=Bytes(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-4, fused=True),
        **settings,
    )
    with _Most() as most:
        trainer.probe(lambda event: most.begin())  # what comes before the first step is not measured
        trainer.fit(STEPS)
    return {**_sizes(settings, micro_batches, hosts, zero), "most_bytes": float(most.size_bytes)}


def _sizes(settings: dict[str, Any], micro_batches: int, hosts: int, zero: int) -> dict[str, float]:
    """The figures of the formula: parameters, live partial sums, and bytes of the largest bucket and layer."""
    with without_values():
        bare = model()
    tensors = model_tensors(bare)
    flat = flat_layout(tensors.parameter_specs(torch.optim.SGD(bare.parameters(), lr=0.1)))
    each = micro_batches if zero > 1 else micro_batches // hosts
    buckets = way(TrainingConfig(**settings)).buckets(flat, one_team(flat, 0))
    return {
        "parameters": float(sum(p.numel() for p in bare.parameters())),
        "partials": float(accumulation(0, each, micro_batches)[1]),
        "bucket_bytes": 4.0 * max(bucket.stop - bucket.start for bucket in buckets),
        "layer_bytes": 4.0 * max(sum(p.numel() for p in bare.get_submodule(b).parameters()) for b in blocks(bare)),
    }


class _Most:
    """The largest size of the arena while it runs, once it has begun."""

    def __init__(self) -> None:
        self.size_bytes = 0
        self._begun = threading.Event()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_Most":
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        self._begun.set()
        self._thread.join()

    def begin(self) -> None:
        """Look from now on."""
        self._begun.set()

    def _sample(self) -> None:
        self._begun.wait()
        while not self._over.is_set():
            self.size_bytes = max(self.size_bytes, shared_bytes())
            time.sleep(0.01)


def shared_bytes() -> int:
    """Bytes of the arena that are in memory."""
    total, inside = 0, False
    with open("/proc/self/smaps") as lines:
        for line in lines:
            if "-" in line.split(" ", 1)[0]:
                inside = any(name in line for name in SHARED)
            elif inside and line.startswith("Rss:"):
                total += 1024 * int(line.split()[1])
    return total


def described() -> dict[str, Any]:
    """What is measured."""
    return {"layers": LAYERS, "width": WIDTH, "optimizer": "AdamW", "precision": "fp32", "steps": STEPS}
