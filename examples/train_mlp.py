"""A script that trains under ``python``, ``unisono run -n 2`` and ``torchrun --nproc-per-node 2``, with one result.

python examples/train_mlp.py --steps 100
unisono run -n 2 examples/train_mlp.py --steps 100
torchrun --standalone --nproc-per-node 2 examples/train_mlp.py --steps 100
"""

import argparse

import torch
from torch import nn
from torch.utils.data import TensorDataset

import unisono


def build() -> nn.Module:
    """The model; called under the run's seed."""
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Dropout(0.1), nn.Linear(64, 1))


def make_data() -> TensorDataset:
    """A noisy polynomial."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2048, 8, generator=generator)
    y = (x[:, :1] * x[:, 1:2] + x[:, 2:3] ** 2) + 0.1 * torch.randn(2048, 1, generator=generator)
    return TensorDataset(x, y)


def main() -> None:
    """Train, and print the digest: it does not depend on how the script was started."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=100)
    trainer = unisono.Trainer(
        model=build,
        loss=nn.functional.mse_loss,
        data=make_data(),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        global_batch_size=64,
        micro_batch_size=16,
        clip=1.0,
        schedule="cosine",
    )
    result = trainer.fit(arguments.parse_args().steps)
    if trainer.model is not None and result.loss is not None:
        trainer.model.eval()
        print(f"loss {result.loss:.4f}, prediction for zeros {trainer.model(torch.zeros(1, 8)).item():.4f}")


if __name__ == "__main__":
    main()
