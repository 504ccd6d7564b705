"""Clipping by the global norm: one canonical norm, whoever owns which block."""

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def squared_norms(blocks: Sequence[Tensor]) -> list[float]:
    """The squared Euclidean norm of each block, in double precision."""
    if not blocks:
        return []
    return [norm * norm for norm in torch.stack(torch._foreach_norm(list(blocks), 2)).double().tolist()]


def global_norm(squares: Iterable[float]) -> float:
    """The norm of the whole gradient from its blocks' squared norms, given in the canonical order of blocks."""
    return math.sqrt(math.fsum(squares))


def clip_factor(norm: float, limit: float) -> float:
    """What the gradient is multiplied with, as in ``torch.nn.utils.clip_grad_norm_``.

    >>> clip_factor(0.5, 1.0)
    1.0
    """
    return min(1.0, limit / (norm + 1e-6))
