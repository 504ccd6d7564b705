"""``unisono doctor``: what this machine offers, and whether two workers agree on it."""

import os
import platform
import shutil
from dataclasses import asdict, dataclass
from typing import Any

import torch

from unisono.launch.launcher import Launcher, shares_memory
from unisono.launch.runs import cores
from unisono.trainer import Trainer


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    name: str
    good: bool
    text: str

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return asdict(self)


def examine(launcher: Launcher) -> list[Finding]:
    """Look at everything that a run depends on."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    free = shutil.disk_usage(".").free
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    cuda = torch.cuda.is_available()
    findings = [
        Finding("python", True, platform.python_version()),
        Finding("torch", version >= (2, 11), f"{torch.__version__} (2.11 or later is needed)"),
        Finding("cpu", True, f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {cores()} cores"),
        Finding("memory", True, f"{memory / 2**30:.1f} GiB"),
        Finding("disk", free > 1 << 30, f"{free / 2**30:.1f} GiB free in this directory"),
        Finding("shared memory", True, "memfd and pidfd" if shares_memory() else "none: one worker only"),
        Finding("cuda", True, torch.cuda.get_device_name() if cuda else "no device"),
    ]
    numbers = (1, 2) if shares_memory() else (1,)
    digests = [launcher.run({"call": "unisono.check.doctor:probe", "arguments": {}}, n).results[0] for n in numbers]
    equal = len(set(digests)) == 1
    counted = " and ".join(map(str, numbers))
    text = f"{counted} workers give the same bits" if equal else f"{counted} workers differ: {digests}"
    return [*findings, Finding("exactness", equal, text)]


def probe() -> str:
    """Train a tiny model for a few steps; the digest."""
    generator = torch.Generator().manual_seed(0)
    data = [(torch.randn(16, generator=generator), torch.randn(4, generator=generator)) for _ in range(64)]
    trainer = Trainer(
        model=lambda: torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4)),
        loss=torch.nn.functional.mse_loss,
        data=data,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        global_batch_size=12,
        micro_batch_size=4,
        clip=1.0,
        observe={"progress": False},
    )
    return trainer.fit(steps=5).digest
