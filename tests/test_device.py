"""On a CUDA device: the same bits each time, through checkpoints and lost workers; the figures of a plain loop."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.test_parity import CASES, plain_loop
from unisono.launch.local import LocalLauncher
from unisono.optim import KFAC, LAMB, LARS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = {"device": "cuda"}
STEPS = 12
MODELS: list[dict[str, Any]] = [
    {"model": "mlp", "clip": 1.0},
    {"model": "norm", "optimizer": "momentum"},
    {"model": "wide", "precision": "bf16"},
    {"model": "tied", "optimizer": "adafactor"},
    {"model": "untouched", "optimizer": "adam"},
    {"model": "mlp", "optimizer": "lars"},
    {"model": "norm", "optimizer": "lamb", "clip": 0.05},
]
IDS = [" ".join(str(options[key]) for key in ("model", "optimizer") if key in options) for options in MODELS]


def trained(pool: LocalLauncher, **options: Any) -> Any:
    """The result of one worker on the device."""
    arguments = {"steps": STEPS, **CUDA, **options}
    return pool.run({"call": "tests.jobs:train", "arguments": arguments}, 1).result


@pytest.mark.parametrize("case", CASES, ids=lambda name: name)
def test_a_run_is_exact_with_itself(pool: LocalLauncher, case: str) -> None:
    first, second = (trained(pool, **CASES[case]) for _ in range(2))
    assert first["digest"] == second["digest"] and first["losses"] == second["losses"]


@pytest.mark.parametrize("options", MODELS, ids=IDS)
def test_a_lost_worker_comes_back_with_its_state(pool: LocalLauncher, options: dict[str, Any], tmp_path: Path) -> None:
    faults = [
        {"rank": 0, "step": step, "moment": moment, "how": "kill"}
        for step, moment in ((2, "backward"), (5, "mid-update"), (9, "forward"))
    ]
    arguments = {"strikes": faults, "run_dir": str(tmp_path), "fault": {"snapshot_every": 3}, **CUDA, **options}
    ending = pool.run({"call": "tests.jobs:struck", "arguments": arguments}, 1)
    assert ending.result["digest"] == trained(pool, **options)["digest"]
    records = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    back = [(r["step"], r["lost_steps"]) for r in records if r["event"] == "RolledBack"]
    assert back == [(0, 1), (3, 1), (6, 2)]


@pytest.mark.parametrize("options", MODELS, ids=IDS)
def test_a_stopped_run_is_resumed(pool: LocalLauncher, options: dict[str, Any], tmp_path: Path) -> None:
    trained(pool, run_dir=str(tmp_path), **{**options, "steps": 5})
    assert trained(pool, run_dir=str(tmp_path), resume=True, **options)["digest"] == trained(pool, **options)["digest"]


def test_a_checkpoint_of_a_device_is_resumed_on_the_cpu(pool: LocalLauncher, tmp_path: Path) -> None:
    """The bits differ from there on, since other kernels compute; the figures do not."""
    trained(pool, model="plain", run_dir=str(tmp_path), steps=5)
    on_cpu = trained(pool, model="plain", run_dir=str(tmp_path), resume=True, device="cpu")
    assert on_cpu["losses"][-1] == pytest.approx(trained(pool, model="plain")["losses"][-1], rel=1e-4)


@pytest.mark.parametrize(("optimizer", "tolerance"), [("momentum", 1e-5), ("adamw", 1e-4)])
def test_the_losses_are_those_of_a_plain_loop(pool: LocalLauncher, optimizer: str, tolerance: float) -> None:
    ours = trained(pool, model="plain", optimizer=optimizer, steps=20, clip=1.0)["losses"]
    assert ours == pytest.approx(plain_loop(optimizer, 20, 4, 7, "cuda"), rel=tolerance)


def test_evaluation_on_a_device(pool: LocalLauncher) -> None:
    found, on_cpu = (
        trained(pool, model="plain", validated=True, validate={"every": 4}, device=device)["validations"]
        for device in ("cuda", "cpu")
    )
    assert len(found) == 3
    assert [v["loss"] for v in found] == pytest.approx([v["loss"] for v in on_cpu], rel=1e-4)


@pytest.mark.parametrize("make", [KFAC, LARS, LAMB], ids=lambda make: make.__name__)
def test_optimizers_of_ones_own_loop_do_there_what_they_do_here(make: type[torch.optim.Optimizer]) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Tanh(), nn.Flatten(), nn.Linear(144, 10)).double()
    x, y = torch.randn(32, 1, 6, 6, dtype=torch.float64), torch.randint(0, 10, (32,))

    def losses(device: str) -> list[float]:
        model, found = copy.deepcopy(base).to(device), []
        optimizer = make(model.parameters(), lr=0.1)  # type: ignore[call-arg]
        if isinstance(optimizer, KFAC):
            optimizer.watch(model)
        for _ in range(8):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x.to(device)), y.to(device))
            torch.autograd.backward(loss)
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    assert losses("cuda") == pytest.approx(losses("cpu"), rel=1e-12)


def test_more_workers_than_devices_are_refused(pool: LocalLauncher) -> None:
    count = torch.cuda.device_count() + 1
    with pytest.raises(Exception, match=rf"{count} workers on this host, which has .* CUDA devices"):
        pool.run({"call": "tests.jobs:train", "arguments": {"steps": 1, "model": "mlp", **CUDA}}, count)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="one CUDA device")
def test_two_devices_give_the_bits_of_one(pool: LocalLauncher) -> None:
    arguments = {"steps": STEPS, "model": "mlp", **CUDA}
    digests = {pool.run({"call": "tests.jobs:train", "arguments": arguments}, n).result["digest"] for n in (1, 2)}
    assert len(digests) == 1
