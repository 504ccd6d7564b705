"""Faults in the middle of an exchange: every survivor names the rank and the operation, in time; then it reforms."""

import re
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore, Store

from unisono.comm.network import Link, NetworkWire
from unisono.errors import LaunchError
from unisono.launch.local import LocalLauncher
from unisono.launch.worker_set import WorkerSet

DEADLINE_S = 1.5


@pytest.fixture
def tolerant(pool: LocalLauncher, monkeypatch: pytest.MonkeyPatch) -> LocalLauncher:
    """A pool that lets survivors end by themselves instead of ending them with the first that failed."""
    monkeypatch.setattr(WorkerSet, "_failures", lambda self: (False, False))
    monkeypatch.setattr(WorkerSet, "_raise_failure", lambda self: None)
    return pool


def survivors(
    pool: LocalLauncher, workers: int, hosts: int, call: str = "survive", together: int = 1, **arguments: Any
) -> list[dict[str, Any]]:
    settings = {"deadline_s": DEADLINE_S, "wire": {"bucket_bytes": 300}, "fault": {"on_loss": "stop"}, **arguments}
    ending = pool.run({"call": f"tests.jobs:{call}", "arguments": settings}, workers, hosts=hosts, together=together)
    return [result for rank, result in enumerate(ending.results) if rank != arguments["rank"]]


@pytest.mark.parametrize(
    ("workers", "hosts", "phase"),
    [
        *[(2, 2, "compute"), (2, 2, "wait"), (3, 3, "compute"), (3, 3, "wait")],
        *[(4, 2, "compute"), (4, 2, "wait"), (4, 2, "update")],
    ],
)
def test_a_stopped_worker_is_named_by_all_others(tolerant: LocalLauncher, workers: int, hosts: int, phase: str) -> None:
    """(last rank, step 3, compute or wait): SIGSTOP."""
    started = time.monotonic()
    found = survivors(tolerant, workers, hosts, rank=workers - 1, how="stop", step=3, phase=phase)
    assert len(found) == workers - 1
    for result in found:
        assert result["kind"] in ("WaitTimeout", "Revoked", "PeerLost")
        assert f"rank {workers - 1} (host {hosts - 1})" in result["error"], result["error"]
        assert re.search(r"of step [34]", result["error"])
        assert result["at"] - started < DEADLINE_S + 2 + 1.5  # 1.5: to start, and to train two steps


@pytest.mark.parametrize("zero", [1, 2, 3])
@pytest.mark.parametrize(("how", "phase"), [("stop", "compute"), ("stop", "wait"), ("kill", "compute")])
def test_a_host_that_keeps_a_part_of_the_state_is_named_by_all_others(
    tolerant: LocalLauncher, zero: int, how: str, phase: str
) -> None:
    """(last rank, step 3): the others wait for sums, for values, or for a layer's parameters."""
    started = time.monotonic()
    settings: dict[str, Any] = {"layout": {"zero": zero}, "global_batch_size": 24}
    for result in survivors(tolerant, 3, 3, rank=2, how=how, step=3, phase=phase, **settings):
        assert result["kind"] in ("WaitTimeout", "Revoked", "PeerLost")
        assert "rank 2 (host 2)" in result["error"], result["error"]
        assert result["at"] - started < DEADLINE_S + 2 + 1.5


@pytest.mark.parametrize(
    ("rank", "how", "phase"),
    [
        *[(0, "stop", "update"), (1, "stop", "compute"), (1, "kill", "wait"), (2, "stop", "compute")],
        *[(2, "kill", "compute"), (3, "stop", "compute"), (3, "kill", "wait"), (5, "stop", "update")],
    ],
)
@pytest.mark.parametrize("layout", [{"pipeline": 2}, {"tensor": 2, "zero": 1}], ids=["pipeline", "tensor"])
def test_a_worker_of_a_replica_is_named_on_all_hosts(
    tolerant: LocalLauncher, rank: int, how: str, phase: str, layout: dict[str, Any]
) -> None:
    """(any stage, step 3), two replicas on host 0, one on host 1: mates wait for it, and every lane for its mates."""
    started = time.monotonic()
    settings: dict[str, Any] = {"layout": layout, "rank": rank, "how": how, "step": 3, "phase": phase}
    for result in survivors(tolerant, 6, 2, together=2, **settings):
        assert result["kind"] in ("WaitTimeout", "Revoked", "PeerLost")
        assert f"rank {rank} (host {rank // 4})" in result["error"], result["error"]
        assert result["at"] - started < DEADLINE_S + 2 + 2.5


