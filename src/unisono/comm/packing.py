"""A wire that sends gradients in fewer bytes where that is quicker; the same bits arrive."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from unisono.comm.lossless import pack, packed_bytes, unpack
from unisono.comm.wire import Addressed, Pending, Wire
from unisono.errors import GroupError

LEAST_BYTES = 1 << 12
"""Below this a message travels as it is."""


class Packed:
    """A wire whose large floating-point messages are packed while it is on; all members turn it on and off together.

    Attributes:
        on: whether it packs.
    """

    def __init__(self, wire: Wire) -> None:
        self.rank = wire.rank
        self.size = wire.size
        self.ordered = wire.ordered
        self.on = False
        self._wire = wire
        self._saved = 0

    def post(self, sends: Sequence[Addressed], receives: Sequence[Addressed], tag: int) -> Pending:
        """Start sending and receiving."""
        if not self.on:
            return self._wire.post(sends, receives, tag)
        once: dict[tuple[int, int], Tensor] = {}  # what goes to several members is packed once
        for tensor, _ in sends:
            place = (tensor.data_ptr(), tensor.nbytes)
            if place not in once:
                once[place] = pack(tensor) if _is_worth_it(tensor) else tensor
        packed = [(once[tensor.data_ptr(), tensor.nbytes], member) for tensor, member in sends]
        self._saved += sum(t.nbytes for t, _ in sends) - sum(t.nbytes for t, _ in packed)
        arriving = [(tensor, _room(tensor), member) for tensor, member in receives]
        pending = self._wire.post(packed, [(room, member) for _, room, member in arriving], tag)
        return _Arriving(pending, [item for item in arriving if item[1] is not item[0]])

    def take_saved_bytes(self) -> int:
        """What was saved since this was asked last."""
        saved, self._saved = self._saved, 0
        return saved


@dataclass(frozen=True, slots=True)
class _Arriving:
    pending: Pending
    packed: Sequence[tuple[Tensor, Tensor, int]]

    def wait(self, operation: str) -> None:
        self.pending.wait(operation)
        for tensor, room, member in self.packed:
            try:
                unpack(room, tensor)
            except GroupError as error:
                raise GroupError(f"{operation}: from member {member}: {error}") from error


def _is_worth_it(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.nbytes >= LEAST_BYTES


def _room(tensor: Tensor) -> Tensor:
    """Where a message arrives; what is packed may be shorter."""
    return torch.empty(packed_bytes(tensor), dtype=torch.uint8) if _is_worth_it(tensor) else tensor


class Trial:
    """Which of two ways is quicker: takes turns, keeps to the one with the lower median, and tries again much later."""

    WARMUP, TURNS, PERIOD = 2, 4, 1000

    def __init__(self) -> None:
        self._steps = 0
        self._seconds: dict[bool, list[float]] = {False: [], True: []}
        self._best: bool | None = None

    def note(self, way: bool, seconds: float) -> None:
        """A step took so long, one way or the other."""
        self._steps += 1
        if self._steps > self.PERIOD:
            self._steps, self._best = self.WARMUP, None
            self._seconds = {False: [], True: []}
        if self._best is not None or self._steps <= self.WARMUP:
            return
        self._seconds[way].append(seconds)
        if min(map(len, self._seconds.values())) >= self.TURNS:
            self._best = median(self._seconds[True]) < median(self._seconds[False])

    @property
    def wanted(self) -> bool:
        """The way that a later step should go."""
        return self._steps % 2 == 1 if self._best is None else self._best
