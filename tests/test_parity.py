"""The parity matrix: one digest for every number of workers and ZeRO stage, whatever is trained, however it is cut."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from tests import toys
from unisono.launch.local import LocalLauncher
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler

CASES: dict[str, dict[str, Any]] = {
    "dropout, clipping, AdamW": {"model": "mlp", "clip": 0.5},
    "SGD with momentum": {"model": "mlp", "optimizer": "momentum"},
    "bf16 autocast": {"model": "mlp", "precision": "bf16"},
    "BatchNorm": {"model": "norm", "optimizer": "momentum"},
    "tied weights": {"model": "tied", "clip": 0.1},
    "untouched parameters": {"model": "untouched", "optimizer": "adam"},
    "parameters that are first touched late": {"model": "untouched", "optimizer": "momentum"},
    "two dtypes": {"model": "double", "clip": 1.0},
    "weighted loss": {"model": "mlp", "loss": "weighted", "clip": 1.0},
    "augmentation by python, numpy, torch": {"model": "mlp", "augment": True},
    "activation checkpointing": {"model": "checkpointed"},
    "per-parameter optimizer": {"model": "mlp", "optimizer": "adafactor"},
    "per-parameter optimizer on some parameters": {"model": "mlp", "optimizer": "muon"},
    "LARS": {"model": "mlp", "optimizer": "lars"},
    "LAMB, clipped once": {"model": "norm", "optimizer": "lamb", "clip": 0.05},
    "K-FAC": {"model": "mlp", "optimizer": "kfac"},
    "K-FAC, clipped": {"model": "norm", "optimizer": "kfac", "clip": 0.1},
    "K-FAC, two dtypes": {"model": "double", "optimizer": "kfac"},
    "K-FAC, tied weights, bf16 autocast": {"model": "tied", "optimizer": "kfac", "precision": "bf16"},
    "K-FAC, activation checkpointing": {"model": "checkpointed", "optimizer": "kfac"},
    "K-FAC, untouched parameters": {"model": "untouched", "optimizer": "kfac"},
    "clipping by value": {"model": "mlp", "optimizer": "momentum", "clip": {"value": 1e-3}},
    "adaptive clipping": {"model": "mlp", "optimizer": "momentum", "clip": {"agc": 1e-3}},
    "coupled optimizer": {"model": "mlp", "optimizer": "coupled"},
    "state made by the optimizer's constructor": {"model": "untouched", "optimizer": "adagrad"},
    "cosine schedule, linear scaling": {
        "model": "mlp",
        "schedule": {"name": "cosine", "warmup_steps": 2},
        "scaling": {"rule": "linear", "base_batch_size": 56},
    },
    "micro-batches of one row": {"model": "mlp", "micro_batch_size": 1, "global_batch_size": 5},
    "validation in between": {"model": "norm", "validated": True, "validate": {"every": 2}},
}


DIVIDED = [name for name in CASES if CASES[name].get("optimizer") != "kfac"]
"""Cases whose state hosts can share."""


def train(pool: LocalLauncher, workers: int, hosts: int = 1, together: int = 1, **arguments: Any) -> dict[str, Any]:
    target = {"call": "tests.jobs:train", "arguments": arguments}
    result: dict[str, Any] = pool.run(target, workers, hosts=hosts, together=together).results[0]
    return result


@pytest.mark.parametrize("case", CASES, ids=lambda name: name)
def test_one_result(pool: LocalLauncher, case: str) -> None:
    expected = train(pool, 1, **CASES[case])
    assert len(expected["losses"]) == 6 and all(math.isfinite(loss) for loss in expected["losses"])
    for workers, zero in ((2, 1), (3, 0), (4, 1)):
        result = train(pool, workers, layout={"zero": zero}, **CASES[case])
        assert result["digest"] == expected["digest"], f"{workers} workers, ZeRO {zero}"
        assert result["losses"] == expected["losses"]
        assert result["validations"] == expected["validations"]


WHOLE = {"untouched", "double", "checkpointed"}
"""Models that cannot be cut: one whose code looks at values, and two that pass values on between modules."""


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["model"] not in WHOLE], ids=lambda name: name)
def test_one_result_in_pipelines(pool: LocalLauncher, case: str) -> None:
    expected = train(pool, 1, **CASES[case])
    for workers, layout in (
        (2, {"pipeline": 2, "schedule": "1f1b", "zero": 0}),
        (2, {"pipeline": 2, "schedule": "zb_v"} if CASES[case]["model"] != "tied" else {"pipeline": 2}),
        (4, {"data": 2, "pipeline": 2, "schedule": "zb_h1", "zero": 0}),
        (3, {"pipeline": 3, "schedule": "gpipe", "recompute": "full"}),
    ):
        result = train(pool, workers, layout=layout, **CASES[case])
        assert result["digest"] == expected["digest"], layout
        assert result["losses"] == expected["losses"] and result["validations"] == expected["validations"]


@pytest.mark.parametrize("case", CASES, ids=lambda name: name)
def test_one_result_across_a_resume(pool: LocalLauncher, case: str, tmp_path: Path) -> None:
    """Stopped after step 3 on 3 workers (ZeRO 1), resumed on 2 (ZeRO 0)."""
    expected = train(pool, 1, **CASES[case])
    settings = {"run_dir": str(tmp_path), **CASES[case]}
    if "schedule" in settings:
        settings["schedule"] = {**settings["schedule"], "decay_steps": 6}
    train(pool, 3, steps=3, **settings)
    result = train(pool, 2, layout={"zero": 0}, resume=True, **settings)
    assert result["digest"] == expected["digest"]
    assert result["losses"] == expected["losses"][3:]


@pytest.mark.parametrize("case", CASES, ids=lambda name: name)
def test_one_result_across_hosts(pool: LocalLauncher, case: str) -> None:
    """One worker on each host, several on each, hosts of unequal size; buckets small enough that there are many; packed
    without loss always, never, and in turns."""
    expected = train(pool, 1, **CASES[case])
    for workers, hosts, zero, lossless in (
        (2, 2, 1, "auto"),
        (3, 2, 0, "never"),
        (4, 2, 1, "auto"),
        (3, 3, 1, "always"),
    ):
        wire, zero = {"bucket_bytes": 300, "lossless": lossless}, zero if case in DIVIDED else 0
        result = train(pool, workers, hosts, layout={"zero": zero}, wire=wire, **CASES[case])
        assert result["digest"] == expected["digest"], f"{workers} workers on {hosts} hosts, ZeRO {zero}, {lossless}"
        sends = case != "coupled optimizer" or not zero  # rank 0 updates everything then, and keeps all gradients
        if CASES[case]["model"] == "mlp" and workers == hosts and sends:  # rank 0 exchanges what is large enough
            packed = [saved > 0 for saved in result["saved"]]
            assert set(packed) == ({True} if lossless == "always" else {False, True})
        assert result["losses"] == expected["losses"]
        assert result["validations"] == expected["validations"]


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name]["model"] not in WHOLE], ids=lambda name: name)
def test_one_result_where_every_host_has_pipelines(pool: LocalLauncher, case: str) -> None:
    """Each stage's workers exchange their sums with their like; hosts of unequal size; a state for all, or shared."""
    expected = train(pool, 1, **CASES[case])
    for workers, together, further in (
        (4, 2, {"zero": 1}),
        (6, 2, {"schedule": "zb_v"} if CASES[case]["model"] != "tied" else {}),
        (6, 3, {"schedule": "gpipe", "zero": 0}),
    ):
        layout = {"pipeline": together, **further, **({} if case in DIVIDED else {"zero": 0})}
        settings: dict[str, Any] = {"layout": layout, "wire": {"bucket_bytes": 300}, **CASES[case]}
        result = train(pool, workers, 2, together, **settings)
        assert result["digest"] == expected["digest"], layout
        assert result["losses"] == expected["losses"] and result["validations"] == expected["validations"]


