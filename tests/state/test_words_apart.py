"""A state whose plain numbers lie apart from its memory, as on a device: the same bits, saved, resumed and copied."""

from pathlib import Path
from typing import Any

import pytest

from tests import jobs
from unisono.plan.assignment import DEVICE_RUN_ELEMENTS
from unisono.state import training_state

CASES: list[dict[str, Any]] = [
    {"model": "wide", "optimizer": "adamw", "clip": 0.5},
    {"model": "untouched", "optimizer": "adam"},
    {"model": "tied", "optimizer": "momentum"},
    {"model": "norm", "optimizer": "adafactor"},
    {"model": "mlp", "optimizer": "coupled"},
    {"model": "untouched", "optimizer": "adagrad"},
]
IDS = [f"{case['model']}, {case['optimizer']}" for case in CASES]


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on this process trains as on a device, in the CPU's memory."""
    monkeypatch.setattr(training_state, "holds_words", lambda memory: False)
    monkeypatch.setattr("unisono.preparation.RUN_ELEMENTS", DEVICE_RUN_ELEMENTS)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_the_result_is_the_same(case: dict[str, Any], request: pytest.FixtureRequest, tmp_path: Path) -> None:
    expected = jobs.trainer(**case).fit(8).digest
    request.getfixturevalue("apart")
    assert jobs.trainer(**case).fit(8).digest == expected
    saved: dict[str, Any] = {"run_dir": str(tmp_path), "checkpoint": {"every": 2}}
    jobs.trainer(**case, **saved).fit(5)
    assert jobs.trainer(**case, **saved).fit(8, resume=True).digest == expected
