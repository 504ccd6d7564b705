"""Collectives over point-to-point messages: every algorithm, any number of members, any length; threads are members."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from unisono.comm.algorithms import ALGORITHMS, broadcast, drive, gather_bytes
from unisono.comm.network import Link, NetworkWire
from unisono.plan.blocks import aligned


def together(members: list[NetworkWire], work: Callable[[NetworkWire], Any]) -> list[Any]:
    results: list[Any] = [None] * len(members)

    def run(i: int) -> None:
        results[i] = work(members[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 5, 7])
def wires(request: pytest.FixtureRequest) -> Iterator[list[NetworkWire]]:
    size: int = request.param
    link = Link("gloo", HashStore(), "127.0.0.1", 20.0, torch.device("cpu"))
    members: list[Any] = [None] * size

    def join(rank: int) -> None:
        members[rank] = NetworkWire(link, "test", rank, size)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield members
    for wire in members:
        wire.close()


@pytest.mark.parametrize("elements", [1, 63, 1000, 64 * 7 * 8 + 5])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_sum_over_all_members(wires: list[NetworkWire], algorithm: str, elements: int) -> None:
    """Whole numbers add without rounding, so that every order of additions gives the same sum."""
    generator = torch.Generator().manual_seed(elements)
    values = [torch.randint(-1000, 1000, (elements,), generator=generator).float() for _ in wires]
    expected = torch.stack(values).sum(0)

    def work(wire: NetworkWire) -> torch.Tensor:
        mine = values[wire.rank].clone()
        drive(ALGORITHMS[algorithm](wire, mine, 3), algorithm)
        return mine

    for result in together(wires, work):
        assert torch.equal(result, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_all_members_end_with_the_same_bits(wires: list[NetworkWire], algorithm: str) -> None:
    def work(wire: NetworkWire) -> torch.Tensor:
        mine = torch.randn(3001, generator=torch.Generator().manual_seed(wire.rank))
        drive(ALGORITHMS[algorithm](wire, mine, 0), algorithm)
        return mine

    first, *others = together(wires, work)
    assert all(torch.equal(first, other) for other in others)


def test_a_ring_sends_as_little_as_possible(wires: list[NetworkWire]) -> None:
    n, elements = len(wires), 64 * 420

    def work(wire: NetworkWire) -> int:
        before = wire.sent_bytes
        drive(ALGORITHMS["ring"](wire, torch.ones(elements), 0), "ring")
        return wire.sent_bytes - before

    expected = [2 * (n - 1) * 4 * aligned(elements // n)] * n if n > 1 else [0]
    assert together(wires, work) == pytest.approx(expected, rel=0.02)


def test_broadcast_and_gather(wires: list[NetworkWire]) -> None:
    def work(wire: NetworkWire) -> tuple[list[float], list[bytes]]:
        tensor = torch.full((5,), float(wire.rank + 1))
        drive(broadcast(wire, tensor, 1), "broadcast")
        return tensor.tolist(), gather_bytes(wire, b"x" * wire.rank * 1000, 2, "gather")

    expected = [b"x" * rank * 1000 for rank in range(len(wires))]
    assert together(wires, work) == [([1.0] * 5, expected)] * len(wires)
