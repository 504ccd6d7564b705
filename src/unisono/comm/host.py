"""The workers of one host as a group: partials, messages and commits through the arena. One worker is a normal case."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from unisono.comm.arena import Arena, Region, store_fence
from unisono.comm.canonical import Cover
from unisono.comm.header import Header, Publication
from unisono.comm.host_layout import CAUSE_BYTES, MAILBOX_BYTES, HostLayout
from unisono.comm.partial import Partial, PartialLayout
from unisono.comm.waiting import Waiter
from unisono.errors import LaunchError
from unisono.events import PHASES
from unisono.run.summation import Node, covering, missing


class HostGroup:
    """A `Group` over one arena.

    Arguments:
        arena, layout: the shared memory and its division.
        partials: the fields of a partial.
        slot: this worker's place in the arena.
        members: the slots of this generation's workers, in order of rank.
        generation: from 1.
        deadline_s: seconds that any wait may take.
        memory: region -> bytes, where tensors do not lie in the arena itself (a CUDA device's).
        names: what a rank of this group is called in errors.
        teams: for each part of the model, the crews that compute it: the slots of those who do so together, of whom
            the first one's sums are read; default: each slot computes all of it.
    """

    def __init__(
        self,
        arena: Arena,
        layout: HostLayout,
        partials: PartialLayout,
        slot: int,
        members: Sequence[int],
        generation: int,
        deadline_s: float,
        memory: Callable[[Region], Tensor] | None = None,
        waiter: Waiter | None = None,
        names: Callable[[int], str] = "rank {}".format,
        teams: Sequence[Sequence[Sequence[int]]] | None = None,
    ) -> None:
        self.unlike = ""
        self.arena = arena
        self.layout = layout
        self.header = Header(arena, layout.regions.named["header"], layout.slots)
        self.slot = slot
        self.members = tuple(members)
        self.teams = teams if teams is not None else [[(slot,) for slot in self.members]]
        self._generation = generation
        self.names = names
        self.partials = partials
        self._memory = memory or (lambda region: arena.tensor(region, torch.uint8))
        self.waiter = replace(waiter or Waiter(deadline_s, self.is_revoked), revoked=self.is_revoked, cause=self.cause)
        self._views: dict[tuple[int, int], Partial] = {}
        self._messages = self.header.sequence(slot)
        self._reports = arena.bytes(layout.regions.named["reports"]).cast("d")

    @property
    def rank(self) -> int:
        """This worker's number."""
        return self.members.index(self.slot)

    @property
    def size(self) -> int:
        """Number of workers."""
        return len(self.members)

    @property
    def generation(self) -> int:
        """The group's number."""
        return self._generation

    def assemble(self, layout_hash: int) -> None:
        """Wait until every member has mapped the arena, and check that all laid it out alike."""
        self.header.set_layout(self.slot, layout_hash)

        def ready() -> list[int] | None:
            seen = [self.header.layout(slot) for slot in self.members]
            return seen if all(seen) else None

        seen = self.waiter(ready, "assemble", lambda: self.missing(lambda s: bool(self.header.layout(s))))
        differing = [rank for rank, value in enumerate(seen) if value != seen[0]]
        if differing:
            raise LaunchError(
                f"{self.names(differing[0])} built another model or configuration than {self.names(0)} (other names, "
                "shapes, dtypes, batch sizes or optimizer); the model's factory must not depend on the rank"
            )
        self.header.generation = self._generation

    @property
    def owners(self) -> "HostGroup":
        """All of them share one state."""
        return self

    @property
    def on_gradient(self) -> None:
        """Nobody waits for single gradients."""
        return None

    def begin(self, step: int) -> None:
        """Nothing is to be prepared."""

    def enter(self, activity: str, step: int) -> None:
        """Say what this worker does now."""
        self.header.set_activity(self.slot, activity, step)

    def partial(self, entry: int) -> Partial:
        """This worker's buffer number ``entry``."""
        return self.view(self.slot, entry)

    def view(self, slot: int, entry: int) -> Partial:
        """The buffer number ``entry`` of a slot."""
        view = self._views.get((slot, entry))
        if view is None:
            memory = self._memory(self.layout.partial(slot, entry))
            view = self._views[slot, entry] = Partial(self.partials, memory)
        return view

    def memory(self, name: str) -> Tensor:
        """A region of the arena by its name, as bytes."""
        return self._memory(self.layout.regions.named[name])

    def total(self) -> Partial:
        """Where the sum over all hosts goes."""
        return Partial(self.partials, self.memory("total"))

    def publish(self, step: int, entry: int, node: Node) -> None:
        """One aligned store: the subtree is complete."""
        self.header.publish(self.slot, entry, self._generation, step, node)

    def collect(self, step: int, count: int) -> list[Cover]:
        """Wait for all micro-batches of the step, then close it."""

        def cover_of(found: Mapping[Node, Publication]) -> Cover | None:
            chosen = covering(found, count)
            if chosen is None:
                return None
            return [(node, self.view(found[node].slot, found[node].entry)) for node in chosen]

        covers: list[Cover] = []

        def ready() -> bool | None:
            while len(covers) < len(self.teams):
                cover = cover_of(self._published(step, len(covers)))
                if cover is None:
                    return None
                covers.append(cover)
            return True

        def absent() -> str:
            lost = missing(self._published(step, len(covers)), count)
            whose = self._name(len(covers))
            return f"micro-batches {_ranges(lost)} of step {step} are not published{whose}; {self.doing()}"

        self.waiter(ready, f"collect of step {step}", absent)
        self.header.closed = step
        return covers

    def _publications(self, step: int, slots: Sequence[int]) -> Iterable[Publication]:
        return self.header.publications(self._generation, step, slots)

    def _published(self, step: int, team: int) -> dict[Node, Publication]:
        """What all of a crew of a team have published, as its first worker has."""
        found: dict[Node, Publication] = {}
        for first, *others in self.teams[team]:
            also = [{p.node for p in self._publications(step, (other,))} for other in others]
            for publication in self._publications(step, (first,)):
                if all(publication.node in nodes for nodes in also):
                    found.setdefault(publication.node, publication)
        return found

    def _name(self, team: int) -> str:
        """A team, for an error."""
        return f" by worker {team} of the pipelines" if len(self.teams) > 1 else ""

    def await_published(self, step: int, nodes: Sequence[Node]) -> None:
        """Wait until every team has published all of these subtrees of a step."""

        def absent() -> list[str]:
            lost = [len(set(nodes).difference(self._published(step, team))) for team in range(len(self.teams))]
            return [f"{number} sums of this host{self._name(team)}" for team, number in enumerate(lost) if number]

        self.waiter(
            lambda: None if absent() else True,
            f"collect of step {step}",
            lambda: f"{', '.join(absent())} are not published; {self.doing()}",
        )

    def distribute(self, step: int, values: Callable[[int, int, int], Tensor]) -> None:
        """Whoever shares the state reads it where it was updated."""

    def finish(self, step: int) -> None:
        """One store: this slot is done with the step."""
        self.header.set_done(self.slot, step)

    def settle(self, step: int, grace_s: float = 0.0) -> None:
        """Wait for everyone's `finish`.

        Arguments:
            grace_s: as of `all_gather`.
        """

        def ready() -> bool | None:
            return True if all(self.header.done(slot) >= step for slot in self.members) else None

        waiter = replace(self.waiter, deadline_s=self.waiter.deadline_s + grace_s)
        waiter(ready, f"commit of step {step}", lambda: self.missing(lambda slot: self.header.done(slot) >= step))
        self.header.committed = step

    def set_flags(self, flags: int) -> None:
        """Requests to go with the next step."""
        self.header.set_flags(self.slot, flags)

    def all_flags(self) -> int:
        """Everyone's requests joined."""
        result = 0
        for slot in self.members:
            result |= self.header.flags(slot)
        return result

    def all_gather(self, payload: bytes, operation: str, grace_s: float = 0.0) -> list[bytes]:
        """Everyone's payload; larger ones than a mailbox go in several rounds.

        Arguments:
            grace_s: added to the deadline, where a member may first have to wait for another host.
        """
        room = MAILBOX_BYTES - 8
        received = [bytearray() for _ in self.members]
        totals = [0] * self.size
        sent, first = 0, True
        while first or any(len(data) < total for data, total in zip(received, totals, strict=True)):
            first = False
            self._messages += 1
            number = self._messages
            box = self.arena.bytes(self.layout.mailbox(self.slot, number))
            chunk = payload[sent : sent + room]
            box[:8] = len(payload).to_bytes(8, "little")
            box[8 : 8 + len(chunk)] = chunk
            sent += len(chunk)
            self.header.set_sequence(self.slot, number)
            self._wait_for_messages(number, operation, grace_s)
            for i, slot in enumerate(self.members):
                box = self.arena.bytes(self.layout.mailbox(slot, number))
                totals[i] = int.from_bytes(box[:8], "little")
                received[i] += box[8 : 8 + min(room, totals[i] - len(received[i]))]
        return [bytes(data) for data in received]

    def _wait_for_messages(self, number: int, operation: str, grace_s: float) -> None:
        def ready() -> bool | None:
            return True if all(self.header.sequence(slot) >= number for slot in self.members) else None

        waiter = replace(self.waiter, deadline_s=self.waiter.deadline_s + grace_s)
        waiter(ready, operation, lambda: self.missing(lambda slot: self.header.sequence(slot) >= number))

    def barrier(self, operation: str) -> None:
        """An exchange of nothing."""
        self.all_gather(b"", operation)

    def broadcast(self, tensor: Tensor, operation: str) -> None:
        """There is one host, and its workers share what they have."""

    @property
    def wire_use(self) -> None:
        """No bytes leave the host."""
        return None

    def report(self, step: int, seconds: Sequence[float]) -> None:
        """Two rows in turn, so that a reader of the settled step is not overtaken."""
        start = (self.slot * 2 + step % 2) * len(PHASES)
        for i, value in enumerate(seconds):
            self._reports[start + i] = value

    def reports(self, step: int) -> list[list[float]]:
        """Seconds in each phase, a list for each rank."""
        starts = [(slot * 2 + step % 2) * len(PHASES) for slot in self.members]
        return [list(self._reports[start : start + len(PHASES)]) for start in starts]

    def gather_compression(self) -> dict[str, Tensor]:
        """Nothing is compressed."""
        return {}

    def restore_compression(self, tensors: Mapping[str, Tensor]) -> None:
        """Nothing is compressed."""

    def close(self, cause: BaseException | None = None) -> None:
        """The memory is let go of with its last view."""

    def revoke(self, cause: str = "") -> None:
        """One store, which every wait polls; the first cause that was given goes into everyone's error."""
        words = self.arena.bytes(self.layout.regions.named["cause"])
        if cause and not self.is_revoked():
            text = cause.encode()[: CAUSE_BYTES - 2]
            words[2 : 2 + len(text)] = text
            words[:2] = len(text).to_bytes(2, "little")
        store_fence()
        self.header.revoked = self._generation + 1

    def is_revoked(self) -> bool:
        """Whether this generation has ended."""
        return self.header.revoked > self._generation

    def cause(self) -> str:
        """Why it has, where that was said."""
        words = self.arena.bytes(self.layout.regions.named["cause"])
        return bytes(words[2 : 2 + int.from_bytes(words[:2], "little")]).decode(errors="replace")

    def reform(self, generation: int, members: Sequence[int]) -> "HostGroup":
        """The next generation over the same memory."""
        if generation <= self._generation:
            raise ValueError(f"generation {generation} is not after {self._generation}")
        group = HostGroup(
            self.arena,
            self.layout,
            self.partials,
            self.slot,
            members,
            generation,
            self.waiter.deadline_s,
            self._memory,
            self.waiter,
            self.names,
            [[crew for crew in team if set(crew) <= set(members)] for team in self.teams],
        )
        self.header.generation = generation
        return group

    def missing(self, arrived: Callable[[int], bool]) -> str:
        """Whose slot has not arrived, and what they did last."""
        late = [rank for rank, slot in enumerate(self.members) if not arrived(slot)]
        return "; ".join(f"{self.names(rank)} is missing, last seen in {self._last(rank)}" for rank in late)

    def describe(self, rank: int) -> str:
        """A worker, with what it did last."""
        return f"{self.names(rank)}, last seen in {self._last(rank)},"

    def _last(self, rank: int) -> str:
        return self.header.activity(self.members[rank])

    def doing(self) -> str:
        """What the others did last."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        return ", ".join(f"{self.names(rank)}: {self._last(rank)}" for rank in others)


def _ranges(numbers: Sequence[int]) -> str:
    """Whole numbers as ranges.

    >>> _ranges([1, 2, 3, 7])
    '1-3, 7'
    """
    parts: list[list[int]] = []
    for n in numbers:
        if parts and parts[-1][1] == n - 1:
            parts[-1][1] = n
        else:
            parts.append([n, n])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in parts)
