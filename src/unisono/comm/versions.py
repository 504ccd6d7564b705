"""How far the blocks of a state are, in the arena: one word each, which whoever updates a block sets."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from unisono.comm.host import HostGroup
from unisono.plan.roster import Loss


class ArenaVersions:
    """Those of one state's blocks.

    Arguments:
        words: one a block.
        what: is waited for, for errors.
    """

    def __init__(self, group: HostGroup, words: memoryview, what: str) -> None:
        self._group = group
        self._what = what
        self._words: NDArray[np.uint64] = np.frombuffer(words, dtype=np.uint64)

    def await_all(self, step: int, blocks: Sequence[int]) -> Sequence[Loss]:
        """Wait until some blocks are at ``step``; workers that were lost meanwhile, of whose blocks some may not be."""

        wanted = np.asarray(blocks, dtype=np.int64)

        def ready() -> bool:
            return bool((self._words[wanted] >= step).all())

        return self._group.wait_or_lose(
            ready, f"{self._what} of step {step}", lambda: f"updates of some blocks; {self._group.doing()}"
        )
