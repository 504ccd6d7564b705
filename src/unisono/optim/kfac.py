"""K-FAC: SGD along the natural gradient, by a curvature that is a Kronecker product of two matrices for each layer."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from unisono.errors import TrainingError
from unisono.optim.kronecker import Factors, Layer, input_of, layers_of, limited, moments, natural_gradient, not_finite
from unisono.optim.layerwise import moving, refuse_unless
from unisono.plan.assignment import UpdateClass

WEIGHTS, FACTORS = "weights", "factors"


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
    layer's output: samples, or all leading dimensions. A run watches the model by itself; in a loop of one's own,
    `watch` does. (Papers: see `unisono.optim.kronecker`.)

    Arguments:
        params: parameters, or groups of them, each with an ``lr``, ``momentum`` and ``weight_decay`` of its own.
        damping: added to the curvature.
        decay: of running averages; the first step's are taken as they are.
        factor_every: steps between updates of A and G.
        inverse_every: steps between decompositions, a multiple of ``factor_every``.
        kl_clip: limit of the change of predictions; None for none.

    Raises:
        ValueError: for an argument outside its range.

    >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    >>> optimizer = KFAC(model.parameters(), lr=0.1).watch(model)
    >>> loss = nn.functional.mse_loss(model(torch.ones(3, 4)), torch.zeros(3, 2))
    >>> loss.backward()
    >>> optimizer.step()
    """

    update_class = UpdateClass.PARAMETER
    recorded = ("damping", "decay", "kl_clip", "factor_every", "inverse_every")
    """Settings besides those of groups, to record with a run."""

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
        fits = inverse_every >= 1 and inverse_every % factor_every == 0
        refuse_unless(fits, "inverse_every", inverse_every, f"a multiple of factor_every ({factor_every})")
        refuse_unless(kl_clip is None or kl_clip > 0, "kl_clip", kl_clip, "above 0, or None")
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "role": WEIGHTS})
        self.damping, self.decay, self.kl_clip = damping, decay, kl_clip
        self.factor_every, self.inverse_every = factor_every, inverse_every
        self._watched: dict[str, _Watched] = {}
        self._handles: list[RemovableHandle] = []

    def factors_of(self, model: nn.Module) -> dict[str, Factors]:
        """Memory for the curvature of a model's layers, by their names; a group of its own, once.

        Raises:
            ValueError: where there is no layer whose curvature can be learned.
        """
        trained = {id(p) for group in self.param_groups for p in group["params"]}
        factors = {name: Factors(layer) for name, layer in layers_of(model, trained).items()}
        if not factors:
            raise ValueError("the model has no linear or convolutional layer whose weights this optimizer holds")
        members = [p for pair in factors.values() for p in (pair.inputs, pair.outputs)]
        self.add_param_group({"params": members, "role": FACTORS})
        return factors

    def watch(self, model: nn.Module) -> "KFAC":
        """Learn the curvature of a model's layers from its backwards, once, before a scheduler of rates is made; this
        optimizer.

        Raises:
            ValueError: as `factors_of`; and where it watches a model already.
        """
        if self._watched:
            raise ValueError("this optimizer watches a model already; make another one for another model")
        for name, factors in self.factors_of(model).items():
            layer = model.get_submodule(name)
            assert isinstance(layer, nn.Linear | nn.Conv2d)
            self._watched[name] = _Watched(name, layer, factors)
            hook = self._hook(self._watched[name])
            self._handles.append(layer.register_forward_hook(hook, with_kwargs=True))
        self.param_groups[-1]["taken"] = 0
        return self

    @property
    def watched(self) -> list[str]:
        """The names of the layers that it watches."""
        return list(self._watched)

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def state_dict(self) -> dict[str, Any]:
        """As any optimizer's, with the curvature of the layers that it watches."""
        curvature = {name: watched.factors.state_dict() for name, watched in self._watched.items()}
        return {**super().state_dict(), "curvature": curvature}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`; after `watch`."""
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "curvature"})
        for name, watched in self._watched.items():
            watched.factors.load_state_dict(state_dict["curvature"][name])

    def _hook(self, watched: "_Watched") -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if not (torch.is_grad_enabled() and output.requires_grad) or self._taken % self.factor_every:
                return
            inputs = input_of(args, kwargs)
            output.register_hook(lambda gradient: watched.add(inputs, gradient))  # type: ignore[no-untyped-call]

        return note

    @property
    def _taken(self) -> int:
        """Steps, where it watches a model."""
        return int(self.param_groups[-1]["taken"])

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for watched in self._watched.values():
            watched.tell()
        for group in self.param_groups:
            for factor in group["params"] if group["role"] == FACTORS else ():
                if factor.grad is not None:
                    self._absorb(factor)
        directions = self._directions()
        for group in self.param_groups:
            for parameter in group["params"] if group["role"] == WEIGHTS else ():
                if parameter.grad is not None:
                    self._move(parameter, directions.get(parameter, parameter.grad), group)
        if self._watched:
            self.param_groups[-1]["taken"] += 1
        return loss

    def _absorb(self, factor: nn.Parameter) -> None:
        """What a step tells of a factor goes into its running average; it is decomposed when it is its turn."""
        state, told = self.state[factor], factor.grad
        assert told is not None
        if not state:
            state["basis"], state["spectrum"] = torch.zeros_like(factor), torch.zeros_like(factor[0])
            state["step"] = torch.zeros((), dtype=torch.float32)
        updates = int(state["step"])
        if updates:
            factor.mul_(self.decay).add_(told, alpha=1 - self.decay)
        else:
            factor.copy_(told)
        if updates * self.factor_every % self.inverse_every == 0:
            spectrum, basis = torch.linalg.eigh(factor)
            state["basis"].copy_(basis)
            state["spectrum"].copy_(spectrum.clamp(min=0))
        state["step"] += 1

    def _directions(self) -> dict[Tensor, Tensor]:
        """The natural gradient of each parameter of a layer, limited."""
        found: dict[Tensor, Tensor] = {}
        change = 0.0
        for watched in self._watched.values():
            weight, bias = watched.layer.weight, watched.layer.bias
            inputs, outputs = (self.state.get(p) for p in (watched.factors.inputs, watched.factors.outputs))
            if not inputs or not outputs or weight.grad is None:
                continue
            of_bias = None if bias is None else bias.grad
            found[weight], column, own = natural_gradient(weight.grad, of_bias, inputs, outputs, self.damping)
            if bias is not None and column is not None:
                found[bias] = column
            change += self._rate_of(weight) ** 2 * own
        factor = limited(change, self.kl_clip)
        return {parameter: direction * factor for parameter, direction in found.items()}

    def _rate_of(self, parameter: Tensor) -> float:
        groups = (group for group in self.param_groups if any(p is parameter for p in group["params"]))
        return float(next(groups)["lr"])

    def _move(self, parameter: Tensor, direction: Tensor, group: dict[str, Any]) -> None:
        if group["weight_decay"]:
            direction = direction.add(parameter, alpha=group["weight_decay"])
        if group["momentum"]:
            direction = moving(self.state[parameter], direction, group["momentum"])
        parameter.add_(direction, alpha=-group["lr"])


class _Watched:
    """A layer in a loop of one's own: what its backwards have told since the last step."""

    def __init__(self, name: str, layer: Layer, factors: Factors) -> None:
        self._name = name
        self.layer = layer
        self.factors = factors
        self._sums: tuple[Tensor, Tensor] | None = None
        self._backwards = 0

    @torch.no_grad()
    def add(self, inputs: Tensor, gradient: Tensor) -> None:
        """What one backward tells."""
        own = moments(self.layer, inputs, gradient, self.factors.inputs.dtype)
        if own is None:
            return
        self._sums = own if self._sums is None else (self._sums[0] + own[0], self._sums[1] + own[1])
        self._backwards += 1

    def tell(self) -> None:
        """Their mean is the gradient of the factors; None where there was no backward.

        Raises:
            TrainingError: where it is not finite.
        """
        if self._sums is not None and not all(bool(total.isfinite().all()) for total in self._sums):
            raise TrainingError(not_finite(self._name))
        for i, factor in enumerate((self.factors.inputs, self.factors.outputs)):
            factor.grad = None if self._sums is None else self._sums[i] / self._backwards
        self._sums, self._backwards = None, 0
