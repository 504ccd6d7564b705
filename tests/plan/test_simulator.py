"""Steps, event by event, beside closed formulas and beside themselves, collapsed and not; links that are shared."""

import json
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.errors import ConfigurationError
from unisono.plan.constants import calibration, frozen
from unisono.plan.division import Division
from unisono.plan.fabric import Fabric, Flow
from unisono.plan.hardware import cluster
from unisono.plan.planner import Question, candidate
from unisono.plan.schedule import Kind, placement, timetable
from unisono.plan.simulator import Step, Trouble, Wires, Work, simulate
from unisono.plan.staging import wires_of, work_of
from unisono.plan.timing import bubble_theory, timing
from unisono.plan.trace import events
from unisono.plan.transformer import NAMED

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("interleaved", 4), ("zb_h1", 1), ("zb_v", 2)]
INSTANT = Wires(8, 1e30, 1e30)


def work(
    schedule: str, virtual: int, p: int, d: int, t: int, m: int, *, size: float = 0.0, exchange: float = 0.0
) -> Work:
    """Equal stages: a forward of a micro-batch takes 12 ms on each worker."""
    stages = len(placement(schedule, p, virtual))
    parts = {Kind.FORWARD: 1.0, Kind.BACKWARD: 2.0, Kind.INPUT: 1.0, Kind.WEIGHT: 1.0}
    seconds = {(kind, s): 0.012 * part * p / stages for kind, part in parts.items() for s in range(stages)}
    number = virtual if schedule == "interleaved" else 1
    return Work(schedule, number, t, p, d, m, seconds, size, (exchange,) * p, 0.0)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
@pytest.mark.parametrize(("p", "m"), [(2, 8), (4, 16), (8, 64), (16, 64)])
def test_bubbles_are_those_of_the_papers(schedule: str, virtual: int, p: int, m: int) -> None:
    """GPipe, 1F1B, interleaved and ZB-H1 exactly; ZB-V, which is found step by step, to a few units."""
    found = simulate(work(schedule, virtual, p, 2, 1, m), INSTANT)
    theory = bubble_theory(schedule, p, m, virtual)
    assert theory is not None
    if schedule == "zb_v":
        units = 6 * m + p - 1
        assert theory - 1e-9 <= found.bubble <= theory + 4 / units
    else:
        assert found.bubble == pytest.approx(theory, rel=1e-9)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_times_are_those_of_the_executors_timetables(schedule: str, virtual: int) -> None:
    """`plan.timing` times the lists that the engine executes; equal parts, no messages."""
    found = simulate(work(schedule, virtual, 4, 1, 1, 9), INSTANT)
    timed = timing(timetable(schedule, 4, range(9), virtual if schedule == "interleaved" else 1))
    assert found.computed_s == pytest.approx(0.012 * timed.total)


@settings(max_examples=12)
@given(
    st.sampled_from(SCHEDULES),
    st.sampled_from([1, 2, 4]),
    st.sampled_from([1, 2, 4, 8]),
    st.sampled_from([1, 2, 3, 6, 8, 12, 16]),
    st.integers(1, 9),
    st.sampled_from([0.0, 1e6, 1e9]),
    st.sampled_from([None, 1, 4]),
    st.sampled_from([None, 5e9, 4e10]),
    st.dictionaries(st.integers(0, 1 << 20), st.sampled_from([1.5, 3.0]), max_size=3),
)
def test_replicas_that_are_alike_count_for_all(
    schedule: tuple[str, int],
    p: int,
    d: int,
    t: int,
    m: int,
    size: float,
    ports: int | None,
    spine: float | None,
    slow: dict[int, float],
) -> None:
    """Collapsed and whole: equal seconds, bubbles and bytes, whatever is shared and whoever is slow."""
    job = work(*schedule, p, d, t, m, size=size, exchange=0.01)
    wires = Wires(8, 450e9, 50e9, ports, spine)
    trouble = Trouble({rank % job.ranks: factor for rank, factor in slow.items()})
    few, all_ = (simulate(job, wires, trouble, collapse=collapse) for collapse in (True, False))
    assert few.seconds == pytest.approx(all_.seconds, rel=1e-9)
    assert few.bubble == pytest.approx(all_.bubble, rel=1e-6, abs=1e-12)
    assert few.sent_bytes == pytest.approx(all_.sent_bytes)
    assert few.busy_s == pytest.approx(all_.busy_s)


