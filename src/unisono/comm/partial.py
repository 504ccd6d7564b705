"""A partial: the sum over an aligned subtree of micro-batches, as bytes that another worker can read.

It holds a gradient for every use of a parameter, the buffers that the micro-batches wrote, how many micro-batches
touched each of these entries, and scalars (loss, weight; where several replicas train apart, the weight of each).
Entries that nobody touched hold no value.
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.arena import Regions
from unisono.plan.blocks import FlatLayout, TensorSpec, flat_layout

SCALARS = ("loss", "weight")


@dataclass(frozen=True, slots=True)
class PartialLayout:
    """Where the fields of a partial lie; the same in every worker."""

    flat: FlatLayout
    buffers: tuple[TensorSpec, ...]
    fields: Regions
    segments: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of one partial."""
        return self.fields.size_bytes

    @property
    def scalars(self) -> int:
        """How many numbers it holds besides tensors."""
        return self.fields.named["scalars"].size_bytes // 8


def torch_dtype(name: str) -> torch.dtype:
    """A dtype by torch's name for it."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def item_size(dtype: str) -> int:
    """Bytes of one element of a dtype named as in torch."""
    return torch_dtype(dtype).itemsize


def is_summed(spec: TensorSpec) -> bool:
    """Whether a buffer is averaged over micro-batches; counters and flags take the first writer's value instead."""
    dtype = torch_dtype(spec.dtype)
    return dtype.is_floating_point or dtype.is_complex


def partial_layout(flat: FlatLayout, buffers: Sequence[TensorSpec]) -> PartialLayout:
    """Lay out the fields of a partial."""
    fields = Regions()
    fields.add("scalars", 8 * (len(SCALARS) + (1 + flat.replicas if flat.replicas else 0)))
    fields.add("counts", 4 * (len(flat.uses) + len(buffers)))
    for i, spec in enumerate(buffers):
        fields.add(f"buffer {i}", spec.numel * item_size(spec.dtype))
    segments = []
    for i, (dtype, elements) in enumerate(zip(flat.segment_dtypes, flat.gradient_elements, strict=True)):
        fields.add(f"segment {i}", elements * item_size(dtype), alignment=4096)
        segments.append(dtype)
    return PartialLayout(flat, tuple(buffers), fields, tuple(segments))


class Partial:
    """Typed access to one partial.

    Attributes:
        segments: the gradients, one flat tensor a segment.
        entries: one tensor for every use, then one for every buffer.
        counts: micro-batches that touched each entry, (uses + buffers,).
        scalars: loss and weight, summed; then the weights of the model itself and of its replicas, if any.
        rows: takes sparse gradients of some uses, one for each micro-batch; those of others are made dense.
    """

    rows: Mapping[int, list[Tensor]] = MappingProxyType({})

    def __init__(self, layout: PartialLayout, memory: Tensor) -> None:
        flat = layout.flat

        def field(name: str) -> Tensor:
            region = layout.fields.named[name]
            return memory[region.offset : region.offset + region.size_bytes]

        self.segments = [field(f"segment {i}").view(torch_dtype(dtype)) for i, dtype in enumerate(layout.segments)]
        self.entries: list[Tensor] = []
        for (_, parameter), place in zip(flat.uses, flat.use_places, strict=True):
            span = self.segments[place.segment][place.offset : place.offset + place.numel]
            self.entries.append(span.view(flat.parameters[parameter].tensor.shape))
        self.uses = len(self.entries)
        self.first_wins = [False] * self.uses + [not is_summed(spec) for spec in layout.buffers]
        for i, spec in enumerate(layout.buffers):
            self.entries.append(field(f"buffer {i}").view(torch_dtype(spec.dtype)).view(spec.shape))
        host = memory if memory.device.type == "cpu" else torch.zeros(layout.size_bytes, dtype=torch.uint8)
        scalars, counts = layout.fields.named["scalars"], layout.fields.named["counts"]
        words = host.numpy().data
        self.scalars = words[scalars.offset : scalars.offset + scalars.size_bytes].cast("d")
        self.counts = words[counts.offset : counts.offset + counts.size_bytes].cast("i")

    def clear(self, entries: Iterable[int] | None = None, *, scalars: bool = True) -> None:
        """No entry, or none of ``entries``, has a value; scalars are 0."""
        for i in range(len(self.counts)) if entries is None else entries:
            self.counts[i] = 0
        for i in range(len(self.scalars) if scalars else 0):
            self.scalars[i] = 0.0

    def part(self, whole: "Partial", cuts: Mapping[int, tuple[int, int, int]]) -> "Partial":
        """This partial, with the part of some entries that lies in another one.

        Arguments:
            cuts: entry -> (dimension, first index, length).
        """
        result = copy.copy(self)
        result.entries = list(self.entries)
        for entry, (dim, first, length) in cuts.items():
            result.entries[entry] = whole.entries[entry].narrow(dim, first, length)
        return result

    def over(self, other: "Partial") -> "Partial":
        """This partial with the gradients of another one."""
        result = copy.copy(self)
        result.segments = other.segments
        result.entries = [*other.entries[: self.uses], *self.entries[self.uses :]]
        return result

    def counts_array(self) -> NDArray[np.int32]:
        """The counts as an array over the same memory."""
        return np.frombuffer(self.counts, dtype=np.int32)


def head_layout(layout: PartialLayout) -> PartialLayout:
    """The fields of a partial that holds no gradients: all but those."""
    return partial_layout(replace(flat_layout([]), segment_replicas=layout.flat.segment_replicas), layout.buffers)


def pack_head(partial: Partial) -> bytes:
    """What a partial holds besides gradients, for a message: scalars, counts of buffers, buffers."""
    buffers = [entry.detach().cpu().contiguous().flatten() for entry in partial.entries[partial.uses :]]
    parts = [partial.scalars.tobytes(), partial.counts_array()[partial.uses :].tobytes()]
    return b"".join([*parts, *(b.view(torch.uint8).numpy().tobytes() for b in buffers)])


def unpack_head(data: bytes, into: Partial) -> None:
    """Put what `pack_head` packed into another partial."""
    scalars, counts = 8 * len(into.scalars), 4 * (len(into.counts) - into.uses)
    into.scalars.cast("B")[:] = data[:scalars]
    into.counts_array()[into.uses :] = np.frombuffer(data[scalars : scalars + counts], dtype=np.int32)
    at = scalars + counts
    for entry in into.entries[into.uses :]:
        size_bytes = entry.numel() * entry.element_size()
        if size_bytes:
            values = torch.frombuffer(bytearray(data[at : at + size_bytes]), dtype=entry.dtype)
            entry.copy_(values.view(entry.shape))
        at += size_bytes


def add_entry(chain: Sequence[Partial], entry: int, value: Tensor | None, count: int = 1) -> None:
    """Add a leaf's value of one entry along a chain of partials: into the first, that one into the second, and so on.

    ``None`` stands for a leaf that did not touch the entry: only what was pending moves on.
    """
    for partial in chain:
        held = partial.counts[entry]
        target = partial.entries[entry]
        if value is not None:
            if not held:
                target.copy_(value)
            elif not partial.first_wins[entry]:
                target.add_(value)
            partial.counts[entry] = count = held + count
        elif held:
            count = held
        else:
            count = 0
        value = target if partial.counts[entry] else None


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors are equal bit for bit: -0.0 is not 0.0, and one NaN is another; None is like None alone."""
    if a is None or b is None:
        return a is b
    return torch.equal(a.detach().reshape(-1).view(torch.uint8), b.detach().reshape(-1).view(torch.uint8))
