"""Clipping: by one canonical norm, whoever owns which block; by value; by the norm of each unit's weights (AGC)."""

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


def clip_units(values: Tensor, gradient: Tensor, factor: float, eps: float) -> None:
    """Adaptive gradient clipping (Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization",
    2021): each unit's gradient is made no longer than ``factor`` times the unit's weights, or than ``eps``.

    A unit is what leads to one output: a row of a matrix, a filter of a convolution, the whole of a vector.

    Arguments:
        values, gradient: of one parameter; the gradient is clipped in place.

    >>> gradient = torch.tensor([[3.0, 4.0], [0.3, 0.4]])
    >>> clip_units(torch.ones(2, 2), gradient, factor=1.0, eps=1e-3)
    >>> [[round(value, 4) for value in row] for row in gradient.tolist()]
    [[0.8485, 1.1314], [0.3, 0.4]]
    """
    limits = _unit_norms(values).clamp_(min=eps).mul_(factor)
    norms = _unit_norms(gradient)
    gradient.mul_(torch.where(norms > limits, limits / norms, torch.ones_like(norms)))


def _unit_norms(tensor: Tensor) -> Tensor:
    units = tuple(range(1, tensor.dim())) if tensor.dim() > 1 else None
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=units, keepdim=True)
    return norms
