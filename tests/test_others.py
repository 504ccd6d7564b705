"""Models of Hugging Face Transformers and timm: the losses of a plain loop, and one result in many layouts."""

from typing import Any

import pytest

from tests import others
from unisono.launch.local import LocalLauncher

LAYOUTS: list[tuple[int, dict[str, Any]]] = [
    (2, {"data": 2, "zero": 3}),
    (3, {"data": 3, "zero": 0, "recompute": "full"}),
    (2, {"pipeline": 2, "schedule": "zb_h1"}),
    (3, {"pipeline": 3, "schedule": "zb_h1", "recompute": "selective"}),
    (2, {"pipeline": 2, "schedule": "interleaved"}),
    (4, {"data": 2, "pipeline": 2, "schedule": "zb_v"}),
]


@pytest.fixture(scope="module")
def models_pool() -> Any:
    with LocalLauncher() as launcher:
        launcher.preload(["torch._dynamo", "tests.others"])
        yield launcher


def train(pool: LocalLauncher, workers: int, **arguments: Any) -> dict[str, Any]:
    result: dict[str, Any] = pool.run({"call": "tests.others:train", "arguments": arguments}, workers).results[0]
    return result


@pytest.mark.parametrize(("optimizer", "tolerance"), [("sgd", 1e-5), ("adamw", 5e-5)])
@pytest.mark.parametrize("model", others.MODELS)
def test_losses_are_those_of_a_plain_loop(
    models_pool: LocalLauncher, model: str, optimizer: str, tolerance: float
) -> None:
    ours = train(models_pool, 2, model=model, optimizer=optimizer, layout={"pipeline": 2})["losses"]
    assert ours == pytest.approx(others.plain_loop(model, optimizer), rel=tolerance)


@pytest.mark.parametrize("model", others.MODELS)
def test_one_result_in_every_layout(models_pool: LocalLauncher, model: str) -> None:
    expected = train(models_pool, 1, model=model, optimizer="adamw", layout={})
    for workers, layout in LAYOUTS:
        found = train(models_pool, workers, model=model, optimizer="adamw", layout=layout)
        assert found == expected, layout


@pytest.mark.parametrize("model", ["gpt2", "llama", "bert", "t5", "vit"])
def test_values_by_name(models_pool: LocalLauncher, model: str) -> None:
    """Transformers says how each module begins; no worker makes the whole model."""
    results = [
        train(models_pool, workers, model=model, optimizer="adamw", layout=layout, init="by_name")
        for workers, layout in ((1, {}), (3, {"pipeline": 3}))
    ]
    assert results[0] == results[1] and results[0]["losses"][-1] < results[0]["losses"][0]
