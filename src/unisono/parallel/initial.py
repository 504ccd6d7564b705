"""Initial values by name: a model too large for one process is built without values, and each module makes its own.

What a module draws is keyed by (seed, its name), so any worker can make any part, and all parts together are what one
worker would have made of the whole.
"""

from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from unisono.errors import ConfigurationError
from unisono.plan.outline import entered
from unisono.run.rng import Isolation, derive

OF_A_MODEL, OF_A_MODULE = "_init_weights", ("reset_parameters", "_reset_parameters")
"""The conventions: a model's ``_init_weights(module)`` as in Hugging Face Transformers; else a module's own method."""


@contextmanager
def without_values() -> Iterator[None]:
    """Parameters that modules register have no values; buffers, which are small, do."""
    register = nn.Module.register_parameter

    def registered(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter)
        own = module._parameters[name]
        if own is not None and not own.is_meta:
            made = nn.Parameter(own.detach().to("meta"), requires_grad=own.requires_grad)
            made.__dict__.update(own.__dict__)
            module._parameters[name] = made

    nn.Module.register_parameter = registered  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@dataclass(frozen=True, slots=True)
class Initialiser:
    """What gives a module its initial values.

    Attributes:
        path: the module's name.
        module: itself.
        function: does it, in place.
    """

    path: str
    module: nn.Module
    function: Callable[[], None]


def initialisers(model: nn.Module) -> list[Initialiser]:
    """Those of all modules with parameters, inner ones first: what holds a module may set its values anew.

    Raises:
        ConfigurationError: naming the modules that have none.
    """
    found: list[Initialiser] = []
    helpless: list[str] = []
    for path, module in reversed(list(model.named_modules())):
        if not any(parameter is not None for parameter in module._parameters.values()):
            continue
        function = _of_model(model, path, module) or _of_module(module)
        if function is None:
            helpless.append(f"{path or 'the model itself'} ({type(module).__name__})")
        else:
            found.append(Initialiser(path, module, function))
    if helpless:
        raise ConfigurationError(
            f"init is by_name, but {len(helpless)} module{'s' * (len(helpless) > 1)} with parameters cannot initialise "
            f"themselves: {', '.join(helpless[:5])}{', ...' * (len(helpless) > 5)}; give them a method "
            "reset_parameters(), or the model a method _init_weights(module)"
        )
    return found


def _of_model(model: nn.Module, path: str, module: nn.Module) -> Callable[[], None] | None:
    """The nearest enclosing model's method."""
    parts = path.split(".") if path else []
    for end in range(len(parts), -1, -1):
        method: Any = getattr(model.get_submodule(".".join(parts[:end])), OF_A_MODEL, None)
        if callable(method):
            return partial(method, module)
    return None


def _of_module(module: nn.Module) -> Callable[[], None] | None:
    methods: list[Any] = [getattr(module, name, None) for name in OF_A_MODULE]
    return next((method for method in methods if callable(method)), None)


def shares(
    members: Sequence[Initialiser], model: nn.Module, workers: int
) -> tuple[list[list[Initialiser]], list[Initialiser]]:
    """Modules that can be initialised apart, for each worker, and those that hold them, which come last."""
    outer = entered(model)
    apart: dict[str, list[Initialiser]] = {}
    holding: list[Initialiser] = []
    for member in members:
        parts = member.path.split(".")
        top = next((".".join(parts[:i]) for i in range(1, len(parts) + 1) if ".".join(parts[:i]) not in outer), None)
        if member.path in outer or top is None:
            holding.append(member)
        else:
            apart.setdefault(top, []).append(member)
    groups = list(apart.values())
    return [[member for group in groups[w::workers] for member in group] for w in range(workers)], holding


@torch.no_grad()
def initialise(
    seed: int, members: Sequence[Initialiser], further: Set[str], done: Callable[[], None] = lambda: None
) -> None:
    """Give modules their initial values, in place.

    Arguments:
        further: names of tied parameters besides the first, which take its values.
        done: called after each module.
    """
    with Isolation() as random:
        for member in members:
            own = {name: p for name, p in member.module._parameters.items() if p is not None}
            tied = [p for name, p in own.items() if f"{member.path}.{name}".lstrip(".") in further]
            if len(tied) == len(own):
                continue
            kept = [p.data for p in tied]
            for p in tied:
                p.data = torch.empty_like(p)
            random.seed(derive(seed, "init", member.path))
            member.function()
            for p, values in zip(tied, kept, strict=True):
                p.data = values
            done()
