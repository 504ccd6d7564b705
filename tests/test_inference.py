"""A trained model's figures and outputs: the same bits on any number of workers, every sample once, whoever is lost."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.toys import Samples, norm
from unisono import Trainer, read_predictions
from unisono.errors import ConfigurationError, PredictionError
from unisono.launch.local import LocalLauncher
from unisono.predictions import INDEX

SETTINGS: dict[str, Any] = {
    "loss": nn.functional.mse_loss,
    "data": Samples(),
    "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "global_batch_size": 16,
    "micro_batch_size": 8,
    "observe": {"progress": False},
}


def looked(pool: LocalLauncher, workers: int, directory: Path, **options: Any) -> dict[str, Any]:
    arguments = {"directory": str(directory), **options}
    result: dict[str, Any] = pool.run({"call": "tests.jobs:look", "arguments": arguments}, workers).result
    return result


def test_one_worker_agrees_with_plain_pytorch(tmp_path: Path) -> None:
    trainer = Trainer(model=norm, **SETTINGS)
    trainer.fit(3)
    assert trainer.model is not None
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    metrics = trainer.evaluate(Samples())
    written = trainer.predict(Samples(), tmp_path / "out")
    after = trainer.model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before), "to look at a model does not change it"
    model, samples = trainer.model.eval(), Samples()
    inputs = torch.stack([samples[i][0] for i in range(len(samples))])
    targets = torch.stack([samples[i][1] for i in range(len(samples))])
    with torch.no_grad():
        expected = model(inputs)
    found = read_predictions(written.directory)
    assert written.samples == len(samples) and list(found) == written.names == ["output"]
    torch.testing.assert_close(found["output"], expected)
    assert metrics["loss"] == pytest.approx(float(nn.functional.mse_loss(expected, targets)), rel=1e-6)


@pytest.mark.parametrize(
    "sync",
    [
        {"mode": "local", "period": 2, "replicas": 2},
        {"mode": "diloco", "period": 2, "replicas": 4, "fragments": 2, "delay": 1},
        {"mode": "server"},
        {"mode": "hogwild"},
    ],
    ids=lambda sync: sync["mode"],
)
def test_the_model_that_workers_agree_on_is_looked_at(sync: dict[str, Any], tmp_path: Path) -> None:
    """By who has trained it, and later."""
    settings = {**SETTINGS, "micro_batch_size": 2, "sync": sync, "run_dir": str(tmp_path / "run")}
    trainer = Trainer(model=norm, **settings)
    trainer.fit(4)
    metrics, written = trainer.evaluate(Samples()), trainer.predict(Samples(), tmp_path / "out")
    assert trainer.model is not None
    with torch.no_grad():
        expected = trainer.model.eval()(Samples().inputs)
    torch.testing.assert_close(read_predictions(written.directory)["output"], expected)
    later = Trainer(model=norm, **settings)
    assert later.evaluate(Samples()) == metrics
    again = read_predictions(later.predict(Samples(), tmp_path / "again").directory)
    assert torch.equal(again["output"], read_predictions(written.directory)["output"])


def test_the_bits_do_not_depend_on_the_number_of_workers(pool: LocalLauncher, tmp_path: Path) -> None:
    results = {n: looked(pool, n, tmp_path / str(n)) for n in (1, 2, 3, 4)}
    assert len({json.dumps(r["metrics"]) for r in results.values()}) == 1
    names = {n: sorted(p.name for p in (tmp_path / str(n)).iterdir()) for n in results}
    assert len({tuple(found) for found in names.values()}) == 1
    for name in names[1]:
        assert len({(tmp_path / str(n) / name).read_bytes() for n in results}) == 1, name


@pytest.mark.parametrize(("what", "rank"), [("evaluate", 1), ("predict", 1), ("predict", 0)])
def test_a_worker_is_killed_while_a_model_is_looked_at(
    pool: LocalLauncher, tmp_path: Path, what: str, rank: int
) -> None:
    """(rank 0 or 1 of 3, its first batch): the others do what it had."""
    expected = looked(pool, 1, tmp_path / "alone")
    found = looked(pool, 3, tmp_path / "struck", dies=[what, rank])
    assert found == {**expected, "written": {**expected["written"], "directory": str(tmp_path / "struck")}}
    a, b = (read_predictions(tmp_path / name)["output"] for name in ("alone", "struck"))
    assert torch.equal(a, b)
    assert not list((tmp_path / "struck").glob("*.part"))


def test_outputs_of_several_tensors_and_what_is_kept_of_them(tmp_path: Path) -> None:
    trainer = Trainer(model=norm, **SETTINGS)
    trainer.fit(1)
    written = trainer.predict(Samples(), tmp_path, post=lambda out: {"best": out.argmax(-1), "all": (out, -out)})
    found = read_predictions(tmp_path)
    assert written.names == list(found) == ["all.0", "all.1", "best"] or set(found) == {"best", "all.0", "all.1"}
    assert torch.equal(found["all.0"].argmax(-1), found["best"]) and torch.equal(found["all.0"], -found["all.1"])
    files = json.loads((tmp_path / INDEX).read_text())["files"]
    assert sum(file["samples"] for file in files) == len(Samples())
    assert torch.equal(load_file(tmp_path / files[0]["file"])["best"], found["best"][: files[0]["samples"]])


def test_what_cannot_be_done_is_one_sentence(tmp_path: Path) -> None:
    trainer = Trainer(model=norm, **SETTINGS)
    with pytest.raises(ConfigurationError, match="no model yet: call fit before"):
        trainer.evaluate(Samples())
    trainer.fit(1)
    with pytest.raises(ConfigurationError, match="nothing to evaluate"):
        trainer.evaluate()
    with pytest.raises(ConfigurationError, match="a row for each sample"):
        trainer.predict(Samples(), tmp_path / "a", post=lambda output: output.mean())
    with pytest.raises(ConfigurationError, match="without a tensor"):
        trainer.predict(Samples(), tmp_path / "b", post=lambda output: "what")
    with pytest.raises(PredictionError, match="not empty"):
        trainer.predict(Samples(), tmp_path)
    with pytest.raises(PredictionError, match="no whole predictions"):
        read_predictions(tmp_path / "a")
    trainer.predict(Samples(), tmp_path / "c")
    (tmp_path / "c" / INDEX).unlink()
    with pytest.raises(PredictionError, match="were not finished; remove it"):
        trainer.predict(Samples(), tmp_path / "c")


def test_a_damaged_file_is_found(tmp_path: Path) -> None:
    trainer = Trainer(model=norm, **SETTINGS)
    trainer.fit(1)
    trainer.predict(Samples(), tmp_path)
    path = next(iter(tmp_path.glob("*.safetensors")))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(PredictionError, match="damaged"):
        read_predictions(tmp_path)


def test_the_commands(tmp_path: Path) -> None:
    def unisono(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "unisono", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)

    (tmp_path / "c.yaml").write_text(
        json.dumps({"task": "images", "steps": 4, "global_batch_size": 32, "micro_batch_size": 16, "run_dir": "run"})
    )
    early = unisono("evaluate", "c.yaml", "-n", "1")
    assert early.returncode == 2 and "no model in run to evaluate; train one" in early.stderr
    trained = json.loads(unisono("train", "c.yaml", "-n", "1", "--json").stdout)
    said = json.loads(unisono("evaluate", "c.yaml", "-n", "2", "--json").stdout)
    assert said["metrics"] == trained["validation"] and said["checkpoint"].endswith("step-00000004")
    predicted = json.loads(unisono("predict", "c.yaml", "-n", "2", "-o", "out", "--json").stdout)
    assert predicted["samples"] == len(read_predictions(tmp_path / "out")["output"])
    again = unisono("predict", "c.yaml", "-n", "1", "-o", "out")
    assert again.returncode == 2 and "not empty" in again.stderr and "Traceback" not in again.stderr
    other = unisono("evaluate", "c.yaml", "-n", "1", "--split", "test")
    assert other.returncode == 2 and "no split 'test'" in other.stderr and "Traceback" not in other.stderr
