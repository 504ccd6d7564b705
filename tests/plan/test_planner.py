"""Whole spaces, pruned ones, and their answers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan.answer import as_dict, as_text, layout
from unisono.plan.constants import Calibration, calibration, frozen
from unisono.plan.division import Division, refuse_impossible
from unisono.plan.hardware import cluster
from unisono.plan.planner import Question, candidate, default_sequences, plan, words
from unisono.plan.simulator import simulate
from unisono.plan.space import division_of, divisors, space
from unisono.plan.staging import wires_of, work_of
from unisono.plan.transformer import NAMED, transformer

KNOWN = frozen()


def question(name: str, devices: str, tokens: int = 4096, **fixed: Any) -> Question:
    found = cluster(devices)
    known = calibration(KNOWN, "default", found.device.name)
    return Question(NAMED[name], tokens, found, default_sequences(found, tokens), known, fixed)


@settings(max_examples=25)
@given(
    st.sampled_from(["llama2:7b", "llama3:8b", "gpt:22b", "llama3:70b", "mixtral:8x7b", "gpt:175b"]),
    st.sampled_from(["8xH100", "64xH100", "256xA100-80", "32xA100-40:8,ethernet25", "1024xH100:8", "16xB200"]),
    st.sampled_from([2048, 8192]),
)
def test_pruning_never_loses_the_best(name: str, devices: str, tokens: int) -> None:
    asked = question(name, devices, tokens)
    try:
        whole = plan(asked, pruned=False, advised=False)
    except ConfigurationError:
        with pytest.raises(ConfigurationError):
            plan(asked, advised=False)
        return
    pruned = plan(asked, advised=False)
    assert pruned.judged < whole.judged
    assert pruned.best[0].step_s == pytest.approx(whole.best[0].step_s, rel=1e-9)


def test_every_row_of_a_space_is_a_legal_division_of_all_devices() -> None:
    model, devices = NAMED["mixtral:8x7b"], cluster("16xH100:8")
    rows = space(model, 4096, devices, 64, {}, pruned=False)
    which = np.random.default_rng(0).choice(len(rows), 400, replace=False)
    seen = set()
    for row in which:
        division = division_of(rows, int(row))
        refuse_impossible(model, division)
        assert division.devices == 16 and division.sequences == 64
        seen.add(division)
    assert len(seen) > 380  # but for the sizes of groups that are all


def test_a_judged_row_and_a_judged_division_are_the_same() -> None:
    """Columns of a space, and one division as a column: equal seconds and bytes."""
    asked = question("llama3:70b", "64xH100")
    best = plan(asked, advised=False).best
    for one in best:
        again = candidate(asked, one.division)
        assert again.step_s == one.step_s and again.needed_bytes == one.needed_bytes
    assert [one.step_s for one in best] == sorted(one.step_s for one in best)


def test_what_is_given_stays_given() -> None:
    found = plan(question("llama3:70b", "64xH100", tensor=8, pipeline=2, schedule="1f1b", zero=1), advised=False)
    assert all(
        (one.division.tensor, one.division.pipeline, one.division.schedule, one.division.zero) == (8, 2, "1f1b", 1)
        for one in found.best
    )


def test_llama_3_of_405_billion_is_planned_as_it_was_trained() -> None:
    """On 16,384 H100 its authors reached 38 to 43% MFU (Grattafiori et al., 2024, table 4); the plan's is beside it."""
    found = plan(question("llama3:405b", "16384xH100:8", 8192), advised=False)
    assert found.question.sequences == 2048  # of 8,192 tokens, as there
    assert 0.30 < found.best[0].mfu < 0.45
    theirs = candidate(
        found.question,
        Division(
            tensor=8, pipeline=16, data=128, zero=1, micro_batches=16, sequence=True, schedule="interleaved", virtual=8
        ),
    )
    assert theirs.mfu == pytest.approx(0.41, abs=0.09) and theirs.step_s >= found.best[0].step_s


def test_twice_the_memory_never_slows_down() -> None:
    asked = question("gpt:175b", "64xA100-80", 2048)
    roomy = replace(asked.cluster.device, memory_bytes=2 * asked.cluster.device.memory_bytes)
    wide = replace(asked, cluster=replace(asked.cluster, device=roomy))
    assert plan(wide, advised=False).best[0].step_s <= plan(asked, advised=False).best[0].step_s


@pytest.mark.parametrize(
    ("name", "devices", "fixed"),
    [
        ("llama2:7b", "8xH100", {"schedule": "zb_v"}),
        ("llama2:7b", "8xH100", {"schedule": "interleaved", "virtual": 4}),
        ("llama2:7b", "8xH100", {"schedule": "gpipe", "pipeline": 2}),
        ("mixtral:8x7b", "16xH100", {"expert": 8}),
        ("mixtral:8x7b", "16xH100", {"expert": 2, "pipeline": 4}),
        ("llama3:8b", "16xH100", {"zero": 3, "shard": 4}),
        ("llama3:8b", "64xH100:8", {"zero": 3, "shard": 0}),
        ("llama3:8b", "16xH100", {"period": 50}),
        ("llama3:8b", "12xH100:4", {}),
        ("gpt:1.7b", "7xH100:7", {}),
        ("layers=2,hidden=64,heads=4,vocab=100", "1xH100", {}),
    ],
)
def test_parts_that_are_given_are_in_all_answers(name: str, devices: str, fixed: dict[str, Any]) -> None:
    asked = question("gpt:1.7b", devices, 2048, **fixed)
    asked = replace(asked, model=transformer(name), sequences=8 * asked.cluster.devices)
    found = plan(asked, advised=False)
    for one in found.best:
        found_parts = {key: getattr(one.division, key) for key in fixed}
        found_parts |= {"shard": one.division.data} if fixed.get("shard") and not one.division.shard else {}  # all
        assert found_parts == fixed


