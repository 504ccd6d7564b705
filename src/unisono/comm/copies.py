"""Micro-batches of a step that two workers compute: the one whose they are is late, and another has nothing to do.

The one that idles claims a micro-batch and publishes its leaf. The late one, before it begins a micro-batch, looks
whether somebody else has it: then it publishes the sums that it has so far, skips what is there by then, and computes
the rest as leaves of their own, so that copies of one leaf can be compared. Nothing is agreed on and nobody is waited
for but those who compute: sums in a canonical tree are the same, whoever's leaves they are made of.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from unisono.comm.header import Header
from unisono.comm.partial import Partial, same_bits
from unisono.comm.roll import Roll
from unisono.errors import SilentCorruption
from unisono.events import MicroBatchesCopied
from unisono.plan.copies import copied_next
from unisono.plan.roster import Lot
from unisono.run.summation import Node, subtrees

PATIENCE = 1.0
"""Times that a micro-batch takes this worker, after which those who still compute count as late."""


class Mates(Protocol):
    """The workers of one host, as `comm.host` has them."""

    header: Header
    slot: int
    roll: Roll
    names: Callable[[int], str]

    @property
    def members(self) -> Sequence[int]:
        """The slots of those who train in this step."""

    @property
    def generation(self) -> int:
        """The group's number."""

    def lot(self) -> Lot:
        """What this worker computes in the step that begins."""

    def view(self, slot: int, entry: int) -> Partial:
        """The buffer number ``entry`` of a slot."""

    def publish(self, step: int, entry: int, node: Node) -> None:
        """The subtree is complete."""

    def published(self, step: int) -> int:
        """How many subtrees of a step this worker has published."""


class Copies:
    """One worker's.

    Arguments:
        group: the workers of this host.
        entries: partials that each may hold at once.
        names: of all entries of a partial.
    """

    def __init__(self, group: Mates, entries: int, names: Sequence[str]) -> None:
        self._most = entries // 2  # the rest is for what lost workers leave
        self._group = group
        self._names = names
        self._idle_since: float | None = None

    def begin(self) -> None:
        """A step begins."""
        self._idle_since = None

    def wanted(self, step: int) -> int:
        """A worker that idles asks: the micro-batch to compute a copy of; -1 for none, or not yet."""
        group, now = self._group, time.monotonic()
        roster, pace_s = group.roll.roster, group.roll.pace_s
        if self._idle_since is None:
            self._idle_since = now
        late = pace_s > 0 and now - self._idle_since > PATIENCE * pace_s
        if not late or roster is None or group.published(step) >= self._most:
            return -1
        there = {m for node, _, _ in self._leaves(step) for m in range(node.start, min(node.stop, group.roll.count))}
        found = copied_next(roster.lots, group.slot, dict(self._begun(step)), there, self._claimed(step))
        return -1 if found is None else found

    def _begun(self, step: int) -> Iterator[tuple[int, int]]:
        for slot in self._group.members:
            _, of, micro_batch = self._group.header.doing(slot)
            if of == step and micro_batch is not None:
                yield slot, micro_batch

    def _claimed(self, step: int) -> set[int]:
        """Those of which others compute a copy now."""
        group = self._group
        others = (slot for slot in group.members if slot != group.slot and not group.roll.is_lost(slot))
        claims = (group.header.claim(slot) for slot in others)
        return {micro_batch for of, micro_batch in claims if of == step}

    def _leaves(self, step: int) -> list[tuple[Node, int, int]]:
        """What others have published: subtree, slot and buffer."""
        others = [slot for slot in self._group.members if slot != self._group.slot]
        found = self._group.header.publications(self._group.generation, step, others)
        return [(p.node, p.slot, p.entry) for p in found]

    def under_way(self, step: int) -> bool:
        """Whether somebody alive computes one: what it reads must not change yet."""
        return bool(self._claimed(step))

    def are_void(self, step: int) -> bool:
        """Whether the step is closed: what is computed of it now may be anything."""
        return self._group.header.closed >= step

    def has(self, step: int, micro_batch: int) -> bool:
        """Whether another worker has one, or computes it."""
        return micro_batch in self._claimed(step) or self.is_there(step, micro_batch)

    def is_there(self, step: int, micro_batch: int) -> bool:
        """Whether another worker has published one."""
        return any(node.start <= micro_batch < node.stop for node, _, _ in self._leaves(step))

    def leave_the_rest(self, step: int, micro_batch: int) -> None:
        """Publish this worker's sums of what comes before a micro-batch, and are not published yet."""
        group = self._group
        first, start = group.published(step), group.lot().micro_batches[0]
        for entry, node in list(enumerate(subtrees(start, micro_batch, group.roll.count)))[first:]:
            group.publish(step, entry, node)

    def make(self, step: int, micro_batch: int, compute: Callable[[], None]) -> None:
        """Compute a copy, and compare it with the other where that is there too.

        Arguments:
            compute: computes the micro-batch and publishes its leaf.

        Raises:
            SilentCorruption: where they differ.
        """
        group = self._group
        group.header.set_claim(group.slot, step, micro_batch)
        try:
            compute()
            self._compare(step, micro_batch, compute)
        finally:
            group.header.set_claim(group.slot, 0, 0)

    def _compare(self, step: int, micro_batch: int, compute: Callable[[], None]) -> None:
        group = self._group
        entry = group.published(step) - 1
        if entry < 0 or self.are_void(step):
            return
        (own,) = (p for p in group.header.publications(group.generation, step, [group.slot]) if p.entry == entry)
        mine = group.view(group.slot, entry)
        for node, slot, theirs in self._leaves(step):
            name = None if node != own.node else self._difference(mine, group.view(slot, theirs))
            if name is None:
                continue
            compute()  # a third time, to see which of them is the odd one
            third = group.view(group.slot, group.published(step) - 1)
            here, there = group.names(group.slot), group.names(slot)
            if self._difference(third, mine) is None:
                odd = f"{here} has it alike twice: look at {there} first"
            elif self._difference(third, group.view(slot, theirs)) is None:
                odd = f"{here} had it wrong once: look at it first"
            else:
                odd = f"{here} has it different again: the run is not pure, or its memory is broken"
            raise SilentCorruption(
                f"{here} and {there} have both computed micro-batch {micro_batch} of step {step} from the same state, "
                f"and have different gradients of {name}. Computed once more, {odd}; then resume (--resume)"
            )

    def _difference(self, a: Partial, b: Partial) -> str | None:
        """The first entry in which two leaves differ; None where they are equal bit for bit."""
        for name, x, y, touched, also in zip(self._names, a.entries, b.entries, a.counts, b.counts, strict=True):
            if bool(touched) != bool(also) or (touched and not same_bits(x, y)):
                return name
        return None if list(a.scalars) == list(b.scalars) else "the loss"

    def news(self, step: int) -> MicroBatchesCopied | None:
        """What was computed by others than those whose it was; asked once the step is closed."""
        roster = self._group.roll.roster
        if roster is None:
            return None
        found: dict[int, list[int]] = {}
        for p in self._group.header.publications(self._group.generation, step, self._group.members):
            own = {m for lot in roster.lots_of(p.slot) for m in lot.micro_batches}
            if p.node.start not in own:
                found.setdefault(p.slot, []).append(p.node.start)
        return MicroBatchesCopied(step, found) if found else None