def test_a_stage_without_trained_parameters_waits_for_no_deadline(pool: LocalLauncher) -> None:
    """Its worker has no sums to exchange, and a step takes longer than anyone may be waited for."""
    expected = train(pool, 1, steps=1, model="frozen")
    settings: dict[str, Any] = {"layout": {"pipeline": 2, "cuts": ["2"]}, "deadline_s": 1.0}
    result = train(pool, 4, 2, 2, steps=1, model="frozen", **settings)
    assert result["digest"] == expected["digest"]


@pytest.mark.parametrize("compression", ["bf16", "powersgd"])
def test_what_pipelines_sum_is_compressed_between_hosts(pool: LocalLauncher, compression: str) -> None:
    settings: dict[str, Any] = {"model": "mlp", "optimizer": "momentum", "wire": {"compression": compression}}
    expected = train(pool, 2, 2, **settings)
    result = train(pool, 4, 2, 2, layout={"pipeline": 2}, **settings)
    assert result["losses"] == pytest.approx(expected["losses"], rel=1e-3)


LOOKS_AT_VALUES = ("untouched",)
"""Models whose code looks at values: nobody can say which layers are needed when."""


@pytest.mark.parametrize("case", DIVIDED, ids=lambda name: name)
def test_one_result_where_hosts_share_the_state(pool: LocalLauncher, case: str) -> None:
    """ZeRO-2 and 3: gradients in rounds, parameters brought where they are used; ZeRO-1 is above."""
    settings = {**CASES[case], "global_batch_size": 24}
    expected = train(pool, 1, **settings)
    for hosts, zero in ((2, 2), (4, 2), (3, 3), (4, 3)):  # four hosts do not divide six micro-batches
        if zero == 3 and CASES[case]["model"] in LOOKS_AT_VALUES:
            continue
        result = train(pool, hosts, hosts, layout={"zero": zero}, wire={"bucket_bytes": 300}, **settings)
        assert result["digest"] == expected["digest"], f"{hosts} hosts, ZeRO {zero}"
        assert result["losses"] == expected["losses"] and result["validations"] == expected["validations"]