@pytest.mark.parametrize(("schedule", "virtual"), SCHEDULES)
def test_512_ranks_are_as_their_classes(schedule: str, virtual: int) -> None:
    job = work(schedule, virtual, 8, 8, 8, 16, size=64e6, exchange=0.02)
    few, all_ = (simulate(job, Wires(8, 450e9, 50e9), collapse=collapse) for collapse in (True, False))
    assert job.ranks == 512 and len(few.counts) == 1 and len(all_.counts) == 8
    assert few.seconds == pytest.approx(all_.seconds, rel=1e-12)


def test_ten_thousand_ranks_take_seconds() -> None:
    """With jitter on every rank no two replicas are alike; without, one counts for all 80."""
    job = work("1f1b", 1, 16, 80, 8, 16, size=64e6)
    assert job.ranks == 10_240
    began = time.monotonic()
    plain = simulate(job, Wires(8, 450e9, 50e9))
    noisy = simulate(job, Wires(8, 450e9, 50e9), Trouble(jitter=0.05, seed=1))
    assert time.monotonic() - began < 10
    assert len(plain.counts) == 1 and len(noisy.counts) == 80
    assert noisy.seconds > plain.seconds
    again = simulate(job, Wires(8, 450e9, 50e9), Trouble(jitter=0.05, seed=1))
    assert again.seconds == noisy.seconds


def test_a_slow_rank_holds_up_its_team_and_then_all() -> None:
    """One of 8 that compute a layer, in one of 4 replicas of 2 stages."""
    job = work("1f1b", 1, 2, 4, 8, 8)
    plain, slow = (simulate(job, INSTANT, Trouble(slow)) for slow in ({}, {job.rank(3, 1, 5): 2.0}))
    assert len(slow.counts) == 2 and sorted(slow.counts.values()) == [1, 3]
    assert slow.seconds == pytest.approx(plain.seconds + 8 * 0.036, rel=0.1)
    assert slow.bubble > plain.bubble


def test_messages_share_ports() -> None:
    """Eight ranks of a node send at once: with one port each takes eight times as long as with eight."""
    job = work("gpipe", 1, 2, 1, 8, 1, size=1e9)
    alone, shared = (simulate(job, Wires(8, 450e9, 50e9, ports)).seconds for ports in (8, 1))
    computing = 2 * 0.036
    assert alone - computing == pytest.approx(2 * 1e9 / 50e9)
    assert shared - computing == pytest.approx(2 * 8e9 / 50e9)
    spine = simulate(job, Wires(8, 450e9, 50e9, spine=40e9)).seconds
    assert spine - computing == pytest.approx(2 * 8e9 / 40e9)


def test_flows_get_equal_parts_for_as_long_as_they_last() -> None:
    """Two of 8 bytes over a link of 4 a second, the second a second later: 4 + 2 + 2; done after 3.5 and 4."""
    fabric = Fabric({"link": 4.0})
    one, two = Flow(("link",), {}, 8.0, 0.0), Flow(("link",), {}, 8.0, 1.0)
    assert fabric.begin(0.0, one) == [one] and one.rate == 4.0
    assert len(fabric.begin(1.0, two)) == 2 and (one.rate, one.left) == (2.0, 4.0)
    assert fabric.end(3.0, one) == [two] and (two.rate, two.left) == (4.0, 4.0)
    assert fabric.end(4.0, two) == []


@pytest.mark.parametrize(
    "words", ["tensor=8 pipeline=4 data=2 zero=1 micro_batches=16 sequence=true", "data=64 zero=3"]
)
def test_a_simulated_step_is_the_cost_models(words: str) -> None:
    """Of one machine: what is simulated, and what is reckoned; hidden messages and uneven ends are the difference."""
    devices = cluster("64xH100")
    division = Division.read(words.split())
    known = calibration(frozen(), "default", "H100")
    asked = Question(NAMED["llama3:70b"], 4096, devices, division.sequences, known, {})
    job = work_of(asked.model, asked.tokens, division, devices, known)
    found = simulate(job, wires_of(devices, known))
    assert found.seconds == pytest.approx(candidate(asked, division).step_s, rel=0.05)


