"""How one waits: a deadline begins anew as long as something comes, and only the worker itself gives signs of life."""

import os
import threading

import pytest

from unisono.comm.locks import Locks
from unisono.comm.waiting import Waiter
from unisono.errors import Revoked, WaitTimeout


class Clock:
    """Time that passes as one sleeps, and a little as one looks."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 1e-4
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += 0.1


def waiter(clock: Clock, deadline_s: float = 1.0) -> Waiter:
    return Waiter(deadline_s, lambda: False, clock=clock, sleep=clock.sleep)


def test_a_deadline_begins_anew_as_long_as_something_comes() -> None:
    clock = Clock()
    wait = waiter(clock)
    assert wait(lambda: True if clock.now > 5 else None, "units", str, lambda: int(2 * clock.now))
    came = clock.now
    with pytest.raises(WaitTimeout, match=r"units waited 1\.\d s \(deadline 1 s\)"):
        wait(lambda: None, "units", str, lambda: min(int(2 * clock.now), 14))
    assert clock.now > came + 2.5  # until 7, and one deadline more


def test_a_wait_without_progress_has_one_deadline() -> None:
    clock = Clock()
    with pytest.raises(WaitTimeout):
        waiter(clock)(lambda: True if clock.now > 5 else None, "units", str)
    assert clock.now < 1.2


def test_only_what_the_worker_itself_does_is_a_sign_of_life() -> None:
    signs: list[str] = []
    wait = Waiter(0.05, lambda: False, told=signs.append, beat=lambda: signs.append("beat")).of_worker()

    def on_a_thread() -> None:
        with pytest.raises(WaitTimeout):
            wait(lambda: None, "thread's", str)
        with pytest.raises(WaitTimeout):
            wait.of_thread()(lambda: None, "thread's", str)

    thread = threading.Thread(target=on_a_thread)
    thread.start()
    thread.join()
    assert signs == []
    with pytest.raises(WaitTimeout):
        wait(lambda: None, "worker's", str)
    assert signs[:2] == ["worker's", "beat"]


def test_a_lock_keeps_the_threads_of_a_worker_apart_and_is_nobodys_in_the_end() -> None:
    """Though nobody else could hold it."""
    locks = Locks(None, Waiter(0.05, lambda: False))
    found: list[type[BaseException]] = []

    def on_a_thread() -> None:
        try:
            locks.hold(3, "server 1")
        except WaitTimeout as error:
            assert "contextlib" not in str(error)
            found.append(type(error))

    with locks.held(3, "server 1"):
        thread = threading.Thread(target=on_a_thread)
        thread.start()
        thread.join()
    locks.hold(3, "server 1")
    assert found == [WaitTimeout]


def test_a_lock_of_a_worker_that_ends_is_not_taken() -> None:
    locks = Locks(os.memfd_create("locks"), Waiter(0.05, lambda: False))
    locks.hold(3, "server 1")
    locks.let_go(3)
    locks.close()
    with pytest.raises(Revoked, match="this worker ends, and its threads with it"):
        locks.hold(4, "server 2")
