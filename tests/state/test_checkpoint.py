"""Checkpoints: every flipped byte is found, nothing is half-written, anything plain can read the export."""

import random
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch

from tests import jobs
from unisono.errors import CheckpointError, ConfigurationError
from unisono.state.checkpoint import (
    DIRECTORY,
    Description,
    load,
    newest_intact,
    path_of,
    prune,
    remove_leftovers,
    save,
    steps_in,
    verify,
)
from unisono.state.export import export, state_dict
from unisono.state.manifest import NAME

ABOUT = Description(ties={}, plain_buffers=(), run={"seed": 0}, fingerprint={"torch": "2"})


def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "parameter/a": torch.randn(100, 70),
        "parameter/b": torch.randn(3).bfloat16(),
        "optimizer/a/step": torch.tensor(3.0),
        "buffer/n": torch.tensor(5),
        "parameter/empty": torch.zeros(0, 4),
    }


def test_what_is_saved_is_loaded(tmp_path: Path) -> None:
    path, manifest = save(tmp_path, 7, tensors().items(), ABOUT)
    assert path == path_of(tmp_path, 7)
    again, loaded = load(path)
    assert again == manifest and again.step == 7
    assert loaded.keys() == tensors().keys()
    assert all(torch.equal(loaded[key], value) and loaded[key].dtype == value.dtype for key, value in tensors().items())


def test_a_thousand_flipped_bytes_are_all_found(tmp_path: Path) -> None:
    path, _ = save(tmp_path, 1, tensors().items(), ABOUT)
    generator = random.Random(0)
    files = sorted(path.iterdir())
    sizes = [f.stat().st_size for f in files]
    for i in range(1000):
        # every other corruption in the manifest, which is smaller than the tensors
        file = path / NAME if i % 2 else generator.choices(files, sizes)[0]
        data = bytearray(file.read_bytes())
        at = generator.randrange(len(data))
        kept = data[at]
        data[at] ^= generator.randrange(1, 256)
        file.write_bytes(data)
        with pytest.raises(CheckpointError):
            verify(path)
        data[at] = kept
        file.write_bytes(data)
    verify(path)


def test_truncated_missing_and_grown_files_are_found(tmp_path: Path) -> None:
    path, manifest = save(tmp_path, 1, tensors().items(), ABOUT)
    name = next(iter(manifest.files))
    data = (path / name).read_bytes()
    for damaged in (data[:-1], data + b"x", b""):
        (path / name).write_bytes(damaged)
        with pytest.raises(CheckpointError, match="bytes instead of"):
            verify(path)
    (path / name).unlink()
    with pytest.raises(CheckpointError, match="cannot read"):
        verify(path)


def test_the_newest_intact_one_is_used_and_damage_is_told(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, tensors().items(), ABOUT)
    (path_of(tmp_path, 3) / NAME).write_text("{")
    path, manifest, damaged = newest_intact(tmp_path)
    assert manifest.step == 2 and path == path_of(tmp_path, 2)
    assert list(damaged) == [path_of(tmp_path, 3)] and "is damaged" in damaged[path_of(tmp_path, 3)]
    shutil.rmtree(path_of(tmp_path, 1))
    (path_of(tmp_path, 2) / NAME).write_text("{")
    with pytest.raises(CheckpointError, match="no intact checkpoint"):
        newest_intact(tmp_path)


def test_old_ones_are_removed_but_the_best(tmp_path: Path) -> None:
    for step in range(1, 7):
        save(tmp_path, step, tensors().items(), ABOUT)
    prune(tmp_path, 2, [3])
    assert steps_in(tmp_path) == [6, 5, 3]


def test_leftovers_of_a_killed_run_are_removed(tmp_path: Path) -> None:
    (tmp_path / "step-00000009.tmp").mkdir()
    (tmp_path / "config.yaml.tmp").write_text("x")
    remove_leftovers(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert steps_in(tmp_path) == []


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path) -> None:
    """A file system of 64 KiB in a mount namespace of its own."""
    code = (
        "import sys, torch; from pathlib import Path; from unisono.state.checkpoint import *; "
        "from tests.state.test_checkpoint import ABOUT; d = Path(sys.argv[1]);\n"
        "save(d, 1, [('parameter/a', torch.zeros(1000))], ABOUT)\n"
        "try: save(d, 2, [('parameter/a', torch.zeros(100000))], ABOUT)\n"
        "except Exception as e: print(type(e).__name__, e)\n"
        "verify(path_of(d, 1)); print(sorted(p.name for p in d.iterdir()))"
    )
    script = f'mount -t tmpfs -o size=64k none {tmp_path} && exec .venv/bin/python -c "$CODE" {tmp_path}'
    import os
    import sys

    script = script.replace(".venv/bin/python", sys.executable)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], capture_output=True, text=True, env={**os.environ, "CODE": code}
    )
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"this machine forbids mounts: {done.stderr.strip()}")
    assert "CheckpointError cannot write checkpoint" in done.stdout and "No space left" in done.stdout, done.stderr
    assert "['step-00000001']" in done.stdout


def test_the_export_is_plain(tmp_path: Path) -> None:
    trainer = jobs.trainer(model="tied", run_dir=str(tmp_path))
    trainer.fit(2)
    model = trainer.model
    assert model is not None
    written = export(path_of(tmp_path / DIRECTORY, 2), tmp_path / "out")
    plain = torch.load(written[1], weights_only=True)
    assert plain.keys() == model.state_dict().keys()
    assert all(torch.equal(plain[key], value) for key, value in model.state_dict().items())
    assert set(safetensors.torch.load_file(written[0])) == {"embedding.weight", "mix.weight", "mix.bias"}
    assert state_dict(path_of(tmp_path / DIRECTORY, 2))["head.weight"].shape == (11, 8)


def test_buffers_are_exported_unless_they_are_not_persistent(tmp_path: Path) -> None:
    trainer = jobs.trainer(model="norm", run_dir=str(tmp_path))
    trainer.fit(1)
    assert trainer.model is not None
    exported = state_dict(path_of(tmp_path / DIRECTORY, 1))
    assert exported.keys() == trainer.model.state_dict().keys()
    assert int(exported["1.num_batches_tracked"]) == 1  # once a step, not once a micro-batch


def test_another_model_or_run_cannot_be_resumed(tmp_path: Path) -> None:
    jobs.trainer(model="norm", run_dir=str(tmp_path)).fit(1)
    with pytest.raises(CheckpointError, match=r"belongs to another model|is torch"):
        jobs.trainer(model="tied", run_dir=str(tmp_path)).fit(2, resume=True)
    with pytest.raises(ConfigurationError, match=r"seed is 1, but the run in .* has 0"):
        jobs.trainer(model="norm", run_dir=str(tmp_path), seed=1).fit(2, resume=True)
    with pytest.raises(ConfigurationError, match="holds the checkpoints of a run"):
        jobs.trainer(model="norm", run_dir=str(tmp_path)).fit(2)


def test_checkpoints_are_consistent_while_training_goes_on(tmp_path: Path) -> None:
    """A checkpoint of step k, written in the background, is the state of a run that ended at k."""
    trainer = jobs.trainer(run_dir=str(tmp_path / "long"), checkpoint={"every": 2, "keep": 100})
    trainer.probe(lambda event: time.sleep(0.01))  # what is due while one is written on a busy machine would wait
    trainer.fit(9)
    saved = steps_in(tmp_path / "long" / DIRECTORY)
    assert 9 in saved and len(saved) >= 3
    for step in saved:
        ended = jobs.trainer().fit(step).digest
        assert verify(path_of(tmp_path / "long" / DIRECTORY, step)).digest == ended
