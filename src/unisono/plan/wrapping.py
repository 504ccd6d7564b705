"""Forwards of modules, replaced for a while and put back."""

from collections.abc import Callable
from typing import Any

from torch import nn

Forward = Callable[..., Any]


class Wrapping:
    """Modules whose forward is another one until `close`."""

    def __init__(self) -> None:
        self._before: list[tuple[nn.Module, Forward | None]] = []

    def add(self, module: nn.Module, wrap: Callable[[Forward], Forward]) -> None:
        """Replace a module's forward by what ``wrap`` makes of it."""
        self._before.append((module, module.__dict__.get("forward")))
        module.forward = wrap(module.forward)

    def close(self) -> None:
        """All modules are as they were, the last one first."""
        while self._before:
            module, before = self._before.pop()
            if before is None:
                del module.forward
            else:
                module.forward = before
