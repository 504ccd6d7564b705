"""Collectives over point-to-point messages: every algorithm, any number of members, any length; threads are members."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from tests.comm.wires import in_threads, join
from unisono.comm.algorithms import ALGORITHMS, broadcast, drive, gather_bytes
from unisono.comm.network import NetworkWire
from unisono.plan.blocks import aligned


def together(members: list[NetworkWire], work: Callable[[NetworkWire], Any]) -> list[Any]:
    return in_threads(len(members), lambda rank: work(members[rank]))


@pytest.fixture(scope="module", params=[1, 2, 3, 4, 5, 7])
def wires(request: pytest.FixtureRequest) -> Iterator[list[NetworkWire]]:
    members = join(request.param)
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
