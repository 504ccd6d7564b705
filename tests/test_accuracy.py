"""Compression costs no accuracy: digits, every codec, five seeds, two hosts. Slow; run with -m slow."""

from pathlib import Path
from statistics import mean
from typing import Any

import pytest

from unisono.config import load
from unisono.launch.local import LocalLauncher

CODECS = ("bf16", "fp16", "int8", "sign", "top_k", "powersgd")
SEEDS = range(5)
POINTS = 0.5


def accuracy(pool: LocalLauncher, seed: int, wire: dict[str, Any]) -> float:
    """In percent, on the validation split."""
    settings = load(Path("configs/images.yaml")).model_dump(mode="json")
    settings |= {"seed": seed, "wire": wire, "run_dir": None, "checkpoint": {}, "layout": {}}
    settings["observe"] = {"progress": False}
    target = {"call": "unisono.tasks.job:train", "arguments": {"config": settings}}
    result = pool.run(target, 2, hosts=2).results[0]
    return 100 * float(result["validation"]["accuracy"])


@pytest.mark.slow
def test_every_codec_reaches_the_accuracy_of_exact_sums(pool: LocalLauncher) -> None:
    exact = mean(accuracy(pool, seed, {}) for seed in SEEDS)
    found = {name: mean(accuracy(pool, seed, {"compression": name}) for seed in SEEDS) for name in CODECS}
    print(f"exact {exact:.2f}", {name: round(value, 2) for name, value in found.items()})
    assert all(value > exact - POINTS for value in found.values())
