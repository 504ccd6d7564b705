"""What steps take here: what follows from a few measured ones, and the layout that is chosen."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from unisono.check import choosing
from unisono.check.choosing import Sounding, candidates, prospect, settled, sound
from unisono.check.comparing import compare
from unisono.check.layouts import outline_of
from unisono.check.machine import measure
from unisono.config import Config, Layout, load, validate
from unisono.errors import ConfigurationError
from unisono.launch.local import LocalLauncher

GPT = {
    "task": "lm",
    "options": {"layers": 4, "width": 32, "heads": 4, "context": 32, "dropout": 0.0},
    "optimizer": {"name": "AdamW", "lr": 1e-3},
    "steps": 20,
    "global_batch_size": 8,
    "micro_batch_size": 2,
}


def config(**changes: Any) -> Config:
    return validate(Config, {**GPT, **changes}, "test")


def sounding(settings: Config, *, dearer: dict[str, float] | None = None) -> Sounding:
    """A made-up one: every unit takes 1 ms forward and 2 back, alone; nothing else takes time."""
    found = outline_of(settings)
    n = len(found.units)
    compute = {(1, "none"): 0.003 * n, (1, "full"): 0.004 * n, (2, "none"): 0.002 * n}
    return Sounding(found, [0.001] * n, [0.002] * n, compute, 0.0, {}, dearer or {})


def test_steps_follow_from_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four micro-batches: on two workers half; in two stages (m + p - 1) / m of half, and what they are uneven."""
    monkeypatch.setattr(choosing, "cores", lambda: 8)
    settings = config()
    known = sounding(settings)
    one = known.compute_s[1, "none"]

    def step(**layout: Any) -> float:
        return prospect(settings, Layout(**layout), known).step_s

    assert step(data=1) == pytest.approx(4 * one)
    assert step(data=2) == pytest.approx(2 * one)
    assert step(data=3) == pytest.approx(2 * one)  # one of three workers has two
    assert step(data=4) == pytest.approx(one)
    assert step(data=1, tensor=2) == pytest.approx(4 * known.compute_s[2, "none"])
    assert step(data=1, recompute="full") == pytest.approx(4 * known.compute_s[1, "full"])
    piped = step(data=1, pipeline=2)
    assert 5 * one / 2 <= piped < 6 * one / 2
    assert step(data=1, pipeline=2, schedule="zb_h1") < piped


