"""This machine, measured: matrix products by shape, memory, and the way between two workers; stored for the planner."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unisono.check.doctor import Finding
from unisono.footprint import machine_bytes
from unisono.launch.launcher import Launcher, shares_memory
from unisono.launch.runs import cores
from unisono.launch.task import STANDARD_ERROR

SHAPES = ((64, 512, 512), (256, 512, 512), (1024, 512, 512), (1024, 2048, 2048), (2048, 4096, 4096), (8192, 8192, 8192))
"""(rows, inner, outer); the last for devices alone."""
ENOUGH_S = 0.3
"""Of repetitions of one thing."""
REPEATED = 3
COPIED_BYTES = 1 << 28
PASSES = 6


def measure(launcher: Launcher, path: Path) -> list[Finding]:
    """Measure, and store what was found."""
    workers = cores() if shares_memory() and not torch.cuda.is_available() else 1
    target = {"call": "unisono.check.machine:rates", "arguments": {}}
    found = launcher.run(target, workers, output=STANDARD_ERROR).results
    one = found[0]
    best = max(one["products"], key=lambda product: product["tflops"])
    on_device = one["device"] != "cpu"
    passed = _between(launcher) if shares_memory() and not on_device else None
    memory = one["memory_bytes"] if on_device else machine_bytes() // workers
    device = {
        "name": "here",
        "memory_gib": memory / 2**30,
        "memory_gb_per_s": one["copied_bytes_per_s"] / 1e9,
        "tflops": best["tflops"],
        "link": "pcie4",
        "node": torch.cuda.device_count() if on_device else workers,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"device": device, "measured": one, "between_bytes_per_s": passed}, indent=1))
    temporary.rename(path)
    shapes = ", ".join(f"{'x'.join(map(str, p['shape']))} {p['tflops']:.3g}" for p in one["products"])
    findings = [
        Finding("device", True, f"{one['device']}, {memory / 2**30:.1f} GiB for each of {workers} workers"),
        Finding("products", True, f"{shapes} TFLOP/s in {one['dtype']}, {workers} workers at once"),
        Finding("memory rate", True, f"{one['copied_bytes_per_s'] / 1e9:.1f} GB/s read and written by each"),
    ]
    if passed is not None:
        findings.append(Finding("between", True, f"{passed / 1e9:.1f} GB/s from one worker to another"))
    return [*findings, Finding("stored", True, f"{path}; --cluster {device['node']}xhere is this machine")]


def rates() -> dict[str, Any]:
    """What this worker reaches while all others do the same."""
    torch.set_num_threads(1)
    cuda = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if cuda else ("cpu", torch.float32)
    shapes: Sequence[tuple[int, int, int]] = SHAPES if cuda else SHAPES[:-1]
    products = []
    for n, k, c in shapes:
        a, b = torch.ones(n, k, device=device, dtype=dtype), torch.ones(k, c, device=device, dtype=dtype)
        took = _seconds(lambda a=a, b=b: a @ b)  # type: ignore[misc]
        products.append({"shape": [n, k, c], "tflops": 2 * n * k * c / took / 1e12})
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    took = _seconds(lambda: target.copy_(source))
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "dtype": str(dtype).removeprefix("torch."),
        "memory_bytes": torch.cuda.get_device_properties(0).total_memory if cuda else 0,
        "products": products,
        "copied_bytes_per_s": 2 * COPIED_BYTES / took,
    }


def _seconds(work: Callable[[], Tensor]) -> float:
    """Of one repetition, the least of many."""
    work()
    least, count, until = float("inf"), 0, time.monotonic() + ENOUGH_S
    while count < REPEATED or time.monotonic() < until:
        count += 1
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        least = min(least, time.perf_counter() - begin)
    return least


def _between(launcher: Launcher) -> float:
    """Bytes a second through the memory that two workers share: a store and a load."""
    results = launcher.run({"call": "unisono.check.machine:passed", "arguments": {}}, 2, output=STANDARD_ERROR).results
    return float(results[0])


def passed() -> float:
    """Bytes a second that one worker hands another over the backend ``arena``: the best of some times."""
    dist.init_process_group("arena")
    values, took = torch.ones(COPIED_BYTES // 16), float("inf")
    for _ in range(PASSES):
        begin = time.perf_counter()
        dist.broadcast(values, 0)
        took = min(took, time.perf_counter() - begin)
    dist.barrier()
    dist.destroy_process_group()
    return values.numel() * 4 / took
