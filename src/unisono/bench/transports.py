"""The ways of communicating that ``unisono bench comm`` compares, in one worker."""

import gc
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from unisono.comm.algorithms import ALGORITHMS, AllReduce, drive, gather_bytes
from unisono.comm.network import Link, NetworkWire
from unisono.launch.world import this_process


@dataclass(frozen=True)
class Operation:
    """One collective by one transport; ``run`` does it once with a flat float32 tensor."""

    name: str
    transport: str
    run: Callable[[Tensor], None]


class Members:
    """The workers of a measurement.

    Attributes:
        rank, count: this one's number, and how many there are.
    """

    def __init__(self, wire: NetworkWire) -> None:
        self._wire = wire
        self.rank, self.count = wire.rank, wire.size

    def slowest(self, seconds: float) -> float:
        """The largest of all members' values; also brings them together."""
        payloads = gather_bytes(self._wire, struct.pack("d", seconds), 1, "slowest")
        return max(float(struct.unpack("d", payload)[0]) for payload in payloads)


@contextmanager
def operations(only: Sequence[str] | None, deadline_s: float) -> Iterator[tuple[list[Operation], Members]]:
    """All that this machine has, or those named."""
    world = this_process()
    link = Link("gloo", world.store(deadline_s), world.address, deadline_s, torch.device("cpu"))
    wire = NetworkWire(link, "bench", world.rank, world.size)
    found = [Operation("all_reduce", name, _by(algorithm, wire)) for name, algorithm in ALGORITHMS.items()]
    if only is not None:
        yield [operation for operation in found if operation.transport in only], Members(wire)
        wire.close()
        return
    timeout = timedelta(seconds=deadline_s)
    dist.init_process_group("gloo", timeout=timeout)
    groups: dict[str, Any] = {"gloo": None, "arena": dist.new_group(backend="arena", timeout=timeout)}
    if dist.is_mpi_available():
        groups["mpi"] = dist.new_group(backend="mpi")
    for transport, group in groups.items():
        found += _collectives(transport, group, world.size)
    yield found, Members(wire)
    wire.close()
    del found
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def _by(algorithm: AllReduce, wire: NetworkWire) -> Callable[[Tensor], None]:
    return lambda values: drive(algorithm(wire, values, 0), "bench")


def _collectives(transport: str, group: Any, ranks: int) -> list[Operation]:
    def all_gather(values: Tensor) -> None:
        part = values[: values.numel() // ranks]
        dist.all_gather_into_tensor(values[: part.numel() * ranks], part.clone(), group=group)

    def reduce_scatter(values: Tensor) -> None:
        part = values.numel() // ranks
        dist.reduce_scatter_tensor(torch.empty(part), values[: part * ranks], group=group)

    return [
        Operation("all_reduce", transport, lambda values: dist.all_reduce(values, group=group)),
        Operation("broadcast", transport, lambda values: dist.broadcast(values, 0, group=group)),
        Operation("all_gather", transport, all_gather),
        Operation("reduce_scatter", transport, reduce_scatter),
    ]


def limit_s(size_bytes: int, members: Members) -> float:
    """Seconds for the memory traffic that an all-reduce needs, at the bandwidth of a copy by all ranks at once.

    Each rank reads its own tensor and writes the result; besides, (n - 1)/n of the tensor passes through shared memory
    twice, on its way to be summed and back: written once and read once each time.
    """
    traffic = size_bytes * (2 + 4 * (members.count - 1) / members.count)
    source = torch.ones(size_bytes // 4)
    target = torch.empty_like(source)
    times = []
    for _ in range(5):
        members.slowest(0.0)
        started = time.perf_counter()
        target.copy_(source)
        times.append(members.slowest(time.perf_counter() - started))
    return sorted(times)[2] * traffic / (2 * size_bytes)
