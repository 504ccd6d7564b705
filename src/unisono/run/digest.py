"""The digest of a training state: equal digests mean equal bits.

SHA-256 over the step and, in order of name, every tensor's name, dtype, shape and the SHA-256 of its bytes. What is
derived (random state, the position in the data, the learning rate) is not in it.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order; copied only where it is not contiguous or not on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data if flat.numel() else memoryview(b"")


def digest(step: int, tensors: Iterable[tuple[str, Tensor]]) -> str:
    """The digest, 64 hexadecimal characters, of a state after ``step`` steps.

    >>> digest(0, [("a", torch.zeros(2)), ("b", torch.ones(1))]) == digest(
    ...     0, [("b", torch.ones(1)), ("a", torch.zeros(2))]
    ... )
    True
    """
    return joined(step, (line(name, tensor) for name, tensor in tensors))


def line(name: str, tensor: Tensor) -> tuple[str, str]:
    """A tensor's name, and what the digest says of it."""
    inner = hashlib.sha256(tensor_bytes(tensor)).hexdigest()
    return name, f"{name} {tensor.dtype} {tuple(tensor.shape)} {inner}\n"


def joined(step: int, lines: Iterable[tuple[str, str]]) -> str:
    """The digest from what it says of each tensor."""
    whole = hashlib.sha256(f"step {step}\n".encode())
    for _, text in sorted(lines):
        whole.update(text.encode())
    return whole.hexdigest()
