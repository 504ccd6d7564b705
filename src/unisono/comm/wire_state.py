"""The memory of compression: on a host between steps, in a checkpoint, at another number of hosts.

It is one host's: what it has not sent yet, in the units of its sums, so that the errors of all hosts may be added up
and shared out anew.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unisono.comm.arena import Regions
from unisono.comm.compression import Compression, compressed_uses, matrix_shape
from unisono.plan.blocks import FlatLayout
from unisono.run.rng import derive

PREFIX = "wire/"
"""Begins the names of a checkpoint's tensors that are the memory of compression, no part of the training state."""


def wire_regions(flat: FlatLayout, compression: Compression) -> Regions:
    """Where the memory of compression lies, by name."""
    regions = Regions()
    for use in compressed_uses(flat, compression):
        rows, columns = matrix_shape(flat, use)
        regions.add(f"error {use}", 4 * rows * columns)
        if compression.name == "top_k" and compression.momentum:
            regions.add(f"velocity {use}", 4 * rows * columns)
        if compression.name == "powersgd":
            regions.add(f"basis {use}", 4 * columns * compression.rank)
    return regions


@dataclass(frozen=True, slots=True)
class WireState:
    """The memory of compression on one host, by use; all float32.

    Attributes:
        error: what has not been sent yet, flat.
        velocity: for top-k with momentum, flat.
        basis: for PowerSGD, (columns, rank): the last step's right factor, the same on all hosts.
    """

    error: Mapping[int, Tensor]
    velocity: Mapping[int, Tensor] = field(default_factory=dict)
    basis: Mapping[int, Tensor] = field(default_factory=dict)

    def named(self, flat: FlatLayout) -> Iterator[tuple[str, Tensor]]:
        """Every tensor by its name in a checkpoint."""
        for kind, tensors in (("error", self.error), ("velocity", self.velocity), ("basis", self.basis)):
            for use, tensor in tensors.items():
                yield f"{PREFIX}{kind}/{flat.uses[use][0]}", tensor

    def norm(self, uses: Sequence[int]) -> float:
        """The norm of the error of some uses."""
        return math.sqrt(sum(float(torch.dot(self.error[use], self.error[use])) for use in uses if use in self.error))


def wire_state(flat: FlatLayout, compression: Compression, regions: Regions, memory: Tensor) -> WireState:
    """Views of a host's memory (bytes)."""
    found: dict[str, dict[int, Tensor]] = {"error": {}, "velocity": {}, "basis": {}}
    for name, region in regions.named.items():
        kind, use = name.split()
        values = memory[region.offset : region.offset + region.size_bytes].view(torch.float32)
        found[kind][int(use)] = values.view(-1, compression.rank) if kind == "basis" else values
    return WireState(found["error"], found["velocity"], found["basis"])


def begin(state: WireState, compression: Compression) -> None:
    """The memory of a run that starts: no error, and a random basis, the same on all hosts."""
    for tensors in (state.error, state.velocity):
        for tensor in tensors.values():
            tensor.zero_()
    for use, basis in state.basis.items():
        generator = torch.Generator().manual_seed(derive(compression.seed, "wire basis", use))
        basis.copy_(torch.randn(basis.shape, generator=generator))


def gathered(state: WireState, flat: FlatLayout, add_up: Callable[[Tensor, str], None]) -> dict[str, Tensor]:
    """What a checkpoint keeps: the errors of all hosts, which ``add_up`` sums; the basis, which all share, as it is."""
    result = {}
    for name, tensor in state.named(flat):
        total = tensor.detach().cpu().clone().view(-1)
        if not _shared(name):
            add_up(total, f"gathering {name}")
        result[name] = total.view(tensor.shape)
    return result


def restore(
    state: WireState,
    flat: FlatLayout,
    compression: Compression,
    tensors: Mapping[str, Tensor],
    hosts: int,
    share: Callable[[Tensor, str], None],
) -> None:
    """Take over what a checkpoint kept, known to the first host, which ``share`` gives to all: equal parts for each."""
    begin(state, compression)
    for name, tensor in state.named(flat):
        if name in tensors and tensors[name].shape == tensor.shape:
            tensor.copy_(tensors[name] if _shared(name) else tensors[name] / hosts)
        whole = tensor.detach().cpu().contiguous()
        share(whole.view(-1), f"restoring {name}")
        tensor.copy_(whole)


def _shared(name: str) -> bool:
    return name.startswith(f"{PREFIX}basis/")
