"""Lossy forms of a gradient, smaller on the wire; what is lost in a step is kept and added in the next.

Codecs turn a flat float32 tensor into bytes and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from unisono.plan.blocks import FlatLayout

SMALLEST = 1024
"""Elements below which a tensor is sent as it is; so are those of one dimension, biases and norms."""


class Codec(Protocol):
    """Bytes for values; members that decode the same bytes get the same values."""

    def size_bytes(self, elements: int) -> int:
        """Bytes that so many values take."""

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Bytes (uint8) of a flat float32 tensor; ``generator`` for those that draw random numbers."""

    def decode(self, data: Tensor, elements: int) -> Tensor:
        """The values, float32."""


@dataclass(frozen=True, slots=True)
class Cast:
    """A shorter floating-point format; what is too large for it is cut to its largest value."""

    dtype: torch.dtype

    def size_bytes(self, elements: int) -> int:
        """Two bytes a value."""
        return elements * self.dtype.itemsize

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Round to nearest."""
        most = torch.finfo(self.dtype).max
        return values.clamp(-most, most).to(self.dtype).view(torch.uint8)

    def decode(self, data: Tensor, elements: int) -> Tensor:
        """Exactly what was rounded to."""
        return data.view(self.dtype).float()


def _chunks(values: Tensor, size: int) -> Tensor:
    """A flat tensor as rows of ``size``, the last one filled up with zeros."""
    rows = -(-values.numel() // size)
    padded = values.new_zeros(rows * size)
    padded[: values.numel()] = values
    return padded.view(rows, size)


@dataclass(frozen=True, slots=True)
class Quantized:
    """One signed byte a value and one scale a chunk, rounded up or down at random so that the mean is right.

    Source: Alistarh et al., QSGD: Communication-efficient SGD via gradient quantization, NeurIPS 2017; with the largest
    magnitude of a chunk as its norm.
    """

    chunk: int = 512
    levels: int = 127

    def size_bytes(self, elements: int) -> int:
        """A byte a value, four a chunk."""
        return elements + 4 * -(-elements // self.chunk)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Scales, then levels."""
        rows = _chunks(values, self.chunk)
        scales = rows.abs().amax(1)
        steps = rows * (self.levels / scales.clamp_min(torch.finfo(torch.float32).tiny)).unsqueeze(1)
        rounded = torch.floor(steps.add_(torch.rand(steps.shape, generator=generator)))
        levels = rounded.clamp_(-self.levels, self.levels).to(torch.int8).view(-1)[: values.numel()]
        return torch.cat([scales.view(torch.uint8), levels.view(torch.uint8)])

    def decode(self, data: Tensor, elements: int) -> Tensor:
        """Levels times their chunk's scale."""
        count = -(-elements // self.chunk)
        scales = data[: 4 * count].clone().view(torch.float32)
        rows = _chunks(data[4 * count :].view(torch.int8).float(), self.chunk)
        return (rows * (scales / self.levels).unsqueeze(1)).view(-1)[:elements]


@dataclass(frozen=True, slots=True)
class Sign:
    """One bit a value and one scale a chunk, its mean magnitude.

    Source: Seide et al., 1-bit stochastic gradient descent, Interspeech 2014; Karimireddy et al., Error feedback fixes
    SignSGD, ICML 2019.
    """

    chunk: int = 1024

    def size_bytes(self, elements: int) -> int:
        """A bit a value, four bytes a chunk."""
        return -(-elements // 8) + 4 * -(-elements // self.chunk)

    def encode(self, values: Tensor, generator: torch.Generator) -> Tensor:
        """Scales, then bits."""
        rows = _chunks(values.abs(), self.chunk)
        sizes = torch.full((rows.shape[0],), float(self.chunk))
        sizes[-1] = values.numel() - (rows.shape[0] - 1) * self.chunk
        bits = torch.from_numpy(np.packbits((values >= 0).numpy()))
        return torch.cat([(rows.sum(1) / sizes).view(torch.uint8), bits])

    def decode(self, data: Tensor, elements: int) -> Tensor:
        """Plus or minus the scale."""
        count = -(-elements // self.chunk)
        scales = data[: 4 * count].clone().view(torch.float32)
        bits = torch.from_numpy(np.unpackbits(data[4 * count :].numpy(), count=elements))
        rows = _chunks(bits.float().mul_(2).sub_(1), self.chunk)
        return (rows * scales.unsqueeze(1)).view(-1)[:elements]


CODECS: Mapping[str, Codec] = {
    "bf16": Cast(torch.bfloat16),
    "fp16": Cast(torch.float16),
    "int8": Quantized(),
    "sign": Sign(),
}


@dataclass(frozen=True, slots=True)
class Compression:
    """How gradients are compressed.

    Attributes:
        name: "bf16", "fp16", "int8", "sign", "top_k" or "powersgd".
        rank: of PowerSGD's factors.
        density: the part of a tensor that top-k sends.
        warmup_steps: over which it falls to that from all, by equal ratios.
        momentum: of top-k's velocity; 0 for none.
        seed: of the run.
    """

    name: str
    rank: int
    density: float
    momentum: float
    seed: int
    warmup_steps: int = 0

    @property
    def sends_little(self) -> bool:
        """Less than a tenth of a large gradient."""
        return self.name in ("sign", "top_k", "powersgd")

    def density_at(self, step: int) -> float:
        """The part of a tensor that top-k sends in a step (from 1)."""
        return float(self.density ** min(1.0, step / self.warmup_steps)) if self.warmup_steps else self.density


def large_uses(flat: FlatLayout) -> list[int]:
    """The uses that are worth compressing: matrices and higher, large enough, of at most 32 bits a value."""
    result = []
    for use, (_, parameter) in enumerate(flat.uses):
        tensor = flat.parameters[parameter].tensor
        if len(tensor.shape) > 1 and tensor.numel >= SMALLEST and tensor.dtype in ("float32", "bfloat16", "float16"):
            result.append(use)
    return result


def matrix_shape(flat: FlatLayout, use: int) -> tuple[int, int]:
    """A gradient as a matrix: its first extent, and all others together."""
    tensor = flat.parameters[flat.uses[use][1]].tensor
    return tensor.shape[0], tensor.numel // tensor.shape[0]


def compressed_uses(flat: FlatLayout, compression: Compression) -> list[int]:
    """The uses that are compressed; those whose factors would be half as large as themselves are not."""
    uses = large_uses(flat)
    if compression.name != "powersgd":
        return uses
    shapes = {use: matrix_shape(flat, use) for use in uses}
    return [use for use, (rows, columns) in shapes.items() if 2 * compression.rank * (rows + columns) < rows * columns]