def test_a_worker_that_only_its_mates_miss_is_named_by_other_hosts(tolerant: LocalLauncher) -> None:
    """(last rank, step 3, its sums are sent but not marked): other hosts are a step ahead, and wait for its mate."""
    for result in survivors(tolerant, 4, 2, call="survive_silence", rank=3, step=3):
        assert "rank 3 (host 1)" in result["error"], result["error"]
        assert re.search(r"of step [34]", result["error"])


@pytest.mark.parametrize(("workers", "hosts"), [(2, 2), (3, 3), (4, 2)])
def test_a_killed_worker_is_named_by_all_others(tolerant: LocalLauncher, workers: int, hosts: int) -> None:
    """(last rank, step 3, compute): SIGKILL."""
    found = survivors(tolerant, workers, hosts, rank=workers - 1, how="kill", step=3)
    assert len(found) == workers - 1
    for result in found:
        assert f"rank {workers - 1} (host {hosts - 1})" in result["error"], result["error"]
        assert re.search(r"of step 3", result["error"])


@pytest.mark.parametrize("workers", [2, 3])
def test_a_wire_is_revoked_and_made_anew_fifty_times(pool: LocalLauncher, workers: int) -> None:
    results = pool.run({"call": "tests.jobs:reform_often", "arguments": {"times": 50}}, workers, hosts=workers).results
    for rank, result in enumerate(results):
        assert statistics.median(result["made_s"]) < 0.5
        assert len(result["freed_s"]) == 50 and statistics.median(result["freed_s"]) < 0.1
        assert result["errors"] == (["Revoked"] if rank == 0 else ["PeerLost"])
        assert result["descriptors"][-1] == result["descriptors"][1], "descriptors leak"


def test_a_wire_is_revoked_while_a_message_comes(pool: LocalLauncher) -> None:
    """Gloo does not free who is in the middle of receiving one when the connection ends: the thread is left behind."""
    arguments = {"times": 12}
    results = pool.run({"call": "tests.jobs:revoked_while_a_message_comes", "arguments": arguments}, 2, hosts=2).results
    assert max(max(took) for took in results) < 2.0


@pytest.mark.parametrize(("workers", "hosts", "lost"), [(3, 3, 1), (4, 2, 3), (5, 2, 0)])
def test_survivors_form_the_next_generation(tolerant: LocalLauncher, workers: int, hosts: int, lost: int) -> None:
    target = {"call": "tests.jobs:reform_without", "arguments": {"lost": lost}}
    results = tolerant.run(target, workers, hosts=hosts).results
    expected = float(sum(range(2 * workers)))
    for place, rank in enumerate(rank for rank in range(workers) if rank != lost):
        assert results[rank]["sums"] == [expected, expected]
        assert results[rank]["place"] == [place, workers - 1]
        assert results[rank]["reformed_s"] < 0.5
        assert f"rank {lost}" in results[rank]["error"]


class Gone(Store):
    """A store for a member that says where it is, and ends before it has heard where the others are."""

    def __init__(self, store: Store) -> None:
        super().__init__()
        self._store = store

    def set(self, key: str, value: str | bytes) -> None:
        self._store.set(key, value)  # type: ignore[arg-type]

    def get(self, key: str) -> bytes:
        raise RuntimeError("it has gone")

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        raise RuntimeError("it has gone")


def test_a_wire_to_one_that_has_gone_on_is_left_as_soon_as_it_is_of_no_use() -> None:
    """Gloo would wait for the connection to the end, where the other was to make it."""
    waited = 0
    for number in range(12):  # whoever has the higher port connects; the other one waits
        store, name = HashStore(), f"generation {number}"
        link = Link("gloo", Gone(store), "127.0.0.1", 20.0, torch.device("cpu"))
        with pytest.raises(LaunchError, match="it has gone"):
            NetworkWire(link, name, 1, 2)
        began = time.monotonic()

        def useless(began: float = began) -> bool:
            return time.monotonic() - began > 0.2

        with pytest.raises(LaunchError) as caught:
            NetworkWire(replace(link, store=store, connect_s=0.5, useless=useless), name, 0, 2)
        waited += "is not waited for any more" in str(caught.value)
        assert time.monotonic() - began < 1.0
    assert waited
    for thread in threading.enumerate():  # gloo's wait ends by itself
        if thread.name == "unisono-connect":
            thread.join()
