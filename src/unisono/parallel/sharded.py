"""A model whose parameters hosts share out: each layer's are brought together for its forward and for its backward.

A parameter's place in memory never changes: bringing it fills the pages, giving it back frees them. In between the
parameter is an empty tensor, so that code which uses it elsewhere fails instead of reading zeros. The next layer's
parameters travel while one is computed (Rajbhandari et al., ZeRO, 2020; Zhao et al., PyTorch FSDP, 2023).
"""

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch._C._autograd import _top_saved_tensors_default_hooks
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from unisono.comm.values import Values
from unisono.comm.wire import Pending
from unisono.plan.wrapping import Forward, Wrapping

REST = 0
"""The number of the group of what belongs to no layer: it is there as long as a micro-batch is computed."""


class ShardedValues:
    """The parameters of one worker's model.

    Arguments:
        layers: the modules whose parameters are brought together, by group; the first one is the whole model's.
        members: the names of each group's parameters.
        parameters: by name, bound to their memory.
        values: how they are brought.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[str],
        members: Sequence[Sequence[str]],
        parameters: Mapping[str, nn.Parameter],
        values: Values,
    ) -> None:
        self._values = values
        self._names = [path or "the model's other parts" for path in layers]
        self._members = [[parameters[name] for name in names] for names in members]
        self._places = [[parameter.data for parameter in group] for group in self._members]
        self._ranges = sorted(
            (place.data_ptr(), place.data_ptr() + place.nbytes, number)
            for number, group in enumerate(self._places)
            for place in group
        )
        self._here: set[int] = set()
        self._coming: dict[int, Pending] = {}
        self._in_backward = False
        self._backward: set[int] = set()  # groups that are needed until their backward is over
        self._order: list[int] = []  # in which a micro-batch needs groups, its forward first
        self._at = 0
        self._active = True
        self._wrapping = Wrapping()
        self._handles = []
        for number, path in enumerate(layers):
            if number != REST:
                self._wrapping.add(model.get_submodule(path), partial(self._layer, number))
                for parameter in self._members[number]:
                    hook = partial(self._enter_backward, number)
                    self._handles.append(parameter.register_hook(hook))  # type: ignore[no-untyped-call]
        for number in range(len(layers)):
            self._here.add(number)
            self._give_back(number)

    def begin_forward(self) -> None:
        """A micro-batch's forward begins."""
        self._at = 0
        self._need(REST)

    def begin_backward(self) -> None:
        """A micro-batch's backward begins, right after its forward."""
        self._in_backward = True
        self._backward.add(REST)

    def without_backward(self) -> None:
        """A micro-batch that has no gradient: what other hosts need for theirs is brought all the same."""
        rest = self._order[self._at :] or [number for number in reversed(self._order[: self._at]) if number != REST]
        for number in rest:
            self._enter_backward(number)

    def end(self) -> None:
        """A micro-batch is over: nothing is needed any more."""
        for number, pending in self._coming.items():
            pending.wait(self._operation(number))
        self._here |= set(self._coming)
        self._coming.clear()
        self._in_backward = False
        self._backward.clear()
        for number in list(self._here):
            self._give_back(number)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """All parameters are here, for code that uses them as it likes."""
        self.bring_all()
        try:
            yield
        finally:
            self._active = True
            self.end()

    def bring_all(self) -> None:
        """From here on all parameters are here."""
        for number in range(len(self._members)):
            self._bring(number)
            self._arrive(number)
        self._active = False

    def close(self) -> None:
        """The model is as it was; parameters that are not here stay empty."""
        self._wrapping.close()
        for handle in self._handles:
            handle.remove()

    def _layer(self, number: int, forward: Forward) -> Forward:
        def layer(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return forward(*args, **kwargs)
            if self._in_backward:  # it is computed again
                self._enter_backward(number)
                return forward(*args, **kwargs)
            self._need(number)
            given = {id(leaf.grad_fn) for leaf in _tensors((args, kwargs)) if leaf.grad_fn is not None}
            if _top_saved_tensors_default_hooks(True) is not None:  # it is computed again, or kept elsewhere
                result = forward(*args, **kwargs)
            else:
                with saved_tensors_hooks(self._pack, self._unpack):
                    result = forward(*args, **kwargs)
            for node in {leaf.grad_fn for leaf in _tensors(result) if leaf.grad_fn is not None}:
                if id(node) not in given:  # what is handed on has its backward elsewhere
                    node.register_prehook(partial(self._enter_backward, number))
            if self._next() != number:
                self._give_back(number)
            return result

        return layer

    def _pack(self, tensor: Tensor) -> object:
        """What a layer's graph keeps: a parameter, or a view of one, has to be brought before it is used again."""
        at = bisect_right(self._ranges, tensor.data_ptr(), key=lambda found: found[0]) - 1
        if at < 0 or tensor.data_ptr() >= self._ranges[at][1]:
            return tensor
        return self._ranges[at][2], tensor

    def _unpack(self, kept: object) -> Tensor:
        if isinstance(kept, tuple):
            number, kept = kept
            self._enter_backward(number)
        assert isinstance(kept, Tensor)
        return kept

    def _enter_backward(self, number: int, gradients: Any = None) -> None:
        """A layer's parameters are needed in the backward; those behind it have had their turn."""
        if number in self._backward or not self._active:
            return
        for other in self._backward - {REST}:
            self._give_back(other)
        self._backward &= {REST}
        self._backward.add(number)
        self._need(number)

    def _need(self, number: int) -> None:
        """Have a group here, and the next one on its way."""
        if self._at < len(self._order) and self._order[self._at] != number:
            del self._order[self._at :]
        if self._at == len(self._order):
            self._order.append(number)
        self._at += 1
        self._bring(number)
        self._arrive(number)
        following = self._next()
        if following is not None:
            self._bring(following)

    def _next(self) -> int | None:
        """What is needed next, as far as that is known from micro-batches before."""
        return self._order[self._at] if self._at < len(self._order) else None

    def _bring(self, number: int) -> None:
        if number not in self._here and number not in self._coming:
            self._coming[number] = self._values.bring(number)

    def _arrive(self, number: int) -> None:
        if number not in self._here:
            self._coming.pop(number).wait(self._operation(number))
            self._here.add(number)
            self._show(number)

    def _operation(self, number: int) -> str:
        return f"parameters of {self._names[number]}, which all hosts must use in the same order for every micro-batch,"

    def _show(self, number: int) -> None:
        for parameter, place in zip(self._members[number], self._places[number], strict=True):
            parameter.data = place

    def _give_back(self, number: int) -> None:
        if number in self._here:
            self._here.remove(number)
            for parameter, place in zip(self._members[number], self._places[number], strict=True):
                parameter.data = place.new_empty(0)
            self._values.give_back(number)


def _tensors(value: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
