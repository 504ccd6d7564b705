"""A layer's curvature as a Kronecker product: what one backward tells of it, and the natural gradient that follows.

Martens and Grosse, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature", 2015; for convolutions
Grosse and Martens, "A Kronecker-factored approximate Fisher matrix for convolution layers", 2016.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Layer = nn.Linear | nn.Conv2d


class Factors(nn.Module):
    """One layer's: A of its inputs, with a row for the bias, and G of the gradients of its outputs.

    They are parameters whose gradient is what a step tells of them, and whose update is a running average: so whatever
    is done for parameters (sums, owners, checkpoints) is done for them.
    """

    def __init__(self, layer: Layer) -> None:
        super().__init__()
        weight = layer.weight
        dtype = torch.promote_types(weight.dtype, torch.float32)  # there is no decomposition in less
        sides = (weight[0].numel() + (layer.bias is not None), len(weight))
        self.inputs, self.outputs = (nn.Parameter(torch.zeros(n, n, dtype=dtype, device=weight.device)) for n in sides)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Nothing is known yet."""
        self.inputs.zero_()
        self.outputs.zero_()


def layers_of(model: nn.Module, trained: Collection[int]) -> dict[str, Layer]:
    """The layers of a model whose curvature can be learned, by name.

    Neither those whose weights are used elsewhere too, nor convolutions whose channels are divided into groups, or that
    pad with other than zeros: their curvature is no Kronecker product of two such matrices. Nor those that compute
    anything else than torch's own layers do.

    Arguments:
        trained: the identities of parameters that are trained.
    """
    uses = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))

    def fits(layer: Layer) -> bool:
        own = [layer.weight] if layer.bias is None else [layer.weight, layer.bias]
        if id(layer.weight) not in trained or not layer.weight.requires_grad or any(uses[id(p)] != 1 for p in own):
            return False
        if "forward" in vars(layer) or type(layer).forward not in (nn.Linear.forward, nn.Conv2d.forward):
            return False
        return not isinstance(layer, nn.Conv2d) or (layer.groups == 1 and layer.padding_mode == "zeros")

    modules = ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d))
    return {name: module for name, module in modules if fits(module)}


def input_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
    """What a layer was called with."""
    given: Tensor = args[0] if args else kwargs["input"]
    return given.detach()


def input_rows(layer: Layer, inputs: Tensor) -> Tensor:
    """What a layer's outputs are linear in: a row for every place of every sample, a 1 at its end for the bias."""
    if isinstance(layer, nn.Conv2d):
        inputs = inputs if inputs.dim() == 4 else inputs.unsqueeze(0)
        padding = _padding(layer)
        if isinstance(padding, list):
            inputs, padding = F.pad(inputs, padding), 0
        patches = F.unfold(inputs, layer.kernel_size, layer.dilation, padding, layer.stride)
        rows = patches.transpose(1, 2).reshape(-1, patches.shape[1])
    else:
        rows = inputs.reshape(-1, inputs.shape[-1])
    return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if layer.bias is not None else rows


@torch.no_grad()
def moments(layer: Layer, inputs: Tensor, gradient: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """E[a a'] and E[g g'] of one backward of a mean over the rows of a layer's output; None where it has no rows.

    Arguments:
        inputs: of the layer.
        gradient: of its output.
        dtype: of the result.
    """
    if not gradient.numel():
        return None
    places, slopes, rows = 1, gradient, input_rows(layer, inputs)
    if isinstance(layer, nn.Conv2d):
        slopes = slopes if slopes.dim() == 4 else slopes.unsqueeze(0)
        places, slopes = slopes[0, 0].numel(), slopes.movedim(1, -1)
    slopes, rows = slopes.reshape(-1, slopes.shape[-1]).to(dtype), rows.to(dtype)
    samples = len(slopes) // places
    return rows.T @ rows / samples, slopes.T @ slopes * (samples / places)


def natural_gradient(
    weight: Tensor, bias: Tensor | None, inputs: dict[str, Tensor], outputs: dict[str, Tensor], damping: float
) -> tuple[Tensor, Tensor | None, float]:
    """(A (x) G + damping I)^-1 of a layer's gradient: of the weights, of the bias; and its product with the gradient.

    Arguments:
        weight, bias: gradients; None where the layer has no bias, or where it is not trained.
        inputs, outputs: the decompositions of A and G: ``basis``, ``spectrum``.
    """
    matrix = weight.reshape(len(weight), -1).to(inputs["basis"].dtype)
    if matrix.shape[1] < len(inputs["basis"]):
        column = torch.zeros_like(matrix[:, 0]) if bias is None else bias.to(matrix.dtype)
        matrix = torch.cat([matrix, column[:, None]], 1)
    turned = outputs["basis"].T @ matrix @ inputs["basis"]
    curvature = torch.outer(outputs["spectrum"], inputs["spectrum"]) + damping
    direction = outputs["basis"] @ (turned / curvature) @ inputs["basis"].T
    change = float((direction * matrix).sum().abs())
    of_weight = direction[:, : weight[0].numel()].reshape(weight.shape).to(weight.dtype)
    return of_weight, None if bias is None else direction[:, -1].to(bias.dtype), change


def not_finite(layer: str) -> str:
    """What to say where a layer's curvature is not a number."""
    return (
        f"the curvature of {layer or 'the model'} is not finite, since gradients of its outputs are not; lower the "
        "learning rate, or look at the model's numerics"
    )


def limited(change: float, limit: float | None) -> float:
    """By which directions become smaller so that predictions change by no more than a limit, in their KL divergence.

    Ba, Grosse and Martens, "Distributed second-order optimization using Kronecker-factored approximations", 2017.

    Arguments:
        change: the sum over layers of the squared learning rate times a direction's product with the gradient.

    >>> limited(4.0, 1.0), limited(0.5, 1.0), limited(4.0, None)
    (0.5, 1.0, 1.0)
    """
    return min(1.0, math.sqrt(limit / change)) if limit is not None and change else 1.0


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
