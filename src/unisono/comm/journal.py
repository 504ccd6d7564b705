"""The commit of one run of blocks: in place, and whole or not at all whatever is killed.

Order of the stores, which x86 keeps: (1) copy the old bytes aside, (2) publish what was copied, (3) update in place,
(4) set the blocks' versions, the last block's last, (5) clear the publication. A crash before (2) changed nothing;
between (2) and the end of (4) the old bytes are put back; after (4) the new ones are whole. Putting back may be
interrupted and begun again: nothing it reads changes until its last store.

The copy lands in the slot's undo area or, while a snapshot is being taken, in the snapshot at the same offset: then
what protects the commit is also the consistent copy of the version before it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from unisono.comm.header import UNDO_PLACE, UNDO_RUN, UNDO_VERSION
from unisono.comm.words import store_fence

IN_UNDO_AREA, IN_SNAPSHOT, COLUMN, ROWS = 0, 1, 2, 4
"""Where old bytes are; added, that they are of a column; in place of that, that they are some rows of a table."""


@dataclass(frozen=True, slots=True)
class Image:
    """What a run of blocks consists of in memory, and where its old bytes go: matching lists of views.

    Attributes:
        column: it covers the same run of every replica too, whose blocks' versions stay.
    """

    first: int
    count: int
    live: Sequence[Tensor]
    undo: Sequence[Tensor]
    snapshot: Sequence[Tensor]
    column: bool = False


def _copy(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    for a, b in zip(target, source, strict=True):
        a.copy_(b)


class Journal:
    """Commits and recovers runs of blocks for one slot.

    Arguments:
        row: the slot's words.
        versions: one word a block: the step after which its present bytes are the state.
        copy: how bytes are copied; replaced in tests that crash in the middle.
        protects: others go on where this worker is killed. Else old bytes are kept for snapshots alone.
    """

    def __init__(
        self,
        row: memoryview,
        versions: memoryview,
        copy: Callable[[Sequence[Tensor], Sequence[Tensor]], None] = _copy,
        *,
        protects: bool = True,
    ) -> None:
        self._row = row
        self._versions = versions
        self._copy = copy
        self._protects = protects

    def commit(self, image: Image, version: int, update: Callable[[], None], *, snapshot: bool = False) -> None:
        """Run ``update``, which overwrites ``image.live`` in place, as the step from ``version - 1`` to ``version``."""
        if not (self._protects or snapshot):
            update()
            self.advance(image, version)
            return
        self._copy(image.snapshot if snapshot else image.undo, image.live)
        self._do(image, version, (IN_SNAPSHOT if snapshot else IN_UNDO_AREA) + (COLUMN if image.column else 0), update)

    def commit_rows(self, image: Image, version: int, keep: Callable[[], None], update: Callable[[], None]) -> None:
        """As `commit`, where some rows of a table change.

        Arguments:
            keep: copies them to the undo area.
        """
        if self._protects:
            keep()
            self._do(image, version, ROWS, update)
        else:
            update()
            self.advance(image, version)

    def _do(self, image: Image, version: int, place: int, update: Callable[[], None]) -> None:
        """Publish what was copied, update, and say so."""
        self._row[UNDO_RUN] = (image.first << 32) | image.count
        self._row[UNDO_PLACE] = place
        store_fence()
        self._row[UNDO_VERSION] = version
        store_fence()
        update()
        self.advance(image, version)
        self._row[UNDO_VERSION] = 0

    def advance(self, image: Image, version: int) -> None:
        """The blocks are at ``version`` now; the last block's word decides."""
        store_fence()
        for block in range(image.first, image.first + image.count):
            self._versions[block] = version

    def recover(
        self,
        image_of: Callable[[int, int, bool], Image],
        only: tuple[int, int] | None = None,
        put_back_rows: Callable[[int], None] | None = None,
    ) -> Image | None:
        """Undo a commit that was cut short.

        Arguments:
            image_of: (first, count, of a column) -> what it was about.
            only: where it was about these blocks, from first to stop, alone.
            put_back_rows: of a table, by its first block.

        Returns the run that was put back to the version before, or None where there was nothing to put back.
        """
        version = self._row[UNDO_VERSION]
        if version == 0:
            return None
        word = self._row[UNDO_RUN]
        first, count = word >> 32, word & 0xFFFFFFFF
        if only is not None and only != (first, first + count):
            return None
        restored = None
        if self._versions[first + count - 1] < version:
            place = self._row[UNDO_PLACE]
            restored = image_of(first, count, bool(place & COLUMN))
            if place & ROWS:
                assert put_back_rows is not None
                put_back_rows(first)
            else:
                self._copy(restored.live, restored.snapshot if place & IN_SNAPSHOT else restored.undo)
            for block in range(first, first + count):
                self._versions[block] = version - 1
        store_fence()
        self._row[UNDO_VERSION] = 0
        return restored
