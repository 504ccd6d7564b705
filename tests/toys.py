"""Small models, data sets and optimizers that exercise one thing each, made by name so that workers can make them."""

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from unisono.optim import KFAC, LAMB, LARS, NewtonCG

SAMPLES = 60


class Tied(nn.Module):
    """Input and output embedding share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 8)
        self.mix = nn.Linear(8, 8)
        self.head = nn.Linear(8, 11, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(torch.tanh(self.mix(self.embedding(x.abs().long().clamp(max=10)[:, 0]))))
        return y[:, :4]


class Untouched(nn.Module):
    """A branch that few micro-batches take, and one that none takes."""

    def __init__(self) -> None:
        super().__init__()
        self.always = nn.Linear(6, 4)
        self.sometimes = nn.Linear(6, 4)
        self.never = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.always(x)
        if float(x[0, 0].detach()) > 0.6:
            y = y + self.sometimes(x)
        return y


class Checkpointed(nn.Module):
    """Dropout inside activation checkpointing, one module called twice: the recomputation must draw the same."""

    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.first = nn.Linear(6, 16)
        self.drop = nn.Dropout(0.3)
        self.second = nn.Linear(16, 16)
        self.out = nn.Linear(16, 4)

    def inner(self, x: Tensor) -> Tensor:
        y: Tensor = self.drop(torch.tanh(self.second(self.drop(x))))
        return y

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.inner, x, use_reentrant=False) if self.on else self.inner(x)
        y: Tensor = self.out(x)
        return y


class Counter(nn.Module):
    """Counts its calls on itself: not pure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        y: Tensor = self.linear(x) * self.calls
        return y


class PythonNoise(nn.Module):
    """Draws from Python's random: not pure."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + random.random()
        return y**2


class WritesParameter(nn.Module):
    """Changes a parameter in its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.linear.weight.clamp_(-1, 1)
        y: Tensor = self.linear(x)
        return y


class HandsOn(nn.Module):
    """Layers that hand on what they were given, keep results on themselves, add a parameter last, and are changed in
    place behind: where a layer's backward begins is not plain to see."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.shift = nn.Linear(8, 8), nn.Parameter(torch.zeros(8))
            self.aside: Tensor | None = None

        def forward(self, x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
            y = torch.tanh(self.linear(x)) * scale
            self.aside = self.linear.weight.t().mean()
            return y + self.shift, scale

    def __init__(self) -> None:
        super().__init__()
        self.first, self.scale = nn.Linear(6, 8), nn.Linear(6, 8)
        self.layers = nn.ModuleList(HandsOn.Layer() for _ in range(4))
        self.out = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        scale, y = self.scale(x), self.first(x)
        for layer in self.layers:
            y, scale = layer(y, scale)
            y += 1.0
        asides: list[Any] = [layer.aside for layer in self.layers]
        result: Tensor = self.out(y) + sum(asides)
        return result


def mlp() -> nn.Module:
    """Larger than one block, with dropout."""
    return nn.Sequential(
        nn.Linear(6, 300), nn.ReLU(), nn.Dropout(0.2), nn.Linear(300, 300), nn.Tanh(), nn.Linear(300, 4)
    )


class Slow(nn.Linear):
    """Takes 0.3 s a forward."""

    def forward(self, input: Tensor) -> Tensor:
        time.sleep(0.3)
        return super().forward(input)


def frozen() -> nn.Module:
    """A first layer that is not trained, and a slow one."""
    return nn.Sequential(nn.Linear(6, 300).requires_grad_(False), nn.Tanh(), Slow(300, 4))


def plain() -> nn.Module:
    """Nothing that draws: what a plain loop computes too."""
    return nn.Sequential(nn.Linear(6, 300), nn.Tanh(), nn.Linear(300, 301), nn.ReLU(), nn.Linear(301, 4))


class Scaled(nn.Module):
    """A layer, and one number that is learned."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.scale = nn.Parameter(torch.tensor(1.0))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x) * self.scale
        return y


class Embedded(nn.Module):
    """A table with sparse gradients, of which a sample uses six rows, and a layer."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.EmbeddingBag(1000, 8, mode="sum", sparse=sparse)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.table((x * 1e4).long() % 1000))
        return y


class EmbeddedAndTied(nn.Module):
    """A table whose lookups have sparse gradients, and which is a layer's weight too, with a dense one."""

    def __init__(self, sparse: bool = True) -> None:
        super().__init__()
        self.table = nn.Embedding(40, 4, sparse=sparse)
        self.mix = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.mix(self.table((x[:, 0] * 1e4).long() % 40)))
        return nn.functional.linear(y, self.table.weight)[:, :4]


def norm() -> nn.Module:
    """BatchNorm and dropout."""
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1), nn.Linear(16, 4))


