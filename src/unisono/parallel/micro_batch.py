"""A micro-batch: its input and target, what a model and a loss make of it, and what is kept until its backward."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unisono.errors import ConfigurationError
from unisono.parallel.curvature import Noted
from unisono.parallel.entrance import Entrance
from unisono.parallel.split import Rest
from unisono.run.rng import Draws

Loss = Callable[[Any, Any], Any]
"""(output, target) -> mean loss, or (sum of losses, weight)."""


@dataclass(slots=True)
class Forwarded:
    """A micro-batch between its forward and its backward, on one stage.

    Attributes:
        made: the loss, or what the next stage needs.
        entrance: what an earlier stage has sent.
        value, weight: of the loss, in the last stage.
        buffers: copies of those that it wrote.
        draws: what its modules draw from.
        rest: what the first part of a backward has left for the second.
        replica: the virtual replica that computes it; 0 for the model itself.
        noted: what it tells of the curvature; None where that is not learned.
    """

    micro_batch: int
    stage: int
    made: Sequence[Tensor]
    entrance: Entrance
    value: float
    weight: float
    buffers: Sequence[Tensor | None]
    draws: Draws
    rest: Rest | None = None
    replica: int = 0
    noted: Noted | None = None

    def scalars(self, count: int) -> list[float]:
        """What a partial's scalars, ``count`` of them, are for this micro-batch alone."""
        own = {0: self.value, 1: self.weight, 2 + self.replica: self.weight}
        return [own.get(i, 0.0) for i in range(count)]


@dataclass(frozen=True, slots=True)
class Objective:
    """A micro-batch's loss as it is evaluated once, with its graph.

    Attributes:
        draws: what its modules draw from.
    """

    output: object
    loss: Tensor
    weight: float
    draws: Draws


def split(batch: object) -> tuple[object, object]:
    """Input and target of a batch: the two parts of a pair, or the batch itself as both."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, batch


def rows(batch: object) -> int:
    """Samples in a batch: the first extent of its first tensor."""
    tensors = [leaf for leaf in pytree.tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.dim() > 0]
    return len(tensors[0]) if tensors else 1


def call(model: nn.Module, inputs: object) -> object:
    """The model's output: a mapping is passed by name, a tuple by position, anything else as it is."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def loss_and_weight(result: object) -> tuple[Tensor, float]:
    """What a loss function returned, as (sum, weight); a mean has the weight 1.

    Raises:
        ConfigurationError: for anything that is neither.
    """
    loss, weight = result if isinstance(result, tuple) and len(result) == 2 else (result, 1.0)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        found = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else f"{type(loss).__name__}"
        raise ConfigurationError(f"the loss returned {found}; return a scalar tensor, or a pair (sum, weight)")
    weight = float(weight.item() if isinstance(weight, Tensor) else weight)
    if weight < 0 or weight != weight:
        raise ConfigurationError(f"the loss returned the weight {weight}; a weight is a number from 0")
    return loss, weight
