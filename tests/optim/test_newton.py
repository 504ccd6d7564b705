"""Newton-CG and GIANT on logistic regressions whose optima are known to ten digits; products against dense matrices."""

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.optim import GIANT, NewtonCG
from unisono.optim.newton import conjugate_gradients

BREAST_CANCER, DIGITS = 37.7589459619, 358.54894773
"""The least sum of losses and half the squared norm of weights, without intercepts: scikit-learn's with C = 1."""


class Problem:
    """Logistic regression; a part of its rows is a part of its objective."""

    def __init__(self, name: str) -> None:
        found = (load_breast_cancer if name == "breast_cancer" else load_digits)()
        inputs = torch.from_numpy(found.data).double()
        self.labels = torch.from_numpy(found.target).long()
        if name == "breast_cancer":
            self.inputs = (inputs - inputs.mean(0)) / inputs.std(0, unbiased=False)
            self.classes = 1
        else:
            self.inputs, self.classes = inputs / 16, 10
        self.optimum = BREAST_CANCER if name == "breast_cancer" else DIGITS

    def start(self) -> tuple[nn.Parameter, nn.Parameter]:
        weight = torch.zeros(self.classes, self.inputs.shape[1], dtype=torch.float64)
        return nn.Parameter(weight), nn.Parameter(torch.zeros(self.classes, dtype=torch.float64))

    def closure(
        self, weight: Tensor, intercept: Tensor, rows: slice | Tensor = slice(None), output: bool = False
    ) -> Callable[[], Any]:
        inputs, labels = self.inputs[rows], self.labels[rows]
        share = len(labels) / len(self.labels)

        def evaluate() -> Any:
            scores = F.linear(inputs, weight, intercept)
            if self.classes == 1:
                loss = F.binary_cross_entropy_with_logits(scores[:, 0], labels.double(), reduction="sum")
            else:
                loss = F.cross_entropy(scores, labels, reduction="sum")
            loss = loss + share * 0.5 * (weight**2).sum()
            return (scores, loss) if output else loss

        return evaluate


@pytest.mark.parametrize("name", ["breast_cancer", "digits"])
def test_it_reaches_the_known_optimum(name: str) -> None:
    """To 1e-8, in at most 15 steps."""
    problem = Problem(name)
    parameters = problem.start()
    optimizer = NewtonCG(parameters)
    closure = problem.closure(*parameters)
    for _ in range(15):
        optimizer.step(closure)
    assert abs(float(closure().detach()) - problem.optimum) < 1e-8


@pytest.mark.parametrize("curvature", ["hessian", "gauss_newton"])
def test_products_are_those_of_the_dense_matrix(curvature: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    inputs, targets = torch.randn(6, 3).double(), torch.randn(6, 2).double()
    members = list(model.parameters())
    vector = torch.randn(sum(p.numel() for p in members)).double()

    def loss_of(flat: Tensor) -> Tensor:
        return (output_of(flat) - targets).pow(4).sum()

    def output_of(flat: Tensor) -> Tensor:
        parts, at = {}, 0
        for name, p in model.named_parameters():
            parts[name] = flat[at : at + p.numel()].view_as(p)
            at += p.numel()
        found: Tensor = torch.func.functional_call(model, parts, (inputs,))
        return found

    start = torch.cat([p.detach().reshape(-1) for p in members])
    if curvature == "hessian":
        dense = torch.func.hessian(loss_of)(start)
    else:
        jacobian = torch.func.jacrev(output_of)(start).reshape(-1, len(start))
        curved = torch.diag(12 * (output_of(start) - targets).reshape(-1) ** 2)
        dense = jacobian.T @ curved @ jacobian
    optimizer = NewtonCG(model.parameters(), curvature=curvature)
    output = model(inputs)
    loss = (output - targets).pow(4).sum()
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, members, create_graph=True)])
    product = optimizer._product(output, loss, gradient, members)
    torch.testing.assert_close(product(vector), dense @ vector, rtol=1e-9, atol=1e-9)


def test_gauss_newton_with_damping_trains_a_small_network() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    inputs = torch.randn(40, 2).double()
    targets = (inputs[:, :1] * inputs[:, 1:]).sin()
    optimizer = NewtonCG(model.parameters(), curvature="gauss_newton", damping=1.0)

    def closure() -> tuple[Tensor, Tensor]:
        output = model(inputs)
        return output, (output - targets).pow(2).mean()

    losses = [float(optimizer.step(closure)) for _ in range(40)]
    assert losses[-1] < 0.01 * losses[0] and all(b <= a for a, b in itertools.pairwise(losses))


