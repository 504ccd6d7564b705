"""A model whose parameters hosts share out: each layer's are brought together for its forward and for its backward.

A parameter's place in memory never changes: bringing it fills the pages, giving it back frees them. In between the
parameter is an empty tensor, so that code which uses it elsewhere fails instead of reading zeros. The next layer's
parameters travel while one is computed (Rajbhandari et al., ZeRO, 2020; Zhao et al., PyTorch FSDP, 2023).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
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
        self._members = [[parameters[name] for name in names] for names in members]
        self._places = [[parameter.data for parameter in group] for group in self._members]
        self._here: set[int] = set()
        self._coming: dict[int, Pending] = {}
        self._backward: set[int] = set()  # groups that are needed until their backward is over
        self._order: list[int] = []  # in which a micro-batch needs groups, its forward first
        self._at = 0
        self._active = True
        self._wrapping = Wrapping()
        for number, path in enumerate(layers):
            if number != REST:
                self._wrapping.add(model.get_submodule(path), partial(self._layer, number))
        for number in range(len(layers)):
            self._here.add(number)
            self._give_back(number)

    def begin_forward(self) -> None:
        """A micro-batch's forward begins."""
        self._at = 0
        self._need(REST)

    def begin_backward(self) -> None:
        """A micro-batch's backward begins, right after its forward."""
        self._backward.add(REST)

    def end(self) -> None:
        """A micro-batch is over: nothing is needed any more."""
        for pending in self._coming.values():
            pending.wait("values that were not needed")
        self._here |= set(self._coming)
        self._coming.clear()
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

    def _layer(self, number: int, forward: Forward) -> Forward:
        def layer(*args: Any, **kwargs: Any) -> Any:
            if not self._active:
                return forward(*args, **kwargs)
            self._need(number)
            result = forward(*args, **kwargs)
            leaves = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
            for node in {leaf.grad_fn for leaf in leaves if leaf.grad_fn is not None}:
                node.register_prehook(partial(self._enter_backward, number))
            if number not in self._backward and self._next() != number:
                self._give_back(number)
            return result

        return layer

    def _enter_backward(self, number: int, gradients: Any) -> None:
        """The gradients of a layer's results are there; those behind it have had their turn."""
        if number in self._backward:
            return
        for other in self._backward - {REST}:
            self._give_back(other)
        self._backward &= {REST}
        self._backward.add(number)
        self._need(number)

    def _need(self, number: int) -> None:
        """Have a group here, and the next one on its way."""
        if number in self._backward and number in self._here:
            return  # a layer that is computed again in its backward
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
            self._coming.pop(number).wait(f"values of layer {number}")
            self._here.add(number)
            self._show(number)

    def _show(self, number: int) -> None:
        for parameter, place in zip(self._members[number], self._places[number], strict=True):
            parameter.data = place

    def _give_back(self, number: int) -> None:
        if number in self._here:
            self._here.remove(number)
            for parameter, place in zip(self._members[number], self._places[number], strict=True):
                parameter.data = place.new_empty(0)
            self._values.give_back(number)
