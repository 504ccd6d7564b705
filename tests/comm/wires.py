"""Members of a wire as threads of one process, over gloo on loopback."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch._C._distributed_c10d import HashStore

from unisono.comm.network import Link, NetworkWire


def join(size: int, deadline_s: float = 20.0) -> list[NetworkWire]:
    """The members of a new wire."""
    link = Link("gloo", HashStore(), "127.0.0.1", deadline_s, torch.device("cpu"))
    return in_threads(size, lambda rank: NetworkWire(link, "test", rank, size))


def in_threads(count: int, work: Callable[[int], Any]) -> list[Any]:
    """Each number's result; what one of them raises is raised here."""
    results: list[Any] = [None] * count
    failures: list[BaseException] = []

    def run(i: int) -> None:
        try:
            results[i] = work(i)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return results
