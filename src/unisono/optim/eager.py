"""torch.optim without torch's compiler: making and stepping an optimizer would import it, for 1.2 s in every worker.

torch wraps methods of its optimizers so that ``torch.compile`` can trace around them; the wrappers import the compiler
when they are first called, compiled or not. Nothing here is compiled, so the methods inside are called.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.optim import Optimizer

_WRAPPED = ("add_param_group", "zero_grad")
_MARK = "__dynamo_disable"  # where torch's wrapper keeps what it calls in the end


@contextmanager
def without_compiler() -> Iterator[None]:
    """Within it, torch's optimizers can be made without importing the compiler."""
    marked = []
    for name in _WRAPPED:
        method = getattr(getattr(Optimizer, name), "__wrapped__", None)
        if method is not None and not hasattr(method, _MARK):
            setattr(method, _MARK, method)
            marked.append(method)
    try:
        yield
    finally:
        for method in marked:
            delattr(method, _MARK)


def stepper(optimizer: Optimizer) -> Callable[[], Any]:
    """The optimizer's step, as it is inside torch's wrappers; with them where they have something to do."""
    kind = type(optimizer)
    hooked = any(getattr(optimizer, name, None) for name in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"))
    if not kind.__module__.startswith("torch.optim") or hooked:
        return optimizer.step
    inner = inspect.unwrap(kind.step)

    def step() -> Any:
        with torch.no_grad():
            return inner(optimizer)

    return step
