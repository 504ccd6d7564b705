"""What flows into what: the way of values from one linear layer to the next, as tensor parallelism needs it.

The model's own code runs once on tensors without values. Every tensor is marked with the linear layers that its
values come from without passing another one, and it is noted who uses it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from unisono.errors import ConfigurationError
from unisono.plan.rehearsal import with_fakes
from unisono.plan.wrapping import Forward, Wrapping

HANDLED_DRAWS = (F.dropout, torch.dropout, F.scaled_dot_product_attention)
"""Functions whose random numbers can be drawn whole by everyone, and then divided."""


@dataclass(frozen=True, slots=True)
class LinearCall:
    """A linear layer is applied.

    Attributes:
        path: of the module.
        feeders: the linear layers that its input comes from.
        given: identity of its input.
    """

    path: str
    feeders: frozenset[str]
    given: int


@dataclass(frozen=True, slots=True)
class ModuleCall:
    """A module's first call.

    Attributes:
        args, kwargs, result: with tensors without values.
        given, made: identities of the flattened arguments and of the result's leaves, 0 for what is no tensor.
    """

    args: Any
    kwargs: Any
    result: Any
    given: tuple[int, ...]
    made: tuple[int, ...]


@dataclass(slots=True)
class Flow:
    """What was found.

    Attributes:
        linears: in the order of their calls.
        ends: linear layers whose results reach the loss without passing another one.
        modules: the first call of each.
        calls: how often each module is called.
        users: identity of a tensor -> the innermost modules in which a function uses it.
        parameter_users: name of a parameter, under each of its names -> the innermost modules in which it is used.
        drawers: modules with code that draws random numbers otherwise than by `HANDLED_DRAWS`, and by what.
    """

    linears: list[LinearCall] = field(default_factory=list)
    ends: frozenset[str] = frozenset()
    modules: dict[str, ModuleCall] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    users: dict[int, set[str]] = field(default_factory=dict)
    parameter_users: dict[str, set[str]] = field(default_factory=dict)
    drawers: dict[str, str] = field(default_factory=dict)


def flow(
    model: nn.Module, forward: Callable[[], object], remedy: str = "layout.tensor=1", *, strict: bool = False
) -> Flow:
    """Follow the values through a model.

    Arguments:
        model: with or without values.
        forward: calls it on a real micro-batch, and computes the loss.
        remedy: what to use where that cannot be, for the error.
        strict: the model's code must not look at the values of its inputs either: it uses the same modules for all.

    Raises:
        ConfigurationError: where the model's code needs values.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    names: dict[int, str] = {}
    tracing = _Tracing(names)
    wrapping = Wrapping()
    with (
        with_fakes(model, mode, names),
        torch.random.fork_rng(devices=[]),
        torch.enable_grad(),
        tracing.calls_of(model),
    ):
        try:
            if strict:
                wrapping.add(model, partial(_within, mode))
            with tracing, _Drawing(tracing):  # what hangs on the input alone, a mask for example, has values
                result = forward()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            where = f"in module {tracing.inside[-1]}" if tracing.inside else "in the model's or the loss's own forward"
            raise ConfigurationError(
                f"the model cannot be divided between workers: its code, run without values, fails {where} with "
                f"{type(error).__name__}: {reason[0]}; use {remedy}, or let that code not look at values"
            ) from error
        finally:
            wrapping.close()
    tracing.found.ends = frozenset().union(*(tracing.marks.get(key, frozenset()) for key in _identities(result)))
    return tracing.found


def _within(mode: FakeTensorMode, forward: Forward) -> Forward:
    def on_fakes(*args: Any, **kwargs: Any) -> Any:
        with mode:
            return forward(*args, **kwargs)

    return on_fakes


def _identities(value: object) -> list[int]:
    """Identities of the tensors in a value, in the order of its leaves; 0 for what is no tensor."""
    return [id(leaf) if isinstance(leaf, Tensor) else 0 for leaf in pytree.tree_leaves(value)]


class _Tracing(TorchFunctionMode):
    """Marks tensors.

    Attributes:
        inside: the modules that are under way.
        function: of torch, that is under way.
    """

    def __init__(self, names: dict[int, str]) -> None:
        super().__init__()
        self.found = Flow()
        self.marks: dict[int, frozenset[str]] = {}
        self.inside: list[str] = []
        self.function: Any = None
        self._names = names
        self._kept: list[object] = []  # so that identities stay unique

    @contextmanager
    def calls_of(self, model: nn.Module) -> Iterator[None]:
        """Note the calls of a model's modules."""
        handles = []
        for path, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(self._entering(path), with_kwargs=True))
            handles.append(module.register_forward_hook(self._leaving(path), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, path: str) -> Callable[..., None]:
        def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.inside.append(path)

        return entering

    def _leaving(self, path: str) -> Callable[..., None]:
        def leaving(module: nn.Module, args: Any, kwargs: Any, result: Any) -> None:
            self.inside.pop()
            self._kept.append((args, kwargs, result))
            self.found.calls[path] = self.found.calls.get(path, 0) + 1
            given, made = _identities((args, kwargs)), _identities(result)
            self.found.modules.setdefault(path, ModuleCall(args, kwargs, result, tuple(given), tuple(made)))

        return leaving

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.function = func
        result = func(*args, **(kwargs or {}))
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        if not results or getattr(func, "__name__", "") == "__get__":  # a shape, or a parameter's value
            return result
        given = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self._kept.append((given, results))
        here = self.inside[-1] if self.inside else ""
        for tensor in given:
            self.found.users.setdefault(id(tensor), set()).add(here)
            if id(tensor) in self._names:
                self.found.parameter_users.setdefault(self._names[id(tensor)], set()).add(here)
        marks: frozenset[str] = frozenset().union(*(self.marks.get(id(tensor), frozenset()) for tensor in given))
        weight = self._names.get(id(args[1])) if func is F.linear and len(args) > 1 else None
        if weight is not None:
            path = weight.rpartition(".")[0]
            self.found.linears.append(LinearCall(path, marks, id(given[0])))
            marks = frozenset((path,))
        for tensor in results:
            self.marks[id(tensor)] = self.marks.get(id(tensor), frozenset()) | marks
        return result


class _Drawing(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes who draws random numbers."""

    def __init__(self, tracing: _Tracing) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tracing = tracing

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        tracing = self._tracing
        draws = torch.Tag.nondeterministic_seeded in func.tags and tracing.function not in HANDLED_DRAWS
        if draws and tracing.inside:
            name = getattr(tracing.function, "__name__", str(func))
            tracing.found.drawers.setdefault(tracing.inside[-1], name)
        return func(*args, **(kwargs or {}))
