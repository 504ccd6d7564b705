"""The commit protocol: whatever store it is cut off at, a run of blocks is whole, and recovery may be cut off too."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor

from unisono.comm.header import SLOT_WORDS, UNDO_VERSION
from unisono.comm.journal import Image, Journal

BLOCKS, ELEMENTS = 3, 4


class Crash(Exception):
    """The process ends here."""


class Stores:
    """Counts every store; crashes before number ``limit``."""

    def __init__(self, limit: int | None) -> None:
        self.limit = limit
        self.count = 0

    def __call__(self) -> None:
        if self.limit is not None and self.count >= self.limit:
            raise Crash
        self.count += 1


class Words:
    """Words of shared memory, whose every store is counted."""

    def __init__(self, words: list[int], stores: Stores) -> None:
        self.words = words
        self.stores = stores

    def __getitem__(self, index: int) -> int:
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.stores()
        self.words[index] = value


class Memory:
    """The memory that outlives a worker: two tensors of a run, the undo area, the snapshot, words."""

    def __init__(self) -> None:
        self.live = [torch.full((BLOCKS * ELEMENTS,), 1.0), torch.full((BLOCKS,), 10.0)]
        self.undo = [torch.full_like(t, -7.0) for t in self.live]
        self.snapshot = [torch.full_like(t, -8.0) for t in self.live]
        self.row = [0] * SLOT_WORDS
        self.versions = [4] * BLOCKS

    def journal(self, stores: Stores) -> Journal:
        """A worker's journal over this memory."""

        def copy(target: Sequence[Tensor], source: Sequence[Tensor]) -> None:
            for a, b in zip(target, source, strict=True):
                for i in range(a.numel()):
                    stores()
                    a[i] = b[i]

        return Journal(Words(self.row, stores), Words(self.versions, stores), copy)  # type: ignore[arg-type]

    def image(self, first: int = 0, count: int = BLOCKS) -> Image:
        return Image(first, count, self.live, self.undo, self.snapshot)

    def update(self, stores: Stores) -> Callable[[], None]:
        """An update in place that reads what it overwrites: done twice, it would be wrong."""

        def run() -> None:
            for tensor in self.live:
                for i in range(tensor.numel()):
                    stores()
                    tensor[i] = tensor[i] * 2 + 1

        return run

    @property
    def state(self) -> tuple[list[float], list[float], list[int]]:
        return self.live[0].tolist(), self.live[1].tolist(), self.versions


OLD = ([1.0] * (BLOCKS * ELEMENTS), [10.0] * BLOCKS, [4] * BLOCKS)
NEW = ([3.0] * (BLOCKS * ELEMENTS), [21.0] * BLOCKS, [5] * BLOCKS)


def commit(memory: Memory, limit: int | None, snapshot: bool) -> int:
    stores = Stores(limit)
    memory.journal(stores).commit(memory.image(), 5, memory.update(stores), snapshot=snapshot)
    return stores.count


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_commit_cut_off_at_any_store_is_undone_or_whole(snapshot: bool) -> None:
    total = commit(Memory(), None, snapshot)
    outcomes = set()
    for limit in range(total):
        memory = Memory()
        with pytest.raises(Crash):
            commit(memory, limit, snapshot)
        memory.journal(Stores(None)).recover(lambda first, count, column, m=memory: m.image(first, count))  # type: ignore[misc]
        assert memory.state in (OLD, NEW), f"store {limit}"
        assert memory.row[UNDO_VERSION] == 0
        outcomes.add(memory.state == NEW)
    assert outcomes == {False, True}


@pytest.mark.parametrize("snapshot", [False, True])
def test_a_recovery_cut_off_at_any_store_can_be_done_again(snapshot: bool) -> None:
    total = commit(Memory(), None, snapshot)
    pairs = 0
    for limit in range(total):
        for second in range(200):
            memory = Memory()
            with pytest.raises(Crash):
                commit(memory, limit, snapshot)

            def image_of(first: int, count: int, column: bool, memory: Memory = memory) -> Image:
                return memory.image(first, count)

            stores = Stores(second)
            try:
                memory.journal(stores).recover(image_of)
            except Crash:
                memory.journal(Stores(None)).recover(image_of)
            else:
                break
            finally:
                pairs += 1
            assert memory.state in (OLD, NEW), f"stores {limit}, {second}"
    assert pairs > 300


def test_a_snapshot_holds_the_version_before() -> None:
    memory = Memory()
    commit(memory, None, True)
    assert memory.snapshot[0].tolist() == OLD[0] and memory.snapshot[1].tolist() == OLD[1]
    assert memory.state == NEW


def test_nothing_to_recover() -> None:
    memory = Memory()
    assert memory.journal(Stores(None)).recover(lambda first, count, column: memory.image(first, count)) is None
    assert memory.state == OLD


def test_where_nobody_would_go_on_old_bytes_are_kept_for_a_snapshot_alone() -> None:
    memory, stores = Memory(), Stores(None)
    journal = memory.journal(stores)
    journal._protects = False
    journal.commit(memory.image(), 5, memory.update(stores))
    assert memory.versions == [5] * BLOCKS and memory.row[UNDO_VERSION] == 0
    assert all((kept == -7.0).all() for kept in memory.undo) and all((kept == -8.0).all() for kept in memory.snapshot)
    before = [tensor.clone() for tensor in memory.live]
    journal.commit(memory.image(), 6, memory.update(stores), snapshot=True)
    assert all(torch.equal(a, b) for a, b in zip(memory.snapshot, before, strict=True))
