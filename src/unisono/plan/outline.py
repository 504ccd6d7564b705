"""A model's outline: the order in which it calls its modules, what each costs, and where it can be cut into stages.

A cut lies in front of a module's call. What was made before it and is needed after it has to be among that call's
arguments: only those travel to the next stage.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

DEAR = frozenset(
    getattr(torch.ops.aten, name)
    for name in (
        "mm", "addmm", "bmm", "baddbmm", "addbmm", "linear", "convolution",
        "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_efficient_attention", "_scaled_dot_product_cudnn_attention",
    )
)  # fmt: skip
"""Operations whose results selective recomputation keeps: matrix products, attention, convolutions."""
FLOPS_A_BYTE = 10
"""Operations in the time in which a core moves a byte: layers without products cost by what they move."""


@dataclass(frozen=True, slots=True)
class TensorForm:
    """A tensor without values."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size_bytes(self) -> int:
        """Bytes that it spans in memory."""
        if 0 in self.shape:
            return 0
        return self.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(self.shape, self.stride, strict=True)))


def form_of(tensor: Tensor) -> TensorForm:
    """A tensor's form."""
    return TensorForm(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


@dataclass(frozen=True, slots=True)
class Unit:
    """One call of a module that is looked at as a whole.

    Attributes:
        path: the module's name.
        flops: of its forward.
        saved_bytes: what its forward, and code up to the next unit, keep for the backward, what earlier units keep
            anyway left out.
        moved_bytes: of its results.
        dear_bytes: of the results of its matrix products, attention and convolutions.
    """

    path: str
    flops: int
    saved_bytes: int
    moved_bytes: int
    dear_bytes: int

    @property
    def cost(self) -> int:
        """What its forward costs, in operations."""
        return self.flops + FLOPS_A_BYTE * self.moved_bytes


@dataclass(frozen=True, slots=True)
class Call:
    """A call of a module, of a unit or of one that units are called in.

    Attributes:
        path: the module's name.
        key: which of its calls: the call that it is made in, and the calls of that module there so far.
        first, stop: the units that are called in it.
        results: what it returns, `TensorForm` in place of tensors.
        given_bytes: of the tensors that it is called with.
    """

    path: str
    key: str
    first: int
    stop: int
    results: Any
    given_bytes: int


@dataclass(frozen=True, slots=True)
class Cut:
    """A place where the model can be cut: in front of a call.

    Attributes:
        unit: the first one behind the cut.
        path, key: the call whose arguments travel.
        leaves: which of its flattened arguments travel: the places of each tensor, which may be given several times.
        forms: of those tensors.
    """

    unit: int
    path: str
    key: str
    leaves: tuple[tuple[int, ...], ...]
    forms: tuple[TensorForm, ...]


@dataclass(frozen=True, slots=True)
class Outline:
    """What a rehearsal found.

    Attributes:
        units: in the order of their calls.
        calls: of all modules, in the order in which they begin.
        cuts: where the model can be cut, in order.
        homes: by name of a parameter or buffer, the unit whose stage needs it.
    """

    units: tuple[Unit, ...]
    calls: tuple[Call, ...]
    cuts: tuple[Cut, ...]
    homes: Mapping[str, int]


def next_key(within: str, path: str, counts: dict[str, int]) -> str:
    """The key of a module's next call.

    Arguments:
        within: the key of the call that it is made in, empty for none.
        counts: the calls of each module there so far; counted on.
    """
    number = counts.get(path, 0)
    counts[path] = number + 1
    return f"{within} > {path} {number}"


def entered(model: nn.Module) -> set[str]:
    """Modules that are looked into: those that hold a list or a sequence of modules with parameters."""
    found = {""}
    for path, module in model.named_modules():
        several = sum(any(True for _ in child.parameters()) for child in module.children()) > 1
        if path and several and isinstance(module, nn.ModuleList | nn.Sequential):
            parts = path.split(".")
            found.update(".".join(parts[:i]) for i in range(1, len(parts) + 1))
    return found
