"""Questions and answers over sockets: proof before anything is parsed, errors, deadlines, and what is left behind."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from unisono.comm.calls import Answering, Asking, Endpoint, Words
from unisono.comm.waiting import Waiter
from unisono.errors import GroupError, PeerLost, Revoked, WaitTimeout


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
    with pytest.raises(PeerLost, match=r"whoever answers at 127.0.0.1:\d+ is not rank 1"):
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
                connected.recv(1024)

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(PeerLost, match="is not rank 1"):
            Asking(Endpoint("127.0.0.1", listener.getsockname()[1], b"s" * 32), "rank 1", waiter())
        thread.join()


def test_what_cannot_be_answered_is_said_with_its_reason(desk: Desk, open_desk: Answering) -> None:
    asking = Asking(open_desk.endpoint, "rank 1 (host 1)", waiter())
    asking.ask("pull in step 3", {"op": "fail"})
    with pytest.raises(GroupError, match=r"pull in step 3: rank 1 \(host 1\) cannot answer: there is no such thing"):
        asking.answer("pull in step 3")
    asking.ask("pull in step 3", {"op": "revoked"})
    with pytest.raises(Revoked):
        asking.answer("pull in step 3")
    asking.close()
    assert [type(error) for error in desk.failed] == [ValueError, Revoked]


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


def test_nobody_is_left_where_nobody_has_come(desk: Desk) -> None:
    end = answering(desk)
    end.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "unisono-answer"]
