"""Questions and answers over sockets: proof before anything is parsed, errors, deadlines, and what is left behind."""

import contextlib
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from unisono.comm import calls
from unisono.comm.calls import Answering, Asking, Endpoint, Words
from unisono.comm.waiting import Waiter
from unisono.errors import GroupError, LaunchError, PeerLost, Revoked, TrainingError, WaitTimeout


class Desk:
    """Answers with what it was asked, doubled."""

    def __init__(self) -> None:
        self.failed: list[BaseException] = []
        self.threads: set[int] = set()
        self.held = threading.Event()
        self.held.set()

    def handler(self) -> "Desk":
        self.threads.add(threading.get_ident())
        return self

    def __call__(self, words: Words, data: Tensor) -> tuple[Words, Sequence[Tensor]]:
        if words.get("op") == "fail":
            raise ValueError("there is no such thing")
        if words.get("op") == "revoked":
            raise Revoked("the group was revoked")
        if words.get("op") == "nan":
            raise TrainingError("the gradient's norm is nan")
        if words.get("op") == "unreadable":
            return {"said": np.int64(3)}, ()
        self.held.wait()
        return {"said": words}, [data, data]


@pytest.fixture
def desk() -> Desk:
    return Desk()


def answering(desk: Desk, askers: int = 1) -> Answering:
    return Answering("127.0.0.1", askers, desk.handler, desk.failed.append)


@pytest.fixture
def open_desk(desk: Desk) -> Iterator[Answering]:
    end = answering(desk)
    yield end
    desk.held.set()
    end.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "unisono-answer"]


def waiter(deadline_s: float = 5.0, revoked: bool = False) -> Waiter:
    return Waiter(deadline_s, lambda: revoked)


def test_a_question_is_answered_on_a_thread_of_the_one_who_asks(desk: Desk) -> None:
    """Large ones too: more than a socket holds."""
    end = answering(desk, askers=2)
    asking = [Asking(end.endpoint, f"rank {n}", waiter()) for n in range(2)]
    large = torch.randn(3_000_000)
    for n, one in enumerate(asking):
        one.ask("a question", {"number": n}, [large, torch.arange(3)])
    for n, one in enumerate(asking):
        words, data = one.answer("a question")
        assert words == {"said": {"number": n}}
        assert torch.equal(data[: large.nbytes].view(torch.float32), large)
        assert data.numel() == 2 * (large.nbytes + 24)
    assert len(desk.threads) == 2 and not desk.failed
    assert asking[0].take_sent_bytes() == large.nbytes + 24 and asking[0].take_sent_bytes() == 0
    assert end.take_sent_bytes() > 4 * large.nbytes
    with pytest.raises(PeerLost, match="cannot reach rank 2"):  # nobody else is expected
        Asking(end.endpoint, "rank 2", waiter())
    for one in asking:
        one.close()
    end.close()


def test_questions_are_answered_in_order(open_desk: Answering) -> None:
    asking = Asking(open_desk.endpoint, "rank 1", waiter())
    for n in range(5):
        asking.ask("a question", {"n": n})
    assert [asking.answer("a question")[0]["said"]["n"] for _ in range(5)] == list(range(5))
    asking.close()


def test_a_stranger_is_not_heard(desk: Desk, open_desk: Answering) -> None:
    """Whoever does not know the secret, sends something else, or nothing; who knows it comes in afterwards."""
    wrong = Endpoint(open_desk.endpoint.address, open_desk.endpoint.port, bytes(32))
    with pytest.raises(PeerLost, match=r"it has ended, or does not know this run's secret"):
        Asking(wrong, "rank 1", waiter())
    with socket.create_connection((wrong.address, wrong.port)) as stranger:
        stranger.sendall(b'{"op": "pull"}' * 100)
        stranger.settimeout(5)
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1024):
                pass
    socket.create_connection((wrong.address, wrong.port)).close()
    silent = socket.create_connection((wrong.address, wrong.port))
    asking = Asking(Endpoint.read(open_desk.endpoint.written()), "rank 1", waiter())
    asking.ask("a question", {})
    assert asking.answer("a question")[0] == {"said": {}}
    assert len(desk.threads) == 1
    asking.close()
    silent.close()


def test_a_server_that_does_not_know_the_secret_is_not_believed() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def pretend() -> None:
            connected, _ = listener.accept()
            with connected:
                connected.sendall(bytes(64))
                while connected.recv(1024):
                    pass

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(PeerLost, match="is not rank 1"):
            Asking(Endpoint("127.0.0.1", listener.getsockname()[1], b"s" * 32), "rank 1", waiter())
        thread.join()


def test_what_cannot_be_answered_is_said_with_its_reason(desk: Desk, open_desk: Answering) -> None:
    asking = Asking(open_desk.endpoint, "rank 1 (host 1)", waiter())
    asking.ask("pull in step 3", {"op": "fail"})
    said = r"pull in step 3: rank 1 \(host 1\) cannot answer: ValueError: there is no such thing"
    with pytest.raises(GroupError, match=said):
        asking.answer("pull in step 3")
    asking.ask("pull in step 3", {"op": "nan"})
    with pytest.raises(TrainingError, match=r"^the gradient's norm is nan$"):
        asking.answer("pull in step 3")
    asking.ask("pull in step 3", {"op": "unreadable"})
    with pytest.raises(GroupError, match="cannot answer: TypeError"):
        asking.answer("pull in step 3")
    asking.ask("pull in step 3", {"op": "revoked"})
    with pytest.raises(Revoked):
        asking.answer("pull in step 3")
    asking.close()
    assert [type(error) for error in desk.failed] == [ValueError, TrainingError, TypeError, Revoked]