def double() -> nn.Module:
    """Parameters of two dtypes."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 8)
            self.b = nn.Linear(8, 4).double()

        def forward(self, x: Tensor) -> Tensor:
            y: Tensor = self.b(self.a(x).double())
            return y.float()

    return Mixed()


def wide() -> nn.Module:
    """Matrices that are large enough to be compressed."""
    return nn.Sequential(nn.Linear(6, 128), nn.Tanh(), nn.Linear(128, 64), nn.Tanh(), nn.Linear(64, 4))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "hands_on": HandsOn,
    "mlp": mlp,
    "frozen": frozen,
    "plain": plain,
    "norm": norm,
    "embedded": Embedded,
    "embedded_dense": lambda: Embedded(sparse=False),
    "scaled": Scaled,
    "wide": wide,
    "tied": Tied,
    "smooth": lambda: nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 4)),
    "normed": lambda: nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.LayerNorm(4)),
    "embedded_and_tied": lambda: EmbeddedAndTied(),
    "untouched": Untouched,
    "double": double,
    "checkpointed": lambda: Checkpointed(True),
    "not_checkpointed": lambda: Checkpointed(False),
    "counter": Counter,
    "python_noise": PythonNoise,
    "writes_parameter": WritesParameter,
}


class Samples:
    """Pairs of (6,) and (4,); with ``augment``, noise from python, numpy and torch is added to each."""

    def __init__(self, augment: bool = False, fail_at: int | None = None) -> None:
        generator = torch.Generator().manual_seed(1)
        self.inputs = torch.randn(SAMPLES, 6, generator=generator)
        self.targets = torch.randn(SAMPLES, 4, generator=generator)
        self.augment = augment
        self.fail_at = fail_at

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.fail_at:
            raise ValueError("this sample is broken")
        x = self.inputs[index]
        if self.augment:
            x = x + random.random() + float(np.random.rand()) + torch.rand(6)
        return x, self.targets[index]


class SkewedSamples(Samples):
    """Some of which say that they take nine times as much as others."""

    def cost(self, index: int) -> int:
        return 9 if index % 7 == 0 else 1


def weighted(output: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """A masked loss: (sum, weight); the weight differs between micro-batches."""
    mask = (target[:, 0] > 0).float()
    return (((output - target) ** 2).mean(1) * mask).sum(), mask.sum()


def no_weight(output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Everything masked."""
    return ((output - target) ** 2).sum(), 0.0


def sometimes(output: Tensor, target: Tensor) -> tuple[Tensor, float]:
    """Some micro-batches are masked whole, and depend on nothing."""
    if float(target[0, 0]) > 0.5:
        return torch.zeros(()), 0.0
    return ((output - target) ** 2).mean(), 1.0


def not_a_number(output: Tensor, target: Tensor) -> Tensor:
    """A loss that is NaN."""
    return (output - target).sum() * float("nan")


def not_smooth(output: Tensor, target: Tensor) -> Tensor:
    """A number whose gradient is none."""
    return (output * 0).abs().sqrt().sum()


def slow(output: Tensor, target: Tensor) -> Tensor:
    """A loss that takes its time."""
    time.sleep(0.06)
    return F.mse_loss(output, target)


LOSSES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "mse": F.mse_loss,
    "weighted": weighted,
    "no_weight": no_weight,
    "sometimes": sometimes,
    "nan": not_a_number,
    "not_smooth": not_smooth,
    "slow": slow,
}


class Coupled(torch.optim.Optimizer):
    """A custom optimizer whose update depends on all gradients, with a plain number in its group."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float) -> None:
        super().__init__(params, {"lr": lr, "count": 0})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["count"] += 1
            total = sum(float(p.grad.double().pow(2).sum()) for p in group["params"] if p.grad is not None)
            for p in group["params"]:
                if p.grad is not None:
                    state = self.state[p]
                    if "average" not in state:
                        state["average"] = torch.zeros_like(p)
                    state["average"].lerp_(p.grad, 0.5)
                    p.data.add_(state["average"], alpha=-group["lr"] / (group["count"] + total**0.5))


def muon(params: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    """Muon for matrices only; vectors stay as they are."""
    return torch.optim.Muon([p for p in params if p.dim() == 2], lr=1e-2)


OPTIMIZERS: dict[str, Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.01, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-2, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, lr=1.0),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "muon": muon,
    "lars": lambda p: LARS(p, lr=0.5, weight_decay=1e-2, trust_coefficient=0.02, nesterov=True),
    "lamb": lambda p: LAMB(p, lr=1e-2, exclude_vectors=False),
    "kfac": lambda p: KFAC(p, lr=0.05, weight_decay=1e-2, damping=1e-2, factor_every=2, inverse_every=4),
    "newton": lambda p: NewtonCG(p),
    "gauss_newton": lambda p: NewtonCG(p, curvature="gauss_newton", damping=1.0),
    "coupled": lambda p: Coupled(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p),
    "sparse_adam": lambda p: torch.optim.SparseAdam(list(p)),
}
