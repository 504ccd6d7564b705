"""Making the arena known to torch.distributed, without making ``import unisono`` wait for torch."""

import functools
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

NAME = "arena"
WATCHED = "torch.distributed.distributed_c10d"
REPLACED = (None, "gloo", "cpu:gloo")


def register_with_torch() -> None:
    """Register now if torch.distributed is there, else as soon as it has been imported."""
    module = sys.modules.get(WATCHED)
    if module is not None:
        _register(module)
    elif not any(isinstance(finder, _Watch) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Watch())


def replace_gloo() -> None:
    """In this process, give every program that asks torch.distributed for gloo, or for nothing, the arena."""
    import torch.distributed as dist
    from torch.distributed import distributed_c10d as c10d

    _register(c10d)
    for name, place in (("init_process_group", 0), ("new_group", 2)):  # the backend's place among the arguments
        replacement = _with_arena(getattr(c10d, name), place)
        setattr(c10d, name, replacement)
        setattr(dist, name, replacement)
    c10d.Backend.default_device_backend_map["cpu"] = NAME


def _with_arena(function: Callable[..., Any], place: int) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*arguments: Any, **named: Any) -> Any:
        if len(arguments) > place:
            if arguments[place] in REPLACED:
                arguments = (*arguments[:place], NAME, *arguments[place + 1 :])
        elif named.get("backend") in REPLACED:
            named["backend"] = NAME
        return function(*arguments, **named)

    return call


def _register(module: ModuleType) -> None:
    if NAME not in module.Backend.backend_list:
        module.Backend.register_backend(NAME, _create, devices=["cpu"])


def _create(*arguments: Any) -> Any:
    """Make a group; the backend is imported with the first one."""
    from unisono.comm.backend import ArenaGroup

    return ArenaGroup(*arguments)


class _Watch(MetaPathFinder):
    """Sees one module's import, and goes."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that registers afterwards."""
        if fullname != WATCHED:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Registering(spec.loader)
        return spec


class _Registering(Loader):
    def __init__(self, inner: Loader) -> None:
        self._inner = inner

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        """As the module's own loader."""
        return self._inner.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        """The module, then the registration."""
        self._inner.exec_module(module)
        _register(module)
