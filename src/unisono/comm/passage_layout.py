"""Where the slots of a pipeline's passages lie in the arena."""

from dataclasses import dataclass
from enum import IntEnum

from unisono.comm.arena import PAGE, Regions
from unisono.plan.blocks import aligned

HEAD_BYTES = PAGE


class Way(IntEnum):
    """What a passage carries."""

    ACTIVATIONS = 0
    GRADIENTS = 1


@dataclass(frozen=True, slots=True)
class PassageLayout:
    """Where slots lie.

    Attributes:
        counts: micro-batches of each lane: of each replica, or of each of its tensor-parallel workers.
        sizes: bytes of what is passed on behind each stage but the last.
    """

    counts: tuple[int, ...]
    sizes: tuple[int, ...]

    def _slot_bytes(self, stage: int) -> int:
        return aligned(HEAD_BYTES + self.sizes[stage], PAGE)

    def add_to(self, regions: Regions) -> None:
        """Ask for the memory of all passages."""
        slots = len(Way) * sum(self.counts)
        regions.add("passage words", 8 * slots * len(self.sizes))
        regions.add("passages", slots * sum(self._slot_bytes(stage) for stage in range(len(self.sizes))), PAGE)

    def words(self, lane: int, stage: int, way: Way) -> tuple[int, int]:
        """The first word of a passage behind ``stage``, and how many it has: one a slot."""
        before = len(Way) * (sum(self.counts) * stage + sum(self.counts[:lane]))
        return before + way * self.counts[lane], self.counts[lane]

    def slot(self, lane: int, stage: int, way: Way, slot: int) -> tuple[int, int]:
        """(offset, bytes) of a slot."""
        first, _ = self.words(lane, stage, way)
        own = first - len(Way) * sum(self.counts) * stage + slot
        before = len(Way) * sum(self.counts) * sum(self._slot_bytes(s) for s in range(stage))
        return before + own * self._slot_bytes(stage), self._slot_bytes(stage)
