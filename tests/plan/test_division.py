"""Bytes of a device beside the papers' formulas and figures; divisions in words; what does not go together."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan import usage
from unisono.plan.division import Division
from unisono.plan.hardware import cluster
from unisono.plan.jobs import Job, columns
from unisono.plan.occupancy import occupancy
from unisono.plan.transformer import NAMED, Transformer
from unisono.plan.usage import STATE_BYTES

UNFUSED = Division(attention="unfused")
GIB = 1 << 30


def layer_bytes(model: Transformer, tokens: int, division: Division) -> float:
    """Of one layer of one micro-batch."""
    return float(usage.layer_bytes(columns([Job(model, tokens, division, cluster("1xH100"))]))[0])


def stage_bytes(model: Transformer, tokens: int, division: Division, stage: int) -> dict[str, float]:
    """Of a device of one stage."""
    return occupancy(model, tokens, division).stages[stage]


def test_activations_of_the_22_billion_are_as_published() -> None:
    """Korthikanti et al., 2022: 59.25 GiB on each of 8 devices, 4 sequences of 2,048 tokens, nothing computed again."""
    model = NAMED["gpt:22b"]
    division = replace(UNFUSED, tensor=8, micro_batch=4)
    assert model.layers * layer_bytes(model, 2048, division) == 59.25 * GIB


@given(st.integers(1, 64), st.integers(1, 16), st.integers(1, 4096), st.sampled_from([1, 2, 4, 8]), st.integers(1, 8))
def test_activations_are_those_of_the_papers_table(width: int, heads: int, s: int, t: int, b: int) -> None:
    """Table 2 of Korthikanti et al.: s b h times (34 + 5 a s / h), and what divides and recomputes it."""
    a, h = 8 * heads, 64 * heads * width
    model = Transformer("gpt", 1, h, a, a, 4 * h, 1, gated=False, dropout=True)
    sbh, scores = s * b * h, 5 * a * s / h
    for division, factor in (
        (UNFUSED, 34 + scores),
        (replace(UNFUSED, tensor=t), 10 + 24 / t + scores / t),
        (replace(UNFUSED, tensor=t, sequence=True), (34 + scores) / t),
        (replace(UNFUSED, tensor=t, recompute="selective"), 10 + 24 / t),
        (replace(UNFUSED, tensor=t, sequence=True, recompute="selective"), 34 / t),
        (Division(tensor=t, sequence=True), 34 / t),  # flash attention keeps no scores
        (replace(UNFUSED, tensor=t, recompute="full"), 2),
        (replace(UNFUSED, tensor=t, sequence=True, recompute="full"), 2 / t),
    ):
        assert layer_bytes(model, s, replace(division, micro_batch=b)) == pytest.approx(sbh * factor)


@pytest.mark.parametrize(("zero", "share"), [(0, "16"), (1, "4 + 12 / n"), (2, "2 + 14 / n"), (3, "16 / n")])
def test_states_are_divided_as_in_zero(zero: int, share: str) -> None:
    """Rajbhandari et al., 2020, figure 1, of n replicas."""
    model, n = NAMED["llama3:8b"], 64
    kinds = stage_bytes(model, 1, Division(data=n, zero=zero), 0)
    assert kinds["working"] == (4 * model.layer_parameters if zero == 3 else 0)  # two layers' gathered parameters
    states = sum(kinds[kind] for kind in STATE_BYTES)
    assert states == pytest.approx(model.parameters * eval(share, {"n": n}))


@given(st.sampled_from(sorted(NAMED)), st.integers(1, 24), st.sampled_from([1, 2, 4, 8]))
def test_stages_have_all_parameters_between_them(name: str, pipeline: int, tensor: int) -> None:
    """And tied ones twice, where first and last stage are two; keys and values as often as devices need them."""
    model, division = NAMED[name], Division(pipeline=pipeline, tensor=tensor)
    found = sum(stage_bytes(model, 1, division, stage)["parameters"] for stage in range(pipeline)) * tensor / 2
    twice = model.vocab * model.hidden if model.tied and pipeline > 1 else 0
    again = max(0, tensor / model.kv_heads - 1) * model.layers * 2 * model.hidden * model.kv_width
    assert found == pytest.approx(model.parameters + twice + again)


def test_keys_and_values_are_held_several_times_where_devices_are_more() -> None:
    """Llama 3 70B has 8 of them: on 64 devices each is on 8."""
    model = NAMED["llama3:70b"]
    few, many = (stage_bytes(model, 1, Division(tensor=t), 0)["parameters"] for t in (8, 64))
    shared = 2 * model.layers * 2 * model.hidden * model.kv_width
    assert few == pytest.approx(2 * model.parameters / 8)
    assert many == pytest.approx((2 * model.parameters - shared) / 64 + shared / 8)


def test_what_is_computed_again_takes_its_room_meanwhile() -> None:
    model, division = NAMED["gpt:22b"], replace(UNFUSED, tensor=8, micro_batch=4, recompute="full")
    kept, whole = (layer_bytes(model, 2048, replace(division, recompute=r)) for r in ("full", "none"))
    assert stage_bytes(model, 2048, division, 0)["working"] == pytest.approx(whole - kept)


def test_a_stage_keeps_as_many_micro_batches_as_come_before_it_ends() -> None:
    """1F1B: the first of p stages p, the last one; no more than there are."""
    model = NAMED["gpt:22b"]
    for count in (2, 100):
        division = Division(pipeline=4, micro_batches=count)
        kept = [stage_bytes(model, 2048, division, stage)["activations"] for stage in range(4)]
        one = 12 * layer_bytes(model, 2048, division)
        assert kept == pytest.approx([min(4 - stage, count) * one for stage in range(4)])


def test_the_fullest_stage_decides() -> None:
    model = NAMED["llama3:70b"]
    fine = Division.read(["tensor=8", "pipeline=4", "data=2", "zero=1", "micro_batches=8"])
    found = occupancy(model, 4096, fine)
    assert found.most_bytes == round(sum(found.stages[0].values()))
    alike = occupancy(model, 4096, replace(fine, micro_batches=1)).as_text()
    assert "each of 64 devices needs" in alike and "stages 1 to 2: " in alike
    assert found.as_dict()["division"]["tensor"] == 8 and len(found.as_dict()["stages"]) == 4


def test_of_many_stages_a_few_are_shown() -> None:
    division = Division(pipeline=48, micro_batches=96)
    lines = occupancy(NAMED["gpt:22b"], 2048, division).as_text().splitlines()
    assert len(lines) == 7 and lines[5] == "  ..." and lines[6].startswith("  stage 47: ")


def test_interleaved_stages_keep_more() -> None:
    """Korthikanti et al., 2022, section 4.2.3: the first stage 1 + (p - 1) / (p v) times as much."""
    model = NAMED["gpt:22b"]
    plain = stage_bytes(model, 2048, Division(pipeline=4, micro_batches=16), 0)["activations"]
    mixed = Division(pipeline=4, micro_batches=16, schedule="interleaved", virtual=3)
    assert stage_bytes(model, 2048, mixed, 0)["activations"] == pytest.approx(plain * (1 + 3 / 12))


def test_experts_are_divided_among_their_devices() -> None:
    model = NAMED["mixtral:8x7b"]
    experts = 3 * model.hidden * 8 * model.expert_ffn * model.layers
    whole, parts = (stage_bytes(model, 1, Division(data=8, expert=e), 0)["parameters"] for e in (1, 8))
    assert whole - parts == pytest.approx(2 * experts * 7 / 8)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["tenser=8"], r"'tenser' is no part of a division; did you mean tensor\?"),
        (["tensor=0"], "tensor is '0'; give a number from 1"),
        (["zero=4"], "zero is '4'; give 0 to 3"),
        (["shard=all"], "shard is 'all'; give a number, or 0 for all replicas"),
        (["recompute=some"], "recompute is 'some'; give none or selective or full"),
        (["sequence=1"], "sequence is '1'; give true or false"),
        (["tensor=7"], "tensor is 7, which does not divide the 64 heads"),
        (["pipeline=99"], r"pipeline is 99, and gpt:22b has 48 layers; use fewer"),
        (["tensor=2", "tensor=4"], "tensor is given twice"),
        (["zero=1"], "zero is 1, and there is one replica"),
        (["sequence=true"], "sequence is true, and one device computes a layer"),
        (["virtual=2"], "virtual is 2 and schedule 1f1b"),
        (["pipeline=24", "schedule=interleaved", "virtual=3"], "pipeline x virtual is 72, and gpt:22b has 48 layers"),
        (["data=6", "zero=3", "shard=4"], "shard is 4, which does not divide 6 replicas"),
        (["data=2", "expert=2"], "expert is 2, and gpt:22b has 0 experts"),
    ],
)
def test_a_division_that_cannot_be_is_refused(words: list[str], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        occupancy(NAMED["gpt:22b"], 2048, Division.read(words))
