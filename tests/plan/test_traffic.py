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
    message = 2 * 2 * TOKENS * MODEL.hidden
    found = traffic(MODEL, TOKENS, division, cluster("4xA100-80:2"))
    assert found.sent_bytes == {"pipeline": 12 * 2 * message} and found.links["pipeline"].name == "ib400"
    two = traffic(MODEL, TOKENS, replace(division, pipeline=2), cluster("2xA100-80"))
    assert two.sent_bytes == {"pipeline": 12 * message} and two.links["pipeline"].name == "nvlink3"


@given(st.integers(1, 8), st.integers(1, 100))
def test_equal_stages_wait_as_long_as_narayanan_et_al_say(p: int, m: int) -> None:
    """(p - 1) / m of the ideal time, on top of it; operations beside Megatron's formula, less what is masked."""
    model = replace(NAMED["gpt:22b"], layers=8 * p, vocab=1)
    found = traffic(model, TOKENS, Division(pipeline=p, micro_batches=m), cluster(f"{p}xA100-80"))
    ideal = (model.step_flops(m, TOKENS) - 3 * m * model.attention_flops(TOKENS) / 2) / (p * 312e12)
    assert found.compute_s == pytest.approx(ideal * (1 + (p - 1) / m), rel=1e-4)
    assert found.bubble == pytest.approx((p - 1) / (m + p - 1), abs=1e-4)


def test_the_longest_stage_holds_up_the_others() -> None:
    """Three layers in two stages: the longer one takes two; and the output takes its time."""
    model = replace(NAMED["llama3:8b"], layers=3, vocab=1)
    found = traffic(model, TOKENS, Division(pipeline=2, micro_batches=64), cluster("2xH100"))
    assert found.bubble == pytest.approx(1 - 64 * 3 / (2 * (3 + 63 * 2)), rel=1e-3)
    output = traffic(NAMED["llama3:8b"], TOKENS, Division(pipeline=4, micro_batches=8), cluster("4xH100"))
    assert output.bubble > 3 / 11


def test_replicas_send_as_in_zero() -> None:
    """Rajbhandari et al., 2020, section 7: 1 and 2 as much as plain data parallelism, 3 half as much again."""
    plain = traffic(MODEL, TOKENS, Division(data=16), cluster("16xA100-80"))
    assert plain.sent_bytes == pytest.approx({"data": ring_bytes(16, 2 * MODEL.parameters)})
    for zero, factor in ((1, 1.0), (2, 1.0), (3, 1.5)):
        found = traffic(MODEL, TOKENS, Division(data=16, zero=zero), cluster("16xA100-80"))
        assert found.sent_bytes["data"] == pytest.approx(factor * plain.sent_bytes["data"])
    gathered = traffic(MODEL, TOKENS, Division(data=16, zero=3, micro_batches=4), cluster("16xA100-80"))
    assert gathered.sent_bytes["data"] == pytest.approx(6 * plain.sent_bytes["data"])
    scattered = traffic(MODEL, TOKENS, Division(data=16, zero=2, micro_batches=4), cluster("16xA100-80"))
    assert scattered.sent_bytes["data"] == pytest.approx(2.5 * plain.sent_bytes["data"])


def test_all_ports_of_a_node_carry_what_replicas_send() -> None:
    """One of eight, where each node has one of them alone; all eight, but not faster than inside."""
    rates = {
        t: traffic(MODEL, TOKENS, Division(tensor=t, data=64 // t), cluster("64xA100-80")).rates["data"]
        for t in (1, 4, 8)
    }
    assert rates == {1: 300e9, 4: 100e9, 8: 50e9}


def test_sequence_parallelism_gathers_once_more() -> None:
    division = Division(tensor=8)
    plain, apart = (
        traffic(MODEL, TOKENS, replace(division, sequence=sequence), cluster("8xA100-80")).sent_bytes["tensor"]
        for sequence in (False, True)
    )
    assert apart == pytest.approx(1.25 * plain)


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
    assert "stages wait 50." in text and "tensor: each device sends " in text and " s over nvlink3" in text
    assert found.as_dict()["sequences"] == 4


def test_of_many_stages_a_few_are_shown() -> None:
    division = Division(pipeline=48, micro_batches=96)
    lines = occupancy(MODEL, TOKENS, division, None).as_text().splitlines()
    assert len(lines) == 7 and lines[5] == "  ..." and lines[6].startswith("  stage 47: ")
