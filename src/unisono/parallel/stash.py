"""A model's parameters in several versions: each micro-batch is computed with the one that is its own."""

from collections.abc import Iterator, Sequence

from torch import Tensor, nn

from unisono.plan.blocks import FlatLayout
from unisono.plan.stash import Stashing, place, used


class Stash:
    """The versions of one worker's model.

    A version is a parameter object of its own: a graph stands on the one that its forward used, whatever is bound now.

    Arguments:
        model: as it is bound to the first place.
        bound: the parameter of every trained use, in flat order.
        places: the values of all parameters, in flat order, at each place; as many as the parameter with most versions
            needs.
    """

    def __init__(
        self,
        model: nn.Module,
        flat: FlatLayout,
        stashing: Stashing,
        bound: Sequence[nn.Parameter],
        places: Sequence[Sequence[Tensor]],
    ) -> None:
        self._unit = stashing.unit
        self._owners = [
            (model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name, _ in flat.uses
        ]
        self._delays = [stashing.delays[parameter] for _, parameter in flat.uses]
        self._objects = [
            [own, *(_over(places[at][parameter], own) for at in range(1, 1 + delay))]
            for own, delay, (_, parameter) in zip(bound, self._delays, flat.uses, strict=True)
        ]
        self._bound = [0] * len(self._objects)

    @property
    def leaves(self) -> Iterator[tuple[int, nn.Parameter]]:
        """Every parameter object, with its use."""
        for use, objects in enumerate(self._objects):
            for parameter in objects:
                yield use, parameter

    def bind(self, micro_batch: int) -> None:
        """Compute with what a micro-batch is to be computed with."""
        unit = micro_batch // self._unit
        self._bind([place(used(unit, delay), delay) for delay in self._delays])

    def rest(self) -> None:
        """Compute with what lies at the first place."""
        self._bind([0] * len(self._objects))

    def _bind(self, wanted: Sequence[int]) -> None:
        for use, (at, before) in enumerate(zip(wanted, self._bound, strict=True)):
            if at != before:
                module, attribute = self._owners[use]
                setattr(module, attribute, self._objects[use][at])
                self._bound[use] = at


def _over(values: Tensor, like: nn.Parameter) -> nn.Parameter:
    parameter = nn.Parameter(values.new_empty(0), requires_grad=like.requires_grad)
    parameter.data = values  # and not Parameter(values), which would share a version counter
    return parameter
