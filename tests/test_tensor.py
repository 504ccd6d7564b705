"""Tensor parallelism in processes: losses of whole layers, a result for each degree, other models, resume, faults."""

from pathlib import Path
from typing import Any

import pytest

from tests import others
from tests.test_layouts import GPT, verify
from unisono.errors import UnisonoError
from unisono.launch.local import LocalLauncher

TENSOR = Path(__file__).parents[1] / "configs" / "tensor.txt"
"""Layouts that divide layers, each way in several surroundings."""


def train_gpt(pool: LocalLauncher, workers: int, **arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = pool.run({"call": "tests.jobs:train_gpt", "arguments": arguments}, workers).results[0]
    return result


@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 1e-5), ("adamw", 5e-5)])
@pytest.mark.parametrize("degree", [2, 4])
def test_losses_are_those_of_whole_layers(pool: LocalLauncher, degree: int, optimizer: str, tolerance: float) -> None:
    """Twenty steps with dropout, accumulation, clipping and tied embeddings."""
    expected = train_gpt(pool, 1, optimizer=optimizer, layout={})["losses"]
    assert len(expected) == 20 and expected[-1] < expected[0]
    for further in ({}, {"sequence_parallel": True}, {"sequence_parallel": True, "loss_parallel": True}):
        found = train_gpt(pool, degree, optimizer=optimizer, layout={"tensor": degree, **further})["losses"]
        assert found == pytest.approx(expected, rel=tolerance), further


def test_one_result_for_each_way_of_dividing_layers() -> None:
    done = verify("configs/lm.yaml", *GPT, "options.heads=4", "--layouts", str(TENSOR), "--steps", "3")
    assert done.returncode == 0 and "one result for each of 8 ways of dividing layers" in done.stdout, done.stdout


@pytest.fixture(scope="module")
def models_pool() -> Any:
    with LocalLauncher() as launcher:
        launcher.preload(["torch._dynamo", "tests.others"])
        yield launcher


@pytest.mark.parametrize("model", ["llama", "bert", "t5", "vit"])
def test_models_that_nobody_here_wrote(models_pool: LocalLauncher, model: str) -> None:
    """The plan of Llama is its own; those of the others follow from their flow of values."""
    expected = others.plain_loop(model, "adamw")
    digests = set()
    for workers, layout in (
        (2, {"tensor": 2}),
        (4, {"tensor": 2, "data": 2, "zero": 0, "recompute": "full"}),
        (4, {"tensor": 2, "pipeline": 2, "schedule": "zb_h1"}),
    ):
        arguments = {"model": model, "optimizer": "adamw", "layout": layout}
        found = models_pool.run({"call": "tests.others:train", "arguments": arguments}, workers).results[0]
        assert found["losses"] == pytest.approx(expected, rel=5e-5), layout
        digests.add(found["digest"])
    assert len(digests) == 1
    if model != "vit":  # 17 positions
        arguments = {"model": model, "optimizer": "adamw", "layout": {"tensor": 2, "sequence_parallel": True}}
        found = models_pool.run({"call": "tests.others:train", "arguments": arguments}, 2).results[0]
        assert found["losses"] == pytest.approx(expected, rel=5e-5)


def test_a_checkpoint_resumes_in_any_layout(pool: LocalLauncher, tmp_path: Path) -> None:
    """Saved by two replicas of two stages; resumed by two who divide layers, by three shards, and by one."""
    run_dir = str(tmp_path / "run")
    whole = train_gpt(pool, 1, optimizer="adamw", layout={}, steps=8)
    losses: list[float] = []
    ways: list[tuple[int, dict[str, Any]]] = [
        (4, {"data": 2, "pipeline": 2}),
        (2, {"tensor": 2}),
        (3, {"zero": 3}),
        (1, {}),
    ]
    for i, (workers, layout) in enumerate(ways):
        found = train_gpt(
            pool, workers, optimizer="adamw", layout=layout, steps=2 * i + 2, resume=i > 0, run_dir=run_dir
        )
        losses += found["losses"]
        assert ["divided_layers" in notice for notice in found["notices"]] == ([True] if i in (1, 2) else [])
    assert losses == pytest.approx(whole["losses"], rel=5e-5) and losses[:2] == whole["losses"][:2]


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("kill", r"worker 1 of 2 .* was killed by SIGKILL; the others have been ended"),
        ("sleep", r"worker 1 .* has made no progress for .*: compute of step 2, micro-batch 0, at .*jobs"),
        ("raise", r"(?s)worker 1 of 2 failed:.*struck on purpose"),
    ],
)
def test_a_fault_of_a_worker_that_divides_layers(pool: LocalLauncher, how: str, expected: str) -> None:
    """(rank 1, step 2, compute): the other one waits in a layer's sum."""
    settings = {"model": "plain", "layout": {"tensor": 2}, "deadline_s": 1.0, "fault": {"on_loss": "stop"}}
    arguments = {"rank": 1, "how": how, **settings}
    with pytest.raises(UnisonoError, match=expected):
        pool.run({"call": "tests.jobs:fail", "arguments": arguments}, 2)
