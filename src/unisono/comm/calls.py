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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from unisono.comm.waiting import Waiter
from unisono.errors import GroupError, PeerLost, Revoked

T = TypeVar("T")

Words = Mapping[str, Any]
Message = tuple[Words, Tensor]
"""Words, and bytes that go with them."""
Handler = Callable[[Words, Tensor], tuple[Words, Sequence[Tensor]]]
"""A question -> its answer, whose bytes may lie in several tensors."""

_HEAD = struct.Struct("<IQ")
NONCE_BYTES = 32
STRANGER_S = 10.0
"""Seconds in which whoever connects must have proved itself."""
LEAVE_S = 2.0
"""Seconds in which a thread ends that answers nobody any more, unless it is held up: then it is left behind."""
DOZE_S = 0.05
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
        sent_bytes: since `take_sent_bytes`.
    """

    def __init__(
        self,
        address: str | None,
        askers: int,
        handler: Callable[[], Handler],
        failed: Callable[[BaseException], None],
    ) -> None:
        found = address or socket.gethostbyname(socket.gethostname())
        family = socket.AF_INET6 if ":" in found else socket.AF_INET
        self._listener = socket.create_server((found, 0), family=family, backlog=max(1, askers))
        self.endpoint = Endpoint(found, int(self._listener.getsockname()[1]), secrets.token_bytes(NONCE_BYTES))
        self._askers = askers
        self._handler = handler
        self._failed = failed
        self._over = False
        self.sent_bytes = 0
        self._connected: list[socket.socket] = []
        self._known = 0
        self._counting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, name="unisono-answer", daemon=True)
        self._accepting.start()

    def _accept(self) -> None:
        while not self._over:
            try:
                connected, _ = self._listener.accept()
            except OSError:
                break  # all have come, or this end is closed
            self._connected.append(connected)
            thread = threading.Thread(target=self._meet, args=(connected,), name="unisono-answer", daemon=True)
            self._threads.append(thread)
            thread.start()
        self._listener.close()

    def _meet(self, connected: socket.socket) -> None:
        """Answer whoever has connected, once it has proved that it belongs to the job."""
        connected.settimeout(STRANGER_S)
        try:
            known = _proved(connected, self.endpoint.secret, asks=False)
        except OSError:
            known = False
        if not known:
            connected.close()
            return
        with self._counting:
            self._known += 1
            if self._known == self._askers:
                _shut(self._listener)
        connected.settimeout(None)
        self._answer(connected)

    def _answer(self, connected: socket.socket) -> None:
        """All that one of those who ask wants to know, until it goes."""
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        handle: Handler | None = None
        while (question := _received(connected)) is not None:
            fault: BaseException | None = None
            try:
                handle = handle or self._handler()
                words, parts = handle(*question)
            except BaseException as error:
                words, parts, fault = {"error": f"{error}", "revoked": isinstance(error, Revoked)}, [], error
            try:
                for piece in _pieces(words, parts):
                    connected.sendall(piece)
                    self.sent_bytes += len(piece)
            except OSError:
                return  # it is gone, and whoever watches it knows
            if fault is not None and not self._over:
                self._failed(fault)

    def take_sent_bytes(self) -> int:
        """What was sent since this was asked last."""
        sent, self.sent_bytes = self.sent_bytes, 0
        return sent

    def close(self) -> None:
        """Answer nobody any more."""
        self._over = True
        for connected in (self._listener, *self._connected):
            _shut(connected)
        for thread in (self._accepting, *self._threads):
            thread.join(LEAVE_S)
        for connected in self._connected:
            connected.close()


class Asking:
    """One worker's connection to another that answers.

    Arguments:
        endpoint: of the other.
        name: what it is called in errors.
        waiter: how this one waits.

    Attributes:
        sent_bytes: since `take_sent_bytes`.

    Raises:
        PeerLost: where nobody answers there who knows the secret.
    """

    def __init__(self, endpoint: Endpoint, name: str, waiter: Waiter) -> None:
        self._name = name
        self._socket: socket.socket | None = None
        try:
            self._socket = socket.create_connection(
                (endpoint.address, endpoint.port), min(STRANGER_S, waiter.deadline_s)
            )
            known = _proved(self._socket, endpoint.secret, asks=True)
        except OSError as error:
            self.close()
            raise PeerLost(f"cannot reach {name} at {endpoint.address}:{endpoint.port}: {error}") from error
        if not known:
            self.close()
            raise PeerLost(f"whoever answers at {endpoint.address}:{endpoint.port} is not {name}")
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._waiter = replace(waiter, sleep=self._doze)
        self._writes = False
        self.sent_bytes = 0

    def _doze(self, seconds: float) -> None:
        """Until something can be done."""
        sockets = [self._open]
        select.select([] if self._writes else sockets, sockets if self._writes else [], [], DOZE_S)

    def ask(self, operation: str, words: Words, parts: Sequence[Tensor] = ()) -> None:
        """Send a question; its answer is to be taken before the next one's.

        Arguments:
            parts: bytes that go with it, in flat tensors.
        """
        self._writes = True
        for piece in _pieces(words, parts):
            left = piece
            while left:
                left = left[self._when_possible(self._open.send, left, operation) :]
        self.sent_bytes += sum(part.nbytes for part in parts)

    def answer(self, operation: str) -> Message:
        """The answer to the question that was asked first.

        Raises:
            GroupError: where the other could not answer, with its reason.
            PeerLost: where it is gone.
            WaitTimeout: where it does not answer in time.
        """
        self._writes = False

        def take(size_bytes: int) -> Tensor:
            into = torch.empty(size_bytes, dtype=torch.uint8)
            left = into.numpy().data
            while left:
                count = self._when_possible(self._open.recv_into, left, operation)
                if count == 0:
                    raise self._lost(operation)
                left = left[count:]
            return into

        size_bytes, payload_bytes = _HEAD.unpack(take(_HEAD.size).numpy().tobytes())
        words: Words = json.loads(take(size_bytes).numpy().tobytes())
        payload = take(payload_bytes)
        if "error" in words:
            kind = Revoked if words["revoked"] else GroupError
            raise kind(f"{operation}: {self._name} cannot answer: {words['error']}")
        return words, payload

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

    @property
    def _open(self) -> socket.socket:
        assert self._socket is not None
        return self._socket

    def take_sent_bytes(self) -> int:
        """What was sent since this was asked last."""
        sent, self.sent_bytes = self.sent_bytes, 0
        return sent

    def close(self) -> None:
        """Ask nothing any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _shut(connected: socket.socket) -> None:
    """Free whoever waits on a socket; one that is closed, or not connected any more, has nobody."""
    with contextlib.suppress(OSError):
        connected.shutdown(socket.SHUT_RDWR)


