"""Questions and answers between workers that share no memory: who is asked has a thread for each of those who ask.

Nothing is parsed before both ends have proved that they know a secret, which whoever answers has made, and which the
workers have told each other over the group that they have already. A message is words (JSON) and bytes.
"""

import contextlib
import hmac
import json
import secrets
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from unisono.comm.waiting import Waiter
from unisono.errors import GroupError, LaunchError, PeerLost, Revoked, TrainingError

Words = Mapping[str, Any]
Message = tuple[Words, Tensor]
"""Words, and bytes that go with them."""
Handler = Callable[[Words, Tensor], tuple[Words, Sequence[Tensor]]]
"""A question -> its answer, whose bytes may lie in several tensors."""

_HEAD = struct.Struct("<IQ")
_KINDS: Mapping[str, type[Exception]] = {"revoked": Revoked, "training": TrainingError, "group": GroupError}
"""Kinds of errors that may come in place of an answer."""
NONCE_BYTES, PROOF_BYTES, SECRET_BYTES = 32, 32, 32
STRANGER_S = 10.0
"""Seconds in which whoever connects must have proved itself."""
MOST_STRANGERS = 64
"""Connections at a time that have not; further ones are closed."""
LEAVE_S = 2.0
"""Seconds in which all threads end that answer nobody any more; those that are held up are left behind."""
DOZE_MS = 50
"""The longest that a wait for a socket lasts before the group is looked at again."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a worker answers."""

    address: str
    port: int
    secret: bytes

    def written(self) -> list[str]:
        """For a message."""
        return [self.address, str(self.port), self.secret.hex()]

    @classmethod
    def read(cls, written: Sequence[str]) -> "Endpoint":
        """From a message."""
        return cls(written[0], int(written[1]), bytes.fromhex(written[2]))