def test_a_checkpoint_may_take_longer_than_a_deadline(pool: LocalLauncher, tmp_path: Path) -> None:
    """Those who do not write it wait from tensor to tensor."""
    arguments = {"seconds": 0.1, "model": "mlp", "layout": {"zero": 1}, "deadline_s": 1.0, "run_dir": str(tmp_path)}
    result = pool.run({"call": "tests.jobs:train_with_a_slow_disk", "arguments": arguments}, 4, hosts=2).results[0]
    assert result["step"] == 2 and len(list((tmp_path / "checkpoints").glob("step-*"))) == 2


@pytest.mark.parametrize("recompute", ["none", "full", "selective"])
def test_layers_whose_backward_is_not_announced(pool: LocalLauncher, recompute: str) -> None:
    settings: dict[str, Any] = {"model": "hands_on", "global_batch_size": 24}
    expected = train(pool, 1, **settings)
    found = train(pool, 2, 2, layout={"zero": 3, "recompute": recompute}, **settings)
    assert (found["digest"], found["losses"]) == (expected["digest"], expected["losses"])


def test_a_micro_batch_without_a_gradient_keeps_no_host_waiting(pool: LocalLauncher) -> None:
    settings: dict[str, Any] = {"model": "mlp", "loss": "sometimes", "global_batch_size": 24}
    expected = train(pool, 1, **settings)
    for hosts, zero in ((2, 1), (2, 2), (2, 3), (3, 3)):
        found = train(pool, hosts, hosts, layout={"zero": zero}, **settings)
        assert (found["digest"], found["losses"]) == (expected["digest"], expected["losses"]), (hosts, zero)