def test_a_wait_has_a_deadline_and_ends_with_the_group(desk: Desk, open_desk: Answering) -> None:
    desk.held.clear()
    asking = Asking(open_desk.endpoint, "rank 1", waiter(0.3))
    asking.ask("pull in step 3", {})
    with pytest.raises(WaitTimeout, match=r"pull in step 3 waited 0\.\d s .*; rank 1 has not answered"):
        asking.answer("pull in step 3")
    revoked = Asking.__new__(Asking)
    revoked.__dict__.update(asking.__dict__, _waiter=waiter(revoked=True))
    with pytest.raises(Revoked, match="while this worker waited in pull in step 3"):
        revoked.answer("pull in step 3")
    desk.held.set()
    asking.close()


def test_whoever_is_gone_is_named_at_once(desk: Desk) -> None:
    end = answering(desk)
    desk.held.clear()
    asking = Asking(end.endpoint, "rank 1", waiter(30.0))
    asking.ask("push 4 in step 3", {})

    def leave() -> None:
        desk.held.set()
        end.close()

    threading.Timer(0.1, leave).start()
    began = time.monotonic()
    with pytest.raises(PeerLost, match=r"push 4 in step 3: rank 1 is gone"):
        asking.answer("push 4 in step 3")
        asking.answer("push 4 in step 3")  # where the first one was answered before
    assert time.monotonic() - began < 5.0
    asking.close()


def test_whoever_waits_is_told_why_the_other_leaves(desk: Desk) -> None:
    end = answering(desk)
    desk.held.clear()
    asking = Asking(end.endpoint, "rank 1", waiter(30.0))
    asking.ask("push 4 in step 3", {})
    while not desk.threads:
        time.sleep(0.01)
    end.close(WaitTimeout("units of step 3 waited 9 s; unit 3 by rank 2"))
    said = r"rank 1 cannot answer: units of step 3 waited 9 s; unit 3 by"
    with pytest.raises(Revoked, match=f"push 4 in step 3: {said}"):
        asking.answer("push 4 in step 3")
    asking.close()
    desk.held.set()


def test_whoever_asks_later_is_told_too_and_strangers_are_not(desk: Desk) -> None:
    end = answering(desk, askers=2)
    asking = Asking(end.endpoint, "rank 1", waiter())
    with socket.create_connection((end.endpoint.address, end.endpoint.port)) as stranger:
        assert len(stranger.recv(calls.NONCE_BYTES)) == calls.NONCE_BYTES
        end.close(KeyboardInterrupt())
        assert stranger.recv(100) == b""
    large = [torch.zeros(1_000_000)]
    with pytest.raises(Revoked, match="push 4: rank 1 cannot answer: KeyboardInterrupt"):
        for _ in range(10):
            asking.ask("push 4", {}, large)
            asking.answer("push 4")
    asking.close()


def test_threads_that_are_held_up_are_left_behind_together(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "LEAVE_S", 0.5)
    end = answering(desk, askers=4)
    desk.held.clear()
    asking = [Asking(end.endpoint, "rank 1", waiter()) for _ in range(4)]
    for one in asking:
        one.ask("a question", {})
    while len(desk.threads) < 4:
        time.sleep(0.01)
    began = time.monotonic()
    end.close()
    assert time.monotonic() - began < 1.5
    desk.held.set()
    for one in asking:
        one.close()


def test_a_slow_proof_is_no_proof(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """However it is drawn out; and whoever does not answer is not called someone else."""
    monkeypatch.setattr(calls, "STRANGER_S", 0.4)
    end = answering(desk)
    began = time.monotonic()
    with socket.create_connection((end.endpoint.address, end.endpoint.port)) as slow:
        with contextlib.suppress(OSError):
            while time.monotonic() - began < 5.0:
                slow.sendall(b"x")
                time.sleep(0.1)
        assert time.monotonic() - began < 2.0
    end.close()
    said = pytest.raises(PeerLost, match=r"rank 1 at 127.0.0.1:\d+ does not answer: ")
    with socket.create_server(("127.0.0.1", 0)) as silent, said:
        Asking(Endpoint("127.0.0.1", silent.getsockname()[1], b"s" * 32), "rank 1", waiter())


def test_more_than_a_thousand_files_may_be_open(desk: Desk, open_desk: Answering) -> None:
    """As in a worker that reads many: `select` knows only descriptors up to 1023."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < 2000:
        pytest.skip("this machine allows no more")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2000), hard))
    opened = [os.dup(0) for _ in range(1100)]
    try:
        asking = Asking(open_desk.endpoint, "rank 1", waiter())
        desk.held.clear()
        asking.ask("a question", {})
        threading.Timer(0.1, desk.held.set).start()
        assert asking.answer("a question")[0] == {"said": {}}
        asking.close()
    finally:
        for descriptor in opened:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_address_that_cannot_be_had_is_said(desk: Desk) -> None:
    with pytest.raises(LaunchError, match=r"workers of other hosts cannot ask this one at 203\.0\.113\.7: "):
        Answering("203.0.113.7", 1, desk.handler, desk.failed.append)


def test_nobody_is_left_where_nobody_has_come(desk: Desk) -> None:
    end = answering(desk)
    end.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "unisono-answer"]
