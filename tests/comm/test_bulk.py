"""Large payloads beside training: what arrives, chunk by chunk, between members of one process."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from unisono.comm import bulk
from unisono.comm.background import Background
from unisono.comm.bulk import Bulk
from unisono.comm.wire import Addressed, Pending


class Switch:
    """Messages of members that are threads, and how many were under way at once."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], list[Tensor]] = {}
        self._changed = threading.Condition()
        self.under_way: dict[int, int] = {}
        self.most = 0

    def put(self, source: int, target: int, tag: int, tensor: Tensor) -> None:
        with self._changed:
            self._boxes.setdefault((source, target, tag), []).append(tensor.clone())
            self._changed.notify_all()

    def take(self, source: int, target: int, tag: int) -> Tensor:
        with self._changed:
            assert self._changed.wait_for(lambda: self._boxes.get((source, target, tag)), 10)
            return self._boxes[source, target, tag].pop(0)


class Line:
    """One member's wire."""

    ordered = False

    def __init__(self, switch: Switch, rank: int, size: int) -> None:
        self.rank, self.size, self._switch = rank, size, switch
        switch.under_way[rank] = 0

    def post(self, sends: Sequence[Addressed], receives: Sequence[Addressed], tag: int) -> Pending:
        for tensor, target in sends:
            if tensor.numel():
                self._switch.put(self.rank, target, tag, tensor)
        self._switch.under_way[self.rank] += 1
        self._switch.most = max(self._switch.most, self._switch.under_way[self.rank])
        return _Coming(self._switch, self.rank, [(t, s) for t, s in receives if t.numel()], tag)


class _Coming:
    def __init__(self, switch: Switch, rank: int, receives: Sequence[Addressed], tag: int) -> None:
        self._switch, self._rank, self._receives, self._tag = switch, rank, receives, tag

    def wait(self, operation: str) -> None:
        for tensor, source in self._receives:
            tensor.copy_(self._switch.take(source, self._rank, self._tag))
        self._switch.under_way[self._rank] -= 1


@pytest.mark.parametrize("sizes", [(0, 0), (1, 0), (5, 300), (1000, 1000, 17), (96, 97, 0, 191)])
def test_everyone_has_everyones_payload(sizes: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of any lengths, several exchanges one after another; never more than two chunks under way."""
    monkeypatch.setattr(bulk, "CHUNK_BYTES", 96)
    switch, size = Switch(), len(sizes)
    members = [
        Bulk(Line(switch, rank, size), Background(f"bulk {rank}", lambda: torch.set_num_threads(1)))
        for rank in range(size)
    ]
    rounds = [[bytes((rank + number + i) % 251 for i in range(n)) for rank, n in enumerate(sizes)] for number in (0, 1)]
    with ThreadPoolExecutor(size) as threads:
        for payloads in rounds:
            started = [member.start(payload, "test") for member, payload in zip(members, payloads, strict=True)]
            assert all(found == payloads for found in threads.map(lambda future: future.result(10), started))
    assert switch.most <= bulk.AT_ONCE
    for member in members:
        member.thread.close(lambda: False)
