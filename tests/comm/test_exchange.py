"""A lane's buckets are under way together, and members that are ready at different times do not wait in a circle."""

import random
import time
from collections.abc import Callable, Iterator

import pytest
import torch

from tests.comm.wires import in_threads, join
from unisono.comm.algorithms import ALGORITHMS, Collective, scattered
from unisono.comm.bundle import Bundle, together
from unisono.comm.exchange import Lane
from unisono.comm.network import NetworkWire
from unisono.comm.wire import Wire
from unisono.plan.exchange import Bucket

BUCKETS = [Bucket(i, lane=0, team=0, segment=0, start=0, stop=1, uses=()) for i in range(7)]
ELEMENTS = 500


def twice(wire: Wire, tensor: torch.Tensor, tag: int) -> Collective:
    """A sum of sums, as PowerSGD makes it: four rounds."""
    yield from scattered(wire, tensor, tag)
    yield from scattered(wire, tensor, tag)


REDUCTIONS = {**ALGORITHMS, "scattered": scattered, "twice": twice}


@pytest.fixture(scope="module", params=[3, 5])
def wires(request: pytest.FixtureRequest) -> Iterator[list[NetworkWire]]:
    members = join(request.param, deadline_s=5.0)
    yield members
    for wire in members:
        wire.close()


class Backward:
    """Finishes its buckets at random times; some at once, as when the exchange is slower than the backward."""

    def __init__(self, seed: int) -> None:
        chance = random.Random(seed)
        now, self._times = time.monotonic(), []
        for _ in BUCKETS:
            now += chance.choice([0.0, 0.0, 0.001, 0.004]) * chance.random()
            self._times.append(now)

    def is_ready(self, bucket: Bucket) -> bool:
        return time.monotonic() >= self._times[bucket.index]

    def await_ready(self, bucket: Bucket) -> None:
        time.sleep(max(0.0, self._times[bucket.index] - time.monotonic()))


def exchange(
    wire: NetworkWire, reduce: Callable[[Bucket, int], Iterator[object]], seed: int, *, ordered: bool
) -> list[int]:
    """Run a lane; the buckets whose ends it told, in that order, and -1 for the last sums."""
    backward, done = Backward(seed), []
    Lane(
        buckets=BUCKETS,
        ready=backward.is_ready,
        await_ready=backward.await_ready,
        reduce=reduce,  # type: ignore[arg-type]
        done=lambda bucket: done.append(bucket.index),
        ordered=ordered,
        last=lambda step: ALGORITHMS["direct"](wire, torch.zeros(3), 99),
        finished=lambda: done.append(-1),
    ).run(1, 1, last=True)
    return done


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_members_that_are_ready_at_different_times(wires: list[NetworkWire], name: str, ordered: bool) -> None:
    """Fifteen steps, in each of which every member finishes its buckets at times of its own."""

    def work(rank: int) -> None:
        for step in range(15):
            tensors = [torch.full((ELEMENTS,), float(bucket.index + rank)) for bucket in BUCKETS]
            done = exchange(
                wires[rank],
                lambda bucket, step, tensors=tensors: REDUCTIONS[name](  # type: ignore[misc]
                    wires[rank], tensors[bucket.index], bucket.index
                ),
                seed=100 * step + rank,
                ordered=ordered,
            )
            assert sorted(done) == [-1, *(bucket.index for bucket in BUCKETS)]
            n = len(wires)
            for i, tensor in enumerate(tensors):
                total = float(n * i + n * (n - 1) // 2) * (n if name == "twice" else 1)
                assert torch.equal(tensor, torch.full((ELEMENTS,), total))

    in_threads(len(wires), work)


@pytest.mark.parametrize("name", REDUCTIONS)
def test_every_member_has_the_same_rounds(name: str) -> None:
    """Also those that have nothing to send: what is posted in one round may leave in one message."""

    class Nowhere:
        ordered = False

        def __init__(self, rank: int, size: int) -> None:
            self.rank, self.size = rank, size

        def post(self, sends: object, receives: object, tag: int) -> object:
            return object()

    for size in range(1, 12):
        rounds = {
            len(list(REDUCTIONS[name](Nowhere(rank, size), torch.zeros(ELEMENTS), 0)))  # type: ignore[arg-type]
            for rank in range(size)
        }
        assert len(rounds) == 1, size


def test_small_messages_leave_together(wires: list[NetworkWire]) -> None:
    """Several collectives at once, some large: the sums are right, and each round is one message to a member."""
    n = len(wires)
    posted: list[int] = [0] * n

    class Counting:
        ordered = False

        def __init__(self, wire: NetworkWire) -> None:
            self.rank, self.size, self._wire = wire.rank, wire.size, wire

        def post(self, sends, receives, tag):  # type: ignore[no-untyped-def]
            posted[self.rank] += sum(1 for tensor, _ in sends if tensor.numel())
            return self._wire.post(sends, receives, tag)

    def work(rank: int) -> list[torch.Tensor]:
        tensors = [
            torch.full((size,), rank + 1, dtype=dtype)
            for size, dtype in ((300, torch.float32), (0, torch.float32), (5, torch.int32), (40_000, torch.bfloat16))
        ]
        bundle = Bundle(Counting(wires[rank]), 7)
        for pending in together([scattered(bundle, tensor, 0) for tensor in tensors], [bundle]):
            pending.wait("a bundle")
        return tensors

    total = n * (n + 1) // 2
    for tensors in in_threads(n, work):
        assert [set(tensor.tolist()) for tensor in tensors] == [{total}, set(), {total}, {total}]
    assert max(posted) == 2 * (n - 1)
