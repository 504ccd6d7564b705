"""Authenticated connections between launchers: made, accepted, read and dropped, without waiting for anyone."""

import errno
import resource
import selectors
import socket
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from unisono.launch.channel import Channel, Role
from unisono.launch.control import Message

SEND_DEADLINE_S = 10.0
BLOCKED_S = 0.01
"""Between two attempts to send what could not be sent."""
LAST_WORDS_S = 1.0
OTHER_FILES = 512
"""That a launcher needs besides."""
HANDSHAKE_DEADLINE_S = 10.0
MOST_STRANGERS = 64
READ_BYTES = 1 << 16
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""A host that does not answer for 20 s is lost: seconds idle, seconds between tries, tries, and milliseconds in all."""


def allow_lines(count: int) -> None:
    """Let this process have so many connections, as far as it may: the usual limit is 1024 files."""
    least, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + OTHER_FILES
    if least != resource.RLIM_INFINITY and least < wanted:
        resource.setrlimit(
            resource.RLIMIT_NOFILE, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most)
        )


@dataclass(slots=True, eq=False)
class Line:
    """A connection to another launcher.

    Attributes:
        number: the other's, once it is known.
        workers: of the other's host.
        where: its listener, as others reach it.
        called: the number of the one that this end has called, until it is known to be there.
        blocked: the lines, of all, on which something could not be sent yet.
        blocked_since: when that began, on this one.
    """

    socket: socket.socket
    channel: Channel
    peer: str
    since: float
    clock: Callable[[], float]
    blocked: "set[Line]"
    number: int | None = None
    workers: int = 0
    where: tuple[str, int] | None = None
    called: int | None = None
    blocked_since: float | None = None

    def flush(self) -> None:
        """Send what can be sent without waiting; the rest when `Lines.select` is called next.

        Raises:
            OSError: where the other end is gone.
        """
        outgoing = self.channel.outgoing
        if not outgoing:
            return
        try:
            del outgoing[: self.socket.send(outgoing)]
        except BlockingIOError:
            pass
        except OSError:
            self.give_up()
            raise
        if outgoing and self.blocked_since is None:
            self.blocked_since = self.clock()
            self.blocked.add(self)
        elif not outgoing and self.blocked_since is not None:
            self.blocked_since = None
            self.blocked.discard(self)

    def give_up(self) -> None:
        """Half a frame may be on its way, so nothing can follow; reading finds the end."""
        self.channel.outgoing.clear()
        self.blocked.discard(self)
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def send(self, message: Message | bytes) -> None:
        """Send a message, as it is or encoded."""
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
        all: those that are open, established or not, in the order in which they were made.
    """

    secret: bytes
    clock: Callable[[], float] = time.monotonic
    all: dict[Line, None] = field(default_factory=dict)
    listener: socket.socket | None = None
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _strangers: dict[Line, None] = field(default_factory=dict)
    _blocked: set[Line] = field(default_factory=set)
    _to: dict[int, dict[Line, None]] = field(default_factory=dict)

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
        for line in list(self._blocked):
            with suppress(OSError):
                line.flush()
            if line.blocked_since is not None and self.clock() - line.blocked_since > SEND_DEADLINE_S:
                line.give_up()
        if self._blocked:
            timeout = BLOCKED_S if timeout is None else min(timeout, BLOCKED_S)
        found = []
        for key, _ in self._selector.select(timeout):
            if key.fileobj is self.listener:
                self._accept()
            else:
                found.append(key.data)
        for line in list(self._strangers):
            if line.channel.established:
                del self._strangers[line]
            elif self.clock() - line.since > HANDSHAKE_DEADLINE_S and line not in found:
                self.drop(line)
        return found

    def know(self, line: Line, number: int) -> None:
        """A line leads to this launcher."""
        self._forget(line)
        line.number = number
        self._to.setdefault(number, {})[line] = None

    def to(self, number: int | None) -> Line | None:
        """The newest line to another launcher."""
        lines = self._to.get(number) if number is not None else None
        return next(reversed(lines)) if lines else None

    def all_to(self, number: int) -> list[Line]:
        """All lines to it."""
        return list(self._to.get(number, ()))

    def add(self, connection: socket.socket, role: Role, peer: str) -> Line:
        """Take a connection over."""
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes sends nothing
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        line = Line(connection, Channel(self.secret, role), peer, self.clock(), self.clock, self._blocked)
        self.all[line] = self._strangers[line] = None
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
        del self.all[line]
        self._strangers.pop(line, None)
        self._blocked.discard(line)
        self._forget(line)
        self._selector.unregister(line.socket)
        line.socket.close()

    def close(self) -> None:
        """Let go of all; what could not be sent yet has a moment."""
        for line in list(self.all):
            if line.channel.outgoing:
                with suppress(OSError):
                    line.socket.settimeout(LAST_WORDS_S)
                    line.socket.sendall(line.channel.take())
            self.drop(line)
        if self.listener is not None:
            self._selector.unregister(self.listener)
            self.listener.close()
            self.listener = None
        self._selector.close()

    def _forget(self, line: Line) -> None:
        if line.number is not None and (lines := self._to.get(line.number)) is not None:
            lines.pop(line, None)

    def _accept(self) -> None:
        assert self.listener is not None
        try:
            connection, where = self.listener.accept()
        except OSError:
            return
        if len(self._strangers) >= MOST_STRANGERS:
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