def test_workers_share_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four on two cores take as long as two do."""
    monkeypatch.setattr(choosing, "cores", lambda: 2)
    settings = config()
    known = sounding(settings)
    two, four = (prospect(settings, Layout(data=n), known).step_s for n in (2, 4))
    assert two == pytest.approx(four)
    slower = replace(known, dearer={"together": 1.5})
    assert prospect(settings, Layout(data=2), slower).step_s == pytest.approx(1.5 * two)


def test_candidates_are_all_that_so_many_workers_can_have() -> None:
    found = candidates(config(), 4)
    assert len({tuple(sorted(layout.model_dump().items(), key=str)).__repr__() for layout in found}) == len(found)
    shapes = {(layout.data, layout.tensor, layout.pipeline) for layout in found}
    assert {(1, 1, 1), (2, 1, 1), (4, 1, 1), (1, 2, 2), (2, 1, 2), (1, 4, 1), (1, 1, 4), (3, 1, 1)} <= shapes
    assert all((layout.data or 1) * layout.model_workers <= 4 for layout in found)
    assert all((layout.data or 1) <= 1 for layout in candidates(config(global_batch_size=2), 4))


def test_auto_is_a_word_and_leaves_the_rest_open(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(json.dumps({**GPT, "layout": "auto"}))
    assert load(path).layout.auto and load(path, ["layout=auto"]).layout.auto
    with pytest.raises(ConfigurationError, match="auto chooses pipeline too; leave pipeline out, or auto"):
        validate(Config, {**GPT, "layout": {"auto": True, "pipeline": 2}}, "test")


@pytest.fixture(scope="module")
def launcher() -> Any:
    with LocalLauncher() as found:
        yield found


def digest(launcher: LocalLauncher, settings: Config, run_dir: Path) -> str:
    """Of what its workers have trained."""
    own = settings.model_copy(update={"run_dir": str(run_dir)})
    workers = (own.layout.data or 1) * own.layout.model_workers
    arguments = {"config": own.model_dump(mode="json")}
    return str(launcher.run({"call": "unisono.tasks.job:train", "arguments": arguments}, workers).result["digest"])


def test_a_layout_is_chosen_and_trained(launcher: LocalLauncher, tmp_path: Path) -> None:
    """What is chosen gives the bits that another number of replicas gives."""
    said: list[str] = []
    found = settled(launcher, config(layout="auto", observe={"progress": False}), 2, said.append)
    assert not found.layout.auto and found.layout.data in (1, 2)
    assert said[-1].startswith("layout: auto") and "ms" in said[-1]
    other = found.model_copy(update={"layout": Layout(data=3 - found.layout.data, tensor=found.layout.tensor)})
    assert digest(launcher, found, tmp_path / "chosen") == digest(launcher, other, tmp_path / "other")


def test_a_resumed_run_divides_layers_as_before(launcher: LocalLauncher) -> None:
    found = settled(launcher, config(layout="auto"), 2, before=Layout(tensor=2))
    assert found.layout.tensor == 2
    with pytest.raises(ConfigurationError, match="no layout of 2 workers divides layers by 3, as the run did"):
        settled(launcher, config(layout="auto"), 2, before=Layout(tensor=3))


def test_no_layout_fits_a_small_machine(launcher: LocalLauncher) -> None:
    tight = config(layout={"auto": True, "memory_gib": 0.001})
    with pytest.raises(ConfigurationError, match=r"no layout of 1 workers fits: the smallest needs .* and there are"):
        settled(launcher, tight, 1)


def test_relaxed_runs_and_devices_are_not_measured_so(launcher: LocalLauncher) -> None:
    with pytest.raises(ConfigurationError, match=r"sync.mode is local; give a layout"):
        settled(launcher, config(layout="auto", sync={"mode": "local", "period": 2}), 1)


def test_what_is_measured_has_a_time_for_every_unit(launcher: LocalLauncher) -> None:
    settings = config()
    known = sound(launcher, settings, [Layout(data=1), Layout(data=2)])
    assert len(known.forward) == len(known.backward) == len(outline_of(settings).units)
    assert min(known.forward) >= 0 and sum(known.backward) > 0
    assert known.compute_s[1, "none"] > 0 and known.dearer["together"] >= 1.0


def test_a_run_is_compared_with_its_prediction(launcher: LocalLauncher, tmp_path: Path) -> None:
    settings = config(run_dir=str(tmp_path / "run"), layout={"data": 1}, observe={"progress": False})
    arguments = {"config": settings.model_dump(mode="json")}
    launcher.run({"call": "unisono.tasks.job:train", "arguments": arguments}, 1)
    found = compare(launcher, tmp_path / "run")
    assert found.steps == 19 and found.measured_s > 0 and "compute" in found.phases
    assert "the prediction is" in found.as_text() and found.as_dict()["ratio"] > 0
    with pytest.raises(ConfigurationError, match="holds no records of a run"):
        compare(launcher, tmp_path)


def test_this_machine_is_measured(launcher: LocalLauncher, tmp_path: Path) -> None:
    found = {finding.name: finding.text for finding in measure(launcher, tmp_path / "machine.json")}
    stored = json.loads((tmp_path / "machine.json").read_text())
    assert stored["device"]["tflops"] > 0 and stored["between_bytes_per_s"] > 0
    assert stored["device"]["memory_gb_per_s"] > 0 and all(one["tflops"] > 0 for one in stored["measured"]["products"])
    assert "GB/s" in found["memory rate"] and "xhere is this machine" in found["stored"]
