"""K-FAC against its definition: explicit Kronecker products, made sample by sample, in double precision."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.bench.optimizers import digits, network
from unisono.errors import TrainingError
from unisono.optim import KFAC
from unisono.plan.assignment import shared_out

STEPS = 20


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4, bias=False), nn.Tanh(), nn.Linear(4, 3))


def cnn() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, stride=2),
        nn.BatchNorm2d(3),
        nn.Tanh(),
        nn.Conv2d(3, 2, 2, bias=False),
        nn.Flatten(),
        nn.Linear(8, 3),
    )


SHAPES = {"mlp": (5,), "cnn": (1, 6, 6)}
SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "not clipped": {"kl_clip": None, "lr": 0.01},
    "no momentum": {"momentum": 0.0},
    "decay of weights": {"weight_decay": 0.1},
    "other averages": {"decay": 0.5},
    "no averages": {"decay": 0.0},
    "factors every 2 steps": {"factor_every": 2, "inverse_every": 2},
    "inverses every 6 steps, factors every 3": {"inverse_every": 6, "factor_every": 3},
    "inverses every 5 steps": {"inverse_every": 5},
    "much damping": {"damping": 1.0},
}


@pytest.mark.parametrize("kind", ["mlp", "cnn"])
@pytest.mark.parametrize("name", SWITCHES)
def test_it_is_its_definition(kind: str, name: str) -> None:
    torch.manual_seed(0)
    model = (mlp if kind == "mlp" else cnn)().double()
    dense = copy.deepcopy(model)
    given = {"lr": 0.05, "damping": 0.01, "inverse_every": 1, **SWITCHES[name]}
    optimizer = KFAC(model.parameters(), **given).watch(model)
    reference = Dense(dense, {"momentum": 0.9, "weight_decay": 0.0, "decay": 0.95, "kl_clip": 1e-3} | given)
    for step in range(STEPS):
        random = torch.Generator().manual_seed(step)
        inputs = torch.randn(7, *SHAPES[kind], generator=random).double()
        labels = torch.randint(0, 3, (7,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(inputs), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        reference.step(inputs, labels)
    for ours, theirs in zip(model.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)


class Dense:
    """From the definition: curvature matrices as large as a layer's weights are many, and their inverses."""

    def __init__(self, model: nn.Module, given: dict[str, Any]) -> None:
        self.model, self.given, self.taken = model, {"factor_every": 1, **given}, 0
        self.layers = [m for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
        self.averages: dict[nn.Module, list[Tensor]] = {}
        self.inverses: dict[nn.Module, Tensor] = {}
        self.moving: dict[nn.Parameter, Tensor] = {}

    def step(self, inputs: Tensor, labels: Tensor) -> None:
        given = self.given
        gradients: dict[Any, Tensor] = dict(zip(self.model.parameters(), self._gradients(inputs, labels), strict=True))
        if self.taken % given["factor_every"] == 0:
            for layer, new in self._curvature(inputs, labels).items():
                old = self.averages.get(layer)
                d = given["decay"]
                self.averages[layer] = (
                    new if old is None else [d * a + (1 - d) * b for a, b in zip(old, new, strict=True)]
                )
        if self.taken % given["inverse_every"] == 0:
            for layer, (a, g) in self.averages.items():
                whole = torch.kron(g, a)
                self.inverses[layer] = torch.linalg.inv(whole + given["damping"] * torch.eye(len(whole)))
        directions, change = {}, 0.0
        for layer in self.layers:
            whole_gradient = self._matrix(layer, gradients)
            v = (self.inverses[layer] @ whole_gradient.reshape(-1)).view_as(whole_gradient)
            change += given["lr"] ** 2 * abs(float((v * whole_gradient).sum()))
            directions[layer] = v
        factor = min(1.0, math.sqrt(given["kl_clip"] / change)) if given["kl_clip"] else 1.0
        for layer, v in directions.items():
            if layer.bias is not None:
                gradients[layer.bias], v = factor * v[:, -1], v[:, :-1]
            gradients[layer.weight] = (factor * v).reshape(layer.weight.shape)
        for p, d in gradients.items():
            d = d + given["weight_decay"] * p.detach()
            before = self.moving.get(p)
            u = self.moving[p] = d if before is None else given["momentum"] * before + d
            p.data = p.data - given["lr"] * u
        self.taken += 1

    def _gradients(self, inputs: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss = F.cross_entropy(self.model(inputs), labels)
        return torch.autograd.grad(loss, list(self.model.parameters()))

    def _matrix(self, layer: Any, gradients: dict[Any, Tensor]) -> Tensor:
        weight = gradients[layer.weight].reshape(len(layer.weight), -1)
        return weight if layer.bias is None else torch.cat([weight, gradients[layer.bias][:, None]], 1)

    def _curvature(self, inputs: Tensor, labels: Tensor) -> dict[Any, list[Tensor]]:
        """E[a a'] and E[g g'], one sample and one place after another."""
        seen: dict[Any, tuple[Tensor, Tensor]] = {}

        def note(layer: Any, arguments: Any, output: Tensor) -> None:
            seen[layer] = (arguments[0], output)

        statistics = {k: v.clone() for k, v in self.model.named_buffers()}
        handles = [layer.register_forward_hook(note) for layer in self.layers]
        losses = F.cross_entropy(self.model(inputs), labels, reduction="sum")
        slopes = torch.autograd.grad(losses, [seen[layer][1] for layer in self.layers])
        for handle in handles:
            handle.remove()
        for key, value in self.model.named_buffers():
            value.copy_(statistics[key])
        result = {}
        for layer, slope in zip(self.layers, slopes, strict=True):
            a_sum, g_sum, count = torch.zeros(()).double(), torch.zeros(()).double(), len(inputs)
            for n in range(count):
                for a, g in self._places(layer, seen[layer][0][n].detach(), slope[n]):
                    if layer.bias is not None:
                        a = torch.cat([a, torch.ones(1).double()])
                    a_sum = a_sum + torch.outer(a, a)
                    g_sum = g_sum + torch.outer(g, g)
            places = slope[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
            result[layer] = [a_sum / count, g_sum / (count * places)]
        return result

    def _places(self, layer: Any, given: Tensor, slope: Tensor) -> list[tuple[Tensor, Tensor]]:
        if isinstance(layer, nn.Linear):
            return [(given, slope)]
        (top, left), (down, right) = layer.padding, layer.stride
        height, width = layer.kernel_size
        padded = F.pad(given, (left, left, top, top))
        return [
            (padded[:, i * down : i * down + height, j * right : j * right + width].reshape(-1), slope[:, i, j])
            for i in range(slope.shape[1])
            for j in range(slope.shape[2])
        ]


def test_it_reaches_the_loss_of_sgd_in_half_the_steps() -> None:
    """Digits, the whole training set as one batch; SGD at the best of its rates."""
    training, _ = digits()
    inputs, labels = training.tensors

    def losses(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int, seed: int) -> list[float]:
        torch.manual_seed(seed)
        model = network()
        optimizer, found = make(model), []
        for _ in range(steps):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs), labels)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            found.append(float(loss.detach()))
        return found

    for seed in range(3):
        rates = (0.3, 0.5, 0.7, 1.0)
        reached = min(
            losses(lambda m, lr=rate: torch.optim.SGD(m.parameters(), lr=lr, momentum=0.9), 40, seed)[-1]  # type: ignore[misc]
            for rate in rates
        )
        ours = losses(
            lambda m: KFAC(m.parameters(), lr=0.3, kl_clip=None, damping=3e-3, inverse_every=1).watch(m), 20, seed
        )
        assert min(ours) <= reached, (ours, reached)


@given(st.lists(st.integers(1, 200), min_size=1, max_size=6), st.integers(1, 3))
def test_decompositions_are_shared_out(sizes: list[int], workers: int) -> None:
    """Every matrix once; within Graham's bound of the best, which is found by trying all."""
    costs = [size**3 for size in sizes]

    def most(owners: Sequence[int]) -> int:
        return max(sum(c for c, owner in zip(costs, owners, strict=True) if owner == w) for w in range(workers))

    best = min(map(most, itertools.product(range(workers), repeat=len(costs))))
    owners = shared_out(costs, workers)
    assert len(owners) == len(costs) and set(owners) <= set(range(workers))
    assert most(owners) <= best * (4 / 3 - 1 / (3 * workers)) * (1 + 1e-12)


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_digits_model_is_shared_out_well(workers: int) -> None:
    """At most 1.1 times what cannot be less."""
    costs = [n**3 for n in (65, 128, 129, 10)]
    owners = shared_out(costs, workers)
    loads = [sum(c for c, owner in zip(costs, owners, strict=True) if owner == worker) for worker in range(workers)]
    assert max(loads) / sum(costs) <= 1.1 * max(1 / workers, max(costs) / sum(costs))


def test_same_padding_and_a_last_layer_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 3, (2, 3), padding="same"), nn.Flatten(), nn.Linear(48, 2))
    optimizer = KFAC(model[2].parameters(), lr=0.1).watch(model)
    assert optimizer.watched == ["2"]
    optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    before = [p.detach().clone() for p in model.parameters()]
    F.mse_loss(model(torch.randn(5, 2, 4, 4)), torch.zeros(5, 2)).backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    optimizer.close()