class Answering:
    """A worker's end at which others ask.

    Arguments:
        address: of this host, as the others reach it; None for the one that its name resolves to.
        askers: how many will connect; when all have, nobody can any more.
        handler: makes what answers one of them; called on its thread.
        failed: called with what could not be answered because of a fault here.

    Attributes:
        endpoint: to be told to the others.

    Raises:
        LaunchError: where the address cannot be had.
    """

    def __init__(
        self,
        address: str | None,
        askers: int,
        handler: Callable[[], Handler],
        failed: Callable[[BaseException], None],
    ) -> None:
        self._listener = _listening(address, askers)
        found, port = self._listener.getsockname()[:2]
        self.endpoint = Endpoint(found, int(port), secrets.token_bytes(SECRET_BYTES))
        self._askers = askers
        self._handler = handler
        self._failed = failed
        self._over = False
        self._counting = threading.Lock()
        self._known = 0
        self._sent_bytes = 0
        self._connected: dict[socket.socket, _Line] = {}
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="unisono-answer", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while not self._over and self._known < self._askers:
            try:
                connected, _ = self._listener.accept()
            except OSError:  # shut down, or whoever came has gone again
                time.sleep(0.0 if self._over else 1e-3)
                continue
            with self._counting:
                self._threads = [thread for thread in self._threads if thread.is_alive()]
                crowded = len(self._connected) - self._known >= MOST_STRANGERS
                if not crowded:
                    self._connected[connected] = _Line()
            if crowded:
                connected.close()
                continue
            thread = threading.Thread(target=self._meet, args=(connected,), name="unisono-answer", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._listener.close()

    def _meet(self, connected: socket.socket) -> None:
        """Answer whoever has connected, once it has proved that it belongs to the job."""
        try:
            known = _proved(connected, self.endpoint.secret, time.monotonic() + STRANGER_S, asks=False)
        except OSError:
            known = False
        try:
            if known:
                with self._counting:
                    self._connected[connected].known = True
                    self._known += 1
                    if self._known == self._askers:
                        _shut(self._listener)
                connected.settimeout(None)
                connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._answer(connected)
        finally:
            _shut(connected)
            if not known:
                with self._counting:
                    self._connected.pop(connected)
                connected.close()

    def _answer(self, connected: socket.socket) -> None:
        """All that one of those who ask wants to know, until it goes."""

        def take(size_bytes: int) -> Tensor | None:
            into = torch.empty(size_bytes, dtype=torch.uint8)
            return into if _fill(connected, into.numpy().data) else None

        handle: Handler | None = None
        while (question := _message(take)) is not None:
            fault: BaseException | None = None
            try:
                handle = handle or self._handler()
                pieces = _pieces(*handle(*question))
            except BaseException as error:
                pieces, fault = _pieces(_error(error)), error
            if fault is not None and not self._over:
                self._failed(fault)
            line = self._connected[connected]
            with line.writing:
                if line.over or not self._give(connected, pieces):
                    return

    def _give(self, connected: socket.socket, pieces: Sequence[memoryview]) -> bool:
        """Send a message; False where the other end is gone, which whoever watches it knows."""
        try:
            for piece in pieces:
                connected.sendall(piece)
        except OSError:
            return False
        with self._counting:
            self._sent_bytes += sum(piece.nbytes for piece in pieces[1:])
        return True

    def take_sent_bytes(self) -> int:
        """What was sent besides words since this was asked last."""
        with self._counting:
            sent, self._sent_bytes = self._sent_bytes, 0
        return sent

    def close(self, cause: BaseException | None = None) -> None:
        """Answer nobody any more.

        Arguments:
            cause: why, where others may still wait: they are told.
        """
        self._over = True
        until = time.monotonic() + LEAVE_S
        for connected, line in list(self._connected.items()):
            tells = cause is not None and line.known
            if tells and line.writing.acquire(timeout=max(0.0, until - time.monotonic())):
                connected.setblocking(False)  # it may be that nobody reads it
                self._give(connected, _pieces({**_error(cause), "kind": "revoked"} if cause is not None else {}))
                line.over = True
                line.writing.release()
            _shut(connected)
        _shut(self._listener)
        for thread in (self._accepting, *self._threads):
            thread.join(max(0.0, until - time.monotonic()))
        self._listener.close()
        for connected in list(self._connected):
            connected.close()


@dataclass(slots=True)
class _Line:
    """A connection to one who asks, or may.

    Attributes:
        writing: held by who writes to it.
        known: the other end has proved that it belongs to the job.
        over: it was told that no answer comes any more.
    """

    writing: threading.Lock = field(default_factory=threading.Lock)
    known: bool = False
    over: bool = False


class Asks(Protocol):
    """Who asks another worker, and waits for its answer."""

    def call(self, operation: str, words: Words) -> Words:
        """What it answers."""


class Asking:
    """One worker's connection to another that answers.

    Arguments:
        endpoint: of the other.
        name: what it is called in errors.
        waiter: how this one waits.

    Attributes:
        waited_s: seconds that this one has waited for answers.

    Raises:
        PeerLost: where nobody answers there who knows the secret.
    """

    def __init__(self, endpoint: Endpoint, name: str, waiter: Waiter) -> None:
        self._name = name
        where, until = (endpoint.address, endpoint.port), time.monotonic() + min(STRANGER_S, waiter.deadline_s)
        try:
            self._socket = socket.create_connection(where, max(0.001, until - time.monotonic()))
        except OSError as error:
            raise PeerLost(f"cannot reach {name} at {where[0]}:{where[1]}: {error}") from error
        try:
            known = _proved(self._socket, endpoint.secret, until, asks=True)
        except OSError as error:
            self.close()
            raise PeerLost(f"{name} at {where[0]}:{where[1]} does not answer: {error}") from error
        if not known:
            self.close()
            raise PeerLost(f"whoever answers at {where[0]}:{where[1]} is not {name}")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._poll = select.poll()
        self._waiter = replace(waiter, sleep=lambda seconds: (self._poll.poll(DOZE_MS), None)[1])
        self._sent_bytes = 0
        self.waited_s = 0.0

    def ask(self, operation: str, words: Words, parts: Sequence[Tensor] = ()) -> None:
        """Send a question; its answer is to be taken before the next one's.

        Arguments:
            parts: bytes that go with it, in flat tensors.
        """
        self._poll.register(self._socket, select.POLLOUT)
        try:
            for piece in _pieces(words, parts):
                left = piece
                while left:
                    left = left[self._when_possible(self._socket.send, left, operation) :]
        except PeerLost:
            self.answer(operation)  # it may have said why
            raise
        self._sent_bytes += sum(part.nbytes for part in parts)

    def answer(self, operation: str) -> Message:
        """The answer to the question that was asked first.

        Raises:
            GroupError, TrainingError: where the other could not answer, with its reason.
            PeerLost: where it is gone.
            WaitTimeout: where it does not answer in time.
        """
        self._poll.register(self._socket, select.POLLIN)
        began = time.perf_counter()

        def take(size_bytes: int) -> Tensor:
            into = torch.empty(size_bytes, dtype=torch.uint8)
            left = into.numpy().data
            while left:
                count = self._when_possible(self._socket.recv_into, left, operation)
                if count == 0:
                    raise self._lost(operation)
                left = left[count:]
            return into

        message = _message(take)
        assert message is not None
        self.waited_s += time.perf_counter() - began
        words = message[0]
        if "error" in words:
            if words["kind"] == "training":
                raise TrainingError(words["error"])
            raise _KINDS[words["kind"]](f"{operation}: {self._name} cannot answer: {words['error']}")
        return message

    def call(self, operation: str, words: Words) -> Words:
        """Ask, and what the other answers."""
        self.ask(operation, words)
        return self.answer(operation)[0]

    def _when_possible(self, move: Callable[[memoryview], int], part: memoryview, operation: str) -> int:
        def moved() -> int | None:
            try:
                return move(part)
            except BlockingIOError:
                return None
            except OSError as error:
                raise self._lost(operation) from error

        return self._waiter(moved, operation, lambda: f"{self._name} has not answered")

    def _lost(self, operation: str) -> PeerLost:
        return PeerLost(f"{operation}: {self._name} is gone (connection lost)")

    def take_sent_bytes(self) -> int:
        """What was sent besides words since this was asked last."""
        sent, self._sent_bytes = self._sent_bytes, 0
        return sent

    def close(self) -> None:
        """Ask nothing any more."""
        self._socket.close()


def _error(error: BaseException) -> Words:
    """In place of an answer."""
    kind = next((name for name, kind in _KINDS.items() if isinstance(error, kind)), "group")
    ours = isinstance(error, tuple(_KINDS.values()))
    return {"error": str(error) if ours else f"{type(error).__name__}: {error}", "kind": kind}


def _pieces(words: Words, parts: Sequence[Tensor] = ()) -> list[memoryview]:
    """A message as bytes to be sent one after another."""
    views = [part.reshape(-1).view(torch.uint8).numpy().data for part in parts if part.numel()]
    said = json.dumps(words, separators=(",", ":")).encode()
    head = _HEAD.pack(len(said), sum(view.nbytes for view in views))
    return [memoryview(head + said), *views]


def _message(take: Callable[[int], Tensor | None]) -> Message | None:
    """The next message; None where the other end has gone.

    Arguments:
        take: the next bytes; None likewise.
    """
    head = take(_HEAD.size)
    if head is None:
        return None
    size_bytes, payload_bytes = _HEAD.unpack(head.numpy().tobytes())
    said, payload = take(size_bytes), take(payload_bytes)
    if said is None or payload is None:
        return None
    return json.loads(said.numpy().tobytes()), payload


def _fill(connected: socket.socket, left: memoryview) -> bool:
    """Receive bytes from a socket that waits for them; False where the other end has gone."""
    while left:
        try:
            count = connected.recv_into(left)
        except OSError:
            return False
        if count == 0:
            return False
        left = left[count:]
    return True


def _proved(connected: socket.socket, secret: bytes, until: float, *, asks: bool) -> bool:
    """Whether the other end knows the secret too; each proves it over what the other has just made.

    Raises:
        OSError: where it does not answer in time, or has gone.
    """

    def take(size_bytes: int) -> bytes:
        data = b""
        while len(data) < size_bytes:
            connected.settimeout(max(0.001, until - time.monotonic()))
            more = connected.recv(size_bytes - len(data))
            if not more:
                raise ConnectionError("it has closed the connection: it has ended, or does not know this run's secret")
            if time.monotonic() > until:
                raise TimeoutError("it takes too long")
            data += more
        return data

    def code(asks: bool, first: bytes, second: bytes) -> bytes:
        return hmac.digest(secret, (b"asks" if asks else b"answers") + first + second, "sha256")

    mine = secrets.token_bytes(NONCE_BYTES)
    connected.settimeout(max(0.001, until - time.monotonic()))
    connected.sendall(mine)
    other = take(NONCE_BYTES)
    if asks:  # who asks for entry proves first
        connected.sendall(code(True, mine, other))
    proof = take(PROOF_BYTES)
    known = hmac.compare_digest(proof, code(not asks, other, mine))
    if known and not asks:
        connected.sendall(code(False, mine, other))
    return known


def _listening(address: str | None, askers: int) -> socket.socket:
    """A socket at which others connect."""
    wanted = address or socket.gethostname()
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(wanted, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.bind(where)
        listener.listen(max(1, askers) + MOST_STRANGERS)
    except OSError as error:
        raise LaunchError(f"workers of other hosts cannot ask this one at {wanted}: {error}") from error
    return listener


def _shut(connected: socket.socket) -> None:
    """Free whoever waits on a socket; one that is closed, or not connected any more, has nobody."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)
