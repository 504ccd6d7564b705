"""Newton's method for convex and small models: directions by conjugate gradients, from products with the curvature.

Both optimizers work on one process, or on several that each have a part of the data: what has to be summed over them
goes through ``total``, and is counted in ``rounds``.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from unisono.optim.layerwise import refuse_unless
from unisono.run.summation import fold

Part = Tensor | tuple[Tensor, Tensor]
"""The loss on a part of the data, with its graph and without a backward; for Gauss-Newton, the output that the loss was
computed from, and the loss."""
Closure = Callable[[], Part | list[Part]]
"""This process's part of the data, or several of them."""
Total = Callable[[Sequence[Tensor]], Tensor]
"""The sum of tensors, one for each part of this process, over all processes; the same on each."""
Product = Callable[[Tensor], list[Tensor]]
"""Vector -> the product of each part's curvature with it."""

SUFFICIENT, SHRINK, MOST_HALVINGS = 1e-4, 0.5, 40
"""Of Armijo's line search: the part of the expected decrease that is enough; how a step that is too long shrinks."""


class NewtonCG(Optimizer):
    """Truncated Newton with a line search (Nocedal and Wright, "Numerical Optimization", 2006, algorithm 7.1; Martens,
    "Deep learning via Hessian-free optimization", 2010, for Gauss-Newton products and damping).

    In a step, for the loss f with gradient g and curvature B (the Hessian, or Gauss-Newton's matrix)::

        p: (B + damping I) p = -g, by conjugate gradients until |residual| <= min(0.5, sqrt(|g|)) |g|
        w = w + t p,  t = 1, 1/2, 1/4, ... until f(w + t p) <= f(w) + 1e-4 t g'p

    Where the curvature along a direction is not positive, conjugate gradients end with what they have. Damping that is
    not 0 follows the ratio of the actual decrease to the expected one (Levenberg-Marquardt).

    Arguments:
        params: parameters of one dtype; double precision, where the optimum is to be found to its last digits.
        curvature: "hessian", or "gauss_newton", which is never negative where the loss is convex in the output.
        damping: to begin with.
        most_products: with the curvature, in a step.
        total: sums over parts and processes; default: those of this process.

    Attributes:
        rounds: sums over processes so far, each of them a round of communication.

    Raises:
        ValueError: for an argument outside its range.

    >>> weight = nn.Parameter(torch.tensor([5.0, -3.0], dtype=torch.float64))
    >>> optimizer = NewtonCG([weight])
    >>> float(optimizer.step(lambda: ((weight - torch.tensor([1.0, 2.0])) ** 2).sum()))
    41.0
    >>> [round(value, 12) for value in weight.tolist()]
    [1.0, 2.0]
    """

    recorded = ("curvature", "most_products")
    """Settings besides those of groups, to record with a run."""

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        curvature: str = "hessian",
        damping: float = 0.0,
        most_products: int = 250,
        total: Total = lambda parts: fold(parts, torch.add),
    ) -> None:
        refuse_unless(curvature in ("hessian", "gauss_newton"), "curvature", curvature, "hessian or gauss_newton")
        refuse_unless(damping >= 0, "damping", damping, "at least 0")
        refuse_unless(most_products >= 1, "most_products", most_products, "at least 1")
        super().__init__(params, {"damping": damping})
        if len(self.param_groups) != 1:
            raise ValueError(f"{type(self).__name__} has one direction for all parameters; give them in one group")
        self._gauss_newton = curvature == "gauss_newton"
        self.curvature, self.most_products = curvature, most_products
        self._total = total
        self._entering: Callable[[int], None] = lambda part: None
        self.rounds = 0

    def step(  # type: ignore[override]
        self, closure: Closure, total: Total | None = None, entering: Callable[[int], None] = lambda part: None
    ) -> Tensor:
        """Take one step; the loss before it, over all processes.

        Arguments:
            total: in place of the one that the optimizer was made with.
            entering: called with the number of a part before anything is computed of it that its backward would.
        """
        before = self._total, self._entering
        self._total, self._entering = total or self._total, entering
        try:
            return self._step(closure)
        finally:
            self._total, self._entering = before

    def _step(self, closure: Closure) -> Tensor:
        members: list[nn.Parameter] = self.param_groups[0]["params"]
        parts = self._evaluate(closure)
        slopes = [self._slope(number, loss, members) for number, (_, loss) in enumerate(parts)]
        found = self._sum(
            [
                torch.cat([loss.detach().reshape(1).to(own.dtype), own.detach()])
                for (_, loss), own in zip(parts, slopes, strict=True)
            ]
        )
        before, gradient = found[0], found[1:]
        size = float(gradient.norm())
        if not size or not math.isfinite(size) or not math.isfinite(float(before)):
            return before
        product = self._products(parts, slopes, members)
        direction = self._direction(product, gradient)
        slope = torch.dot(gradient, direction)
        if slope >= 0:  # not a descent: steepest descent is
            direction, slope = -gradient, -torch.dot(gradient, gradient)
        curved = self._damped(self._sum_of(product))(direction) if self.param_groups[0]["damping"] else None
        del parts, slopes, product, found  # and their graphs
        after = self._search(closure, members, direction, float(before), float(slope))
        if curved is not None:
            self._follow(after - float(before), float(slope + 0.5 * torch.dot(direction, curved)))
        return before

    def _evaluate(self, closure: Closure, *, graph: bool = True) -> list[tuple[Tensor | None, Tensor]]:
        with torch.set_grad_enabled(graph):
            result = closure()
        given = result if isinstance(result, list) else [result]
        parts: list[tuple[Tensor | None, Tensor]] = [p if isinstance(p, tuple) else (None, p) for p in given]
        if self._gauss_newton and any(output is None for output, _ in parts):
            raise ValueError("gauss_newton needs the output that the loss was computed from: return (output, loss)")
        return parts

    def _slope(self, number: int, loss: Tensor, members: Sequence[nn.Parameter]) -> Tensor:
        """A part's gradient, with its graph where that is needed; 0 where it depends on nothing."""
        if not loss.requires_grad:
            return torch.zeros_like(_flat(members))
        self._entering(number)
        further = not self._gauss_newton
        return _flat(
            torch.autograd.grad(loss, members, create_graph=further, retain_graph=True, materialize_grads=True)
        )

    def _sum(self, parts: Sequence[Tensor]) -> Tensor:
        self.rounds += 1
        return self._total(parts)

    def _sum_of(self, product: Product) -> Callable[[Tensor], Tensor]:
        return lambda vector: self._sum(product(vector))

    def _products(
        self,
        parts: Sequence[tuple[Tensor | None, Tensor]],
        slopes: Sequence[Tensor],
        members: Sequence[nn.Parameter],
    ) -> Product:
        """All parts' products."""
        each = []
        for number, ((output, loss), own) in enumerate(zip(parts, slopes, strict=True)):
            self._entering(number)
            each.append(self._product(output, loss, own, members))

        def products(vector: Tensor) -> list[Tensor]:
            found = []
            for number, product in enumerate(each):
                self._entering(number)
                found.append(product(vector))
            return found

        return products

    def _damped(self, product: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        damping = self.param_groups[0]["damping"]
        return lambda vector: product(vector).add(vector, alpha=damping)

    def _product(
        self, output: Tensor | None, loss: Tensor, gradient: Tensor, members: Sequence[nn.Parameter]
    ) -> Callable[[Tensor], Tensor]:
        """Vector -> a part's share of the product of the curvature with it."""
        if not (loss if self._gauss_newton else gradient).requires_grad:
            return torch.zeros_like
        if output is None or not self._gauss_newton:
            return lambda vector: _flat(
                torch.autograd.grad(gradient, members, vector, retain_graph=True, materialize_grads=True)
            ).detach()
        (by_output,) = torch.autograd.grad(loss, output, create_graph=True)
        probe = torch.zeros_like(output, requires_grad=True)
        pulled = _flat(torch.autograd.grad(output, members, probe, create_graph=True, materialize_grads=True))

        def product(vector: Tensor) -> Tensor:
            (pushed,) = torch.autograd.grad(pulled, probe, vector, retain_graph=True)  # the Jacobian's product
            (curved,) = torch.autograd.grad(by_output, output, pushed, retain_graph=True, materialize_grads=True)
            found = torch.autograd.grad(output, members, curved, retain_graph=True, materialize_grads=True)
            return _flat(found).detach()

        return product

    def _direction(self, product: Product, gradient: Tensor) -> Tensor:
        """All processes solve the same system together."""
        return conjugate_gradients(
            self._damped(self._sum_of(product)), gradient, _tolerance(gradient), self.most_products
        )

    @torch.no_grad()
    def _search(
        self, closure: Closure, members: Sequence[nn.Parameter], direction: Tensor, before: float, slope: float
    ) -> float:
        """Move along the direction as far as pays; the loss there."""
        start, length = [member.detach().clone() for member in members], 1.0
        for _ in range(MOST_HALVINGS):
            _move(members, start, direction, length)
            losses = [loss.detach().reshape(1).to(members[0].dtype) for _, loss in self._evaluate(closure, graph=False)]
            after = float(self._sum(losses))
            if after <= before + SUFFICIENT * length * slope:
                return after
            length *= SHRINK
        _move(members, start, direction, 0.0)  # nothing is gained any more, to the last digit
        return before

    def _follow(self, actual: float, expected: float) -> None:
        """Damping grows where the quadratic model has promised too much, and shrinks where it holds."""
        group = self.param_groups[0]
        ratio = actual / expected if expected else 1.0
        if ratio < 0.25:
            group["damping"] *= 1.5
        elif ratio > 0.75:
            group["damping"] /= 1.5


class GIANT(NewtonCG):
    """Averaged local Newton directions (Wang et al., "GIANT: Globally Improved Approximate Newton Method for
    Distributed Optimization", 2018): where data are divided at random, the curvature of a part is nearly that of all.

    Each process solves with its own curvature for the common gradient, and directions are averaged: three rounds of
    communication a step, however many products a direction takes, and one more each time that a step was too long.

    Arguments:
        share: this process's part of the data, from 0 to 1.
        processes: how many there are.
        arguments: as of `NewtonCG`.
    """

    def __init__(self, params: Iterable[nn.Parameter], share: float, processes: int, **arguments: Any) -> None:
        refuse_unless(0 < share <= 1, "share", share, "above 0, at most 1")
        refuse_unless(processes >= 1, "processes", processes, "at least 1")
        super().__init__(params, **arguments)
        self._share = share
        self._processes = processes

    def _direction(self, product: Product, gradient: Tensor) -> Tensor:
        """Every process solves a system of its own."""
        own = self._damped(lambda vector: fold(product(vector), torch.add) / self._share)
        found = conjugate_gradients(own, gradient, _tolerance(gradient), self.most_products)
        return self._sum([found]) / self._processes


def _tolerance(gradient: Tensor) -> float:
    """How exactly a direction is to be found: ever more so towards the optimum (Eisenstat and Walker, 1996)."""
    size = float(gradient.norm())
    return min(0.5, math.sqrt(size))


def conjugate_gradients(product: Callable[[Tensor], Tensor], gradient: Tensor, tolerance: float, most: int) -> Tensor:
    """Solve B p = -g until the residual is ``tolerance`` times as long as g, or ``most`` products were taken.

    >>> matrix = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    >>> gradient = torch.tensor([1.0, -2.0], dtype=torch.float64)
    >>> [round(value, 9) for value in conjugate_gradients(lambda v: matrix @ v, gradient, 1e-9, 9).tolist()]
    [-1.0, 1.0]
    """
    enough = tolerance * float(gradient.norm())
    solution, residual = torch.zeros_like(gradient), gradient.clone()
    direction, square = -residual, torch.dot(residual, residual)
    for _ in range(most):
        curved = product(direction)
        curvature = torch.dot(direction, curved)
        if curvature <= 0:
            return solution if bool(solution.any()) else -gradient
        length = square / curvature
        solution = solution + length * direction
        residual = residual + length * curved
        after = torch.dot(residual, residual)
        if float(after) ** 0.5 <= enough:
            break
        direction = -residual + (after / square) * direction
        square = after
    return solution


def _flat(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def _move(members: Sequence[nn.Parameter], start: Sequence[Tensor], direction: Tensor, length: float) -> None:
    at = 0
    for member, value in zip(members, start, strict=True):
        part = direction[at : at + value.numel()].view_as(value)
        member.copy_(value.add(part, alpha=length))
        at += value.numel()
