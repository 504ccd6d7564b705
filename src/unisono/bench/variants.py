"""One way of training each: the same GPT, data and optimizer, timed in the worker that runs it."""

import gc
import importlib.util
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import default_collate

from unisono.events import Event, StepFinished
from unisono.tasks.lm import GPT, VOCABULARY
from unisono.trainer import Trainer

SHAPES = {
    "lm": {"layers": 4, "width": 128, "heads": 4},  # of configs/lm.yaml
    "small": {"layers": 4, "width": 256, "heads": 4},
    "large": {"layers": 8, "width": 512, "heads": 8},
}
CONTEXT = 128
SAMPLES = 512


def build(shape: str) -> nn.Module:
    """The model; dropout off, so that every variant does the same work."""
    return GPT(context=CONTEXT, dropout=0.0, tied=False, **SHAPES[shape])


def optimizer(parameters: Iterable[Any]) -> torch.optim.Optimizer:
    """The fused AdamW, the fastest that torch has on a CPU, for every variant."""
    return torch.optim.AdamW(parameters, lr=3e-4, fused=True)


def loss(output: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy."""
    return F.cross_entropy(output.view(-1, VOCABULARY), target.reshape(-1))


class Bytes:
    """Random samples, the same for every variant."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._data = torch.randint(0, VOCABULARY, (SAMPLES, CONTEXT + 1), generator=generator)

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < SAMPLES:
            raise IndexError(index)
        return self._data[index, :-1], self._data[index, 1:]


class PeakMemory:
    """The largest proportional set size of this process while it runs: shared pages count by share.

    Sampling disturbs timing, so it has runs of its own.
    """

    def __init__(self, *, on: bool) -> None:
        self.peak_bytes = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True) if on else None

    def __enter__(self) -> "PeakMemory":
        if self._thread is not None:
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def _sample(self) -> None:
        while not self._over.wait(0.01):
            with open("/proc/self/smaps_rollup") as rollup:
                for line in rollup:
                    if line.startswith("Pss:"):
                        self.peak_bytes = max(self.peak_bytes, int(line.split()[1]) * 1024)
                        break


def seconds_of_steps(shape: str, steps: int, warmup: int, **settings: Any) -> list[float]:
    """What steps take that Unisono trains, as a user would call it; protection of commits included.

    Arguments:
        settings: of the trainer.
    """
    torch.set_num_threads(1)
    times: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            times.append(time.perf_counter())

    trainer = Trainer(
        model=lambda: build(shape),
        loss=loss,
        data=Bytes(),
        optimizer=optimizer,
        callbacks=[note],
        observe={"progress": False},
        **settings,
    )
    trainer.fit(steps + warmup)
    return between(times, warmup)


def between(times: Sequence[float], warmup: int) -> list[float]:
    """Seconds between the ends of steps, the first ones left out."""
    return [b - a for a, b in zip(times[warmup - 1 :], times[warmup:], strict=False)]


def batch(step: int, size: int) -> tuple[Tensor, Tensor]:
    """What a step trains on, (samples, time) each."""
    data = Bytes()
    rows = [data[(step * size + i) % len(data)] for i in range(size)]
    return torch.stack([row[0] for row in rows]), torch.stack([row[1] for row in rows])


def unisono(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """Unisono."""
    size = micro_batch * int(os.environ["WORLD_SIZE"])
    with PeakMemory(on=memory) as peak:
        seconds = seconds_of_steps(shape, steps, warmup, global_batch_size=size, micro_batch_size=micro_batch)
    return _result(seconds, peak)


def independent(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """Replicas that never communicate: what a step costs where nothing is exchanged."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = build(shape)
    return _loop(model, optimizer(model.parameters()), micro_batch, steps, warmup, memory, lambda x: x.backward())  # type: ignore[no-untyped-call]


def ddp(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """DistributedDataParallel over gloo."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dist.init_process_group("gloo")
    model = nn.parallel.DistributedDataParallel(build(shape))
    result = _loop(model, optimizer(model.parameters()), micro_batch, steps, warmup, memory, lambda x: x.backward())  # type: ignore[no-untyped-call]
    end_group()
    return result


def accelerate(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """Hugging Face Accelerate on the CPU."""
    from accelerate import Accelerator

    torch.manual_seed(0)
    accelerator = Accelerator(cpu=True)
    torch.set_num_threads(1)
    model = build(shape)
    model, optim = accelerator.prepare(model, optimizer(model.parameters()))
    result = _loop(model, optim, micro_batch, steps, warmup, memory, accelerator.backward)
    end_group()
    return result


def fabric(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """Lightning Fabric with its DDP strategy."""
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    torch.manual_seed(0)
    lightning = Fabric(accelerator="cpu", devices=2, strategy="ddp", plugins=[TorchElasticEnvironment()])
    lightning.launch()
    torch.set_num_threads(1)
    model = build(shape)
    wrapped, optim = lightning.setup(model, optimizer(model.parameters()))
    result = _loop(wrapped, optim, micro_batch, steps, warmup, memory, lightning.backward)
    end_group()
    return result


def deepspeed(shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """DeepSpeed with ZeRO stage 1 on the CPU."""
    import deepspeed as ds

    torch.manual_seed(0)
    ds.init_distributed("gloo")
    torch.set_num_threads(1)
    model = build(shape)
    config = {"train_micro_batch_size_per_gpu": micro_batch, "zero_optimization": {"stage": 1}}
    engine, *_ = ds.initialize(model=model, optimizer=optimizer(model.parameters()), config=config)
    result = _loop(engine, engine, micro_batch, steps, warmup, memory, engine.backward)
    end_group()
    return result


VARIANTS: dict[str, Callable[..., dict[str, Any]]] = {
    "independent": independent,
    "ddp": ddp,
    "unisono": unisono,
    "accelerate": accelerate,
    "fabric": fabric,
    "deepspeed": deepspeed,
}
_NEEDS = {"accelerate": "accelerate", "fabric": "lightning_fabric", "deepspeed": "deepspeed"}


def available() -> list[str]:
    """The variants whose libraries are installed."""
    return [name for name in VARIANTS if name not in _NEEDS or importlib.util.find_spec(_NEEDS[name])]


def measure(variant: str, shape: str, micro_batch: int, steps: int, warmup: int, memory: bool) -> dict[str, Any]:
    """Run a variant in this worker."""
    return VARIANTS[variant](shape, micro_batch, steps, warmup, memory)


def _loop(
    model: Any,
    optim: Any,
    micro_batch: int,
    steps: int,
    warmup: int,
    memory: bool,
    backward: Callable[[Tensor], Any],
) -> dict[str, Any]:
    """A plain training loop."""
    data = Bytes()
    times = []
    with PeakMemory(on=memory) as peak:
        for step in range(steps + warmup):
            first = step * micro_batch
            batch = [data[(first + i) % SAMPLES] for i in range(micro_batch)]
            inputs, targets = default_collate(batch)
            optim.zero_grad()
            backward(loss(model(inputs), targets))
            optim.step()
            times.append(time.perf_counter())
    return _result([b - a for a, b in zip(times[warmup - 1 :], times[warmup:], strict=False)], peak)


def _result(seconds: list[float], peak: PeakMemory) -> dict[str, Any]:
    return {"step_s": seconds, "peak_bytes": peak.peak_bytes}


def end_group() -> None:
    """End a process group in good order."""
    gc.collect()
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
