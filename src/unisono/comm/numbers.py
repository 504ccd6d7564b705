"""A number for each block, brought together in the arena: whoever updates a block leaves its own."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unisono.comm.arena import Region
from unisono.comm.host import HostGroup
from unisono.comm.words import store_fence
from unisono.plan.assignment import Run
from unisono.plan.roster import Loss


class ArenaNumbers:
    """Those of one state's blocks.

    Arguments:
        group: the workers of the host.
        region: where they lie.
        what: the numbers are, for errors.
        kept: the blocks that this host keeps, where others keep the rest.
    """

    def __init__(self, group: HostGroup, region: Region, what: str, kept: Sequence[int] | None = None) -> None:
        self._group = group
        self._what = what
        data = group.arena.bytes(region)
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

        def absent() -> str:
            return f"the {self._what} of some blocks; {self._group.doing()}"

        return self._group.wait_or_lose(ready, f"{self._what} of step {step}", absent)

    def all(self, step: int) -> Sequence[float]:
        """That of every block; 0 where others keep it."""
        return self._values.tolist()  # type: ignore[no-any-return]
