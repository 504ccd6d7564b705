"""Snapshots: copies of the training state in memory that outlives workers, for those whose own state ends with them.

A device's memory is gone with its process, and a host that has a part of the state which others lack takes it along. So
every few steps all workers copy the state, a part each, to an arena that their launcher keeps. There are two images:
while one is written, the other is whole. An image counts once all workers have said the same step of it, each by one
store; so whoever ends at whatever moment leaves the last one as it was. Where hosts share a state, each keeps a copy of
its neighbour's image besides, and those who go on bring the newest step together of which everything is left.

Source of the copies at neighbours: Zheng, Shi, Kale, FTC-Charm++ (Cluster 2004): double in-memory checkpoints.
"""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from unisono.comm.arena import LINE, PAGE, Arena, Region, Regions
from unisono.comm.words import store_fence
from unisono.state.portions import Portion, moves, overlap, place_in

KNOWN_BYTES = 1 << 16
SHARE = 0.01
"""Of the time of training, what snapshots may take where nobody has said how often they are made."""
IMAGES = 2

Divide = Callable[[int], Sequence[Sequence[Region]]]
"""Hosts that share a state -> the portions of it."""
Gather = Callable[[bytes, str], list[bytes]]
"""(payload, operation) -> those of all workers of all hosts."""
Transfer = Callable[[Sequence[Tensor], int, Sequence[int], str], None]
"""(tensors, source, targets, operation): what one host has in tensors, into those of others."""


class Mates(Protocol):
    """The workers of this host, and the hosts beside it."""

    def barrier(self, operation: str) -> None:
        """Wait for all workers of this host."""

    def pass_on(self, own: Tensor, before: Tensor, operation: str) -> None:
        """On the first worker: give the next host ``own``, and take that of the one before."""


class Images:
    """The images of one portion in an arena, and those of the neighbour's where hosts share a state.

    Arguments:
        arena: the memory, of `size_bytes`; zeros where there is no image yet.
        portion: this host's.
        divide: tells what is in it.
        workers: of this host, each of which copies a part.

    Attributes:
        kept: what is in each portion that this host has images of.
    """

    def __init__(self, arena: Arena, portion: Portion, divide: Divide, workers: int) -> None:
        self.portion = portion
        self.divide = divide
        self._arena = arena
        divided = divide(portion.hosts)
        self.kept = {kept: divided[kept.number] for kept in self._portions(portion)}
        self._regions = self._layout(portion, divide, workers).named

    @staticmethod
    def _portions(portion: Portion) -> list[Portion]:
        """Those that the host of one has images of."""
        return [portion] if portion.hosts == 1 else [portion, portion.before]

    @classmethod
    def _layout(cls, portion: Portion, divide: Divide, workers: int) -> Regions:
        """How the arena is divided: each worker's words, what is known, and the images."""
        regions, kept, divided = Regions(), cls._portions(portion), divide(portion.hosts)
        for image in range(IMAGES):
            for one in kept:
                regions.add(f"steps {image} {one.number}", 8 * (workers if one == portion else 1))
            regions.add(f"known {image}", 8 + KNOWN_BYTES)
        for image in range(IMAGES):
            for one in kept:
                size_bytes = sum(region.size_bytes for region in divided[one.number])
                regions.add(f"image {image} {one.number}", size_bytes, PAGE)
        return regions

    @classmethod
    def size_bytes(cls, portion: Portion, divide: Divide, workers: int) -> int:
        """Of the arena."""
        return cls._layout(portion, divide, workers).size_bytes

    def steps(self, image: int, portion: Portion) -> memoryview:
        """A word of each worker that writes it: one more than the step of what it has written, 0 while it writes."""
        return self._arena.words(self._regions[f"steps {image} {portion.number}"])

    def of(self, image: int, portion: Portion) -> Tensor:
        """An image's bytes."""
        return self._arena.tensor(self._regions[f"image {image} {portion.number}"], torch.uint8)

    def step(self, image: int, portion: Portion) -> int | None:
        """The step of an image that is whole."""
        words = set(self.steps(image, portion))
        return words.pop() - 1 if len(words) == 1 and 0 not in words else None

    def image_of(self, step: int, portion: Portion) -> int | None:
        """The image of a step, where there is one that is whole."""
        return next((image for image in range(IMAGES) if self.step(image, portion) == step), None)

    def know(self, image: int, known: bytes) -> None:
        """Leave what whoever goes on must know."""
        if len(known) > KNOWN_BYTES:
            raise ValueError(f"{len(known)} bytes are to be known; there is room for {KNOWN_BYTES}")
        words = self._arena.bytes(self._regions[f"known {image}"])
        words[:8], words[8 : 8 + len(known)] = len(known).to_bytes(8, "little"), known

    def known(self, image: int) -> bytes:
        """What was left."""
        words = self._arena.bytes(self._regions[f"known {image}"])
        return bytes(words[8 : 8 + int.from_bytes(words[:8], "little")])

    def offers(self) -> list[dict[str, Any]]:
        """What there is, for a message."""
        found = []
        for image in range(IMAGES):
            for portion in self.kept:
                if (step := self.step(image, portion)) is not None:
                    known = self.known(image).decode() if portion == self.portion else ""
                    found.append({"step": step, "portion": portion.name, "known": known})
        return found