def test_a_trace_has_every_action_of_the_replicas_that_were_simulated() -> None:
    job = work("zb_h1", 1, 4, 2, 8, 6, exchange=0.01)
    found: Step = simulate(job, Wires(8, 450e9, 50e9))
    traced = events(found, job)
    named = {e["args"]["name"] for e in traced if e["ph"] == "M"}
    assert "replica 0 and 1 like it" in named and "stage 3, ranks 48 to 55" in named
    bars = [e for e in traced if e["ph"] == "X"]
    assert len(bars) == 4 * 6 * 3 + 4
    assert max(e["ts"] + e["dur"] for e in bars) == pytest.approx(1e6 * found.seconds)
    by_worker = sorted((e["tid"], e["ts"], e["dur"]) for e in bars)
    for (tid, ts, dur), (other, later, _) in pairwise(by_worker):
        assert tid != other or later >= ts + dur - 1e-3


@pytest.mark.parametrize(
    ("wires", "trouble", "said"),
    [
        (Wires(8, 450e9, 0.0), Trouble(), "a link carries 0 bytes a second"),
        (INSTANT, Trouble({99: 2.0}), "rank 99 is slow, and the job has ranks 0 to 15"),
        (INSTANT, Trouble({1: 0.0}), "a rank is 0 times slower; give a factor above 0"),
        (INSTANT, Trouble(jitter=-1.0), "jitter is -1; give 0 or more"),
    ],
)
def test_what_cannot_be_is_refused(wires: Wires, trouble: Trouble, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        simulate(work("1f1b", 1, 2, 2, 4, 4), wires, trouble)


def unisono(*arguments: str) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", "unisono", "simulate", *arguments]
    return subprocess.run(words, capture_output=True, text=True, timeout=60)


def test_the_command_simulates_a_step_and_weeks(tmp_path: Path) -> None:
    files = {"--trace": tmp_path / "trace.json", "--picture": tmp_path / "step.svg"}
    options = [str(word) for pair in files.items() for word in pair]
    done = unisono(
        "llama3:70b", "tensor=8", "pipeline=4", "--cluster", "256xH100", "--slow", "9=1.5", "--weeks", "2", *options
    )
    assert done.returncode == 0, done.stderr
    assert "256 ranks: 8 replicas of 4 stages of 8; 2 replicas simulated" in done.stdout
    assert "without slow ranks and jitter it would take" in done.stdout and "goodput" in done.stdout
    assert json.loads(files["--trace"].read_text())["traceEvents"]
    assert files["--picture"].read_text().startswith("<?xml")
    data = json.loads(unisono("llama3:8b", "--cluster", "8xH100", "--weeks", "1", "--json").stdout)
    assert data["step_s"] == pytest.approx(data["predicted_s"], rel=0.05) and 0.9 < data["goodput"] <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["llama3:8b"], "simulate needs --cluster"),
        (["llama3:8b", "--cluster", "8xH100", "--slow", "one"], "--slow is 'one'; give RANK=FACTOR"),
        (["llama3:8b", "--cluster", "8xH100", "--slow", "8=2"], "rank 8 is slow, and the job has ranks 0 to 7"),
        (["llama3:8b", "--cluster", "8xH100", "--weeks", "1", "--mtbf", "0"], "mtbf_h is 0; give a number above 0"),
        (["llama3:8b", "--cluster", "8xH100", "--trace", "/proc/no/t.json"], "cannot write /proc/no/t.json"),
    ],
)
def test_wrong_input_is_one_sentence(arguments: list[str], said: str) -> None:
    done = unisono(*arguments)
    assert done.returncode == 2 and said in done.stderr and len(done.stderr.strip().splitlines()) == 1, done.stderr
