"""K-FAC: SGD along the natural gradient, whose curvature is a Kronecker product of two small matrices for each layer.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; for convolutions
Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", 2016; clipping by the
change of the prediction as in Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored
approximations", 2017.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from unisono.optim.layerwise import moving, refuse_unless

Layer = nn.Linear | nn.Conv2d


@dataclass(slots=True)
class Factors:
    """One layer's curvature: A of its inputs, G of the gradients of its outputs, averaged, and their eigenvectors.

    Attributes:
        sums: of what backwards have added since the last step, and how many did.
    """

    inputs: Tensor | None = None
    outputs: Tensor | None = None
    sums: list[Tensor] = field(default_factory=list)
    backwards: int = 0
    bases: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


class KFAC(Optimizer):
    """K-FAC for the linear and convolutional layers of a model; everything else is updated by plain SGD.

    For a layer with weights W (with the bias as a column), inputs a (with a 1 for the bias) and gradients g of the
    outputs of a sample::

        A = E[a a']          for a convolution the sum over places
        G = E[g g']          for a convolution the mean over places
        A, G: running averages, ``decay`` of the last and the rest of this step's
        V: (A (x) G + damping I) vec(V) = vec(grad W)     by their eigenvectors, anew every ``inverse_every`` steps
        v = min(1, sqrt(kl_clip / (lr^2 sum |V . grad W|)))          over all layers
        u = momentum u + v V + weight_decay W;   W = W - lr u

    Gradients are those of the loss that is trained (the empirical Fisher matrix). The loss is a mean over the rows of a
    layer's output: samples, or all leading dimensions.

    Arguments:
        params: parameters, or groups of them, each with an ``lr``, ``momentum`` and ``weight_decay`` of its own.
        damping: added to the curvature.
        decay: of running averages; the first step's are taken as they are.
        factor_every: steps between updates of A and G.
        inverse_every: steps between decompositions.
        kl_clip: limit of the change of predictions; None for none.

    Raises:
        ValueError: for an argument outside its range.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    >>> loss = F.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 2))
    >>> loss.backward()
    >>> optimizer.step()
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter] | Iterable[dict[str, Any]],
        lr: float = 0.1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        damping: float = 1e-3,
        decay: float = 0.95,
        factor_every: int = 1,
        inverse_every: int = 10,
        kl_clip: float | None = 1e-3,
    ) -> None:
        refuse_unless(lr >= 0, "lr", lr, "at least 0")
        refuse_unless(0 <= momentum < 1, "momentum", momentum, "at least 0 and below 1")
        refuse_unless(weight_decay >= 0, "weight_decay", weight_decay, "at least 0")
        refuse_unless(damping > 0, "damping", damping, "above 0")
        refuse_unless(0 <= decay < 1, "decay", decay, "at least 0 and below 1")
        refuse_unless(factor_every >= 1, "factor_every", factor_every, "at least 1")
        refuse_unless(inverse_every >= 1, "inverse_every", inverse_every, "at least 1")
        refuse_unless(kl_clip is None or kl_clip > 0, "kl_clip", kl_clip, "above 0, or None")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        self.damping, self.decay, self.kl_clip = damping, decay, kl_clip
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self.factors: dict[Layer, Factors] = {}
        self.taken = 0
        self._handles: list[RemovableHandle] = []

    def watch(self, model: nn.Module) -> "KFAC":
        """Learn the curvature of a model's layers from its backwards; this optimizer."""
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Conv2d) and id(module.weight) in known and _fits(module):
                self.factors[module] = Factors()
                self._handles.append(module.register_forward_hook(self._note_inputs))
        if not self.factors:
            raise ValueError("the model has no linear or convolutional layer whose weights this optimizer holds")
        return self

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _note_inputs(self, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        assert isinstance(layer, nn.Linear | nn.Conv2d)
        if not (torch.is_grad_enabled() and output.requires_grad) or self.taken % self.factor_every:
            return
        rows = _input_rows(layer, inputs[0].detach())
        places = output[0, 0].numel() if isinstance(layer, nn.Conv2d) else 1
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda gradient: self._add(layer, rows, gradient.detach(), places)
        )

    @torch.no_grad()
    def _add(self, layer: Layer, rows: Tensor, gradient: Tensor, places: int) -> None:
        """What one backward tells of a layer: rows of inputs, one for every place of every sample."""
        slopes = gradient.movedim(1, -1) if isinstance(layer, nn.Conv2d) else gradient
        slopes = slopes.reshape(-1, slopes.shape[-1])
        samples = len(slopes) // places
        own = [rows.T @ rows / samples, slopes.T @ slopes * (samples / places)]
        factors = self.factors[layer]
        factors.sums = [a + b for a, b in zip(factors.sums, own, strict=True)] if factors.sums else own
        factors.backwards += 1

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for factors in self.factors.values():
            self._average(factors)
        if self.taken % self.inverse_every == 0:
            for factors in self.factors.values():
                self._decompose(factors)
        directions = self._directions()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, directions.get(parameter, parameter.grad), group)
        self.taken += 1
        return loss

    def _average(self, factors: Factors) -> None:
        if not factors.backwards:
            return
        found = [total / factors.backwards for total in factors.sums]
        if factors.inputs is None or factors.outputs is None:
            factors.inputs, factors.outputs = found
        else:
            for average, new in zip((factors.inputs, factors.outputs), found, strict=True):
                average.mul_(self.decay).add_(new, alpha=1 - self.decay)
        factors.sums, factors.backwards = [], 0

    def _decompose(self, factors: Factors) -> None:
        if factors.inputs is None or factors.outputs is None:
            return
        (a, by_a), (g, by_g) = torch.linalg.eigh(factors.inputs), torch.linalg.eigh(factors.outputs)
        factors.bases = (a.clamp(min=0), by_a, g.clamp(min=0), by_g)

    def _directions(self) -> dict[Tensor, Tensor]:
        """The natural gradient of each parameter of a layer, clipped."""
        found: list[tuple[Layer, Tensor]] = []
        change = 0.0
        for layer, factors in self.factors.items():
            if factors.bases is None or layer.weight.grad is None:
                continue
            gradient = _whole_gradient(layer)
            a, by_a, g, by_g = factors.bases
            turned = by_g.T @ gradient @ by_a
            direction = by_g @ (turned / (torch.outer(g, a) + self.damping)) @ by_a.T
            change += self._rate_of(layer.weight) ** 2 * float((direction * gradient).sum().abs())
            found.append((layer, direction))
        factor = 1.0
        if self.kl_clip is not None and change:
            factor = min(1.0, math.sqrt(self.kl_clip / change))
        result: dict[Tensor, Tensor] = {}
        for layer, direction in found:
            direction = direction * factor
            if layer.bias is not None:
                result[layer.bias], direction = direction[:, -1].contiguous(), direction[:, :-1]
            result[layer.weight] = direction.reshape(layer.weight.shape)
        return result

    def _rate_of(self, parameter: Tensor) -> float:
        groups = (group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return float(next(groups)["lr"])

    def _move(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            direction = direction.add(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            direction = moving(self.state[parameter], direction, group["momentum"])
        parameter.add_(direction, alpha=-group["lr"])


def _fits(module: Layer) -> bool:
    """Whether a layer's curvature is a Kronecker product: not where channels are divided into groups."""
    return not isinstance(module, nn.Conv2d) or (module.groups == 1 and module.padding_mode == "zeros")


def _input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """What a layer's outputs are linear in: a row for every place of every sample, a 1 at its end for the bias."""
    if isinstance(layer, nn.Conv2d):
        padding = _padding(layer)
        if isinstance(padding, list):
            inputs, padding = F.pad(inputs, padding), 0
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if layer.bias is not None else rows


def _padding(layer: nn.Conv2d) -> Any:
    """As `unfold` takes it, or as `pad` does where the sides differ."""
    if layer.padding == "valid":
        return 0
    if layer.padding == "same":
        sides: list[int] = []
        for size, distance in zip(reversed(layer.kernel_size), reversed(layer.dilation), strict=True):
            total = distance * (size - 1)
            sides += [total // 2, total - total // 2]
        return sides
    return layer.padding


def _whole_gradient(layer: Layer) -> Tensor:
    """Of the weights as a matrix, (outputs, inputs), the bias's as its last column."""
    assert layer.weight.grad is not None
    matrix = layer.weight.grad.reshape(len(layer.weight), -1)
    if layer.bias is None:
        return matrix
    column = layer.bias.grad if layer.bias.grad is not None else torch.zeros_like(layer.bias)
    return torch.cat([matrix, column[:, None]], 1)


def shared_out(costs: Sequence[int], workers: int) -> list[int]:
    """The worker that decomposes each matrix: the dearest first, always to the one that has least.

    Graham, "Bounds on multiprocessing timing anomalies", 1969.

    Arguments:
        costs: of each matrix, the cube of its size.

    >>> shared_out([8, 27, 1, 27], 2)
    [0, 0, 1, 1]
    """
    load, owners = [0] * workers, [0] * len(costs)
    for number in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        owners[number] = min(range(workers), key=lambda worker: (load[worker], worker))
        load[owners[number]] += costs[number]
    return owners
