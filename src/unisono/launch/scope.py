"""What a worker changes in its process while it trains, and puts back: threads, kernels, signals."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Pin intra-op threads, whose number changes a result's last bits."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def deterministic(device: str) -> Iterator[None]:
    """On CUDA, kernels that give the same bits every time.

    Memory that nobody has written to is not filled, as torch does for such kernels otherwise: nothing here reads it.
    """
    if device == "cpu":
        yield
        return
    settings: Any = torch.utils.deterministic
    before, fills = torch.are_deterministic_algorithms_enabled(), settings.fill_uninitialized_memory
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        settings.fill_uninitialized_memory = fills


@contextmanager
def interrupts(stop: Callable[[], None], *, watched: bool) -> Iterator[None]:
    """Let the first Ctrl-C, SIGTERM or SIGUSR1 stop training in good order; the second acts as ever.

    Arguments:
        watched: a launcher sees to what does not stop. Then a second signal is no more than the first: a scheduler
            sends one to every process, and the launcher another.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}

    def request(number: int, frame: FrameType | None) -> None:
        if not watched:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        stop()

    for number in before:
        signal.signal(number, request)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
