"""Checkpoints on disk: written whole or not at all, verified byte by byte, loaded into any layout.

A checkpoint is a directory ``step-00000100``: ``manifest.json`` and safetensors files. It is written under a temporary
name, synced, and renamed; what is removed is renamed first. At most one ``*.tmp`` exists at any time.
"""

import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
from torch import Tensor

from unisono.comm.wire_state import PREFIX
from unisono.errors import CheckpointError
from unisono.run.digest import joined, line
from unisono.state.manifest import NAME, Manifest, SavedFile, SavedTensor, checksums, encode, read

SHARD_BYTES = 128 << 20
DIRECTORY = "checkpoints"


@dataclass(frozen=True, slots=True)
class Description:
    """What is recorded with a state besides its tensors (see `Manifest`)."""

    ties: Mapping[str, str]
    plain_buffers: tuple[str, ...]
    run: Mapping[str, Any]
    fingerprint: Mapping[str, Any]
    validation: Mapping[str, float] | None = None
    best: Mapping[str, Any] | None = None


def path_of(directory: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return directory / f"step-{step:08d}"


def steps_in(directory: Path) -> list[int]:
    """Steps of the checkpoints that are there, the newest first; nothing is said of their being intact."""
    found = [p.name.removeprefix("step-") for p in directory.glob("step-*") if p.is_dir()]
    return sorted((int(name) for name in found if name.isdigit()), reverse=True)


def remove_leftovers(directory: Path) -> None:
    """Remove what a run that was killed while writing has left."""
    for path in directory.glob("*.tmp"):
        shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


def save(
    directory: Path, step: int, tensors: Iterable[tuple[str, Tensor]], about: Description
) -> tuple[Path, Manifest]:
    """Write the checkpoint of a step; an older one of the same step is replaced.

    Arguments:
        tensors: one after another, in order of name; each is read before the next is asked for.

    Raises:
        CheckpointError: where it cannot be written; nothing of it is left, and older ones are as they were.
    """
    target = path_of(directory, step)
    temporary = target.with_suffix(".tmp")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        remove_leftovers(directory)
        temporary.mkdir()
        lines: list[tuple[str, str]] = []
        saved, files = _write_shards(temporary, _noted(tensors, lines))
        manifest = Manifest(
            step=step,
            digest=joined(step, lines),
            tensors=saved,
            files=files,
            ties=dict(about.ties),
            plain_buffers=about.plain_buffers,
            run=dict(about.run),
            fingerprint=dict(about.fingerprint),
            validation=dict(about.validation) if about.validation else None,
            best=dict(about.best) if about.best else None,
        )
        _write(temporary / NAME, encode(manifest))
        _sync(temporary)
        if target.exists() and _same(target, manifest):
            shutil.rmtree(temporary)
            return target, manifest
        if target.exists():
            _discard(target, temporary.with_suffix(".old.tmp"))
        temporary.rename(target)
        _sync(directory)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"cannot write checkpoint {target}: {error.strerror}; older ones are untouched"
        ) from error
    return target, manifest


def _same(path: Path, manifest: Manifest) -> bool:
    """Whether an intact checkpoint of the same state is there already."""
    try:
        return verify(path).digest == manifest.digest
    except CheckpointError:
        return False


def _noted(tensors: Iterable[tuple[str, Tensor]], lines: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """Copies of tensors; ``lines`` receives what the digest says of them."""
    for name, tensor in tensors:
        if not name.startswith(PREFIX):
            lines.append(line(name, tensor))
        yield name, tensor.detach().cpu().contiguous().clone()


def _write_shards(
    directory: Path, named: Iterable[tuple[str, Tensor]]
) -> tuple[dict[str, SavedTensor], dict[str, SavedFile]]:
    saved: dict[str, SavedTensor] = {}
    files: dict[str, SavedFile] = {}
    for number, shard in enumerate(_shards(named)):
        name = f"state-{number:05d}.safetensors"
        data = safetensors.torch.save(dict(shard))
        _write(directory / name, data)
        files[name] = SavedFile(size_bytes=len(data), chunks=checksums(data))
        for key, tensor in shard:
            dtype = str(tensor.dtype).removeprefix("torch.")
            saved[key] = SavedTensor(file=name, dtype=dtype, shape=tuple(tensor.shape))
    return saved, files


def _shards(named: Iterable[tuple[str, Tensor]]) -> Iterator[list[tuple[str, Tensor]]]:
    shard: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in named:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            yield shard
            shard, size = [], 0
        shard.append((name, tensor))
        size += tensor.nbytes
    if shard:
        yield shard


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _discard(path: Path, temporary: Path) -> None:
    path.rename(temporary)
    shutil.rmtree(temporary)


def set_aside(path: Path) -> None:
    """Rename a checkpoint that is damaged, so that it no longer counts as one."""
    aside = path.with_suffix(".damaged")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def prune(directory: Path, keep: int, always: Iterable[int] = ()) -> None:
    """Remove all but the newest ``keep`` checkpoints and those of the steps in ``always``."""
    steps = steps_in(directory)
    for step in set(steps[keep:]) - set(always):
        path = path_of(directory, step)
        _discard(path, path.with_suffix(".tmp"))


def verify(path: Path) -> Manifest:
    """Check every byte of a checkpoint.

    Raises:
        CheckpointError: naming the file, and the chunk where there is one.
    """
    manifest = read(path)
    for name, file in manifest.files.items():
        _checked(path, name, file)
    return manifest


def _checked(path: Path, name: str, file: SavedFile) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path / name}: {error.strerror}") from error
    if len(data) != file.size_bytes:
        raise CheckpointError(f"{path / name} is damaged: {len(data)} bytes instead of {file.size_bytes}")
    for i, (found, expected) in enumerate(zip(checksums(data), file.chunks, strict=True)):
        if found != expected:
            raise CheckpointError(f"{path / name} is damaged: chunk {i} has another checksum")
    return data


def stream(path: Path) -> Iterator[tuple[str, Tensor]]:
    """A checkpoint's tensors, one file of them in memory at a time, each file checked as it is read.

    Raises:
        CheckpointError: where a byte is damaged or missing.
    """
    for name, file in read(path).files.items():
        yield from safetensors.torch.load(_checked(path, name, file)).items()


def load(path: Path) -> tuple[Manifest, dict[str, Tensor]]:
    """All of a checkpoint's tensors by name; as `stream`."""
    return read(path), dict(stream(path))


def newest_intact(directory: Path) -> tuple[Path, Manifest, dict[Path, str]]:
    """The newest checkpoint that is intact, and the newer ones that are not, with the reason.

    Raises:
        CheckpointError: where there is none.
    """
    damaged: dict[Path, str] = {}
    for step in steps_in(directory):
        path = path_of(directory, step)
        try:
            return path, verify(path), damaged
        except CheckpointError as error:
            damaged[path] = str(error)
    reason = "; ".join(damaged.values()) if damaged else "there is none"
    raise CheckpointError(f"no intact checkpoint in {directory}: {reason}; start the run without --resume")
