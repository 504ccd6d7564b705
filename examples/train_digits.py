"""Validation, metrics, checkpoints, a resume and a callback in a script.

unisono run -n 2 examples/train_digits.py             # trains, and saves into runs/digits-example
unisono run -n 2 examples/train_digits.py --resume    # goes on from the newest checkpoint
"""

import argparse

import torch
from torch import Tensor, nn

import unisono
from unisono.events import Event, ValidationFinished
from unisono.tasks.images import Images

TASK = Images(width=8)


def accuracy(output: Tensor, target: Tensor) -> dict[str, Tensor]:
    """The share of images that are recognised: a mean over the batch."""
    return {"accuracy": (output.argmax(-1) == target).float().mean()}


def celebrate(event: Event) -> None:
    """A callback hears every event on rank 0."""
    if isinstance(event, ValidationFinished) and event.best:
        print(f"the best so far: {event.metrics['accuracy']:.1%}")


def main() -> None:
    """Train."""
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--steps", type=int, default=200)
    arguments.add_argument("--run-dir", default="runs/digits-example")
    arguments.add_argument("--resume", action="store_true")
    given = arguments.parse_args()
    trainer = unisono.Trainer(
        model=TASK.model,
        loss=nn.functional.cross_entropy,
        data=TASK.dataset("train"),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        validation=TASK.dataset("validation"),
        metrics=accuracy,
        validate={"every": 50, "metric": "accuracy", "mode": "max", "patience": 5},
        global_batch_size=112,
        micro_batch_size=16,
        run_dir=given.run_dir,
        checkpoint_every=50,
        callbacks=[celebrate],
    )
    trainer.fit(given.steps, resume=given.resume)


if __name__ == "__main__":
    main()
