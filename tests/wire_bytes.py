"""One host of several trains in many ways; the first prints how many bytes left its interface in a step of each.

``python -m tests.wire_bytes CASES``, a JSON list of {"name", "width", "micro_batches", "wire"}, in the environment of
torchrun.
"""

import json
import sys
from typing import Any

import torch
from torch import nn

from unisono import Trainer
from unisono.bench.over_network import Meter
from unisono.events import Event, StepFinished

STEPS = 11


class Rows(torch.utils.data.Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Random rows."""

    def __init__(self, width: int) -> None:
        self.width = width

    def __len__(self) -> int:
        return 64

    def __getitem__(self, i: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = torch.randn(self.width, generator=torch.Generator().manual_seed(i))
        return row, row.roll(1)


def bytes_per_step(width: int, micro_batches: int, wire: dict[str, Any]) -> float:
    """Train some steps; their mean without the first's. Only the first host hears of steps: 0 on the others."""
    meter = Meter()

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            meter.note(event.loss)

    Trainer(
        model=lambda: nn.Linear(width, width),
        loss=nn.functional.mse_loss,
        data=Rows(width),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-3),
        callbacks=[note],
        global_batch_size=micro_batches,
        micro_batch_size=1,
        observe={"progress": False},
        deadline_s=30.0,
        wire=wire,
    ).fit(STEPS)
    return (meter.sent[-1] - meter.sent[0]) / (STEPS - 1) if meter.sent else 0.0


if __name__ == "__main__":
    sent = {case.pop("name"): bytes_per_step(**case) for case in json.loads(sys.argv[1])}
    print(json.dumps(sent))
