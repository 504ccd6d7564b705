"""Recomputation: a block's activations are dropped after its forward, and computed again in its backward, bit for bit.

The blocks are the elements of the model's innermost lists of modules that have parts of their own (a transformer's
layers, a residual network's blocks); where there are none, every module of its outermost sequences. ``selective`` keeps
the results of matrix products, attention and convolutions, so only what is cheap is computed again.

Sources: Chen et al., Training Deep Nets with Sublinear Memory Cost, 2016; Korthikanti et al., Reducing Activation
Recomputation in Large Transformer Models, 2022.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from unisono.errors import ConfigurationError
from unisono.parallel.beside import Beside
from unisono.plan.outline import DEAR, entered
from unisono.plan.partition import Division
from unisono.plan.sharding import within
from unisono.plan.wrapping import Forward, Wrapping


def blocks(model: nn.Module, division: Division | None = None) -> list[str]:
    """The modules that are computed again as a whole; never one that a stage's end cuts."""
    if isinstance(model, Beside):
        own = blocks(model.model, division)
        return [*own, *(f"{replica}.{path}" for replica in model.replicas for path in own)]
    lists = [
        (path, [f"{path}.{name}".lstrip(".") for name, child in module.named_children() if any(child.children())])
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential)
    ]
    candidates = {element for _, elements in lists for element in elements}
    innermost = {path for path in candidates if not any(other.startswith(f"{path}.") for other in candidates)}
    if not innermost:
        looked_into = entered(model)
        children = {path: m for path, m in model.named_modules() if path.rpartition(".")[0] in looked_into}
        kept = {
            path for path, module in children.items() if getattr(module, "inplace", False)
        }  # its input would be lost
        innermost = set(children) - looked_into - kept
    cut = _cut_modules(division) if division is not None else set()
    names = dict(model.named_modules())
    result: list[str] = []
    for path in sorted(innermost):
        if path in cut:
            result += [f"{path}.{name}" for name, _ in names[path].named_children() if f"{path}.{name}" not in cut]
        else:
            result.append(path)
    return [path for path in result if not getattr(names[path], "inplace", False)]  # they write over their input


def refuse_inside(again: Sequence[str], regions: Sequence[str]) -> None:
    """A module that tensor-parallel workers divide is computed again as a whole, or not at all.

    Raises:
        ConfigurationError: where only a part of one would be.
    """
    for path in again:
        region = next((region for region in regions if path != region and within(path, region)), None)
        if region is not None:
            raise ConfigurationError(
                f"layout.recompute would compute {path} again, a part of {region or 'the model'}, whose layers are "
                "divided together; use layout.recompute=none, layout.tensor=1, or put that part into modules of a list"
            )


def _cut_modules(division: Division) -> set[str]:
    """Modules in whose call a stage ends."""
    edges = [cut.unit for cut in division.cuts]
    return {call.path for call in division.outline.calls if any(call.first < edge < call.stop for edge in edges)}


class Recomputation:
    """Blocks of a model that are computed again in the backward.

    Arguments:
        selective: keep the results of matrix products.
    """

    def __init__(self, model: nn.Module, paths: list[str], *, selective: bool) -> None:
        self._wrapping = Wrapping()
        options: dict[str, Any] = {"use_reentrant": False}
        if selective:
            options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
        for path in paths:
            self._wrapping.add(model.get_submodule(path), partial(_again, options))

    def close(self) -> None:
        """The model is as it was."""
        self._wrapping.close()


def _again(options: dict[str, Any], forward: Forward) -> Forward:
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, **options, **kwargs)

    return recomputed


def _policy(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    dear = getattr(operation, "overloadpacket", None) in DEAR
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE
