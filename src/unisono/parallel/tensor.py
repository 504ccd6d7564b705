"""Tensor parallelism: a worker computes with its part of some parameters, and exchanges activations where they meet.

Parameters stay whole in shared memory; a worker's module holds a parameter over its part of them. All that is not
divided is computed by every worker of the group alike, with the same random numbers.

The exchanges are those of Shoeybi et al., Megatron-LM, 2019, and, where activations between the divided layers are
divided along their sequence, of Korthikanti et al., Reducing Activation Recomputation, 2022. They are functions over
plain tensors, which need no default process group, draw the random numbers of the whole activation, and leave a graph
that a zero-bubble backward can divide; with DTensors over gloo a step takes 1.2 to 1.3 times as long (`bench`).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unisono.comm.tensor_group import TensorGroup
from unisono.errors import ConfigurationError
from unisono.parallel.vocabulary import Logits, check_range
from unisono.plan.sharding import Region, Style, TensorPlan, within
from unisono.plan.wrapping import Forward, Wrapping

SEQUENCE = 1  # of activations, (batch, time, ...)
Move = Callable[[Tensor], Tensor]
Part = tuple[int, int, int]
"""Of a tensor: dimension, first index, length; what ``narrow`` takes."""


class _Crossing(torch.autograd.Function):
    """Values go one way, their gradients come back another: each is a collective, or nothing."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, there: Move, back: Move) -> Tensor:
        """What ``there`` makes of the values."""
        ctx.back = back
        return there(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """What ``back`` makes of the gradient."""
        return ctx.back(gradients[0]), None, None


def _same(values: Tensor) -> Tensor:
    return values.view_as(values)


@dataclass(frozen=True, slots=True)
class Crossings:
    """Where activations that everyone has meet those of which everyone has a part.

    Attributes:
        where: in an error.
    """

    group: TensorGroup
    where: str

    def copy(self, values: Tensor) -> Tensor:
        """Whole values go into divided layers: their gradients are sums."""
        return self._cross(values, _same, self._sum)

    def reduce(self, values: Tensor) -> Tensor:
        """Partial sums become whole values."""
        return self._cross(values, self._sum, _same)

    def gather(self, values: Tensor, dim: int) -> Tensor:
        """Parts go, put together, into divided layers."""
        return self._cross(values, partial(self._together, dim=dim), partial(self._sum_part, dim=dim))

    def scatter(self, values: Tensor, dim: int) -> Tensor:
        """Partial sums become parts."""
        return self._cross(values, partial(self._sum_part, dim=dim), partial(self._together, dim=dim))

    def split(self, values: Tensor, dim: int) -> Tensor:
        """Whole values become parts."""
        return self._cross(values, partial(self._part, dim=dim), partial(self._together, dim=dim))

    def join(self, values: Tensor, dim: int) -> Tensor:
        """Parts become whole values."""
        return self._cross(values, partial(self._together, dim=dim), partial(self._part, dim=dim))

    def _cross(self, values: Tensor, there: Move, back: Move) -> Tensor:
        result: Tensor = _Crossing.apply(values, there, back)  # type: ignore[no-untyped-call]
        return result

    def _sum(self, values: Tensor) -> Tensor:
        return self.group.all_reduce(values, f"sum at {self.where}")

    def _sum_part(self, values: Tensor, dim: int) -> Tensor:
        self._check(values, dim)
        return self.group.reduce_scatter(values, dim, f"sum at {self.where}")

    def _together(self, values: Tensor, dim: int) -> Tensor:
        return self.group.all_gather(values, dim, f"exchange at {self.where}")

    def _part(self, values: Tensor, dim: int) -> Tensor:
        self._check(values, dim)
        return values.chunk(self.group.size, dim)[self.group.rank].contiguous()

    def _check(self, values: Tensor, dim: int) -> None:
        if values.shape[dim] % self.group.size:
            raise ConfigurationError(
                f"{self.where} has activations of {values.shape[dim]} positions, which tensor={self.group.size} does "
                "not divide; use layout.sequence_parallel=false, or samples of another length"
            )


@dataclass(frozen=True, slots=True)
class Findings:
    """What a trial finds of a region.

    Attributes:
        draws: for each call of a random function, the dimension in which its input is divided; None for none.
        summed: parameters that everyone has whole, and of whose gradients everyone has a part of the sum.
        kept: the part of the region's activations that a worker keeps for its backward.
    """

    draws: tuple[int | None, ...] = ()
    summed: tuple[str, ...] = ()
    kept: float = 1.0


@dataclass(slots=True)
class _Entered:
    """What has come into divided layers last: several that take the same take it once."""

    given: Tensor | None = None
    values: Tensor | None = None


class TensorParallel:
    """A model of which this worker has a part.

    Arguments:
        model: bound to its memory.
        findings: of the plan's regions, by path; none in a trial.
        loss_parallel: gathered outputs stay divided until the loss needs them.

    Attributes:
        local: this worker's parameters, by name, where they are divided.
        parts: of the divided parameters, by name.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: TensorPlan,
        findings: Mapping[str, Findings],
        group: TensorGroup,
        *,
        loss_parallel: bool = False,
    ) -> None:
        self.group = group
        self.local: dict[str, nn.Parameter] = {}
        self.parts: dict[str, Part] = {}
        self._model = model
        self._whole: dict[str, nn.Parameter] = {}
        self._summed = {name for found in findings.values() for name in found.summed}
        self._active = True
        self._loss_parallel = loss_parallel
        self._wrapping = Wrapping()
        self._divide(plan)
        for region in plan.regions:
            self._wrap(plan, region, findings.get(region.path))

    def _divide(self, plan: TensorPlan) -> None:
        for name, dim in plan.parameters().items():
            path, _, attribute = name.rpartition(".")
            module = self._model.get_submodule(path)
            parameter = getattr(module, attribute, None)
            if parameter is None:
                continue
            length = parameter.shape[dim] // self.group.size
            self.parts[name] = (dim, self.group.rank * length, length)
            local = nn.Parameter(parameter.new_empty(0), requires_grad=parameter.requires_grad)
            local.data = parameter.data.narrow(*self.parts[name])  # see `bind`
            self._whole[name], self.local[name] = parameter, local
            setattr(module, attribute, local)

    def gradient(self, name: str, gradient: Tensor) -> Tensor | None:
        """A parameter's gradient as this worker adds it to its sums; None where another worker of the group does."""
        if name in self._summed:
            gradient = self.group.all_reduce(gradient, f"gradient of {name}")
        return gradient if self.group.rank == 0 or name in self.parts else None

    @contextmanager
    def whole(self) -> Iterator[None]:
        """The model is what it was before it was divided."""
        self._set(self._whole)
        self._active = False
        try:
            yield
        finally:
            self._active = True
            self._set(self.local)

    def close(self) -> None:
        """The model is as it was."""
        self._set(self._whole)
        self._wrapping.close()
        self.group.close()

    def _set(self, parameters: Mapping[str, nn.Parameter]) -> None:
        for name, parameter in parameters.items():
            path, _, attribute = name.rpartition(".")
            setattr(self._model.get_submodule(path), attribute, parameter)

    def _wrap(self, plan: TensorPlan, region: Region, found: Findings | None) -> None:
        """The forwards of a region's divided layers, of where their inputs come in, and its own."""
        divided = region.hidden is not None
        entered = _Entered()
        inside = {path: style for path, style in plan.styles.items() if within(path, region.path)}
        for path, style in inside.items():
            module = self._model.get_submodule(path)
            crossings = Crossings(self.group, path or type(module).__name__)
            if style is Style.ROWWISE:
                self._add(module, partial(_rowwise, module, crossings, divided))
            elif style is Style.EMBEDDING:
                self._add(module, partial(_embedding, module, crossings))
            elif style is Style.GATHERED:
                self._add(module, partial(_divided_logits if self._loss_parallel else _gathered, crossings))
        for path, index in dict.fromkeys(plan.entrances[path] for path in inside if path in plan.entrances):
            module = self._model.get_submodule(path)
            crossings = Crossings(self.group, path or type(module).__name__)
            enter = partial(crossings.gather, dim=SEQUENCE) if divided else crossings.copy
            self._add(module, partial(_entering, enter, index, entered))
        module = self._model.get_submodule(region.path)
        crossings = Crossings(self.group, region.path or type(module).__name__)
        draws = found.draws if found is not None else None
        self._add(module, partial(_region, module, crossings, region, draws, entered))

    def _add(self, module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
        def wrapped(forward: Forward) -> Forward:
            parallel = wrap(forward)

            def call(*args: Any, **kwargs: Any) -> Any:
                return parallel(*args, **kwargs) if self._active else forward(*args, **kwargs)

            return call

        self._wrapping.add(module, wrapped)


def _rowwise(module: Any, crossings: Crossings, divided: bool, forward: Forward) -> Forward:
    def rowwise(values: Tensor) -> Tensor:
        sums = F.linear(values, module.weight)
        result = crossings.scatter(sums, SEQUENCE) if divided else crossings.reduce(sums)
        return result if module.bias is None else result + module.bias.to(result.dtype)

    return rowwise


def _gathered(crossings: Crossings, forward: Forward) -> Forward:
    def gathered(values: Tensor) -> Tensor:
        return crossings.join(forward(values), -1)

    return gathered


def _divided_logits(crossings: Crossings, forward: Forward) -> Forward:
    def logits(values: Tensor) -> Tensor:
        return Logits(forward(values), crossings.group, partial(crossings.join, dim=-1))

    return logits


def _embedding(module: Any, crossings: Crossings, forward: Forward) -> Forward:
    def embedding(indices: Tensor) -> Tensor:
        rows = module.weight.shape[0]
        check_range(indices, rows * crossings.group.size, "an index of an embedding")
        first = crossings.group.rank * rows
        foreign = (indices < first) | (indices >= first + rows)
        own = (indices - first).masked_fill(foreign, 0)
        padding = module.padding_idx
        own_padding = padding - first if padding is not None and first <= padding < first + rows else None
        values = F.embedding(own, module.weight, own_padding).masked_fill(foreign.unsqueeze(-1), 0.0)
        return crossings.reduce(values)

    return embedding


def _entering(enter: Move, index: int, entered: _Entered, forward: Forward) -> Forward:
    def entering(*args: Any, **kwargs: Any) -> Any:
        leaves, form = pytree.tree_flatten((args, kwargs))
        if leaves[index] is not entered.given:
            entered.given, entered.values = leaves[index], enter(leaves[index])
        leaves[index] = entered.values
        args, kwargs = pytree.tree_unflatten(leaves, form)
        return forward(*args, **kwargs)

    return entering


def _region(
    module: nn.Module,
    crossings: Crossings,
    region: Region,
    draws: Sequence[int | None] | None,
    entered: _Entered,
    forward: Forward,
) -> Forward:
    def whole(*args: Any, **kwargs: Any) -> Any:
        if region.hidden is not None and region.begins:
            (args, kwargs) = _at((args, kwargs), region.hidden[0], lambda t: crossings.split(t, SEQUENCE))
        try:
            if module.training and draws is not None:
                with _Draws(draws, crossings) as drawing:
                    result = forward(*args, **kwargs)
                drawing.check_end()
            else:
                result = forward(*args, **kwargs)
        finally:
            entered.given = entered.values = None
        if region.hidden is not None and region.ends:
            result = _at(result, region.hidden[1], lambda t: crossings.join(t, SEQUENCE))
        return result

    return whole


def _at(value: Any, index: int, change: Move) -> Any:
    """A value with one leaf changed."""
    leaves, form = pytree.tree_flatten(value)
    leaves[index] = change(leaves[index])
    return pytree.tree_unflatten(leaves, form)


class _Draws(TorchFunctionMode):
    """Random functions of a region draw for the whole of a divided input, and use their part.

    Arguments:
        dims: for each call, see `Findings`.
    """

    def __init__(self, dims: Sequence[int | None], crossings: Crossings) -> None:
        super().__init__()
        self._dims = list(dims)
        self._crossings = crossings

    def check_end(self) -> None:
        """The region is over.

        Raises:
            ConfigurationError: where it has not called all random functions that it called in its trial.
        """
        if self._dims:
            self._refuse("fewer")

    def _refuse(self, what: str) -> None:
        raise ConfigurationError(
            f"{self._crossings.where} calls {what} random functions (dropout) than in its trial, so that nobody knows "
            "which of them draw for divided activations; let it call the same ones every time, or use layout.tensor=1"
        )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        drawing = drawn(func)
        if drawing is None:
            return func(*args, **kwargs)
        if not self._dims:
            self._refuse("more")
        dim = self._dims.pop(0)
        p, shape = drawing(*args, **kwargs)
        if dim is None or p == 0.0:
            return func(*args, **kwargs)
        group, extents = self._crossings.group, list(shape)
        length, extents[dim] = extents[dim], extents[dim] * group.size
        noise = F.dropout(torch.ones(extents, dtype=args[0].dtype, device=args[0].device), p)
        noise = noise.narrow(dim, group.rank * length, length)
        if func is F.scaled_dot_product_attention:
            return _attention(noise, *args, **kwargs)
        return args[0].mul_(noise) if kwargs.get("inplace") or args[3:4] == (True,) else args[0] * noise


def drawn(func: Any) -> Callable[..., tuple[float, Sequence[int]]] | None:
    """For a random function: its arguments -> (the part that it drops, the shape that it draws for); else None."""
    kinds: dict[Any, Callable[..., tuple[float, Sequence[int]]]] = {
        F.dropout: _dropout,
        torch.dropout: _dropout,
        F.scaled_dot_product_attention: _attention_dropout,
    }
    return kinds.get(func)


def _dropout(
    input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False, train: bool = True
) -> tuple[float, Sequence[int]]:
    return (p if training and train else 0.0), input.shape


def _attention_dropout(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    *_: Any,
    **__: Any,
) -> tuple[float, Sequence[int]]:
    return dropout_p, (*query.shape[:-1], key.shape[-2])


def _attention(
    noise: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, noise > 0, scale=scale, enable_gqa=enable_gqa
    )[0]
    return result
