"""How a tensor lies in memory: a kernel's last bits can depend on its strides, and on where in a line it begins."""

import torch
from torch import Tensor

LINE_BYTES = 64


def span(tensor: Tensor) -> int:
    """Elements from a tensor's first to its last, in memory.

    >>> span(torch.zeros(4, 8)[:, :3])
    27
    """
    if not tensor.numel():
        return 0
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))


def alike(values: Tensor, form: Tensor, phase: int) -> Tensor:
    """Values in memory of their own: no view of another tensor.

    Arguments:
        form: has the strides.
        phase: bytes from the beginning of a line to the first element.
    """
    elements, skipped = span(form), phase // values.itemsize
    flat = torch.empty(skipped + elements, dtype=values.dtype)  # torch's memory begins with a line
    result = torch.empty(0, dtype=values.dtype)
    result.set_(flat.untyped_storage(), skipped, form.shape, form.stride())
    if 0 in form.stride():
        flat[skipped:].copy_(values.as_strided((elements,), (1,), values.storage_offset()))
    else:
        result.copy_(values)
    return result