def test_one_result_with_the_optimizers_state_on_a_disk(pool: LocalLauncher, tmp_path: Path) -> None:
    expected = train(pool, 1, model="mlp", clip=0.5)
    disk, run_dir = tmp_path / "disk", tmp_path / "run"
    disk.mkdir()
    for workers, hosts, zero in ((1, 1, None), (3, 1, None), (2, 1, 0), (2, 2, 1), (4, 2, None)):
        found = train(pool, workers, hosts, layout={"offload": str(disk), "zero": zero}, model="mlp", clip=0.5)
        assert (found["digest"], found["losses"]) == (expected["digest"], expected["losses"]), (workers, hosts, zero)
    settings: dict[str, Any] = {"layout": {"offload": str(disk)}, "model": "mlp", "clip": 0.5, "run_dir": str(run_dir)}
    train(pool, 2, steps=3, **settings)
    assert train(pool, 3, resume=True, **settings)["digest"] == expected["digest"]
    assert list(disk.iterdir()) == []


@pytest.mark.parametrize(
    ("model", "optimizer"),
    [
        ("norm", "adamw"),
        ("tied", "adamw"),
        ("mlp", "adamw"),
        ("scaled", "adamw"),
        ("scaled", "lamb"),
        ("mlp", "adafactor"),
    ],
)
def test_one_result_across_resumes_where_hosts_share_the_state(
    pool: LocalLauncher, tmp_path: Path, model: str, optimizer: str
) -> None:
    settings: dict[str, Any] = {"model": model, "optimizer": optimizer, "global_batch_size": 24}
    expected = train(pool, 1, **settings)
    settings |= {"run_dir": str(tmp_path), "checkpoint": {"every": 2}}
    for steps, workers, hosts, zero in ((1, 2, 2, 3), (2, 4, 2, 1), (3, 3, 3, 2), (4, 2, 1, None), (5, 3, 3, 3)):
        train(pool, workers, hosts, steps=steps, resume=steps > 1, layout={"zero": zero}, **settings)
    result = train(pool, 2, 2, resume=True, layout={"zero": 1}, **settings)
    assert result["digest"] == expected["digest"]


def test_one_result_across_a_resume_on_several_hosts(pool: LocalLauncher, tmp_path: Path) -> None:
    expected = train(pool, 1, model="norm")
    train(pool, 4, 2, steps=3, model="norm", run_dir=str(tmp_path))
    assert train(pool, 3, 3, resume=True, model="norm", run_dir=str(tmp_path))["digest"] == expected["digest"]


def test_checkpointing_changes_nothing(pool: LocalLauncher) -> None:
    """Recomputation in the backward draws the dropout of the forward."""
    with_it, without = (train(pool, 2, model=name)["digest"] for name in ("checkpointed", "not_checkpointed"))
    assert with_it == without


def test_seeds_differ(pool: LocalLauncher) -> None:
    assert train(pool, 1, seed=1)["digest"] != train(pool, 1, seed=2)["digest"]


def test_no_weight_skips_the_update(pool: LocalLauncher) -> None:
    digests = {train(pool, n, loss="no_weight", steps=1)["digest"] for n in (1, 2)}
    assert len(digests) == 1


def plain_loop(optimizer_name: str, steps: int, micro: int, count: int, device: str = "cpu") -> list[float]:
    """The twenty lines of plain PyTorch that a run of ours must agree with: one process, accumulation, clipping."""
    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        model = toys.MODELS["plain"]().to(device)
    optimizer = toys.OPTIMIZERS[optimizer_name](model.parameters())
    data, sampler = toys.Samples(), Sampler(toys.SAMPLES, 0, micro * count, micro)
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        total = 0.0
        for m in range(count):
            rows = [data[i] for i in sampler.indices(step, m).tolist()]
            inputs, targets = (torch.stack(part).to(device) for part in zip(*rows, strict=True))
            loss = F.mse_loss(model(inputs), targets) / count
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(total)
    return losses


@pytest.mark.parametrize(("optimizer", "tolerance"), [("momentum", 1e-6), ("adamw", 5e-5)])
def test_losses_agree_with_plain_pytorch(pool: LocalLauncher, optimizer: str, tolerance: float) -> None:
    ours = train(pool, 2, model="plain", optimizer=optimizer, steps=20, clip=1.0)["losses"]
    assert ours == pytest.approx(plain_loop(optimizer, 20, 4, 7), rel=tolerance)
