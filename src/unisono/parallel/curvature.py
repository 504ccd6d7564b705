"""What a micro-batch tells of the curvature of a model's layers, on its way into the sums with its gradients."""

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from unisono.optim.kronecker import Layer, input_of, moments
from unisono.plan.blocks import CURVATURE
from unisono.plan.wrapping import Forward, Wrapping

Noted = dict[int, list[tuple[Tensor, Tensor]]]
"""What the backwards of one micro-batch tell, by layer."""


class Statistics:
    """Watches a model's layers: the innermost of all that wraps them, so that it sees what they compute with.

    Arguments:
        model: as it is bound.
        uses: names of all that gradients are summed for; those of `Factors` are told here.
        every: steps from one that tells to the next.
    """

    def __init__(self, model: nn.Module, uses: Sequence[str], every: int) -> None:
        self._every = every
        self._noted: Noted | None = None
        numbers = {name: use for use, name in enumerate(uses)}
        self._uses: list[tuple[int, int]] = []
        self._wrapping = Wrapping()
        for name in uses:
            path, _, last = name.removeprefix(CURVATURE).rpartition(".")
            if name.startswith(CURVATURE) and last == "inputs":
                layer, factors = model.get_submodule(path), model.get_submodule(f"{CURVATURE}{path}")
                assert isinstance(layer, nn.Linear | nn.Conv2d) and isinstance(factors.inputs, Tensor)
                self._wrapping.add(layer, partial(self._watched, layer, len(self._uses), factors.inputs.dtype))
                self._uses.append((numbers[name], numbers[f"{CURVATURE}{path}.outputs"]))

    def close(self) -> None:
        """The model is as it was."""
        self._wrapping.close()

    def begin(self, step: int) -> Noted | None:
        """What the forward of a micro-batch of ``step`` (from 1) begins with; None in a step that tells nothing."""
        self._noted = {} if (step - 1) % self._every == 0 else None
        return self._noted

    def end(self) -> None:
        """The forward is over."""
        self._noted = None

    def told(self, noted: Noted, weight: float) -> Iterator[tuple[int, Tensor]]:
        """For each use of a factor: the mean over a layer's calls, times the micro-batch's weight.

        Arguments:
            weight: of its loss, above 0; the gradients were those of so many times its mean.
        """
        for number, found in noted.items():
            for i, scale in enumerate((weight, 1 / weight)):
                own = [pair[i] for pair in found]
                total = sum(own[1:], start=own[0])
                yield self._uses[number][i], total if scale == len(own) else total * (scale / len(own))

    def _watched(self, layer: Layer, number: int, dtype: torch.dtype, forward: Forward) -> Forward:
        def watched(*args: Tensor, **kwargs: Tensor) -> Tensor:
            output: Tensor = forward(*args, **kwargs)
            noted = self._noted
            if noted is None or not (torch.is_grad_enabled() and output.requires_grad):
                return output
            waiting = [input_of(args, kwargs)]

            def add(gradient: Tensor) -> None:
                if not waiting:  # a backward in two parts comes by twice
                    return
                found = moments(layer, waiting.pop(), gradient, dtype)
                if found is not None:
                    noted.setdefault(number, []).append(found)

            output.register_hook(add)  # type: ignore[no-untyped-call]
            return output

        return watched
