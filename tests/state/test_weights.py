"""Weights of others are taken up, one tensor at a time; what a run exports is what others read."""

import json
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict_saver import save as save_dcp

from tests.jobs import small_trainer as trainer
from unisono.errors import CheckpointError
from unisono.state.checkpoint import DIRECTORY, path_of
from unisono.state.export import export, state_dict
from unisono.state.weights import matched, weights


def build() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 4))


def given() -> dict[str, Tensor]:
    torch.manual_seed(5)
    model = build()
    model[1].running_mean.add_(3)  # type: ignore[operator]
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def sharded(values: dict[str, Tensor], directory: Path) -> Path:
    """As Hugging Face writes a large model."""
    directory.mkdir()
    names = list(values)
    files = {"model-00001-of-00002.safetensors": names[:3], "model-00002-of-00002.safetensors": names[3:]}
    for file, members in files.items():
        safetensors.torch.save_file({name: values[name] for name in members}, directory / file)
    weight_map = {name: file for file, members in files.items() for name in members}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def saved(values: dict[str, Tensor], directory: Path) -> Path:
    """As torch.distributed.checkpoint writes."""
    save_dcp(values, checkpoint_id=directory, no_dist=True)
    return directory


def written(save: Callable[[Any, Path], object], name: str) -> Callable[[dict[str, Tensor], Path], Path]:
    def write(values: dict[str, Tensor], directory: Path) -> Path:
        directory.mkdir()
        save(values, directory / name)
        return directory / name

    return write


KINDS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {
    "a state_dict": written(torch.save, "weights.pt"),
    "inside a larger dict": written(lambda values, path: torch.save({"step": 3, "state_dict": values}, path), "w.pt"),
    "under a wrapper's names": written(
        lambda values, path: torch.save({f"module.{k}": v for k, v in values.items()}, path), "weights.bin"
    ),
    "safetensors": written(safetensors.torch.save_file, "weights.safetensors"),
    "a directory of Hugging Face, one file": lambda values, path: (
        written(safetensors.torch.save_file, "model.safetensors")(values, path).parent
    ),
    "a directory of Hugging Face, two files": sharded,
    "a directory of DCP": saved,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_begins_with_what_is_given(kind: str, tmp_path: Path) -> None:
    values = given()
    path = KINDS[kind](values, tmp_path / "given")
    seen: dict[str, Tensor] = {}

    class Watching(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            if not seen:
                seen.update({name: tensor.detach().clone() for name, tensor in self.state_dict().items()})
            result: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
            return result

    trainer(model=lambda: Watching(*build()), start_from=str(path)).fit(1)
    assert set(seen) == set(values)
    for name, value in values.items():
        assert torch.equal(seen[name], value), name


def test_what_was_exported_gives_the_same_outputs(tmp_path: Path) -> None:
    """In plain PyTorch; in one file and in several; and as the beginning of another run."""
    subject = trainer(model=build, run_dir=str(tmp_path / "run"))
    subject.fit(3)
    checkpoint = path_of(tmp_path / "run" / DIRECTORY, 3)
    assert subject.model is not None
    subject.model.eval()
    x = torch.randn(7, 6)
    expected = subject.model(x)
    plain = build().eval()
    plain.load_state_dict(torch.load(export(checkpoint, tmp_path / "one")[1], weights_only=True))
    assert torch.equal(plain(x), expected)
    files = export(checkpoint, tmp_path / "many", shard_bytes=100)
    assert len(files) > 3 and files[0].name == f"model-00001-of-{len(files) - 1:05d}.safetensors"
    index = json.loads(files[-1].read_text())["weight_map"]
    again = {name: safetensors.torch.load_file(tmp_path / "many" / file)[name] for name, file in index.items()}
    whole = state_dict(checkpoint)
    assert set(again) == set(whole) and all(torch.equal(again[name], whole[name]) for name in whole)
    for source in (tmp_path / "one" / "model.safetensors", tmp_path / "many", checkpoint):
        keys = matched(weights(source), {name: (name,) for name in whole})
        assert all(torch.equal(tensor, whole[name]) for name, tensor in keys.tensors())


def put(value: object, path: Path) -> Path:
    """A file that torch.save writes."""
    torch.save(value, path / "w.pt")
    return path / "w.pt"


def rubbish(path: Path) -> Path:
    """A file that is none."""
    (path / "w.safetensors").write_bytes(b"x")
    return path / "w.safetensors"


WRONG: dict[str, Callable[[Path], Path]] = {
    "no weights at": lambda path: path / "nothing.pt",
    "holds no weights that are known": lambda path: path,
    "holds a list; a state_dict maps": lambda path: put([1], path),
    "cannot read weights from": rubbish,
    "has no 0.weight and 4 more; it holds 4 tensors": lambda path: put(dict(list(given().items())[3:7]), path),
    r"0.weight is \(5, 7\) in .* and \(5, 6\) in the model": lambda path: put(
        {**given(), "0.weight": torch.ones(5, 7)}, path
    ),
}


@pytest.mark.parametrize("match", WRONG)
def test_what_cannot_be_taken_is_one_sentence(match: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=match):
        trainer(model=build, start_from=str(WRONG[match](tmp_path))).fit(1)


def test_metadata_that_could_run_code_is_not_read(tmp_path: Path) -> None:
    class Harmful:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "harm"),)

    (tmp_path / ".metadata").write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(CheckpointError, match=r"posix\.mkdir, which may be unsafe"):
        weights(tmp_path)
    assert not (tmp_path / "harm").exists()
