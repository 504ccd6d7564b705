"""Workers of a host: messages, partials, waits with deadlines, revocation; threads stand in for processes."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from unisono.comm.arena import Arena, Region, Regions
from unisono.comm.descriptor import create_descriptor
from unisono.comm.group import STOP, Group
from unisono.comm.header import Header, header_bytes
from unisono.comm.host import HostGroup
from unisono.comm.host_layout import MAILBOX_BYTES, host_layout
from unisono.comm.partial import partial_layout
from unisono.errors import LaunchError, Revoked, WaitTimeout
from unisono.plan.blocks import ParameterSpec, TensorSpec, flat_layout
from unisono.run.summation import Node

FLAT = flat_layout([ParameterSpec(TensorSpec("w", "float32", (5,)), ("w",), 0)])
PARTIALS = partial_layout(FLAT, [])


def groups(size: int, deadline_s: float = 5.0) -> list[HostGroup]:
    layout = host_layout(size, 2, 4, PARTIALS.size_bytes, 64, 1, 64)
    arena = Arena(None, layout.size_bytes)
    return [HostGroup(arena, layout, PARTIALS, slot, range(size), 1, deadline_s) for slot in range(size)]


def nobody_is_lost(left: Sequence[int]) -> None:
    raise AssertionError(f"micro-batches {left} are to be computed again")


def together(members: list[HostGroup], work: Callable[[HostGroup], Any]) -> list[Any]:
    results: list[Any] = [None] * len(members)

    def run(i: int) -> None:
        try:
            results[i] = work(members[i])
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(members))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_a_host_group_meets_the_contract() -> None:
    assert isinstance(groups(1)[0], Group)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_everyone_receives_everyones_message(size: int) -> None:
    """Messages shorter and longer than a mailbox, many times: no half of a mailbox is read too late."""

    def talk(group: HostGroup) -> bool:
        for i in range(40):
            length = (i * 7919 * (group.rank + 1)) % (3 * MAILBOX_BYTES) if i % 8 == 0 else i * group.rank
            received = group.all_gather(bytes([group.rank + 1]) * length, "talk")
            for rank, payload in enumerate(received):
                expected = (i * 7919 * (rank + 1)) % (3 * MAILBOX_BYTES) if i % 8 == 0 else i * rank
                if payload != bytes([rank + 1]) * expected:
                    return False
        return True

    assert together(groups(size), talk) == [True] * size


def test_a_step_is_collected_once_all_is_published() -> None:
    members = groups(2)

    def work(group: HostGroup) -> list[float]:
        totals = []
        for step in range(1, 30):
            group.begin(step, 2)
            partial = group.partial(0)
            partial.clear()
            partial.scalars[0] = float(step * (group.rank + 1))
            group.publish(step, 0, Node(0, group.rank))
            totals.append(sum(p.scalars[0] for _, p in group.collect(step, 2, nobody_is_lost)[0]))
            group.finish(step)
            group.settle(step)
        return totals

    expected = [3.0 * step for step in range(1, 30)]
    assert together(members, work) == [expected, expected]
    assert members[0].header.closed == members[0].header.committed == 29


def test_a_missing_rank_is_named_with_what_it_did_last() -> None:
    first, second = groups(2, deadline_s=0.1)
    second.enter("compute", 7)
    with pytest.raises(
        WaitTimeout, match=r"barrier .*waited .*test_host.py:\d+; rank 1 is missing, last seen in compute of step 7"
    ):
        first.barrier("barrier of the test")
    first.begin(3, 4)
    first.publish(3, 0, Node(0, 0))
    with pytest.raises(WaitTimeout, match="micro-batches 1-3 of step 3 are not published; rank 1: compute of step 7"):
        first.collect(3, 4, nobody_is_lost)
    with pytest.raises(WaitTimeout, match=r"commit of step 3 .* rank 0 is missing"):
        first.settle(3)


def test_revoking_frees_all_who_wait_and_a_later_generation_goes_on() -> None:
    members = groups(3, deadline_s=30.0)

    def wait(group: HostGroup) -> str:
        if group.rank == 2:
            time.sleep(0.05)
            group.revoke()
            return "revoked"
        group.barrier("wait")
        return "passed"

    started = time.monotonic()
    outcomes = together(members, wait)
    assert time.monotonic() - started < 1.0
    assert [type(o) for o in outcomes] == [Revoked, Revoked, str]
    reformed = [member.reform(2, [0, 2]) for member in (members[0], members[2])]
    assert [(g.rank, g.size, g.generation) for g in reformed] == [(0, 2, 2), (1, 2, 2)]
    with pytest.raises(ValueError, match="not after"):
        reformed[0].reform(2, [0])


def test_partials_of_an_old_generation_do_not_count() -> None:
    member = groups(1)[0]
    member.publish(1, 0, Node(0, 0))
    later = member.reform(2, [0])
    assert later.header.publications(2, 1, (0,)) == []
    assert len(later.header.publications(1, 1, (0,))) == 1


def test_flags_are_joined() -> None:
    members = groups(2)
    members[1].set_flags(STOP)
    assert members[0].all_flags() == STOP


def test_another_layout_is_refused_by_rank() -> None:
    outcomes = together(groups(3), lambda g: g.assemble(5 if g.rank < 2 else 6))
    assert all(isinstance(o, LaunchError) and "rank 2 built another model" in str(o) for o in outcomes)


def test_an_idle_wait_burns_no_core() -> None:
    first, _ = groups(2, deadline_s=0.6)
    before = time.process_time()
    with pytest.raises(WaitTimeout):
        first.barrier("idle")
    assert time.process_time() - before < 0.2


def test_memory_is_shared_through_the_descriptor_and_starts_at_zero() -> None:
    descriptor = create_descriptor(8192)
    one, two = Arena(descriptor, 8192), Arena(descriptor, 8192)
    one.words(Region(64, 8))[0] = 2**63
    assert two.words(Region(64, 8))[0] == 2**63
    assert two.tensor(Region(128, 64), torch.float32).sum() == 0


def test_an_arena_that_cannot_be_mapped_is_said() -> None:
    with pytest.raises(LaunchError, match="cannot map"):
        Arena(None, 1 << 60)


def test_regions_are_aligned_and_apart() -> None:
    regions = Regions()
    a, b = regions.add("a", 10), regions.add("b", 10, 4096)
    assert a.offset == 0 and b.offset == 4096 and regions.size_bytes == 4106


def test_memory_that_is_no_arena_is_refused() -> None:
    arena = Arena(None, header_bytes(1))
    arena.words(Region(0, 8))[0] = 5
    with pytest.raises(ValueError, match="not an arena"):
        Header(arena.bytes(Region(0, header_bytes(1))), 1)
