"""Losses and weights of micro-batches, as soon as these are forwarded: hosts tell each other before the backward."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unisono.comm.words import store_fence
from unisono.run.summation import Node, finish


def foretold_bytes(micro_batches: int, scalars: int) -> int:
    """Bytes for those of a step."""
    return 8 * micro_batches * (1 + scalars)


class Foretold:
    """Those of a host's workers.

    Arguments:
        memory: common to them.
        count: micro-batches of a step.
        scalars: of a partial.

    Attributes:
        scalars: see there.
    """

    def __init__(self, memory: memoryview, count: int, scalars: int) -> None:
        rows: NDArray[np.float64] = np.frombuffer(memory, dtype=np.float64).reshape(count, 1 + scalars)
        self._steps, self._values = rows[:, 0], rows[:, 1:]
        self._count, self.scalars = count, scalars

    def put(self, step: int, micro_batch: int, scalars: Sequence[float]) -> None:
        """A micro-batch has been forwarded."""
        self._values[micro_batch] = scalars
        store_fence()
        self._steps[micro_batch] = step

    def has(self, step: int, micro_batches: Sequence[int]) -> bool:
        """Whether all of these have been."""
        return bool((self._steps[list(micro_batches)] == step).all())

    def summed(self, node: Node) -> tuple[float, ...]:
        """The canonical sum over a subtree."""
        leaves = {Node(0, m): tuple(self._values[m].tolist()) for m in self.of(node)}
        return finish(leaves, self._count, lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)), node)

    def of(self, node: Node) -> range:
        """The micro-batches of a subtree."""
        return range(node.start, min(node.stop, self._count))
