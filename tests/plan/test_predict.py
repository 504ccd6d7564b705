"""Rows of published runs: what of them can be judged, and how well."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from unisono.errors import ConfigurationError
from unisono.plan.constants import calibration, frozen
from unisono.plan.predict import predict, rescaled
from unisono.plan.published import Run, run

ROOT = Path(__file__).parents[2]
ROWS = json.loads(gzip.decompress((ROOT / "data" / "published-runs.json.gz").read_bytes()))["rows"]
KNOWN = frozen()
MEASURED = ("iter_time_s", "derived_iter_time_s", "tokens_per_s_per_gpu", "mem_gib", "mfu", "hfu", "tflops_per_gpu")


def row(**changes: Any) -> dict[str, Any]:
    """One of a sweep, without what was measured."""
    sweep = (r for r in ROWS if r["source"] == "hf_ultrascale_nanotron" and r["status"] == "ok")
    first = next(r for r in sweep if r["pp"] == 2 and r["num_gpus"] == 16)
    plain = {key: value for key, value in first.items() if key not in MEASURED}
    return {key: value for key, value in {**plain, **changes}.items() if value is not ...}


def test_what_was_measured_is_not_looked_at() -> None:
    """A row and the same row without its measurements are judged alike."""
    whole = [r for r in ROWS if r["status"] == "ok"][::40]
    bare = [{key: value for key, value in r.items() if key not in MEASURED} for r in whole]
    assert predict(whole, KNOWN) == predict(bare, KNOWN)


def test_the_frozen_constants_predict_as_the_report_says() -> None:
    """Median errors over all runs that worked, of three frameworks, with the constants as they are shipped."""
    report = json.loads((ROOT / "calibration" / "report.json").read_text())["times"]
    for source, name, most in (
        ("mosaicml_llm_foundry", "llm-foundry/A100", 0.035),
        ("vtrain_single_node", "megatron-deepspeed/A100", 0.05),
        ("hf_ultrascale_nanotron", "nanotron/H100", 0.20),
    ):
        own = [r for r in ROWS if r["source"] == source and r["status"] == "ok"][::4]
        times = [r.get("iter_time_s") or r.get("derived_iter_time_s") for r in own]
        pairs = zip(times, predict(own, KNOWN), strict=True)
        errors = [abs(answer["iter_time_s"] / time - 1) for time, answer in pairs if time and "reason" not in answer]
        assert len(errors) > 0.9 * len(own) and np.median(errors) < most
        assert report[name]["constants"] <= 12


def test_an_answer_says_where_its_numbers_come_from() -> None:
    (answer,) = predict([row()], KNOWN)
    assert answer["calibration"] == "nanotron/H100" and answer["fits"] is True
    assert sum(answer["breakdown"].values()) == pytest.approx(answer["iter_time_s"])
    assert sum(answer["memory"].values()) == pytest.approx(answer["mem_gib"])
    (silent,) = predict([row(recompute=..., inter_node=...)], KNOWN)
    assert "recompute=none" in silent["assumed"] and "inter_node=ib400" in silent["assumed"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"layers": ...}, "layers is missing"),
        ({"mbs": ..., "num_microbatches": ...}, "mbs is missing"),
        ({"gpu": "H101"}, "the device 'H101' is not known; known are V100-16"),
        ({"tp": 3}, "tp x pp x cp is 6, which does not divide num_gpus"),
        ({"dp": 3}, "which dp x mbs, 3 x"),
        ({"num_gpus": 0}, "num_gpus is 0; give a whole number from 1"),
        ({"num_microbatches": 7}, "num_microbatches is 7, and gbs / dp / mbs is"),
        ({"pp": 2, "layers": 1}, "pipeline is 2, and llama-"),
        ({"precision": "NVFP4"}, "products in 4 bits are not modelled"),
        ({"gpu": "A100-SXM4-80GB", "precision": "fp8"}, "A100-80 has no products in 8 bits"),
        ({"moe": "8x22B"}, "the experts' numbers are missing"),
        ({"inter_node": "0 Gb/s per gpu"}, "give a rate above 0"),
        ({"gated_mlp": "yes"}, "gated_mlp is 'yes'; give true or false"),
        ({"sharding": "some"}, "sharding is 'some'; give none, zero1, zero2 or zero3"),
        ({"seq": float("nan")}, "seq is nan; give a whole number from 1"),
        ({"kv_heads": 5}, "cannot share hidden"),
        ({"schedule": "foo"}, "schedule is 'foo'; give 1f1b"),
        ({"model": "llama2-70b (LoRA)"}, "fine-tuning with adapters is not modelled"),
        ({"shard_group": 3}, "shard_group is 3, which does not divide dp x cp"),
        ({"recompute": "half"}, "recompute is 'half'; give none, selective or full"),
    ],
)
def test_what_cannot_be_judged_is_answered_with_the_reason(changes: dict[str, Any], reason: str) -> None:
    (answer,) = predict([row(**changes)], KNOWN)
    assert set(answer) == {"id", "reason"} and reason in answer["reason"]


def test_what_is_no_row_is_answered_too() -> None:
    found = predict([row(), 5], KNOWN)  # type: ignore[list-item]
    assert found[0]["iter_time_s"] > 0 and "missing" in found[1]["reason"]


def test_memory_is_that_of_the_least_recomputation_that_fits_where_a_row_does_not_say_it() -> None:
    small = {"tp": 1, "pp": 1, "dp": 16, "mbs": 16, "gbs": 256, "num_microbatches": 1, "sharding": "zero1"}
    (silent,), (said,) = (predict([row(**small, recompute=value)], KNOWN) for value in (..., "none"))
    assert silent["iter_time_s"] == said["iter_time_s"]
    assert silent["mem_gib"] < said["mem_gib"] and not said["fits"]


def test_experts_that_are_described_are_judged() -> None:
    moe = {"experts": 8, "chosen": 2, "expert_ffn": 4096}
    found = run(row(moe=moe, ep=2))
    assert isinstance(found, Run) and found.job.model.experts == 8 and found.job.division.expert == 2


def test_one_scalar_is_refitted_on_ones_own_rows() -> None:
    own = [r for r in ROWS if r["source"] == "internlm_7b_a100"][:5]
    slow = [{**r, "iter_time_s": 3 * (r.get("iter_time_s") or r["derived_iter_time_s"])} for r in own]
    known = rescaled(slow, KNOWN)
    before, after = (calibration(which, "internlm", "A100-80").scale for which in (KNOWN, known))
    assert after == pytest.approx(3 * before, rel=0.15)
    assert calibration(known, "nanotron", "H100").scale == 1.0
    with pytest.raises(ConfigurationError, match="of 2 rows, at most 2 of one framework and device"):
        rescaled(slow[:2], KNOWN)


def test_unknown_frameworks_and_devices_have_kin() -> None:
    assert calibration(KNOWN, "something", "H200").name == "default/H100"
    assert calibration(KNOWN, "nanotron", "A100-80").name == "nanotron/H100"
    assert calibration(KNOWN, "default", "L4").name == "default/H100"
    assert calibration(KNOWN, "llm-foundry", "B200").name == "llm-foundry/H100"


def test_the_command_answers_rows(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps({"rows": [row(), row(layers=...)]}))
    command = [sys.executable, "-m", "unisono", "plan", "predict", "--rows", str(tmp_path / "rows.json")]
    answers = json.loads(subprocess.run([*command, "--json"], capture_output=True, check=True, text=True).stdout)[
        "rows"
    ]
    assert answers[0]["iter_time_s"] > 0 and answers[1]["reason"] == "layers is missing"
    text = subprocess.run(command, capture_output=True, check=True, text=True).stdout
    assert "s a step" in text and "cannot be judged: layers is missing" in text
