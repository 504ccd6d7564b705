"""The squared norms of a gradient's blocks, brought together in the arena: whoever updates a block leaves its own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unisono.comm.host import HostGroup
from unisono.comm.words import store_fence
from unisono.plan.assignment import Run
from unisono.plan.roster import Loss


class ArenaSquares:
    """Those of one state's blocks.

    Arguments:
        group: the workers of the host.
        replica: the number of the state.
        kept: the blocks that this host keeps, where others keep the rest.
    """

    def __init__(self, group: HostGroup, replica: int, kept: Sequence[int] | None = None) -> None:
        self._group = group
        data = group.arena.bytes(group.layout.squares(replica))
        halves = len(data) // 2
        trained = group.layout.blocks - 1  # the last one stands for the buffers
        self._steps: NDArray[np.uint64] = np.frombuffer(data[:halves], dtype=np.uint64)[:trained]
        self._values: NDArray[np.float64] = np.frombuffer(data[halves:], dtype=np.float64)[:trained]
        self._kept = np.arange(trained) if kept is None else np.array(kept)

    def put(self, step: int, run: Run, values: Sequence[float]) -> None:
        """Leave those of a run's blocks."""
        self._values[run.first : run.stop] = values
        store_fence()
        self._steps[run.first : run.stop] = step

    def has(self, step: int, run: Run) -> bool:
        """Whether those of a run have been left."""
        return bool((self._steps[run.first : run.stop] == step).all())

    def await_all(self, step: int) -> Sequence[Loss]:
        """Wait for those of all blocks; workers that were lost meanwhile, of whose blocks some may be missing."""

        def ready() -> bool:
            return bool((self._steps[self._kept] == step).all())

        return self._group.wait_or_lose(ready, f"norm of step {step}", lambda: f"blocks' norms; {self._group.doing()}")

    def all(self, step: int) -> Sequence[float]:
        """The squared norm of every block; 0 where others keep it."""
        return self._values.tolist()  # type: ignore[no-any-return]
