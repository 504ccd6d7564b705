"""Where a stage's graph begins: tensors that have arrived, and the gradients that its backward brings back to them."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils import _pytree as pytree


class Entrance:
    """What a stage begins with.

    Attributes:
        tensors: what has arrived; those that need a gradient are results of a node of this stage's own graph, so the
            stage may change them in place as it could if an earlier module had made them.
        edges: the places in the graph of those that need a gradient, whatever is done to them later. In the first
            stage, which nothing arrives at, the results of its first module: what the gradients of inputs lead to.
    """

    def __init__(self, arrived: Sequence[Tensor], needed: Sequence[bool]) -> None:
        self._needed = tuple(needed)
        self._gradients: list[Tensor | None] = []
        self.tensors = list(arrived)
        if any(needed):
            phony = torch.empty(0, requires_grad=True)
            members = [tensor for tensor, wanted in zip(arrived, needed, strict=True) if wanted]
            results = iter(_Begin.apply(phony, self._gradients, members))  # type: ignore[no-untyped-call]
            self.tensors = [next(results) if wanted else t for t, wanted in zip(arrived, needed, strict=True)]
        members = [tensor for tensor, wanted in zip(self.tensors, needed, strict=True) if wanted]
        self.edges: list[GradientEdge] = [get_gradient_edge(tensor) for tensor in members]

    def begin_at(self, result: object) -> None:
        """Nothing has arrived; the first module has returned this."""
        leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self.edges = [get_gradient_edge(tensor) for tensor in leaves if tensor.requires_grad and tensor.grad_fn]

    def receive(self, gradients: Sequence[Tensor | None]) -> None:
        """The gradients of `edges`, where a backward has not brought them here by itself."""
        self._gradients[:] = gradients

    def gradients(self) -> list[Tensor | None]:
        """One for every tensor; None where none was needed, or none came."""
        found = iter(self._gradients)
        return [next(found, None) if wanted else None for wanted in self._needed]


class _Begin(torch.autograd.Function):
    """A node that passes tensors on as its results, and keeps their gradients."""

    @staticmethod
    def forward(ctx: Any, phony: Tensor, gradients: list[Tensor | None], tensors: list[Tensor]) -> Any:
        ctx.set_materialize_grads(False)
        ctx.gradients = gradients
        return tuple(tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        ctx.gradients[:] = gradients
        return None, None, None
