"""What a step computes and sends, beside the formulas of the papers."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.division import Division
from unisono.plan.hardware import cluster
from unisono.plan.occupancy import occupancy
from unisono.plan.traffic import ring_bytes, traffic
from unisono.plan.transformer import NAMED

MODEL = NAMED["gpt:22b"]
TOKENS = 2048


@given(st.integers(1, 64), st.integers(1, 1000))
def test_a_ring_sends_twice_all_but_ones_own_part(devices: int, size: int) -> None:
    """Each of n - 1 turns a part of n, to sum; and as many to hand the sums round."""
    turns = 2 * (devices - 1)
    assert ring_bytes(devices, size) == pytest.approx(turns * size / devices)


@pytest.mark.parametrize("t", [2, 4, 8])
def test_devices_of_a_layer_send_what_narayanan_et_al_say(t: int) -> None:
    """8 b s h (t - 1) / t numbers a layer and micro-batch; with layers computed again, half as many more."""
    division = Division(tensor=t, micro_batch=4, micro_batches=3)
    numbers = 8 * 4 * TOKENS * MODEL.hidden * (t - 1) / t * MODEL.layers * 3
    found = traffic(MODEL, TOKENS, division, cluster(f"{t}xA100-80"))
    assert found.sent_bytes == pytest.approx({"tensor": 2 * numbers})
    again = traffic(MODEL, TOKENS, replace(division, recompute="full"), cluster(f"{t}xA100-80"))
    assert again.sent_bytes["tensor"] == pytest.approx(1.5 * 2 * numbers)
    assert again.compute_s / found.compute_s == pytest.approx(4 / 3, rel=0.02)  # but for the output


def test_stages_send_activations_and_their_gradients() -> None:
    division = Division(pipeline=4, micro_batch=2, micro_batches=12)
    found = traffic(MODEL, TOKENS, division, cluster("4xA100-80:2"))
    assert found.sent_bytes == {"pipeline": 12 * 2 * 2 * 2 * TOKENS * MODEL.hidden}
    assert found.links["pipeline"].name == "nvlink3"
    assert found.bubble == pytest.approx(3 / 15)
    alone = MODEL.step_flops(24, TOKENS) / (4 * 312e12)
    assert found.compute_s == pytest.approx(alone * 15 / 12)  # (p - 1) / m of the ideal time, on top


def test_replicas_send_as_in_zero() -> None:
    """Rajbhandari et al., 2020, section 7: 1 and 2 as much as plain data parallelism, 3 half as much again."""
    plain = traffic(MODEL, TOKENS, Division(data=16), cluster("16xA100-80"))
    assert plain.sent_bytes == pytest.approx({"data": ring_bytes(16, 2 * MODEL.parameters)})
    for zero, factor in ((1, 1.0), (2, 1.0), (3, 1.5)):
        found = traffic(MODEL, TOKENS, Division(data=16, zero=zero), cluster("16xA100-80"))
        assert found.sent_bytes["data"] == pytest.approx(factor * plain.sent_bytes["data"])
    gathered = traffic(MODEL, TOKENS, Division(data=16, zero=3, micro_batches=4), cluster("16xA100-80"))
    assert gathered.sent_bytes["data"] == pytest.approx(4.5 * plain.sent_bytes["data"])


def test_neighbours_share_a_node() -> None:
    """Devices of a layer, then replicas, then stages."""
    found = traffic(MODEL, TOKENS, Division(tensor=8, pipeline=2, data=4), cluster("64xA100-80"))
    assert {reason: link.name for reason, link in found.links.items()} == {
        "tensor": "nvlink3",
        "pipeline": "ib400",
        "data": "ib400",
    }
    assert found.seconds["tensor"] == pytest.approx(found.sent_bytes["tensor"] / 300e9)
    text = found.as_text()
    assert "stages wait 50.0% of it" in text and "tensor: each device sends " in text and " over nvlink3, " in text
    assert found.as_dict()["sequences"] == 4


def test_of_many_stages_a_few_are_shown() -> None:
    division = Division(pipeline=48, micro_batches=96)
    lines = occupancy(MODEL, TOKENS, division, None).as_text().splitlines()
    assert len(lines) == 7 and lines[5] == "  ..." and lines[6].startswith("  stage 47: ")
