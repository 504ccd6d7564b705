"""How the arena of a host is divided: words, mailboxes, state, undo areas, partials, and what an exchange needs."""

from dataclasses import dataclass

from unisono.comm.arena import PAGE, Region, Regions
from unisono.comm.header import ENTRIES, MOST_SLOTS, header_bytes
from unisono.comm.meeting import MeetingLayout, meeting_layout
from unisono.comm.memos import memos_bytes
from unisono.comm.passage_layout import PassageLayout
from unisono.events import PHASES

MAILBOX_BYTES = 1 << 16
CAUSE_BYTES = 1 << 10
KNOWN_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class HostLayout:
    """How the arena of a host is divided. Pages that nobody touches cost nothing."""

    slots: int
    blocks: int
    entries: int
    partial_bytes: int
    state_bytes: int
    replicas: int
    undo_bytes: int
    buckets: int
    regions: Regions
    crew: MeetingLayout

    @property
    def size_bytes(self) -> int:
        """Bytes of address space."""
        return self.regions.size_bytes

    def versions(self, replica: int) -> Region:
        """The versions of a replica's blocks, one word each."""
        return self.regions.named["versions"].part(replica * 8 * self.blocks, 8 * self.blocks)

    def numbers(self, kind: str, replica: int) -> Region:
        """For each of a replica's blocks, a step, and a number there.

        Arguments:
            kind: "squares" for the squared norms of gradients, "changes" for how far they would move the model.
        """
        return self.regions.named[kind].part(replica * 16 * self.blocks, 16 * self.blocks)

    def mailbox(self, slot: int, number: int) -> Region:
        """Where a slot's message goes; two halves in turn, since a slower reader may still read the last."""
        return self.regions.named["mailboxes"].part((slot * 2 + number % 2) * MAILBOX_BYTES, MAILBOX_BYTES)

    def partial(self, slot: int, entry: int) -> Region:
        """A slot's buffer for a partial."""
        size = _paged(self.partial_bytes)
        return self.regions.named["partials"].part((slot * self.entries + entry) * size, self.partial_bytes)

    def state(self, replica: int) -> Region:
        """A replica's training state."""
        return self.regions.named["state"].part(replica * _paged(self.state_bytes), self.state_bytes)

    def snapshot(self) -> Region:
        """The consistent copy that a checkpoint is written from."""
        return self.regions.named["snapshot"]

    def meeting(self, crew: int) -> MeetingLayout:
        """Where a group of tensor-parallel workers meets."""
        size_bytes = _paged(self.crew.regions.size_bytes)
        return self.crew.within(self.regions.named["meetings"].part(crew * size_bytes, size_bytes))

    def memos(self) -> Region:
        """What workers leave for those after them."""
        return self.regions.named["memos"]

    def undo(self, slot: int) -> Region:
        """A slot's undo area."""
        return self.regions.named["undo"].part(slot * _paged(self.undo_bytes), self.undo_bytes)


def _paged(size_bytes: int) -> int:
    return -(-size_bytes // PAGE) * PAGE


def host_layout(
    slots: int,
    blocks: int,
    entries: int,
    partial_bytes: int,
    state_bytes: int,
    replicas: int,
    undo_bytes: int,
    buckets: int = 0,
    wire_bytes: int = 0,
    passages: PassageLayout | None = None,
    crews: int = 0,
    crew: int = 1,
    pool_bytes: int = 0,
    claims_bytes: int = 0,
    foretold_bytes: int = 0,
) -> HostLayout:
    """Divide an arena.

    Arguments:
        entries: partials that a slot may hold at once.
        buckets: in which the gradient travels between hosts, 0 where there is one host.
        wire_bytes: the memory of compression.
        passages: between the stages of a pipeline.
        crews: groups of tensor-parallel workers.
        crew: workers of each.
        pool_bytes: what workers that wait for nobody take in turn.
        claims_bytes: what workers of several hosts take in turn, round by round.
        foretold_bytes: what is known of micro-batches before their gradients are.
    """
    if entries > ENTRIES:
        raise ValueError(f"{entries} partials a slot exceed the {ENTRIES} that can be published")
    if slots > MOST_SLOTS:
        raise ValueError(f"{slots} workers exceed the {MOST_SLOTS} that a host can have")
    regions = Regions()
    regions.add("header", header_bytes(slots))  # first: the launcher reads it
    regions.add("versions", 8 * blocks * replicas)
    regions.add("reports", 8 * slots * 2 * len(PHASES))
    regions.add("squares", 16 * blocks * replicas)
    regions.add("changes", 16 * blocks * replicas)
    regions.add("mailboxes", slots * 2 * MAILBOX_BYTES, PAGE)
    regions.add("state", replicas * _paged(state_bytes), PAGE)
    regions.add("undo", slots * _paged(undo_bytes), PAGE)
    regions.add("snapshot", state_bytes, PAGE)
    regions.add("partials", slots * entries * _paged(partial_bytes), PAGE)
    regions.add("cause", CAUSE_BYTES)
    regions.add("known", KNOWN_BYTES)
    regions.add("memos", memos_bytes(slots), PAGE)
    if buckets:
        regions.add("ready", 8 * slots * buckets)
        regions.add("summed", 8 * (buckets + 2))
        regions.add("total", partial_bytes, PAGE)
        regions.add("wire", wire_bytes, PAGE)
        regions.add("foretold", foretold_bytes)
    regions.add("pool", pool_bytes, PAGE)
    regions.add("claims", claims_bytes)
    if passages is not None:
        passages.add_to(regions)
    meeting = meeting_layout(crew, 0)
    regions.add("meetings", crews * _paged(meeting.regions.size_bytes), PAGE)
    return HostLayout(
        slots, blocks, entries, partial_bytes, state_bytes, replicas, undo_bytes, buckets, regions, meeting
    )
