"""A backward in two parts: gradients of what has arrived first, which an earlier stage waits for; weights' later.

Bit for bit the joint backward: each node of the graph runs the same kernels on the same gradients, once for each part.
Source: Qi et al., Zero Bubble Pipeline Parallelism, 2024.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

Node = Any  # torch.autograd.graph.Node: its methods are not typed


@dataclass(slots=True)
class _Branch:
    """Where weights join the way from the stage's end to its beginning, or an end that does not lie on that way.

    Attributes:
        node: on that way, or of that end.
        weights: reached through it alone.
        gradients: of its results, once the first part has passed it.
    """

    node: Node
    weights: list[int]
    gradients: tuple[Tensor | None, ...] = ()


@dataclass(slots=True)
class Rest:
    """What the first part has left for the second.

    Attributes:
        roots: where nothing has arrived, the whole backward: its beginnings.
        branches: else.
        ready: weights whose gradients the first part had to bring along, since they join the way at several places.
    """

    roots: list[tuple[Tensor, Tensor | None]] = field(default_factory=list)
    branches: list[_Branch] = field(default_factory=list)
    ready: dict[int, Tensor | None] = field(default_factory=dict)


def first_part(
    roots: Sequence[tuple[Tensor, Tensor | None]], arrived: Sequence[GradientEdge], weights: Sequence[Tensor]
) -> tuple[list[Tensor | None], Rest]:
    """The gradients of what has ``arrived``, and what is left to do.

    Arguments:
        roots: what the stage has made, with its gradients (None for a loss).
    """
    if not arrived or not roots:
        return [None] * len(arrived), Rest(roots=list(roots))
    branches = _branches(roots, arrived, weights)
    times: dict[int, int] = {}
    for branch in branches:
        for weight in branch.weights:
            times[weight] = times.get(weight, 0) + 1
    several = sorted(weight for weight, number in times.items() if number > 1)
    rest = Rest()
    handles = []
    for branch in branches:
        branch.weights = [weight for weight in branch.weights if times[weight] == 1]
        if branch.weights:
            rest.branches.append(branch)
            handles.append(branch.node.register_prehook(_keep(branch)))
    try:
        found = torch.autograd.grad(
            [root for root, _ in roots],
            [*arrived, *(get_gradient_edge(weights[weight]) for weight in several)],
            [gradient for _, gradient in roots],
            retain_graph=True,
            allow_unused=True,
        )
    finally:
        for handle in handles:
            handle.remove()
    for branch in rest.branches:  # where the way ends, the node itself has not run
        ends = [
            (edge.output_nr, gradient)
            for edge, gradient in zip(arrived, found, strict=False)
            if edge.node is branch.node
        ]
        if ends:
            branch.gradients = tuple(dict(ends).get(i) for i in range(1 + max(i for i, _ in ends)))
    rest.ready = dict(zip(several, found[len(arrived) :], strict=True))
    return list(found[: len(arrived)]), rest


def second_part(rest: Rest, weights: Sequence[Tensor], take: Callable[[int, Tensor], None]) -> None:
    """The gradients of the weights, each handed to ``take`` with its number."""
    if rest.roots:
        found = torch.autograd.grad(
            [root for root, _ in rest.roots],
            list(weights),
            [gradient for _, gradient in rest.roots],
            allow_unused=True,
        )
        rest.ready.update(enumerate(found))
    for weight, gradient in rest.ready.items():
        if gradient is not None:
            take(weight, gradient)
    for branch in rest.branches:
        given = [(i, gradient) for i, gradient in enumerate(branch.gradients) if gradient is not None]
        if not given:
            continue
        found = torch.autograd.grad(
            [GradientEdge(branch.node, i) for i, _ in given],
            [weights[weight] for weight in branch.weights],
            [gradient for _, gradient in given],
            allow_unused=True,
        )
        branch.gradients = ()
        for weight, gradient in zip(branch.weights, found, strict=True):
            if gradient is not None:
                take(weight, gradient)


def _keep(branch: _Branch) -> Callable[[tuple[Tensor | None, ...]], None]:
    def keep(gradients: tuple[Tensor | None, ...]) -> None:
        branch.gradients = gradients

    return keep


def _branches(
    roots: Sequence[tuple[Tensor, Tensor | None]], arrived: Sequence[GradientEdge], weights: Sequence[Tensor]
) -> list[_Branch]:
    """The nodes between the roots and what has arrived from which weights are reached in another way."""
    beginnings = {edge.node for edge in arrived}
    numbers = {_node(weight): i for i, weight in enumerate(weights) if weight.requires_grad}
    edges = [(get_gradient_edge(root), torch.ones_like(root) if g is None else g) for root, g in roots]
    order = _children_first([edge.node for edge, _ in edges])
    on_the_way: set[Node] = set()
    result = []
    sets: dict[Node, set[int]] = {}
    for node in order:
        children = [child for child, _ in node.next_functions if child is not None]
        if node in beginnings or any(child in on_the_way for child in children):
            on_the_way.add(node)
        aside: set[int] = {numbers[node]} if node in numbers else set()
        for child in children:
            if child not in on_the_way:
                aside |= sets[child]
        sets[node] = aside
        if node in on_the_way and aside:
            result.append(_Branch(node, sorted(aside)))
    for node in dict.fromkeys(edge.node for edge, _ in edges):  # what is passed on, and not made of what has arrived
        if node not in on_the_way and sets[node]:
            given = {edge.output_nr: gradient for edge, gradient in edges if edge.node is node}
            result.append(_Branch(node, sorted(sets[node]), tuple(given.get(i) for i in range(1 + max(given)))))
    return result


def _node(tensor: Tensor) -> Node:
    return get_gradient_edge(tensor).node


def _children_first(roots: Sequence[Node]) -> list[Node]:
    """All nodes of a graph, each after those that its gradients go to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, bool]] = [(root, False) for root in roots]
    while stack:
        node, over = stack.pop()
        if over:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((child, False) for child, _ in node.next_functions if child is not None and child not in seen)
    return order
