"""What cannot run on given hosts is said with the numbers, and with what can be instead."""

from typing import Any

import pytest

from unisono.config import TrainingConfig
from unisono.errors import ConfigurationError
from unisono.launch.possible import refuse_impossible
from unisono.plan.hosts import Hosts, evenly


@pytest.mark.parametrize(
    ("sizes", "settings", "expected"),
    [
        ((2, 3), {"layout": {"pipeline": 2}}, "5 workers cannot make replicas of 2"),
        ((3, 3), {"layout": {"pipeline": 2}}, "3 workers on host 0 cannot make replicas of 2"),
        ((2, 1, 3), {"layout": {"pipeline": 2}}, "1 worker on host 1 cannot make replicas of 2"),
        ((1, 1), {"layout": {"pipeline": 2}, "device": "cuda"}, "use device cpu, or layout.pipeline=1"),
        ((2, 2), {"layout": {"tensor": 2, "zero": 2}}, "of several workers layout.zero=1 is possible"),
        ((2, 2), {"layout": {"zero": 3}}, "layout.zero=1 is possible, or one worker on each (-n 1) with more threads"),
        ((5, 4), {}, "9 workers but only 8 micro-batches in a step; use at most 8 workers"),
    ],
)
def test_what_is_refused(sizes: tuple[int, ...], settings: dict[str, Any], expected: str) -> None:
    config = TrainingConfig(global_batch_size=8, micro_batch_size=1, **settings)
    with pytest.raises(ConfigurationError) as caught:
        refuse_impossible(config, Hosts(sizes))
    assert expected in str(caught.value)
    if "tensor" in settings.get("layout", {}):
        assert "one worker on each" not in str(caught.value)  # which could not make a replica


@pytest.mark.parametrize(
    ("sizes", "layout"),
    [((2, 4), {"pipeline": 2, "zero": 1}), ((1, 1), {"zero": 3}), ((4,), {"tensor": 2, "zero": 3}), ((3, 1), {})],
)
def test_what_is_possible(sizes: tuple[int, ...], layout: dict[str, Any]) -> None:
    refuse_impossible(TrainingConfig(global_batch_size=8, micro_batch_size=1, layout=layout), Hosts(sizes))


def test_workers_that_stay_together_must_make_whole_groups() -> None:
    with pytest.raises(ValueError, match="5 workers are no groups of 2"):
        evenly(5, 2, together=2)


def test_rounds_of_hosts_that_share_gradients_are_limited() -> None:
    config = TrainingConfig(global_batch_size=402, micro_batch_size=1, layout={"zero": 2})
    with pytest.raises(ConfigurationError, match="each of 2 hosts has 201 micro-batches in a step; at most 200 are"):
        refuse_impossible(config, Hosts((1, 1)))