def test_pruning_keeps_selective_recomputation_where_it_saves_memory() -> None:
    asked = question("llama2:13b", "8xA100-40", 8192)
    asked = replace(asked, known=calibration(KNOWN, "torchtitan", "A100-40"))
    whole, pruned = (plan(asked, pruned=which, advised=False).best[0] for which in (False, True))
    assert pruned.step_s == pytest.approx(whole.step_s) and whole.division.recompute == "selective"


@pytest.mark.parametrize("sequences", [8, 16, 64])
def test_what_is_planned_is_what_is_simulated(sequences: int) -> None:
    """With few micro-batches too, where stages wait most."""
    asked = replace(question("llama3:70b", "64xH100", 4096), sequences=sequences)
    for one in plan(asked, advised=False).best:
        work = work_of(asked.model, asked.tokens, one.division, asked.cluster, asked.known)
        found = simulate(work, wires_of(asked.cluster, asked.known))
        assert found.seconds == pytest.approx(one.step_s, rel=0.15)


def test_what_fits_nowhere_says_the_least_change_with_which_it_would() -> None:
    with pytest.raises(ConfigurationError, match=r"llama3:405b fits nowhere on 8 x H100 .* it fits on \d+ of them"):
        plan(question("llama3:405b", "8xH100", 8192))


def test_a_batch_that_no_division_has_is_refused() -> None:
    asked = replace(question("llama3:8b", "8xH100"), sequences=7, fixed={"data": 8})
    with pytest.raises(ConfigurationError, match=r"no division of llama3:8b over 8 devices has 7 sequences .* data=8"):
        plan(asked)


def test_slow_links_are_answered_with_rare_meetings() -> None:
    found = plan(replace(question("llama2:7b", "16xA100-40:8,ethernet1", pipeline=1), sequences=64))
    assert found.best[0].limit in ("gradients", "gather")
    best = max(found.changes, key=lambda change: change[1])
    assert "meet every 50 steps" in best[0] and best[1] > 1.2
    text = as_text(found, price=2.0)
    assert "what would make it 1.2 times as fast" in text and "a trillion tokens cost" in text


def test_an_answer_as_data_and_as_a_part_of_a_configuration() -> None:
    found = plan(question("llama3:8b", "8xH100", context=1))
    data = as_dict(found, price=2.0)
    assert json.loads(json.dumps(data)) == data
    assert data["best"][0]["step_s"] == pytest.approx(sum(data["best"][0]["seconds"].values()))
    assert layout(Division(pipeline=2, schedule="zb_v", virtual=2))["layout"] == {
        "data": 1,
        "pipeline": 2,
        "schedule": "zb_v",
    }
    from unisono.config import Layout

    Layout(**data["layout"]["layout"])


@given(st.integers(1, 5000))
def test_divisors(number: int) -> None:
    assert divisors(number) == [n for n in range(1, number + 1) if number % n == 0]


def test_words() -> None:
    assert words(Division()) == "one device"
    assert Division.read(words(Division(tensor=8, sequence=True, zero=3, data=4)).split()).tensor == 8
    assert Calibration().name == "default"


def unisono(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "unisono", "plan", *arguments], capture_output=True, text=True, timeout=60
    )


def test_the_command_plans(tmp_path: Path) -> None:
    picture = tmp_path / "plan.svg"
    done = unisono("llama3:8b", "context=1", "--cluster", "16xH100", "--picture", str(picture), "--price", "2")
    assert done.returncode == 0, done.stderr
    assert "where a step's time goes" in done.stdout and "layout: {data:" in done.stdout
    assert picture.read_text().startswith("<?xml") and "timetable" in picture.read_text()
    assert json.loads(unisono("llama3:8b", "--cluster", "8xH100", "--json").stdout)["best"][0]["mfu"] > 0.2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama3:8b", "--cluster", "8xH101"], "no device is known as 'H101'"),
        (["llama3:8b", "--price", "2"], "--price is for a --cluster"),
        (["llama3:8b", "--cluster", "8xH100", "--rows", "x"], "--rows is for a configuration or predict"),
        (["predict"], "plan predict needs --rows FILE"),
        (["predict", "--cluster", "8xH100"], "--cluster is for a model or a configuration"),
        (["predict", "--rows", "nowhere.json"], "cannot read rows from nowhere.json"),
        (["llama3:8b", "--cluster", "8xH100", "--picture", "x.gif"], "give a name that ends with .png, .svg, .pdf"),
        (["llama3:405b", "--cluster", "8xT4"], "fits nowhere on 8 x T4"),
        (["llama3:8b", "--cluster", "8xH100", "--framework", "nanotrn"], "did you mean nanotron"),
        (["llama3:8b", "zero=0", "tensor=1", "pipeline=1", "--cluster", "8xA100-40"], "fits nowhere on 8 x A100-40"),
        (["predict", "tensor=8", "--rows", "x"], "tensor=8 is for a model or a configuration"),
        (["llama3:8b", "tensor=3", "--cluster", "8xH100"], "no division of llama3:8b over 8 devices"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], said: str) -> None:
    done = unisono(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
