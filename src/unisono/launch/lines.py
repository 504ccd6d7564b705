"""Authenticated connections between launchers: made, accepted, read and dropped, without waiting for anyone."""

import errno
import selectors
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from unisono.launch.channel import Channel, Role
from unisono.launch.control import Message

SEND_DEADLINE_S = 10.0
HANDSHAKE_DEADLINE_S = 10.0
MOST_STRANGERS = 64
READ_BYTES = 1 << 16
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""A host that does not answer for 20 s is lost: seconds idle, seconds between tries, tries, and milliseconds in all."""


@dataclass(slots=True, eq=False)
class Line:
    """A connection to another launcher.

    Attributes:
        number: the other's, once it is known.
        workers: of the other's host.
        where: its listener, as others reach it.
        called: the number of the one that this end has called, until it is known to be there.
    """

    socket: socket.socket
    channel: Channel
    peer: str
    since: float
    number: int | None = None
    workers: int = 0
    where: tuple[str, int] | None = None
    called: int | None = None

    def flush(self) -> None:
        """Send what is to be sent."""
        data = self.channel.take()
        if data:
            try:
                self.socket.settimeout(SEND_DEADLINE_S)
                self.socket.sendall(data)
            except OSError:  # half a frame may be on its way: nothing can follow, and reading finds the end
                self.socket.shutdown(socket.SHUT_RDWR)
                raise
            finally:
                self.socket.setblocking(False)

    def send(self, message: Message) -> None:
        """Send a message."""
        self.channel.send(message)
        self.flush()

    def read(self) -> list[Message] | None:
        """Messages that came in; None where the other end has closed."""
        try:
            data = self.socket.recv(READ_BYTES)
        except BlockingIOError:
            return []
        if not data:
            return None
        messages = self.channel.feed(data)
        self.flush()
        return messages


@dataclass(slots=True)
class Lines:
    """This launcher's connections, and where it listens.

    Attributes:
        all: those that are open, established or not.
    """

    secret: bytes
    clock: Callable[[], float] = time.monotonic
    all: list[Line] = field(default_factory=list)
    listener: socket.socket | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)

    def fileno(self) -> int:
        """Readable when something has come in."""
        descriptor: int = self._selector.fileno()  # type: ignore[attr-defined]
        return descriptor

    def listen(self, address: str, port: int, backlog: int) -> None:
        """Accept connections.

        Raises:
            OSError: where that address cannot be had.
        """
        family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
        self.listener = socket.create_server((address, port), family=family, backlog=backlog)
        self.listener.setblocking(False)
        self._selector.register(self.listener, selectors.EVENT_READ)

    def select(self, timeout: float | None) -> list[Line]:
        """Lines on which something has come in; new ones are accepted."""
        found = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self.listener:
                self._accept()
            else:
                found.append(key.data)
        for line in [line for line in self.all if not line.channel.established]:
            if self.clock() - line.since > HANDSHAKE_DEADLINE_S and line not in found:
                self.drop(line)
        return found

    def add(self, connection: socket.socket, role: Role, peer: str) -> Line:
        """Take a connection over."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes sends nothing
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        line = Line(connection, Channel(self.secret, role), peer, self.clock())
        self.all.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)
        line.flush()
        return line

    def call(self, address: str, port: int, timeout_s: float) -> Line:
        """Connect to another launcher.

        Raises:
            OSError: where it is not there.
        """
        connection = socket.create_connection((address, port), timeout=timeout_s)
        return self.add(connection, Role.CLIENT, str(connection.getpeername()[0]))

    def drop(self, line: Line) -> None:
        """Close a connection."""
        self.all.remove(line)
        self._selector.unregister(line.socket)
        line.socket.close()

    def close(self) -> None:
        """Let go of all."""
        for line in list(self.all):
            self.drop(line)
        if self.listener is not None:
            self._selector.unregister(self.listener)
            self.listener.close()
            self.listener = None
        self._selector.close()

    def _accept(self) -> None:
        assert self.listener is not None
        try:
            connection, where = self.listener.accept()
        except OSError:
            return
        if sum(not line.channel.established for line in self.all) >= MOST_STRANGERS:
            connection.close()
            return
        try:
            self.add(connection, Role.SERVER, str(where[0]))
        except OSError:
            connection.close()


@dataclass(slots=True)
class Dial:
    """A connection that is being made, while everything else goes on.

    Attributes:
        number: whom it leads to.
    """

    number: int
    socket: socket.socket
    until: float

    @classmethod
    def begin(cls, number: int, where: tuple[str, int], until: float) -> "Dial":
        """Start to connect.

        Raises:
            OSError: where that fails at once.
        """
        family, kind, _, _, address = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0]
        connection = socket.socket(family, kind)
        connection.setblocking(False)
        code = connection.connect_ex(address)
        if code not in (0, errno.EINPROGRESS):
            connection.close()
            raise OSError(code, "cannot connect")
        return cls(number, connection, until)

    def state(self) -> bool | None:
        """True once it is connected, False where it never will be, None while it may be."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.socket, selectors.EVENT_WRITE)
            if not selector.select(0):
                return None
        return self.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
