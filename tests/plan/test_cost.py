"""Seconds and bytes of the cost model beside closed formulas, with constants that make every rate a peak."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.collectives import group, ring_bytes, sum_seconds
from unisono.plan.constants import Calibration, Constants
from unisono.plan.cost import REASONS, cost, hidden_behind, waits
from unisono.plan.division import Division
from unisono.plan.hardware import cluster
from unisono.plan.jobs import Job, Jobs, columns
from unisono.plan.transformer import NAMED
from unisono.plan.usage import Habits, fullest_bytes, stage_bytes, total_bytes

PEAK = Constants(
    matmul=1.0,
    passes=0.0,
    attention=1.0,
    launch_s=0.0,
    within=1.0,
    between=1.0,
    hop_s=0.0,
    congestion=0.0,
    overlap=0.0,
    step_s=0.0,
    sum_s=0.0,
    output_bytes=0.0,
)
"""Nothing but peaks."""
IDEAL = Calibration(constants=PEAK)
MODEL = NAMED["gpt:22b"]
TOKENS = 2048


def jobs(division: Division, devices: str, name: str = "gpt:22b") -> Jobs:
    return columns([Job(NAMED[name], TOKENS, division, cluster(devices))])


def seconds(division: Division, devices: str, known: Calibration = IDEAL, name: str = "gpt:22b") -> dict[str, float]:
    return {reason: float(column[0]) for reason, column in cost(jobs(division, devices, name), known).reasons.items()}


@given(st.integers(1, 64), st.integers(1, 1000))
def test_a_ring_sends_twice_all_but_ones_own_part(devices: int, size: int) -> None:
    """Each of n - 1 turns a part of n, to sum; and as many to hand the sums round."""
    turns = 2 * (devices - 1)
    assert float(ring_bytes(devices, size)) == pytest.approx(turns * size / devices)


def test_operations_are_megatrons() -> None:
    """72 B s l h^2 (1 + s / 6h + V / 12lh), of which causal attention's half is left out: SC 2021, section 5.1."""
    found = jobs(Division(data=2, micro_batch=3, micro_batches=5), "2xA100-80")
    h, layers, v, b = MODEL.hidden, MODEL.layers, MODEL.vocab, 30
    whole = 72 * b * TOKENS * layers * h**2 * (1 + TOKENS / (6 * h) + v / (12 * layers * h))
    masked = 72 * b * TOKENS * layers * h**2 * TOKENS / (6 * h) / 2
    assert float(found.model_flops[0]) == pytest.approx(whole - masked, rel=1e-9)


def test_computing_takes_its_operations_at_peak_and_what_their_operands_move() -> None:
    """Where memory is infinitely fast, no more than the operations: but for fused attention's scores, made again."""
    found = jobs(Division(micro_batch=4, micro_batches=2), "1xA100-80")
    fast = found.but(memory_bytes_per_s=1e30)
    one = float(cost(fast, IDEAL).reasons["compute"][0])
    scores = 2 * 4 * MODEL.layers * 0.5 * 2 * TOKENS**2 * MODEL.hidden  # half as long as the forward's, once more
    assert one == pytest.approx((float(found.model_flops[0]) + scores) / 312e12, rel=1e-9)
    assert float(cost(found, IDEAL).reasons["compute"][0]) > one


@pytest.mark.parametrize("t", [2, 4, 8])
def test_devices_of_a_layer_exchange_what_narayanan_et_al_say(t: int) -> None:
    """8 b s h (t - 1) / t numbers a layer and micro-batch; with layers computed again, half as many more."""
    division = Division(tensor=t, micro_batch=4, micro_batches=3)
    sent = 2 * 8 * 4 * TOKENS * MODEL.hidden * (t - 1) / t * MODEL.layers * 3
    found = seconds(division, f"{t}xA100-80")
    assert found["tensor"] == pytest.approx(sent / 300e9)
    again = seconds(replace(division, recompute="full"), f"{t}xA100-80")
    assert again["tensor"] == pytest.approx(1.5 * found["tensor"])


