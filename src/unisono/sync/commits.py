"""How one worker commits runs of blocks, and puts right what those have begun who were lost."""

from collections.abc import Callable

from torch import Tensor

from unisono.comm.journal import Image, Journal
from unisono.plan.assignment import Run
from unisono.sync.ownership import RunMemory


class Commits:
    """One worker's.

    Arguments:
        slot: its place.
        versions: one word a block.
        row, memory: of a slot: its words, and where runs lie with its undo area.
        protects: others go on where this worker is killed in an update.

    Attributes:
        slot, versions, protects: see there.
        journal: its own.
    """

    def __init__(
        self,
        slot: int,
        versions: memoryview,
        row: Callable[[int], memoryview],
        memory: Callable[[int], RunMemory],
        *,
        protects: bool,
    ) -> None:
        self.slot = slot
        self.versions = versions
        self.protects = protects
        self.journal = Journal(row(slot), versions, protects=protects)
        self._row = row
        self._memory = memory

    @property
    def undo(self) -> Tensor:
        """Where this worker's old bytes go."""
        return self._memory(self.slot).undo

    def at(self, block: int) -> int:
        """The version of a block."""
        return self.versions[block]

    def recover(
        self, slot: int, only: Run | None = None, put_back_rows: Callable[[Tensor, int], None] | None = None
    ) -> None:
        """Put back what the worker of a slot was changing when it died.

        Arguments:
            only: where it was this run.
            put_back_rows: (undo area, first block) -> a table's old rows are in their places.
        """
        memory = self._memory(slot)

        def image_of(first: int, count: int, column: bool) -> Image:
            return memory.image(Run(first, first + count), column=column)

        def put_back(first: int) -> None:
            assert put_back_rows is not None
            put_back_rows(memory.undo, first)

        blocks = None if only is None else (only.first, only.stop)
        Journal(self._row(slot), self.versions).recover(image_of, blocks, put_back)
