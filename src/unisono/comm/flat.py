"""Tensors of any form as flat, contiguous ones, and as bytes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unisono.comm.meeting import MeetingError


def flattened(tensor: Tensor) -> Tensor:
    """A tensor's values as one contiguous dimension; complex ones as pairs are left to their type."""
    values = tensor.detach() if tensor.requires_grad else tensor
    if values.dim() == 1 and values.is_contiguous() and not values.is_complex():
        return values
    return values.resolve_conj().resolve_neg().contiguous().view(-1)


def as_bytes(flat: Tensor) -> Tensor:
    """A flat tensor as bytes."""
    return flat.view(torch.uint8) if flat.numel() else flat.new_empty(0, dtype=torch.uint8)


def as_memory(flat: Tensor) -> memoryview:
    """A flat tensor as memory; it keeps the tensor alive."""
    return as_bytes(flat).numpy().data.cast("B") if flat.numel() else memoryview(bytearray())


class Flat:
    """A tensor as a flat, contiguous one; what is not contiguous is copied, and copied back at the end."""

    def __init__(self, tensor: Tensor, *, out: bool) -> None:
        self._tensor = tensor.detach()
        self._copied = not tensor.is_contiguous() or tensor.is_conj() or tensor.is_neg()
        self._out = out
        self.flat = flattened(tensor)

    def __enter__(self) -> Tensor:
        return self.flat

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Copy back what was copied."""
        if self._copied and self._out:
            self._tensor.copy_(self.flat.view(self._tensor.shape))


def check_same(one: Tensor, many: Sequence[Tensor], size: int) -> None:
    """Raise `MeetingError` unless there is a tensor a rank, all of one size and type."""
    if len(many) != size:
        raise MeetingError(f"a list of {len(many)} tensors for {size} ranks; give one a rank")
    for tensor in many:
        if tensor.numel() != one.numel() or tensor.dtype != one.dtype:
            raise MeetingError(
                f"tensors of one size and type are needed; found {tuple(tensor.shape)} {tensor.dtype} and "
                f"{tuple(one.shape)} {one.dtype}"
            )


def cut(flat: Tensor, tensor: Tensor, sizes: Sequence[int], ranks: int, name: str) -> list[Tensor]:
    """A flat tensor cut by rows of the original; into equal parts where no sizes are given."""
    rows = tensor.shape[0] if tensor.dim() else 1
    if not sizes:
        if rows % ranks:
            raise MeetingError(
                f"all_to_all: the {name} has {rows} rows, which {ranks} ranks do not divide; give split sizes"
            )
        sizes = [rows // ranks] * ranks
    if sum(sizes) != rows or len(sizes) != ranks:
        raise MeetingError(f"all_to_all: {name} split sizes {list(sizes)} do not make up {rows} rows on {ranks} ranks")
    row = flat.numel() // rows if rows else 0
    return list(torch.split(flat, [size * row for size in sizes]))
