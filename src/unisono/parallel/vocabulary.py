"""Logits of which every worker has a part of the vocabulary: their cross-entropy needs three small sums, no exchange.

Code between the model's head and the loss sees a tensor of the whole shape. What keeps the last dimension is done to
the part; `torch.nn.functional.cross_entropy` is computed from the parts; anything else puts them together first.
"""

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from unisono.comm.tensor_group import TensorGroup
from unisono.errors import ConfigurationError

Join = Callable[[Tensor], Tensor]


class Logits(Tensor):
    """A tensor whose last dimension is divided.

    Attributes:
        part: this worker's, (..., classes / workers).
        group: the workers.
        join: part -> the whole.
    """

    part: Tensor
    group: TensorGroup
    join: Join

    @staticmethod
    def __new__(cls, part: Tensor, group: TensorGroup, join: Join) -> Self:
        """Logits from this worker's part."""
        shape = (*part.shape[:-1], part.shape[-1] * group.size)
        needed = part.requires_grad and torch.is_grad_enabled()
        result: Self = Tensor._make_wrapper_subclass(
            cls, shape, dtype=part.dtype, device=part.device, requires_grad=needed
        )
        result.part, result.group, result.join = part, group, join
        with torch._C.DisableTorchFunctionSubclass():
            if needed:
                result.register_hook(_lost)  # type: ignore[no-untyped-call]
        return result

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if func in _FORM or name in ("size", "dim", "numel", "ndimension", "is_floating_point", "__len__"):
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        own = args[0] if args and isinstance(args[0], Logits) else None
        if own is not None:
            if (name.endswith("_") and not name.endswith("__")) or name == "__setitem__":
                raise ConfigurationError(
                    f"the loss changes the model's output in place ({name}), of which every worker has a part; "
                    "let it make a new tensor, or use layout.loss_parallel=false"
                )
            if func is F.cross_entropy:
                loss = _loss(own, *args[1:], **kwargs)
                if loss is not None:
                    return loss
            part = _same_last_dimension(own, name, args[1:], kwargs)
            if part is not None:
                return Logits(part, own.group, own.join)
        args, kwargs = pytree.tree_map_only(Logits, lambda logits: logits.join(logits.part), (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # as torch's own subclasses have it
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Whatever is not a function of torch, for example one of the user's own, sees the whole."""
        args, kwargs = pytree.tree_map_only(Logits, lambda logits: logits.join(logits.part), (args, kwargs or {}))
        return func(*args, **kwargs)


def _lost(gradient: Tensor) -> None:
    """A gradient has come to the wrapper, past its part.

    Raises:
        ConfigurationError: always.
    """
    raise ConfigurationError(
        "the loss gives the model's output, of which every worker has a part, to a function of its own "
        "(torch.autograd.Function), which would lose its gradient; use layout.loss_parallel=false"
    )


_FORM = {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim", "is_sparse")}
"""What is known without values."""


def check_range(indices: Tensor, count: int, what: str, ignored: int | None = None) -> None:
    """As torch does for whole layers.

    Raises:
        IndexError: for an index that is not below ``count``.
    """
    wrong = (indices < 0) | (indices >= count)
    if ignored is not None:
        wrong &= indices != ignored
    if bool(wrong.any()):
        raise IndexError(f"{what} is {int(indices[wrong][0])}, and must be from 0 to {count - 1}")


def _same_last_dimension(logits: Logits, name: str, args: Any, kwargs: Any) -> Tensor | None:
    """What a function that keeps the last dimension makes of the part; None for any other function."""
    part, classes = logits.part, logits.shape[-1]
    if name in ("view", "reshape"):
        extents = args[0] if len(args) == 1 and isinstance(args[0], tuple | list | torch.Size) else args
        if not kwargs and extents and all(isinstance(n, int) for n in extents) and extents[-1] == classes:
            return part.reshape(*extents[:-1], part.shape[-1])
    elif name == "flatten" and not kwargs and tuple(args) in ((0, -2), (0, logits.dim() - 2)):
        return part.flatten(0, -2)
    elif name in ("float", "contiguous", "detach", "clone", "double") and not args and not kwargs:
        return getattr(part, name)()  # type: ignore[no-any-return]
    elif name == "to" and not kwargs and len(args) == 1 and isinstance(args[0], torch.dtype):
        return part.to(args[0])
    elif name == "__getitem__":
        index = args[0] if isinstance(args[0], tuple) else (args[0],)
        if all(isinstance(i, int | slice) or i is Ellipsis for i in index) and not kwargs:
            if Ellipsis in index:
                whole_last = index[-1] == slice(None) or index[-1] is Ellipsis
            else:
                whole_last = len(index) < logits.dim() or index[-1] == slice(None)
            if whole_last:
                return part[index]
    return None


def _loss(
    logits: Logits,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor | None:
    """Cross-entropy of (samples, classes) and class numbers; None for what needs whole logits."""
    usual = weight is None and size_average is None and reduce is None and label_smoothing == 0.0
    if not usual or logits.dim() != 2 or target.is_floating_point():
        return None
    losses: Tensor = _CrossEntropy.apply(logits.part.float(), target, ignore_index, logits.group)  # type: ignore[no-untyped-call]
    if reduction == "none":
        return losses
    if reduction == "sum":
        return losses.sum()
    return losses.sum() / (target != ignore_index).sum()


class _CrossEntropy(torch.autograd.Function):
    """Shoeybi et al., Megatron-LM, 2019, section 3."""

    @staticmethod
    def forward(ctx: Any, part: Tensor, target: Tensor, ignore_index: int, group: TensorGroup) -> Tensor:
        """(samples, part of the classes), (samples,) -> (samples,)."""
        where = "the cross-entropy of divided logits"
        largest = group.all_gather(part.max(dim=-1, keepdim=True).values, -1, where).max(dim=-1).values
        shifted = part - largest.unsqueeze(-1)
        check_range(target, group.size * part.shape[-1], "a target class", ignore_index)
        first = group.rank * part.shape[-1]
        ignored = target == ignore_index
        foreign = (target < first) | (target >= first + part.shape[-1]) | ignored
        own = (target - first).masked_fill(foreign, 0)
        wanted = shifted.gather(-1, own.unsqueeze(-1)).squeeze(-1).masked_fill(foreign, 0.0)
        exponentials = shifted.exp()
        sums, wanted = group.all_reduce(torch.stack([exponentials.sum(-1), wanted]), where)
        ctx.save_for_backward(exponentials.div_(sums.unsqueeze(-1)), own, foreign, ignored)
        losses: Tensor = (sums.log() - wanted).masked_fill(ignored, 0.0)
        return losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        """The softmax, less 1 at the target."""
        probabilities, own, foreign, ignored = ctx.saved_tensors
        ones = (~foreign).to(probabilities.dtype).unsqueeze(-1)
        result = probabilities.scatter_add(-1, own.unsqueeze(-1), -ones)
        return result * gradients[0].masked_fill(ignored, 0.0).unsqueeze(-1), None, None, None
