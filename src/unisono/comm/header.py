"""The arena's words: what workers tell each other in single aligned stores.

One header for the host, one row of words for each slot (written by its worker alone), one version for each block.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from unisono.comm.arena import Arena, Region, store_fence
from unisono.events import PHASES
from unisono.run.summation import Node

MAGIC = 0x554E49534F4E4F01  # "UNISONO", format 1

GENERATION_BITS, STEP_BITS, NODE_BITS = 14, 30, 20
MOST_MICRO_BATCHES = 1 << (NODE_BITS - 1)

# Words of the header.
_MAGIC, _GENERATION, _REVOKED, _CLOSED, _COMMITTED, _HEADER_WORDS = 0, 1, 2, 3, 4, 8
# Words of a slot.
_DONE, _SEQUENCE, _FLAGS, _ACTIVITY, _LAYOUT, _PUBLISHED = 0, 1, 2, 3, 4, 16
ENTRIES = 256  # published subtrees: two a level of the largest tree, and one a round (see `comm.rounds`)
UNDO_VERSION, UNDO_RUN, UNDO_PLACE = 8, 9, 10
SLOT_WORDS = _PUBLISHED + ENTRIES

ACTIVITIES = ("start", *PHASES, "validation", "checkpoint", "finish")


def header_bytes(slots: int) -> int:
    """Size of the words' region."""
    return 8 * (_HEADER_WORDS + slots * SLOT_WORDS)


@dataclass(frozen=True, slots=True)
class Publication:
    """A finished subtree: who holds it, in which of their buffers."""

    node: Node
    slot: int
    entry: int


def pack(generation: int, step: int, node: Node) -> int:
    """One word that says: this subtree of this step is complete in this generation; ``step`` counts from 1."""
    return (generation << (STEP_BITS + NODE_BITS)) | (step << NODE_BITS) | node.code


class Header:
    """Typed access to the words of an arena."""

    def __init__(self, arena: Arena, region: Region, slots: int) -> None:
        self._words = arena.words(region)
        self.slots = slots
        if self._words[_MAGIC] not in (0, MAGIC):
            raise ValueError("not an arena of this version")
        self._words[_MAGIC] = MAGIC

    def slot(self, slot: int) -> memoryview:
        """The words of one slot."""
        start = _HEADER_WORDS + slot * SLOT_WORDS
        return self._words[start : start + SLOT_WORDS]

    @property
    def generation(self) -> int:
        """The group's number; grows at each change of membership."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, value: int) -> None:
        self._words[_GENERATION] = value

    @property
    def revoked(self) -> int:
        """Generations below this number have ended."""
        return self._words[_REVOKED]

    @revoked.setter
    def revoked(self, value: int) -> None:
        self._words[_REVOKED] = value

    @property
    def closed(self) -> int:
        """The last step of which every micro-batch is published: its update may have begun."""
        return self._words[_CLOSED]

    @closed.setter
    def closed(self, step: int) -> None:
        self._words[_CLOSED] = step

    @property
    def committed(self) -> int:
        """The last step whose new state is whole."""
        return self._words[_COMMITTED]

    @committed.setter
    def committed(self, step: int) -> None:
        self._words[_COMMITTED] = step

    def done(self, slot: int) -> int:
        """The last step that a slot's worker has finished."""
        return self.slot(slot)[_DONE]

    def set_done(self, slot: int, step: int) -> None:
        """Everything that this slot owns is at the state after ``step``."""
        store_fence()
        self.slot(slot)[_DONE] = step

    def sequence(self, slot: int) -> int:
        """How many messages a slot's worker has put into its mailbox."""
        return self.slot(slot)[_SEQUENCE]

    def set_sequence(self, slot: int, number: int) -> None:
        """Message ``number`` is complete in the slot's mailbox."""
        store_fence()
        self.slot(slot)[_SEQUENCE] = number

    def flags(self, slot: int) -> int:
        """Requests that travel with a slot's partials."""
        return self.slot(slot)[_FLAGS]

    def set_flags(self, slot: int, flags: int) -> None:
        """Set before the slot's last partial of a step is published, so that all read the same."""
        self.slot(slot)[_FLAGS] = flags

    def set_activity(self, slot: int, activity: str, step: int) -> None:
        """What the slot's worker does now, for the error of whoever waits for it."""
        self.slot(slot)[_ACTIVITY] = (step << 8) | ACTIVITIES.index(activity)

    def activity(self, slot: int) -> str:
        """What the slot's worker did last."""
        word = self.slot(slot)[_ACTIVITY]
        return f"{ACTIVITIES[word & 0xFF]} of step {word >> 8}"

    def layout(self, slot: int) -> int:
        """A hash of the layout that the slot's worker computed, 0 before it has."""
        return self.slot(slot)[_LAYOUT]

    def set_layout(self, slot: int, value: int) -> None:
        """This worker has mapped the arena and expects this layout in it."""
        self.slot(slot)[_LAYOUT] = value

    def publish(self, slot: int, entry: int, generation: int, step: int, node: Node) -> None:
        """The subtree in the slot's buffer ``entry`` is complete, and immutable from now on."""
        store_fence()
        self.slot(slot)[_PUBLISHED + entry] = pack(generation, step, node)

    def publications(self, generation: int, step: int, slots: Sequence[int]) -> list[Publication]:
        """What has been published for a step of a generation; words of other steps do not count."""
        prefix = (generation << STEP_BITS) | step
        found = []
        for slot in slots:
            row = self.slot(slot)
            for entry in range(ENTRIES):
                word = row[_PUBLISHED + entry]
                if word >> NODE_BITS != prefix:
                    break  # entries fill from the first
                found.append(Publication(Node.from_code(word & ((1 << NODE_BITS) - 1)), slot, entry))
        return found