def test_what_it_cannot_do_is_refused() -> None:
    with pytest.raises(ValueError, match="no linear or convolutional layer"):
        KFAC([nn.Parameter(torch.ones(2))]).watch(nn.LayerNorm(3))
    with pytest.raises(ValueError, match=r"damping is 0.0; it must be above 0"):
        KFAC([nn.Parameter(torch.ones(2))], damping=0.0)
    with pytest.raises(ValueError, match=r"inverse_every is 3; it must be a multiple of factor_every \(2\)"):
        KFAC([nn.Parameter(torch.ones(2))], factor_every=2, inverse_every=3)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="watches a model already"):
        KFAC(model.parameters()).watch(model).watch(model)


def test_tied_and_frozen_weights_are_updated_as_by_sgd() -> None:
    """Their curvature is no product of a layer's inputs and outputs; what is frozen stays."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    model[2].weight.requires_grad_(False)
    assert KFAC(model.parameters()).watch(model).watched == ["3"]


def test_it_goes_on_from_its_state() -> None:
    """The curvature is part of the state_dict, and when it is next decomposed."""

    def steps(model: nn.Module, optimizer: KFAC, numbers: range) -> None:
        for step in numbers:
            inputs = torch.randn(7, 5, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            F.mse_loss(model(inputs), torch.ones(7, 3)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()

    given: dict[str, Any] = {"lr": 0.05, "factor_every": 2, "inverse_every": 4}
    model = mlp()
    optimizer = KFAC(model.parameters(), **given).watch(model)
    steps(model, optimizer, range(3))
    other = copy.deepcopy(mlp())
    other.load_state_dict(model.state_dict())
    later = KFAC(other.parameters(), **given).watch(other)
    later.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for one, its in ((model, optimizer), (other, later)):
        steps(one, its, range(3, 9))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_layer_without_rows_tells_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    (model(torch.randn(4, 3)).sum() + model[1](torch.zeros(0, 2)).sum()).backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_curvature_that_is_not_finite_is_told_of() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    (model(torch.zeros(1, 3)) * 0).abs().sqrt().sum().backward()  # the root's slope at 0
    with pytest.raises(TrainingError, match="the curvature of 0 is not finite"):
        optimizer.step()


def test_only_what_torchs_layers_compute_is_learned() -> None:
    """A subclass that computes something else is updated as by SGD; inputs may be given by name, or without a batch."""

    class Scaled(nn.Linear):
        def forward(self, input: Tensor, scale: float = 2.0) -> Tensor:
            return super().forward(input) * scale

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.image, self.scaled, self.last = nn.Conv2d(1, 2, 2), Scaled(4, 3), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.scaled(scale=0.5, input=self.image(x).flatten()[:4])
            output: Tensor = self.last(input=y)
            return output

    model = Named()
    optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    assert optimizer.watched == ["image", "last"]
    model(torch.randn(1, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