@dataclass(frozen=True, slots=True)
class Found:
    """The newest step of which all portions are there.

    Attributes:
        step: the one after which the state was so.
        known: what whoever goes on from it must know besides.
        hosts: that shared the state.
        holders: of each portion, the hosts that have it, as they are numbered now.
    """

    step: int
    known: bytes
    hosts: int
    holders: Mapping[int, Sequence[int]]


class Snapshots:
    """One worker's access to them. All workers make it before any takes a snapshot, and all take each of them.

    Arguments:
        images: this host's.
        parts: the state's bytes (see `TrainingState.parts`), the same in all workers of a host.
        rank, workers: this worker's number, and how many copy a part.
        every: steps from one to the next; "auto": as often as costs `SHARE` of the time.
        older: what was kept when other hosts trained.
        mates: of this worker, where hosts share a state.
        forget: called once what is older is not needed any more.
        clock: seconds, monotonic.

    Attributes:
        found: what all go on from; None until they have looked, and where there is nothing.
    """

    def __init__(
        self,
        images: Images,
        parts: Sequence[Tensor],
        rank: int,
        workers: int,
        every: int | Literal["auto"],
        *,
        older: Sequence[Images] = (),
        mates: Mates | None = None,
        forget: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._images = images
        self._parts = [part.view(torch.uint8).view(-1) for part in parts]
        self._rank = rank
        self._every = every
        self._older = list(older)
        self._mates = mates
        self._forget = forget
        self._clock = clock
        self._cost_s, self._taken_at, self._taken = 0.0, clock(), 0
        self._next = 0
        self.found: Found | None = None
        self._pinned: list[int] = []
        kept = images.kept[images.portion]
        self._own = part_of(sum(region.size_bytes for region in kept), rank, workers)
        self._copied = list(self._what_is_copied(kept))
        if self._parts[0].device.type == "cuda":
            self._pin()

    def _what_is_copied(self, kept: Sequence[Region]) -> Iterator[tuple[int, Tensor]]:
        """(place in an image, part of the state) of all that this worker copies."""
        at = 0
        for region in kept:
            inside = overlap(Region(at, region.size_bytes), Region(self._own.start, len(self._own)))
            if inside is not None:
                place = inside.offset
                for view in self._views(Region(region.offset + inside.offset - at, inside.size_bytes)):
                    yield place, view
                    place += view.numel()
            at += region.size_bytes

    def _views(self, region: Region) -> list[Tensor]:
        """A range of the state, which may go over several of its parts."""
        found, before = [], 0
        for part in self._parts:
            if (inside := overlap(region, Region(before, part.numel()))) is not None:
                start = inside.offset - before
                found.append(part[start : start + inside.size_bytes])
            before += part.numel()
        return found

    def look(self, host: int, hosts: int, gather: Gather) -> Found | None:
        """Find what all can go on from; all workers of all hosts do so together.

        Arguments:
            host, hosts: the number that this worker's images are known by, and how many such numbers there are.
        """
        mine = [offer for images in (self._images, *self._older) for offer in images.offers()]
        said = gather(json.dumps([host, mine]).encode(), "what is left of the state")
        self.found = newest_whole(dict(map(json.loads, said)))
        if self.found is not None:
            image = self._images.image_of(self.found.step, self._images.portion)
            again = self.is_needed(hosts)  # where copies lack: then an older step may be the only one that has them
            self._next = 0 if image is None else image if again else 1 - image
        return self.found

    def restore(self, needs: Sequence[Sequence[Region]], host: int, transfer: Transfer | None = None) -> None:
        """Let this host's state be what was found: on one worker of every host, at the same time.

        Arguments:
            needs: what each host must have (see `portions.needed`).
            transfer: between hosts.
        """
        found = self.found
        assert found is not None
        divided = self._images.divide(found.hosts)
        for move in moves(divided, found.holders, needs):
            if host not in (move.source, move.target):
                continue
            received = None
            if move.source == host:
                portion = Portion(move.portion, found.hosts)
                start = place_in(divided[move.portion], move.region)
                received = self._image(portion, found.step)[start : start + move.region.size_bytes]
            views = self._views(move.region) if move.target == host else []
            if move.source != move.target:
                assert transfer is not None
                received = torch.empty(move.region.size_bytes, dtype=torch.uint8) if received is None else received
                transfer([received], move.source, [move.target], f"state of step {found.step}")
            at = 0
            for view in views:
                assert received is not None
                view.copy_(received[at : at + view.numel()])
                at += view.numel()

    def _image(self, portion: Portion, step: int) -> Tensor:
        for images in (self._images, *self._older):
            if portion in images.kept and (image := images.image_of(step, portion)) is not None:
                return images.of(image, portion)
        raise ValueError(f"there is no image of portion {portion.name} of step {step}")

    def is_due(self, step: int) -> bool:
        """Whether one is to be taken after ``step``: for the one worker that decides."""
        if self._every != "auto":
            return step % self._every == 0
        return self._clock() - self._taken_at >= self._cost_s / SHARE

    def is_needed(self, hosts: int) -> bool:
        """Whether one is to be taken before the first step: the same on all hosts.

        Arguments:
            hosts: by which images are known now.
        """
        found, shared = self.found, self._images.portion.hosts
        if found is None or found.hosts != shared:
            return True
        owned = [Portion(host % shared, shared) for host in range(hosts)]
        kept = ((host, number) for host, own in enumerate(owned) for number in (own.number, own.before.number))
        return any(host not in found.holders[number] for host, number in kept)

    def take(self, step: int, known: bytes) -> None:
        """Copy this worker's part of the state after ``step``; nobody changes the state before all have.

        Arguments:
            known: what whoever goes on from here must know; the first worker's counts.
        """
        began, image, images = self._clock(), self._next, self._images
        own, steps = images.portion, images.steps(image, images.portion)
        steps[self._rank] = 0
        store_fence()
        target = images.of(image, own)
        for at, view in self._copied:
            target[at : at + view.numel()].copy_(view)
        if self._rank == 0:
            images.know(image, known)
        store_fence()
        steps[self._rank] = step + 1
        if self._mates is not None:
            self._mates.barrier(f"snapshot of step {step}")
            if self._rank == 0:
                self._keep_neighbours(self._mates, image, step)
        self._next = 1 - image
        self._taken += 1
        if self._taken == 2 and self._older:  # so all hosts had the first one
            self._older.clear()
            self._forget()
        self._taken_at = self._clock()
        self._cost_s = self._taken_at - began

    def _keep_neighbours(self, mates: Mates, image: int, step: int) -> None:
        own = self._images.portion
        word = self._images.steps(image, own.before)
        word[0] = 0
        store_fence()
        mates.pass_on(self._images.of(image, own), self._images.of(image, own.before), f"snapshot of step {step}")
        store_fence()
        word[0] = step + 1

    def _pin(self) -> None:
        """Let the device write to this worker's share of the images directly: several times as fast.

        Where the system allows no more pinned memory, copies are slower, and that is all.
        """
        first = self._own.start // PAGE * PAGE
        with torch.cuda.device(self._parts[0].device):
            for image in range(IMAGES) if len(self._own) else ():
                address = self._images.of(image, self._images.portion).data_ptr() + first
                if int(_runtime().cudaHostRegister(address, self._own.stop - first, 0)) == 0:
                    self._pinned.append(address)

    def close(self) -> None:
        """Let go of the memory."""
        while self._pinned:
            _runtime().cudaHostUnregister(self._pinned.pop())


def newest_whole(offers: Mapping[int, Sequence[Mapping[str, Any]]]) -> Found | None:
    """The newest step of which every portion is held by some host.

    Arguments:
        offers: of each host, as `Images.offers` gives them.
    """
    held: dict[tuple[int, int], dict[int, list[int]]] = {}
    known: dict[int, str] = {}
    for host in sorted(offers):
        for offer in offers[host]:
            portion = Portion.named(offer["portion"])
            holders = held.setdefault((offer["step"], portion.hosts), {}).setdefault(portion.number, [])
            holders += [host] if host not in holders else []
            known[offer["step"]] = known.get(offer["step"]) or offer["known"]
    whole = [key for key, holders in held.items() if len(holders) == key[1]]
    if not whole:
        return None
    step, hosts = max(whole)
    return Found(step, known[step].encode(), hosts, held[step, hosts])


def _runtime() -> Any:
    """The functions of the CUDA runtime."""
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def part_of(size_bytes: int, rank: int, workers: int) -> range:
    """The bytes that a worker copies: whole lines, about the same for all.

    >>> [part_of(1000, rank, 3) for rank in range(3)]
    [range(0, 320), range(320, 640), range(640, 1000)]
    """
    lines = -(-size_bytes // LINE)
    start, stop = (min(size_bytes, lines * number // workers * LINE) for number in (rank, rank + 1))
    return range(start, stop)