def test_it_is_the_same_over_parts_of_the_data() -> None:
    """Sums over processes make one of several; here two, in lockstep, as generators of what they ask for."""
    problem = Problem("breast_cancer")
    whole = problem.start()
    NewtonCG(whole).step(problem.closure(*whole))
    parameters = problem.start()
    halves = [problem.closure(*parameters, slice(None, 300)), problem.closure(*parameters, slice(300, None))]
    optimizer = NewtonCG(parameters)
    optimizer.step(lambda: halves[0]() + halves[1]())
    for a, b in zip(whole, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("processes", [2, 4])
def test_giant_needs_few_rounds(processes: int) -> None:
    """As Newton-CG reaches it, with a round a product; GIANT with three a step, in a few more steps."""
    problem = Problem("digits")
    order = torch.randperm(len(problem.labels), generator=torch.Generator().manual_seed(0))
    parts = order.tensor_split(processes)
    exact = problem.start()
    newton = NewtonCG(exact)
    while float(problem.closure(*exact)().detach()) > problem.optimum + 1e-4:
        newton.step(problem.closure(*exact))
    members = [problem.start() for _ in parts]
    steps, rounds = together(
        [
            GIANT(own, share=len(part) / len(order), processes=processes)
            for own, part in zip(members, parts, strict=True)
        ],
        [problem.closure(*own, part) for own, part in zip(members, parts, strict=True)],
        lambda: float(problem.closure(*members[0])().detach()) < problem.optimum + 1e-4,
    )
    print(f"Newton-CG: {newton.rounds} rounds; GIANT on {processes}: {rounds} rounds in {steps} steps")
    assert rounds < newton.rounds
    for own in members[1:]:
        for a, b in zip(own, members[0], strict=True):
            assert torch.equal(a, b)


def together(
    optimizers: list[GIANT], closures: list[Callable[[], Any]], done: Callable[[], bool], most: int = 60
) -> tuple[int, int]:
    """Run processes as threads that meet at every sum."""
    meeting = threading.Barrier(len(optimizers))
    brought: list[Tensor] = [torch.zeros(0)] * len(optimizers)
    steps = [0]
    over = [False]

    def run(number: int) -> None:
        def total(parts: Sequence[Tensor]) -> Tensor:
            (brought[number],) = parts
            meeting.wait()
            found = torch.stack(brought).sum(0)
            meeting.wait()
            return found

        optimizers[number]._total = total
        while not over[0]:
            optimizers[number].step(closures[number])
            meeting.wait()
            if number == 0:
                steps[0] += 1
                over[0] = done() or steps[0] >= most
            meeting.wait()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(optimizers))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert steps[0] < most
    return steps[0], optimizers[0].rounds


def test_a_closure_may_return_several_parts() -> None:
    """Their losses are summed, as are their gradients and products."""
    problem = Problem("breast_cancer")
    whole, parts = problem.start(), problem.start()
    of_parts = [problem.closure(*parts, rows) for rows in (slice(None, 100), slice(100, 400), slice(400, None))]
    one, several = NewtonCG(whole), NewtonCG(parts)
    for _ in range(3):
        one.step(problem.closure(*whole))
        several.step(lambda: [part() for part in of_parts])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_conjugate_gradients_stop_at_negative_curvature() -> None:
    matrix, gradient = torch.diag(torch.tensor([1.0, -1.0])), torch.tensor([0.0, 1.0])
    assert conjugate_gradients(lambda v: matrix @ v, gradient, 1e-6, 9).tolist() == [0.0, -1.0]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: NewtonCG(p, curvature="fisher"), "curvature is 'fisher'; it must be hessian or gauss_newton"),
        (lambda p: NewtonCG(p, damping=-1.0), "damping is -1.0"),
        (lambda p: GIANT(p, share=0.0, processes=2), "share is 0.0; it must be above 0, at most 1"),
        (lambda p: NewtonCG([{"params": p}, {"params": [nn.Parameter(torch.ones(1))]}]), "give them in one group"),
    ],
)
def test_arguments_outside_their_range_are_refused(make: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make([nn.Parameter(torch.zeros(2))])
    with pytest.raises(ValueError, match="needs the output that the loss was computed from"):
        parameter = nn.Parameter(torch.zeros(2))
        NewtonCG([parameter], curvature="gauss_newton").step(lambda: parameter.sum())
