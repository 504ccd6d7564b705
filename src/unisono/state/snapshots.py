"""Snapshots: copies of the training state in memory that outlives workers, for those whose own state ends with them.

A device's memory is gone with its process. So every few steps all workers copy the state, a part each, to an arena that
the launcher keeps. There are two images: while one is written, the other is whole. An image counts once all workers
have said the same step of it, each by one store; so whoever ends at whatever moment leaves the last one as it was.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from unisono.comm.arena import LINE, PAGE, Arena, Regions
from unisono.comm.words import store_fence

KNOWN_BYTES = 1 << 16
SHARE = 0.01
"""Of the time of training, what snapshots may take where nobody has said how often they are made."""
IMAGES = 2


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A whole image, of the state after ``step``; ``known`` is what whoever goes on from it must know besides."""

    image: int
    step: int
    known: bytes


def snapshots_regions(sizes: Sequence[int], workers: int) -> Regions:
    """How the arena of snapshots is divided: each worker's words, what is known, and the images, part by part.

    Arguments:
        sizes: of the parts of a state, in bytes.
    """
    regions = Regions()
    for image in range(IMAGES):
        regions.add(f"steps {image}", 8 * workers)
        regions.add(f"known {image}", 8 + KNOWN_BYTES)
    for image in range(IMAGES):
        for number, size_bytes in enumerate(sizes):
            regions.add(f"image {image} part {number}", size_bytes, PAGE)
    return regions


class Snapshots:
    """One worker's access to them. All workers make it before any takes a snapshot, and all take each of them.

    Arguments:
        arena: the memory, as `snapshots_regions` divides it; zeros where there is no image yet.
        parts: the state's bytes (see `TrainingState.parts`), the same in all workers.
        rank, workers: this worker's number, and how many copy a part.
        every: steps from one to the next; "auto": as often as costs `SHARE` of the time.
        clock: seconds, monotonic.

    Attributes:
        found: the newest that was whole when this worker began.
    """

    def __init__(
        self,
        arena: Arena,
        parts: Sequence[Tensor],
        rank: int,
        workers: int,
        every: int | Literal["auto"],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._arena = arena
        self._parts = [part.view(torch.uint8).view(-1) for part in parts]
        self._rank = rank
        self._every = every
        self._clock = clock
        self._regions = snapshots_regions([part.numel() for part in self._parts], workers).named
        self._own = part_of(self._parts[0].numel(), rank, workers)
        self._cost_s, self._taken_at = 0.0, clock()
        self.found = self._newest()
        self._next = 0 if self.found is None else 1 - self.found.image
        self._pinned: list[int] = []
        if self._parts[0].device.type == "cuda":
            self._pin()

    def _newest(self) -> Snapshot | None:
        whole = [image for image in range(IMAGES) if len(set(self._steps(image))) == 1 and self._steps(image)[0]]
        if not whole:
            return None
        image = max(whole, key=lambda image: self._steps(image)[0])
        words = self._arena.bytes(self._regions[f"known {image}"])
        known = bytes(words[8 : 8 + int.from_bytes(words[:8], "little")])
        return Snapshot(image, self._steps(image)[0] - 1, known)

    def _steps(self, image: int) -> memoryview:
        """A word of each worker: one more than the step of what it has written, 0 while it writes."""
        return self._arena.words(self._regions[f"steps {image}"])

    def _image(self, image: int) -> list[Tensor]:
        regions = (self._regions[f"image {image} part {number}"] for number in range(len(self._parts)))
        return [self._arena.tensor(region, torch.uint8) for region in regions]

    def restore(self, snapshot: Snapshot) -> None:
        """Let this worker's state be that of a snapshot."""
        for part, kept in zip(self._parts, self._image(snapshot.image), strict=True):
            part.copy_(kept)

    def is_due(self, step: int) -> bool:
        """Whether one is to be taken after ``step``: for the one worker that decides."""
        if self._every != "auto":
            return step % self._every == 0
        return self._clock() - self._taken_at >= self._cost_s / SHARE

    def take(self, step: int, known: bytes) -> None:
        """Copy this worker's part of the state after ``step``; nobody changes the state before all have.

        Arguments:
            known: what whoever goes on from here must know; the first worker's counts.
        """
        if len(known) > KNOWN_BYTES:
            raise ValueError(f"{len(known)} bytes are to be known; there is room for {KNOWN_BYTES}")
        began, image = self._clock(), self._next
        self._steps(image)[self._rank] = 0
        store_fence()
        target, own = self._image(image), self._own
        target[0][own.start : own.stop].copy_(self._parts[0][own.start : own.stop])
        if self._rank == 0:
            for kept, part in zip(target[1:], self._parts[1:], strict=True):
                kept.copy_(part)
            words = self._arena.bytes(self._regions[f"known {image}"])
            words[:8], words[8 : 8 + len(known)] = len(known).to_bytes(8, "little"), known
        store_fence()
        self._steps(image)[self._rank] = step + 1
        self._next = 1 - image
        self._taken_at = self._clock()
        self._cost_s = self._taken_at - began

    def _pin(self) -> None:
        """Let the device write to this worker's share of the images directly: several times as fast.

        Where the system allows no more pinned memory, copies are slower, and that is all.
        """
        first = self._own.start // PAGE * PAGE
        with torch.cuda.device(self._parts[0].device):
            for image in range(IMAGES) if len(self._own) else ():
                address = self._image(image)[0].data_ptr() + first
                if int(_runtime().cudaHostRegister(address, self._own.stop - first, 0)) == 0:
                    self._pinned.append(address)

    def close(self) -> None:
        """Let go of the memory."""
        while self._pinned:
            _runtime().cudaHostUnregister(self._pinned.pop())


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


def snapshots_bytes(parts: Sequence[Tensor], workers: int) -> int:
    """Of the arena."""
    return snapshots_regions([part.numel() * part.element_size() for part in parts], workers).size_bytes
