"""Portions of a state that hosts share are the whole together, and every host gets what it needs from who has it."""

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from unisono.comm.arena import Arena, Region
from unisono.config import TrainingConfig
from unisono.data.feed import Feed
from unisono.plan.hosts import Hosts, Place
from unisono.preparation import Objects, Prepared, prepare
from unisono.state.portions import Portion, intersection, merged, needed, place_in, portions
from unisono.state.snapshots import Images, Snapshots, newest_whole

REGIONS = st.lists(st.tuples(st.integers(0, 200), st.integers(1, 30)), max_size=8).map(
    lambda pairs: merged([Region(*pair) for pair in pairs])
)


def bytes_of(regions: list[Region]) -> list[int]:
    return [at for region in regions for at in range(region.offset, region.offset + region.size_bytes)]


@given(REGIONS, REGIONS)
def test_intersection_is_what_both_have(some: list[Region], others: list[Region]) -> None:
    common = list(intersection(some, others))
    assert bytes_of(common) == sorted(set(bytes_of(some)) & set(bytes_of(others)))
    for region in common:
        assert bytes_of(some)[place_in(some, region)] == region.offset


def prepared(zero: int, hosts: int) -> tuple[Prepared, TrainingConfig]:
    config = TrainingConfig(global_batch_size=8, micro_batch_size=1, layout={"zero": zero})
    data = [(torch.zeros(7), torch.tensor(0)) for _ in range(8)]

    def model() -> nn.Module:
        made = nn.Sequential(nn.Linear(7, 300), nn.BatchNorm1d(300), nn.Linear(300, 300), nn.Linear(300, 3))
        made[0].requires_grad_(False)
        return made

    objects = Objects(model, nn.functional.cross_entropy, data, torch.optim.AdamW, None, None, None)
    return prepare(
        objects, config, Place(Hosts((1,) * hosts), 0), Feed(data, 0, "training", None, torch.device("cpu"))
    ), config


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_portions_are_the_whole_once(zero: int) -> None:
    for hosts in (1, 2, 3, 5):
        found, _ = prepared(zero, hosts)
        size_bytes = found.layout.size_bytes
        divided = portions(found.layout, size_bytes, found.shards)
        assert len(divided) == hosts
        everything = merged([region for regions in divided for region in regions])
        assert everything == [Region(0, size_bytes)]
        assert sum(region.size_bytes for regions in divided for region in regions) == size_bytes
        for host, regions in enumerate(divided):  # what a host keeps alone it needs
            assert list(intersection(regions, needed(found.layout, size_bytes, found.shards, host))) or not regions


class Links:
    """Between hosts that are threads here."""

    def __init__(self) -> None:
        self._between: dict[tuple[int, int], SimpleQueue[torch.Tensor]] = defaultdict(SimpleQueue)

    def of(self, host: int) -> Any:
        def transfer(tensors: list[torch.Tensor], source: int, targets: list[int], operation: str) -> None:
            for target in targets:
                for tensor in tensors:
                    if host == source:
                        self._between[source, target].put(tensor.clone())
                    else:
                        tensor.copy_(self._between[source, target].get(timeout=10))

        return transfer


@given(st.sampled_from([1, 3]), st.integers(2, 5), st.data())
def test_those_who_are_left_bring_the_whole_state_together(zero: int, before: int, data: st.DataObject) -> None:
    """One host of several that share a state is lost, or none, or another comes; the rest has a copy of everything."""
    then, config = prepared(zero, before)
    size_bytes = then.layout.size_bytes
    state = torch.randint(0, 256, (size_bytes,), dtype=torch.uint8)

    def divide(hosts: int) -> list[list[Region]]:
        return portions(then.layout, size_bytes, then.shards_of(hosts, config))

    lost = data.draw(st.sampled_from([None, *range(before)]))
    kept: list[Images] = []
    for number in range(before):
        portion = Portion(number, before)
        images = Images(Arena(None, Images.size_bytes(portion, divide, 1)), portion, divide, 1)
        for one in images.kept:
            images.of(1, one).copy_(
                torch.cat([state[:0], *(state[r.offset : r.offset + r.size_bytes] for r in images.kept[one])])
            )
            images.steps(1, one)[0] = 8
        images.know(1, b"what is known")
        if number != lost:
            kept.append(images)
    hosts = len(kept) + data.draw(st.integers(0, 1))
    kept += [
        Images(
            Arena(None, Images.size_bytes(Portion(hosts - 1, hosts), divide, 1)), Portion(hosts - 1, hosts), divide, 1
        )
        for _ in range(hosts - len(kept))
    ]
    offers = {host: images.offers() for host, images in enumerate(kept)}
    found = newest_whole(offers)
    assert found is not None and (found.step, found.hosts, found.known) == (7, before, b"what is known")
    now, _ = prepared(zero, hosts)
    needs = [needed(now.layout, size_bytes, now.shards, host) for host in range(hosts)]
    states = [torch.zeros(size_bytes, dtype=torch.uint8) for _ in range(hosts)]
    workers = [Snapshots(images, [own], 0, 1, 1) for images, own in zip(kept, states, strict=True)]
    for worker in workers:
        worker.found = found
    links = Links()
    with ThreadPoolExecutor(hosts) as threads:
        done = [threads.submit(worker.restore, needs, host, links.of(host)) for host, worker in enumerate(workers)]
        for future in done:
            future.result()
    for host in range(hosts):
        for region in needs[host]:
            place = slice(region.offset, region.offset + region.size_bytes)
            assert torch.equal(states[host][place], state[place])


def test_a_step_counts_only_where_every_portion_of_it_is_left() -> None:
    def offer(step: int, number: int, known: str = "") -> dict[str, Any]:
        return {"step": step, "portion": Portion(number, 3).name, "known": known}

    assert newest_whole({}) is None
    assert newest_whole({0: [offer(4, 0), offer(4, 2)]}) is None
    found = newest_whole(
        {
            0: [offer(4, 0, "four"), offer(4, 2), offer(8, 0, "eight"), offer(8, 2)],
            1: [offer(4, 1, "four"), offer(4, 0)],
        }
    )
    assert found is not None and found.step == 4 and found.known == b"four"
    assert found.holders == {0: [0, 1], 2: [0], 1: [1]}
