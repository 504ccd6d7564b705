"""A model's buffers: private to a worker, equal at the start of every micro-batch, averaged once a step.

Every micro-batch starts from the step's buffers. Those that it wrote (BatchNorm's running statistics) enter the
canonical sum; at the commit they become the mean over the micro-batches that wrote them. Counters take the value that
the first micro-batch gave them: they advance once a step, not once a micro-batch.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from unisono.comm.partial import Partial, add_entry


class Buffers:
    """The buffers of one worker's model.

    Arguments:
        model: the model; its buffers stay its own tensors.
        names: the buffers, in the order of the layout.
        committed: their values as of the last committed step, shared by all workers; read only.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], committed: Sequence[Tensor]) -> None:
        self.names = tuple(names)
        self._owners = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in names]
        self._own = [getattr(module, attribute) for module, attribute in self._owners]
        self._committed = committed
        self._stale = set(range(len(names)))
        self._volatile: set[int] = set()  # those that a micro-batch has written

    def reset(self) -> None:
        """Start a forward, or a backward that may compute parts of it again, from the committed values.

        What forwards write is theirs: their graphs may stand on it, and others may be under way.
        """
        for b in self._stale | self._volatile:
            module, attribute = self._owners[b]
            self._own[b] = self._committed[b].clone()
            setattr(module, attribute, self._own[b])
        self._stale.clear()

    def invalidate(self) -> None:
        """The committed values have changed."""
        self._stale.update(range(len(self._own)))

    def gather(self) -> list[Tensor | None]:
        """After a micro-batch's forward: the buffers that it wrote, None for the others."""
        values: list[Tensor | None] = []
        for b, (module, attribute) in enumerate(self._owners):
            value = getattr(module, attribute)
            written = value is not self._own[b] or not torch.equal(value, self._committed[b])
            if written:
                self._volatile.add(b)
            values.append(value.detach() if written else None)
        return values

    def add(self, chain: Sequence[Partial], values: Sequence[Tensor | None], members: Iterable[int]) -> None:
        """Add a micro-batch's buffers to the sums: those of ``members``."""
        uses = chain[0].uses
        for b in members:
            add_entry(chain, uses + b, values[b])