@pytest.mark.parametrize(
    ("schedule", "virtual", "part"),
    [("1f1b", 1, 1.0), ("gpipe", 1, 1.0), ("interleaved", 4, 1 / 4), ("zb_h1", 1, 1 / 3), ("zb_v", 2, 1 / 6)],
)
@pytest.mark.parametrize(("p", "m"), [(4, 8), (2, 64)])
def test_equal_stages_wait_as_long_as_the_papers_say(schedule: str, virtual: int, part: float, p: int, m: int) -> None:
    """(p - 1) / m of the ideal time for 1F1B; a v-th interleaved; a third, or a sixth, without bubbles."""
    model = replace(MODEL, layers=16 * p, vocab=1)
    division = Division(pipeline=p, micro_batches=m, schedule=schedule, virtual=virtual)  # type: ignore[arg-type]
    found = cost(columns([Job(model, TOKENS, division, cluster(f"{p}xA100-80"))]), IDEAL)
    stage = float(found.stage[0])
    assert float(found.reasons["bubble"][0]) == pytest.approx((p - 1) * part * stage, rel=1e-3)


def test_replicas_exchange_as_in_zero() -> None:
    """Rajbhandari et al., 2020, section 7: 1 as much as plain data parallelism; 2 after each micro-batch."""
    plain = seconds(Division(data=16, micro_batches=4), "16xA100-80:16")["gradients"]
    assert plain == pytest.approx(float(ring_bytes(16, 2 * MODEL.parameters)) / 300e9)
    for zero, factor in ((1, 1.0), (2, 2.5)):
        found = seconds(Division(data=16, zero=zero, micro_batches=4), "16xA100-80:16")
        assert found["gradients"] == pytest.approx(factor * plain)
    gathered = seconds(Division(data=16, zero=3, micro_batches=4), "16xA100-80:16")
    layers = MODEL.layers * MODEL.layer_parameters
    assert gathered["gradients"] == 0
    assert gathered["gather"] == pytest.approx(4 * 1.5 * float(ring_bytes(16, 2 * layers)) / 300e9)


def test_a_node_sums_inside_before_it_sends() -> None:
    """Each of 8 devices sends an eighth through a port of its own."""
    found = jobs(Division(data=16), "16xA100-80:8,ib200")
    members = group(found, found.data, found.tensor)
    assert (float(members.inside[0]), float(members.nodes[0])) == (8, 2)
    took = float(sum_seconds(found, PEAK, members, np.array([8e9]))[0])
    assert took == pytest.approx(2 * 7 / 8 * 8e9 / 300e9 + 2 * 1 / 2 * 1e9 / 25e9)


def test_replicas_that_meet_now_and_then_exchange_less() -> None:
    each, rarely = (seconds(Division(data=16, period=n), "16xA100-80:8,ethernet10")["gradients"] for n in (1, 50))
    assert each == pytest.approx(50 * rarely)


def test_groups_of_shards_sum_among_each_other() -> None:
    """Hybrid sharding: what a shard holds, over the nodes."""
    found = seconds(Division(data=16, zero=3, shard=8), "16xA100-80:8,ib200")
    own = 2 * MODEL.parameters / 8
    assert found["gradients"] == pytest.approx(2 * 1 / 2 * own / 25e9)


def test_what_hides_is_what_runs_beside() -> None:
    assert float(hidden_behind(np.array(10.0), np.array(4.0), 1.0)) == 0
    assert float(hidden_behind(np.array(1.0), np.array(4.0), 0.5)) == 3.5


def test_nothing_is_faster_than_its_launches() -> None:
    known = Calibration(constants=replace(PEAK, launch_s=1.0))
    found = cost(jobs(Division(micro_batches=2), "1xH100"), known)
    assert float(found.layer.seconds[0]) == pytest.approx(1.0, rel=1e-2)
    assert float(found.seconds[0]) >= 2 * MODEL.layers