def _pieces(words: Words, parts: Sequence[Tensor]) -> list[memoryview]:
    """A message as bytes to be sent one after another."""
    views = [part.reshape(-1).view(torch.uint8).numpy().data for part in parts if part.numel()]
    said = json.dumps(words, separators=(",", ":")).encode()
    head = _HEAD.pack(len(said), sum(view.nbytes for view in views))
    return [memoryview(head + said), *views]


def _received(connected: socket.socket) -> Message | None:
    """The next message of a blocking socket; None where the other end has gone."""
    head = _taken(connected, _HEAD.size)
    if head is None:
        return None
    size_bytes, payload_bytes = _HEAD.unpack(head.numpy().tobytes())
    said, payload = _taken(connected, size_bytes), _taken(connected, payload_bytes)
    if said is None or payload is None:
        return None
    return json.loads(said.numpy().tobytes()), payload


def _taken(connected: socket.socket, size_bytes: int) -> Tensor | None:
    into = torch.empty(size_bytes, dtype=torch.uint8)
    left = into.numpy().data
    while left:
        try:
            count = connected.recv_into(left)
        except OSError:
            return None
        if count == 0:
            return None
        left = left[count:]
    return into


def _proved(connected: socket.socket, secret: bytes, *, asks: bool) -> bool:
    """Whether the other end knows the secret too; each proves it over what the other has just made."""
    mine = secrets.token_bytes(NONCE_BYTES)
    connected.sendall(mine)
    theirs = _taken(connected, NONCE_BYTES)
    if theirs is None:
        return False
    other = theirs.numpy().tobytes()

    def code(asks: bool, first: bytes, second: bytes) -> bytes:
        return hmac.digest(secret, (b"asks" if asks else b"answers") + first + second, "sha256")

    if asks:  # who asks for entry proves first
        connected.sendall(code(True, mine, other))
    proof = _taken(connected, NONCE_BYTES)
    known = proof is not None and hmac.compare_digest(proof.numpy().tobytes(), code(not asks, other, mine))
    if known and not asks:
        connected.sendall(code(False, mine, other))
    return known
