"""Collectives over memory that the members of a group share: everyone writes its part, all arrive, everyone reads.

Every member has a slot: words, and two buffers that are used in turn. Nobody writes into a buffer before all have
arrived at the round after the one that used it last, so a round needs no second arrival for what it has read.
Sums are taken in order of rank, by one member for each element: all members get the same bits.
"""

import os
import select
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.arena import LINE, PAGE, Arena, Region, Regions
from unisono.comm.waiting import FIRST_SLEEP_S, LONGEST_SLEEP_S
from unisono.comm.words import store_fence

BUFFER_BYTES = 1 << 21
DIRECT_BYTES = 1 << 16
"""Up to this size everyone adds up everything: one round instead of two."""

SPIN_S, YIELD_S, CROWDED_YIELD_S = 100e-6, 2e-3, 100e-6
LOOK_EVERY_S = 10e-3
"""How often who waits looks whether the others are alive."""

_ARRIVED, _MORE, _PROCESS, _CODES, _WORDS = 0, 1, 2, 4, 16  # codes in turn: who is a round ahead has set the other

Combine = Callable[[Tensor, Tensor, Tensor], None]
"""(a, b, out): out = a combined with b."""


class MeetingError(RuntimeError):
    """A collective cannot be completed; a RuntimeError, as programs that use torch.distributed expect."""


@dataclass(frozen=True, slots=True)
class MeetingLayout:
    """How a group's arena is divided."""

    size: int
    regions: Regions

    def within(self, region: Region) -> "MeetingLayout":
        """The same inside a region of a larger arena."""
        named = {name: region.part(own.offset, own.size_bytes) for name, own in self.regions.named.items()}
        return MeetingLayout(self.size, Regions(self.regions.size_bytes, named))

    def buffer(self, rank: int, turn: int) -> Region:
        """One of a member's two buffers."""
        return self.regions.named["buffers"].part((2 * rank + turn) * BUFFER_BYTES, BUFFER_BYTES)


def meeting_layout(size: int, channel_bytes: int) -> MeetingLayout:
    """Divide an arena for ``size`` members, with a channel from each to each. Untouched pages cost nothing."""
    regions = Regions()
    regions.add("words", 8 * _WORDS * size, LINE)
    regions.add("lengths", 8 * size * size, LINE)
    regions.add("buffers", 2 * size * BUFFER_BYTES, PAGE)
    regions.add("channels", size * size * channel_bytes, PAGE)
    return MeetingLayout(size, regions)


