"""A checkpoint as files that need no Unisono: a set of safetensors as Hugging Face writes it, and a state_dict."""

import json
from collections.abc import Iterator
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unisono.plan.blocks import is_plain
from unisono.state.checkpoint import stream
from unisono.state.manifest import Manifest, read
from unisono.state.training_state import BUFFER, PARAMETER

SHARD_BYTES = 2 << 30
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
"""The names that Hugging Face gives to weights in one file, and to the list of several."""


def _plain(manifest: Manifest, path: Path) -> Iterator[tuple[str, Tensor]]:
    """What belongs to a plain state_dict, tied names left out, one file of the checkpoint at a time."""
    for name, tensor in stream(path):
        kind, _, rest = name.partition("/")
        if not is_plain(rest):
            continue
        if kind == PARAMETER or (kind == BUFFER and rest in manifest.plain_buffers):
            yield rest, tensor


def state_dict(path: Path) -> dict[str, Tensor]:
    """The model's plain state_dict: parameters under all their names, and persistent buffers."""
    manifest = read(path)
    result = dict(_plain(manifest, path))
    result.update({name: result[source] for name, source in manifest.ties.items()})
    return result


def export(path: Path, target: Path, shard_bytes: int = SHARD_BYTES) -> list[Path]:
    """Write a set of safetensors into ``target`` and, where it is one file, ``state_dict.pt`` beside it.

    No more than one shard is in memory at a time. Tied weights are written once, as Hugging Face expects; ``tie:NAME``
    in the metadata of the first file names them.

    Arguments:
        shard_bytes: a file's size, where a single tensor is not larger.
    """
    target.mkdir(parents=True, exist_ok=True)
    manifest = read(path)
    shard: dict[str, Tensor] = {}
    written: list[tuple[Path, list[str]]] = []
    size_bytes = total_bytes = 0

    def write() -> None:
        part = target / f"part-{len(written)}.safetensors"
        ties = {f"tie:{name}": source for name, source in manifest.ties.items()} if not written else {}
        safetensors.torch.save_file(shard, part, metadata={"format": "pt", **ties})
        written.append((part, list(shard)))
        shard.clear()

    for name, tensor in _plain(manifest, path):
        if shard and size_bytes + tensor.nbytes > shard_bytes:
            write()
            size_bytes = 0
        shard[name] = tensor
        size_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    write()
    if len(written) == 1:
        single = written[0][0].rename(target / SINGLE)
        torch.save(state_dict(path), target / "state_dict.pt")
        return [single, target / "state_dict.pt"]
    weight_map: dict[str, str] = {}
    files = []
    for i, (part, names) in enumerate(written, 1):
        file = part.rename(target / f"model-{i:05d}-of-{len(written):05d}.safetensors")
        weight_map |= dict.fromkeys(names, file.name)
        files.append(file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(sorted(weight_map.items()))}
    (target / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, target / INDEX]
