"""Weights that others have written: state_dicts, safetensors, directories of Hugging Face and of torch's DCP.

Tensors come one by one, so that a large model is whole in no process. Nothing that is read can run code: pickles are
read by torch's own restricted reader, or by one that knows the few classes of DCP's metadata.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from unisono.errors import CheckpointError
from unisono.state.checkpoint import stream
from unisono.state.export import INDEX, SINGLE
from unisono.state.manifest import NAME as MANIFEST
from unisono.state.manifest import read
from unisono.state.training_state import BUFFER, PARAMETER

DCP_METADATA = ".metadata"
_PREFIXES = ("module.", "_orig_mod.", "model_state_dict.", "state_dict.", "model.")
"""What wrappers and savers put in front of a model's names."""


@dataclass(frozen=True, slots=True)
class Source:
    """Where each tensor is found: a file and a key; several names may share one (tied weights)."""

    kind: str
    path: Path
    keys: Mapping[str, tuple[Path, str]]

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor under its name, file by file."""
        by_file: dict[Path, list[tuple[str, str]]] = {}
        for name, (file, key) in self.keys.items():
            by_file.setdefault(file, []).append((name, key))
        for file, wanted in by_file.items():
            yield from _READERS[self.kind](file, wanted)


def weights(path: Path) -> Source:
    """What there is in a file or a directory.

    Raises:
        CheckpointError: where it is of no known kind, or cannot be read.
    """
    if not path.exists():
        raise CheckpointError(f"no weights at {path}; give a file or a directory that exists")
    try:
        return _source(path)
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"cannot read weights from {path}: {reason}") from error


def _source(path: Path) -> Source:
    if path.is_dir():
        if (path / MANIFEST).exists():
            manifest = read(path)
            own = [name for name in manifest.tensors if name.startswith((f"{PARAMETER}/", f"{BUFFER}/"))]
            return Source("unisono", path, {name.partition("/")[2]: (path, name) for name in own})
        if (path / INDEX).exists():
            listed: dict[str, str] = json.loads((path / INDEX).read_text(encoding="utf-8"))["weight_map"]
            return Source("safetensors", path, {name: (path / file, name) for name, file in listed.items()})
        if (path / SINGLE).exists():
            return _source(path / SINGLE)
        if (path / DCP_METADATA).exists():
            from unisono.state.dcp import names

            return Source("dcp", path, {name: (path, name) for name in names(path)})
        raise CheckpointError(
            f"{path} holds no weights that are known; give a directory with {SINGLE} or {INDEX}, one of "
            "torch.distributed.checkpoint, or a checkpoint of a run"
        )
    if path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="pt") as file:
            return Source("safetensors", path, {name: (path, name) for name in file.keys()})  # noqa: SIM118
    return Source("pickle", path, {name: (path, name) for name in _state_dict(path)})


def _state_dict(path: Path) -> dict[str, Tensor]:
    """A state_dict that torch.save wrote, itself or inside a larger dict; its values stay in the file."""
    loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key in ("state_dict", "model_state_dict", "model"):
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path} holds a {type(loaded).__name__}; a state_dict maps names to tensors")
    return {name: value for name, value in loaded.items() if isinstance(value, Tensor)}


def _from_safetensors(file: Path, wanted: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    with safetensors.safe_open(file, framework="pt") as opened:
        for name, key in wanted:
            yield name, opened.get_tensor(key)


def _from_pickle(file: Path, wanted: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    loaded = _state_dict(file)
    for name, key in wanted:
        yield name, loaded[key]


def _from_unisono(path: Path, wanted: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    names: dict[str, list[str]] = {}
    for name, key in wanted:
        names.setdefault(key, []).append(name)
    for key, tensor in stream(path):
        for name in names.get(key, ()):
            yield name, tensor


def _from_dcp(path: Path, wanted: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    from unisono.state.dcp import tensors  # imports torch.distributed.checkpoint, which few runs need

    yield from tensors(path, wanted)


_READERS = {"safetensors": _from_safetensors, "pickle": _from_pickle, "unisono": _from_unisono, "dcp": _from_dcp}


def matched(source: Source, uses: Mapping[str, tuple[str, ...]]) -> Source:
    """The source by a model's own names.

    Arguments:
        uses: every name that a tensor of the model has, by the first of them.

    Raises:
        CheckpointError: naming what is missing.
    """
    for prefix in ("", *_PREFIXES):
        found = {
            first: source.keys[prefix + name]
            for first, names in uses.items()
            for name in reversed(names)
            if prefix + name in source.keys
        }
        if len(found) == len(uses):
            return Source(source.kind, source.path, found)
    missing = [first for first, names in uses.items() if not any(name in source.keys for name in names)]
    there = ", ".join(list(source.keys)[:3])
    raise CheckpointError(
        f"{source.path} has no {missing[0]}"
        + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        + f"; it holds {len(source.keys)} tensors: {there}, ..."
    )