class Meeting:
    """One member's view.

    Arguments:
        rank: this member's number.
        progress: called while waiting; moves messages on.
        names: what a rank of this group is called in errors.
    """

    def __init__(
        self,
        arena: Arena,
        layout: MeetingLayout,
        rank: int,
        progress: Callable[[], None],
        names: Callable[[int], str] = "rank {}".format,
    ) -> None:
        self.rank = rank
        self._name = names
        self.size = layout.size
        self._words = arena.words(layout.regions.named["words"])
        self._buffers = [[arena.tensor(layout.buffer(r, t), torch.uint8) for t in (0, 1)] for r in range(self.size)]
        self._lengths = arena.words(layout.regions.named["lengths"])
        self._broken = ""
        self._typed: dict[torch.dtype, list[list[Tensor]]] = {}
        self._others = [r for r in range(self.size) if r != rank]
        self._progress = progress
        self._round = 0
        self._crowded = self.size > len(os.sched_getaffinity(0))
        self._words[rank * _WORDS + _PROCESS] = os.getpid()
        self._peers: dict[int, int] = {}
        self._poll = select.poll()

    def begin(self, deadline_s: float) -> None:
        """Wait until all members have mapped the arena, and keep hold of their processes."""
        self._arrive("joining the group", 0, time.monotonic() + deadline_s)
        for rank in self._others:
            try:
                handle = os.pidfd_open(self._words[rank * _WORDS + _PROCESS])
            except OSError as error:
                raise MeetingError(f"{self._name(rank)} has ended already") from error
            self._peers[handle] = rank
            self._poll.register(handle, select.POLLIN)

    def break_up(self, reason: str) -> None:
        """No collective can follow: ends the one that is under way, from any thread."""
        self._broken = self._broken or reason

    @contextmanager
    def whole(self) -> Iterator[None]:
        """A collective that fails half-way leaves members in different rounds: none may follow it.

        Raises:
            MeetingError: where one has failed before.
        """
        if self._broken:
            raise MeetingError(f"an operation of this group failed before: {self._broken}; make a new group")
        before = self._round, self._words[self.rank * _WORDS]
        try:
            yield
        except BaseException as error:
            if before != (self._round, self._words[self.rank * _WORDS]):  # else nothing has begun
                self.break_up(str(error))
            raise

    def close(self) -> None:
        """Let go of the others' processes."""
        self._poll = select.poll()
        for handle in self._peers:
            os.close(handle)
        self._peers.clear()

    def all_reduce(self, tensor: Tensor, combine: Combine, deadline: float) -> None:
        """Combine a flat, contiguous tensor over all members, in place."""
        if tensor.numel() * tensor.element_size() <= DIRECT_BYTES:
            self._reduce_directly(tensor, combine, deadline)
            return
        for part in self._parts(tensor, BUFFER_BYTES):
            turn, slots = self._turn(tensor.dtype)
            each = -(-part.numel() // self.size)
            cuts = [slice(min(r * each, part.numel()), min((r + 1) * each, part.numel())) for r in range(self.size)]
            for r in self._others:
                slots[self.rank][turn][cuts[r]].copy_(part[cuts[r]])
            self._arrive("all_reduce", part.numel(), deadline)
            mine = cuts[self.rank]
            result = slots[self.rank][turn][mine]
            parts = [part[mine] if r == self.rank else slots[r][turn][mine] for r in range(self.size)]
            _combine_all(parts, combine, result)
            self._arrive("all_reduce", part.numel(), deadline)
            for r in range(self.size):
                part[cuts[r]].copy_(slots[r][turn][cuts[r]])

    def _reduce_directly(self, tensor: Tensor, combine: Combine, deadline: float) -> None:
        turn, slots = self._turn(tensor.dtype)
        count = tensor.numel()
        slots[self.rank][turn][:count].copy_(tensor)
        self._arrive("all_reduce", count, deadline)
        _combine_all([slots[r][turn][:count] for r in range(self.size)], combine, tensor)

    def reduce_scatter(self, out: Tensor, inputs: Sequence[Tensor], combine: Combine, deadline: float) -> None:
        """Combine ``inputs[r]`` of all members into ``out`` of member r; all flat and of one length."""
        room = BUFFER_BYTES // self.size // LINE * LINE // out.element_size()
        for start in range(0, max(1, out.numel()), room):
            turn, slots = self._turn(out.dtype)
            stop = min(start + room, out.numel())
            for r in self._others:
                slots[self.rank][turn][r * room : r * room + stop - start].copy_(inputs[r][start:stop])
            self._arrive("reduce_scatter", out.numel(), deadline)
            at = self.rank * room
            parts = [slots[r][turn][at : at + stop - start] for r in range(self.size)]
            parts[self.rank] = inputs[self.rank][start:stop]
            _combine_all(parts, combine, out[start:stop])

    def all_gather(self, outputs: Sequence[Tensor], tensor: Tensor, deadline: float) -> None:
        """Everyone's bytes to all; flat uint8 tensors of one length."""
        for start, stop in _spans(tensor.numel(), BUFFER_BYTES):
            turn = self._next_turn()
            self._buffers[self.rank][turn][: stop - start].copy_(tensor[start:stop])
            self._arrive("all_gather", tensor.numel(), deadline)
            for r, output in enumerate(outputs):
                output[start:stop].copy_(self._buffers[r][turn][: stop - start])

    def gather(self, outputs: Sequence[Tensor] | None, tensor: Tensor, deadline: float) -> None:
        """Everyone's bytes to the member that gives ``outputs``."""
        for start, stop in _spans(tensor.numel(), BUFFER_BYTES):
            turn = self._next_turn()
            self._buffers[self.rank][turn][: stop - start].copy_(tensor[start:stop])
            self._arrive("gather", tensor.numel(), deadline)
            for r, output in enumerate(outputs or ()):
                output[start:stop].copy_(self._buffers[r][turn][: stop - start])

    def reduce(self, tensor: Tensor, root: int, combine: Combine, deadline: float) -> None:
        """Combine a flat tensor over all members into the root's."""
        for part in self._parts(tensor, BUFFER_BYTES):
            turn, slots = self._turn(tensor.dtype)
            slots[self.rank][turn][: part.numel()].copy_(part)
            self._arrive("reduce", part.numel(), deadline)
            if self.rank == root:
                _combine_all([slots[r][turn][: part.numel()] for r in range(self.size)], combine, part)

    def broadcast(self, tensor: Tensor, root: int, deadline: float) -> None:
        """The root's bytes to all."""
        for start, stop in _spans(tensor.numel(), BUFFER_BYTES):
            turn = self._next_turn()
            if self.rank == root:
                self._buffers[root][turn][: stop - start].copy_(tensor[start:stop])
            self._arrive("broadcast", tensor.numel(), deadline)
            if self.rank != root:
                tensor[start:stop].copy_(self._buffers[root][turn][: stop - start])

    def scatter(self, out: Tensor, inputs: Sequence[Tensor] | None, root: int, deadline: float) -> None:
        """``inputs[r]`` of the root to member r, as bytes."""
        room = BUFFER_BYTES // self.size // LINE * LINE
        for start, stop in _spans(out.numel(), room):
            turn = self._next_turn()
            for r, given in enumerate(inputs or ()):
                self._buffers[root][turn][r * room : r * room + stop - start].copy_(given[start:stop])
            self._arrive("scatter", out.numel(), deadline)
            at = self.rank * room
            out[start:stop].copy_(self._buffers[root][turn][at : at + stop - start])

    def all_to_all(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], deadline: float) -> None:
        """``inputs[r]`` to member r, as bytes; lengths may differ from pair to pair."""
        room = BUFFER_BYTES // self.size // LINE * LINE
        start, more = 0, True
        for r, given in enumerate(inputs):
            self._lengths[self.rank * self.size + r] = given.numel()
        while more:
            turn = self._next_turn()
            for r, given in enumerate(inputs):
                part = given[start : start + room]
                self._buffers[self.rank][turn][r * room : r * room + part.numel()].copy_(part)
            left = any(t.numel() > start + room for t in (*inputs, *outputs))
            self._words[self.rank * _WORDS + _MORE] = left
            self._arrive("all_to_all", 0, deadline)
            more = any(self._words[r * _WORDS + _MORE] for r in range(self.size))
            for r, output in enumerate(outputs):
                sent = self._lengths[r * self.size + self.rank]
                if sent != output.numel():
                    raise MeetingError(
                        f"all_to_all on rank {self.rank}: rank {r} sends {sent} bytes, expected are {output.numel()}"
                    )
            for r, output in enumerate(outputs):
                part = output[start : start + room]
                at = self.rank * room
                part.copy_(self._buffers[r][turn][at : at + part.numel()])
            start += room
            self._arrive("all_to_all", 0, deadline)  # before anyone changes its word again

    def barrier(self, deadline: float) -> None:
        """Return when all have come."""
        self._next_turn()
        self._arrive("barrier", 0, deadline)

    def _parts(self, tensor: Tensor, size_bytes: int) -> Iterator[Tensor]:
        """A flat tensor in parts that fit a buffer; one empty part for an empty tensor."""
        room = size_bytes // tensor.element_size()
        for start in range(0, max(1, tensor.numel()), room):
            yield tensor[start : start + room]

    def _next_turn(self) -> int:
        self._round += 1
        return self._round & 1

    def _turn(self, dtype: torch.dtype) -> tuple[int, list[list[Tensor]]]:
        """The buffers' turn of a new round, and all buffers as a type."""
        self._round += 1
        slots = self._typed.get(dtype)
        if slots is None:
            slots = self._typed[dtype] = [[buffer.view(dtype) for buffer in pair] for pair in self._buffers]
        return self._round & 1, slots

    def _arrive(self, operation: str, elements: int, deadline: float) -> None:
        """Say that this member's part is written, and wait until all have said so."""
        words, own = self._words, self.rank * _WORDS
        number = words[own] + 1
        code = (_NUMBERS[operation] << 40) | (elements & 0xFFFFFFFFFF)
        at = _CODES + number % 2
        words[own + at] = code
        store_fence()
        words[own] = number
        for rank in self._others:
            if words[rank * _WORDS] < number:
                self._wait(rank, number, operation, deadline)
            if words[rank * _WORDS + at] != code:
                self._disagree(rank, operation, elements, words[rank * _WORDS + at])

    def _wait(self, rank: int, number: int, operation: str, deadline: float) -> None:
        words, at = self._words, rank * _WORDS
        if not self._crowded:
            until = time.perf_counter() + SPIN_S
            while time.perf_counter() < until:
                if words[at] >= number:
                    return
        until = time.perf_counter() + (CROWDED_YIELD_S if self._crowded else YIELD_S)
        while time.perf_counter() < until:
            if words[at] >= number:
                return
            os.sched_yield()
        pause, looked = FIRST_SLEEP_S, 0.0
        while words[at] < number:
            if self._broken:
                raise MeetingError(f"{operation} on rank {self.rank}: {self._broken}")
            now = time.monotonic()
            self._progress()
            if now - looked > LOOK_EVERY_S:
                looked = now
                self._look_for_the_dead(operation, number)
            if now > deadline:
                late = [r for r in self._others if words[r * _WORDS] < number]
                names = ", ".join(f"{self._name(r)} (process {words[r * _WORDS + _PROCESS]})" for r in late)
                raise MeetingError(
                    f"{operation}, number {number} of this group, on {self._name(self.rank)}: {names} did not come "
                    "before the timeout of this operation"
                )
            time.sleep(pause)
            pause = min(pause * 1.5, LONGEST_SLEEP_S)

    def _look_for_the_dead(self, operation: str, number: int) -> None:
        for handle, _ in self._poll.poll(0):
            rank = self._peers[handle]
            if self._words[rank * _WORDS] < number:  # who has arrived may go
                process = self._words[rank * _WORDS + _PROCESS]
                raise MeetingError(
                    f"{operation}, number {number} of this group, on {self._name(self.rank)}: {self._name(rank)} "
                    f"(process {process}) has ended"
                )

    def check_alive(self, rank: int, operation: str) -> None:
        """Raise if a member has ended."""
        for handle, _ in self._poll.poll(0):
            if self._peers[handle] == rank:
                raise MeetingError(f"{operation} on rank {self.rank}: rank {rank} has ended")

    def _disagree(self, rank: int, operation: str, elements: int, theirs: int) -> None:
        name = next((name for name in _OPERATIONS if _NUMBERS[name] == theirs >> 40), "another operation")
        raise MeetingError(
            f"{self._name(self.rank)} is in {operation} of {elements} elements, {self._name(rank)} in {name} of "
            f"{theirs & 0xFFFFFFFFFF}; all ranks of a group must call the same operations in the same order"
        )


_OPERATIONS = (
    "joining the group",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "gather",
    "reduce",
    "broadcast",
    "scatter",
    "all_to_all",
    "barrier",
)
_NUMBERS = {name: i for i, name in enumerate(_OPERATIONS)}


def _spans(size: int, room: int) -> Iterator[tuple[int, int]]:
    """[start, stop) of parts of ``room``; one empty part for nothing."""
    for start in range(0, max(1, size), room):
        yield start, min(start + room, size)


def _combine_all(parts: Sequence[Tensor], combine: Combine, out: Tensor) -> None:
    """Combine in order of rank; ``out`` may be one of the parts."""
    if len(parts) == 1:
        if out.data_ptr() != parts[0].data_ptr():
            out.copy_(parts[0])
        return
    if len(parts) == 2:
        combine(parts[0], parts[1], out)
        return
    total = torch.empty_like(out)
    combine(parts[0], parts[1], total)
    for part in parts[2:-1]:
        combine(total, part, total)
    combine(total, parts[-1], out)