@given(
    st.sampled_from(sorted(NAMED)),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 8]),
    st.integers(0, 3),
    st.sampled_from([1, 4]),
    st.integers(1, 9),
)
def test_a_step_is_the_sum_of_its_reasons_and_scales(t: str, n: int, p: int, d: int, z: int, b: int, m: int) -> None:
    """Every part is at least 0 and finite; a scalar scales all; more micro-batches never take less."""
    division = Division(tensor=n, pipeline=p, data=d, zero=z if d > 1 else 0, micro_batch=b, micro_batches=m)
    devices = (
        f"{division.devices}xH100:{min(8, division.devices)}" if division.devices % 8 == 0 else f"{n * p * d}xH100:1"
    )
    job = columns([Job(NAMED[t], 4096, division, cluster(devices))])
    plain, twice = cost(job, Calibration()), cost(job, Calibration(scale=2.0))
    assert set(plain.reasons) == set(REASONS)
    assert all(np.isfinite(v).all() and (v >= 0).all() for v in plain.reasons.values())
    assert float(twice.seconds[0]) == pytest.approx(2 * float(plain.seconds[0]))
    more = job.but(micro_batches=m + 1)
    assert float(cost(more, Calibration()).seconds[0]) >= float(plain.seconds[0])


def test_balanced_stages_are_cut_as_nanotron_cuts_them() -> None:
    """32 layers and an output that counts as 2.2: 18 and 14; on four, 9 first."""
    from unisono.plan.usage import stage_layers

    model = replace(NAMED["llama3:8b"], kv_heads=32, vocab=131_072)
    for p, first, last in ((2, 18, 14), (4, 9, 6)):
        job = columns([Job(model, TOKENS, Division(pipeline=p), cluster(f"{p}xH100"))])
        layers = stage_layers(job, np.arange(p, dtype=float), Habits(balances_output=True))
        assert (layers[0], layers[-1], layers.sum()) == (first, last, 32)


@pytest.mark.parametrize(
    ("schedule", "virtual"), [("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1), ("zb_v", 2)]
)
@pytest.mark.parametrize("p", [2, 4, 8])
def test_waits_are_those_of_the_timetables_with_few_micro_batches_too(schedule: str, virtual: int, p: int) -> None:
    """Fewer micro-batches than stages: what is simulated; ZB-V, which has no closed form, to a unit of work."""
    from tests.plan.test_simulator import INSTANT, work
    from unisono.plan.simulator import simulate

    for m in range(1, 2 * p + 1):
        if m > p and m % p and schedule in ("interleaved", "zb_v"):
            continue  # uneven turns
        division = Division(pipeline=p, micro_batches=m, schedule=schedule, virtual=virtual)  # type: ignore[arg-type]
        job = columns([Job(replace(MODEL, layers=64), TOKENS, division, cluster(f"{p}xA100-80"))])
        slots = simulate(work(schedule, virtual, p, 1, 1, m), INSTANT).computed_s / 0.036 - m
        assert float(waits(job)[0]) == pytest.approx(slots, abs=0.7 if schedule == "zb_v" else 1e-9)


def test_experts_that_are_held_once_are_not_exchanged() -> None:
    """Of 8 experts on 8 devices each is on one: what all have is summed, and nothing of them."""
    one = seconds(Division(data=8, expert=8), "8xA100-80:8", name="mixtral:8x7b")["gradients"]
    all_ = seconds(Division(data=8), "8xA100-80:8", name="mixtral:8x7b")["gradients"]
    model = NAMED["mixtral:8x7b"]
    experts = model.layers * 3 * model.hidden * 8 * model.expert_ffn
    assert all_ - one == pytest.approx(float(ring_bytes(8, 2 * experts)) / 300e9, rel=1e-6)


def test_the_fullest_device_is_found_among_all() -> None:
    """18 layers in 8 stages: the fourth has three of them, one more than the first three."""
    model = replace(NAMED["llama2:7b"], layers=18, vocab=1000)
    for p, m in ((8, 32), (7, 5), (5, 64)):
        job = columns([Job(model, 4096, Division(pipeline=p, micro_batches=m), cluster(f"{p}xH100"))])
        kinds = stage_bytes(job, np.arange(p, dtype=float))
        every = np.sum([np.broadcast_to(size, p) for size in kinds.values()], axis=0)
        assert float(total_bytes(fullest_bytes(job))[0]) == pytest.approx(float(every.max()), rel=0.02)
