"""A checkpoint as files that need no Unisono: plain safetensors, and a state_dict for ``torch.load``."""

from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor

from unisono.state.checkpoint import load
from unisono.state.training_state import BUFFER, PARAMETER


def state_dict(path: Path) -> dict[str, Tensor]:
    """The model's plain state_dict: parameters under all their names, and persistent buffers."""
    manifest, tensors = load(path)
    result: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition("/")
        if kind == PARAMETER or (kind == BUFFER and rest in manifest.plain_buffers):
            result[rest] = tensor
    result.update({name: result[source] for name, source in manifest.ties.items()})
    return result


def export(path: Path, target: Path) -> list[Path]:
    """Write ``model.safetensors`` and ``state_dict.pt`` into ``target``.

    Tied weights are written once to safetensors, which has no notion of them; ``ties`` in its metadata names them.
    """
    target.mkdir(parents=True, exist_ok=True)
    tensors = state_dict(path)
    seen: dict[int, str] = {}
    ties = {
        name: seen[t.data_ptr()]
        for name, t in tensors.items()
        if seen.setdefault(t.data_ptr(), name) != name and t.numel()
    }
    plain = {name: tensor for name, tensor in tensors.items() if name not in ties}
    written = [target / "model.safetensors", target / "state_dict.pt"]
    safetensors.torch.save_file(
        plain, written[0], metadata={"format": "pt", **{f"tie:{k}": v for k, v in ties.items()}}
    )
    torch.save(tensors, written[1])
    return written
