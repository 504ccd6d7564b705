"""Checkpoints under fault: training goes on where it can, says so, tries again, and older ones stay intact."""

import errno
import math
import os
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import jobs
from unisono import saving
from unisono.errors import CheckpointError, RecordError
from unisono.events import CheckpointSaved, Event, Notice, RunFinished, StepFinished
from unisono.observe.records import EventLog
from unisono.state import checkpoint
from unisono.state.checkpoint import DIRECTORY, path_of, steps_in, verify
from unisono.state.interval import best_interval_s


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FIRST_RETRY_S", 0.0)


def fit_with_a_bad_disk(
    monkeypatch: pytest.MonkeyPatch, run_dir: Path, number: int, bad: range, steps: int = 12
) -> list[Event]:
    """Train with a checkpoint every 2 steps; what is written while some steps are the last fails."""
    write, at, told = checkpoint._write, [0], list[Event]()

    def spoiled(path: Path, data: bytes) -> None:
        if at[0] in bad:
            write(path, data[: len(data) // 2])
            raise OSError(number, os.strerror(number))
        write(path, data)

    def note(event: Event) -> None:
        told.append(event)
        if isinstance(event, StepFinished):
            at[0] = event.step
            time.sleep(0.05)  # the writer keeps up

    monkeypatch.setattr(checkpoint, "_write", spoiled)
    jobs.trainer(run_dir=str(run_dir), checkpoint={"every": 2, "keep": 100}, callbacks=[note]).fit(steps)
    return told


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EIO])
def test_training_goes_on_when_a_checkpoint_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, number: int
) -> None:
    told = fit_with_a_bad_disk(monkeypatch, tmp_path, number, range(5, 10))
    notices = [event.text for event in told if isinstance(event, Notice)]
    assert notices and all("NO CHECKPOINT was saved" in text and os.strerror(number) in text for text in notices)
    assert any(isinstance(event, RunFinished) for event in told)
    saved = steps_in(tmp_path / DIRECTORY)
    assert saved[0] == 12 and len(saved) >= 2
    for step in saved:
        verify(path_of(tmp_path / DIRECTORY, step))
    assert sorted(event.step for event in told if isinstance(event, CheckpointSaved)) == sorted(saved)
    assert not list((tmp_path / DIRECTORY).glob("*.tmp"))


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"step-00000012: No space left.*older ones are untouched"):
        fit_with_a_bad_disk(monkeypatch, tmp_path, errno.ENOSPC, range(5, 1000))
    saved = steps_in(tmp_path / DIRECTORY)
    assert saved and saved[0] <= 4
    verify(path_of(tmp_path / DIRECTORY, saved[0]))


def test_the_interval_is_chosen_from_cost_and_failure_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(saving, "FIRST_AUTO_S", 0.0)
    options: dict[str, Any] = {"run_dir": str(tmp_path), "callbacks": [(told := list[Event]()).append]}
    jobs.trainer(checkpoint_every="auto", **options).fit(60)
    saved = [event.step for event in told if isinstance(event, CheckpointSaved)]
    assert saved[0] <= 3 and saved[-1] == 60 and len(saved) <= 3  # once, and then not for minutes


@given(st.floats(0.01, 100), st.floats(1e3, 1e7))
def test_no_other_interval_loses_less(cost_s: float, mtbf_s: float) -> None:
    """The part of time lost is cost / interval + (interval + cost) / (2 mtbf), to the first order."""

    def lost(interval_s: float) -> float:  # Daly's model without restart time
        segment = interval_s + cost_s
        return mtbf_s * math.expm1(segment / mtbf_s) / interval_s

    best = best_interval_s(cost_s, mtbf_s)
    if cost_s < mtbf_s / 20:
        for factor in (0.5, 0.8, 1.25, 2.0):
            assert lost(best) <= lost(factor * best) * 1.001


def test_records_that_cannot_be_written_do_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The others who listen hear of it, and of every step."""
    told: list[Event] = []
    write, full = EventLog.__call__, range(3, 6)

    def spoiled(log: EventLog, event: Event) -> None:
        if isinstance(event, StepFinished) and event.step in full:
            raise RecordError("cannot write events.jsonl: No space left on device; make room")
        write(log, event)

    monkeypatch.setattr(EventLog, "__call__", spoiled)
    observe = {"progress": True, "tensorboard": False, "report": False}
    assert jobs.trainer(run_dir=str(tmp_path), callbacks=[told.append], observe=observe).fit(8).step == 8
    assert [event.step for event in told if isinstance(event, StepFinished)] == list(range(1, 9))
