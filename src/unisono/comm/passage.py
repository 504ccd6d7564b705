"""Tensors between the stages of a pipeline on one host: written once into shared memory, and used there.

A passage leads from one stage to the next, or back, within one lane: a replica, or one of the tensor-parallel workers
of each of its stages. It has a slot for each micro-batch of a step; a sender takes the first free one, so that as much
memory is touched as there are micro-batches under way. The receiver's graph stands on the slot's own memory until it is
released.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from unisono.comm.arena import Region
from unisono.comm.forms import LINE_BYTES, alike, span
from unisono.comm.host import HostGroup
from unisono.comm.partial import torch_dtype
from unisono.comm.passage_layout import HEAD_BYTES, PassageLayout, Way
from unisono.comm.words import store_fence
from unisono.errors import GroupError
from unisono.plan.blocks import aligned

STEP_BITS, MICRO_BATCH_BITS = 30, 20


@dataclass(frozen=True, slots=True)
class Arrived:
    """What was received; its memory belongs to the receiver until it calls ``release``.

    Attributes:
        needed: whether each tensor needs a gradient.
    """

    tensors: Sequence[Tensor | None]
    needed: Sequence[bool]
    release: Callable[[], None]


class Passages:
    """The passages of one lane, for one of its workers.

    Arguments:
        group: the workers of the host.
        lane: which one.
    """

    def __init__(self, group: HostGroup, layout: PassageLayout, lane: int) -> None:
        self._group = group
        self._layout = layout
        self._lane = lane
        named = group.layout.regions.named
        self._words = group.arena.words(named["passage words"])
        self._region: Region = named["passages"]

    def send(
        self,
        stage: int,
        way: Way,
        step: int,
        micro_batch: int,
        tensors: Sequence[Tensor | None],
        needed: Sequence[bool],
    ) -> None:
        """Pass tensors on behind ``stage``, or gradients back to it; they may change once this returns."""
        first, count = self._layout.words(self._lane, stage, way)
        slot = next(slot for slot in range(count) if not self._words[first + slot])
        offset, size_bytes = self._layout.slot(self._lane, stage, way, slot)
        memory = self._group.arena.bytes(self._region.part(offset, size_bytes))
        at = HEAD_BYTES
        entries: list[object] = []
        for tensor, wanted in zip(tensors, needed, strict=True):
            if tensor is None:
                entries.append(None)
                continue
            phase = tensor.data_ptr() % LINE_BYTES  # a kernel's last bits can depend on it
            packed = _is_loose(tensor)
            elements = tensor.numel() if packed else span(tensor)
            start, at = at + phase, at + aligned(phase + elements * tensor.itemsize, LINE_BYTES)
            if at > size_bytes:
                raise GroupError(
                    f"stage {stage} passes on {at} bytes in micro-batch {micro_batch} of step {step}, and there is "
                    f"room for {size_bytes}, after the first micro-batch's shapes; in a pipeline all have the same"
                )
            _put(tensor.detach(), memory, start, packed=packed)
            dtype = str(tensor.dtype).removeprefix("torch.")
            entries.append([dtype, list(tensor.shape), list(tensor.stride()), start, packed, wanted])
        head = json.dumps(entries).encode()
        if len(head) + 8 > HEAD_BYTES:
            raise GroupError(
                f"stage {stage} passes on {len(entries)} tensors, whose forms take {len(head)} bytes of "
                f"{HEAD_BYTES - 8}; cut the model elsewhere (layout.cuts)"
            )
        memory[: len(head) + 8] = len(head).to_bytes(8, "little") + head
        store_fence()
        self._words[first + slot] = self._word(step, micro_batch)

    def receive(self, stage: int, way: Way, step: int, micro_batch: int) -> Arrived:
        """What was passed on behind ``stage``, or back to it.

        Raises:
            WaitTimeout, Revoked: as every wait.
            ReplicaBroken: where the worker of a stage is lost.
        """
        first, count = self._layout.words(self._lane, stage, way)
        wanted = self._word(step, micro_batch)
        words = self._words

        def ready() -> int | None:
            self.check()
            return next((slot for slot in range(count) if words[first + slot] == wanted), None)

        what = "activations of stage" if way is Way.ACTIVATIONS else "gradients for stage"
        operation = f"{what} {stage}, micro-batch {micro_batch} of step {step},"
        slot = self._group.waiter(ready, operation, lambda: "they have not come; " + self._group.doing())
        offset, size_bytes = self._layout.slot(self._lane, stage, way, slot)
        memory = self._group.arena.bytes(self._region.part(offset, size_bytes))
        length = int.from_bytes(memory[:8], "little")
        entries = json.loads(bytes(memory[8 : 8 + length]))
        tensors = [None if entry is None else _taken(memory, *entry[:5]) for entry in entries]

        def release() -> None:
            words[first + slot] = 0

        return Arrived(tensors, [entry is not None and entry[5] for entry in entries], release)

    def check(self) -> None:
        """Go on only while the workers of all stages are alive.

        Raises:
            ReplicaBroken: where one is not.
        """
        self._group.check_replica()

    def _word(self, step: int, micro_batch: int) -> int:
        step_word = (self._group.generation << STEP_BITS) | step
        return (step_word << MICRO_BATCH_BITS) | (micro_batch + 1)


def clear_lane(group: HostGroup, layout: PassageLayout, lane: int) -> None:
    """Forget what lies in a lane's passages, of which nobody makes use."""
    words = group.arena.words(group.layout.regions.named["passage words"])
    for stage in range(len(layout.sizes)):
        for way in Way:
            first, count = layout.words(lane, stage, way)
            words[first : first + count] = memoryview(bytes(8 * count)).cast("Q")


def _is_loose(tensor: Tensor) -> bool:
    """Whether there is other memory between a tensor's elements: it travels without."""
    return 0 not in tensor.stride() and span(tensor) > tensor.numel()


def _put(tensor: Tensor, memory: memoryview, start: int, *, packed: bool) -> None:
    if not tensor.numel():
        return
    elements = tensor.numel() if packed else span(tensor)
    raw = torch.frombuffer(memory, dtype=torch.uint8, offset=start, count=elements * tensor.itemsize)
    target = raw.view(tensor.dtype)
    if packed:
        target.view(tensor.shape).copy_(tensor)
    else:
        target.copy_(tensor.as_strided((elements,), (1,), tensor.storage_offset()))


def _taken(memory: memoryview, dtype: str, shape: list[int], stride: list[int], start: int, packed: bool) -> Tensor:
    """A tensor over a slot's memory: no view of another, so that autograd lets it be changed in place."""
    kind = torch_dtype(dtype)
    form = torch.empty_strided(shape, stride, dtype=kind, device="meta")
    if not form.numel():
        return torch.empty_strided(shape, stride, dtype=kind)
    elements = form.numel() if packed else span(form)
    flat = torch.frombuffer(memory, dtype=kind, offset=start, count=elements)
    if packed:
        return alike(flat.view(shape), form, start % LINE_BYTES)
    return flat.set_(flat.untyped_storage(), 0, shape, stride)
