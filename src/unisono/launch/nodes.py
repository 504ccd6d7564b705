"""The launchers of a run's hosts: they find each other, pass on what workers leave for each other, and end together.

Launcher 0 listens, hears all, and tells all; the others each hold one line to it. Training itself does not pass here.
"""

import selectors
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from unisono.errors import ConfigurationError, LaunchError
from unisono.launch.channel import Channel, Refused, Role
from unisono.launch.control import Message
from unisono.plan.hosts import Hosts

SEND_DEADLINE_S = 10.0
HANDSHAKE_DEADLINE_S = 10.0
MOST_STRANGERS = 64
SAY_AFTER_S = 5.0
READ_BYTES = 1 << 16
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 20_000}
"""A host that does not answer for 20 s is lost: seconds idle, seconds between tries, tries, and milliseconds in all."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the launchers meet.

    Attributes:
        address, port: where launcher 0 listens.
        nodes, number: how many launchers there are, and which this one is.
        secret: the job's.
        deadline_s: seconds until all must be there.
    """

    address: str
    port: int
    nodes: int
    number: int
    secret: bytes
    deadline_s: float = 300.0


def parse_rendezvous(text: str) -> tuple[str, int]:
    """Address and port.

    Raises:
        ConfigurationError: for anything that is not HOST:PORT.

    >>> parse_rendezvous("10.0.0.1:29400")
    ('10.0.0.1', 29400)
    """
    address, separator, port = text.rpartition(":")
    if not separator or not address or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigurationError(
            f"--rendezvous is {text!r}; give HOST:PORT of the first host, 10.0.0.1:29400 for example"
        )
    return address.strip("[]"), int(port)


def free_port(address: str) -> int:
    """A port that is free on one of this host's addresses."""
    with socket.create_server((address, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@dataclass(slots=True)
class _Line:
    """A connection to another launcher."""

    socket: socket.socket
    channel: Channel
    peer: str
    since: float
    number: int | None = None
    workers: int = 0
    done: bool = False

    def flush(self) -> None:
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
class Failure:
    """Why the run ends on all hosts."""

    text: str
    exit_code: int


@dataclass(slots=True)
class Nodes:
    """This host's launcher among the others; a context manager.

    Arguments:
        rendezvous: where they meet.
        version: of the software; all must have the same.

    Attributes:
        hosts: once `join` has returned.
        address: of this host, as the others reach it.
        master_port: free on host 0, for programs that start torch.distributed by themselves.
        failure: why another host has failed.
        over: all hosts have ended in good order.
        on_set: called with what a worker of another host has left for all.
    """

    rendezvous: Rendezvous
    version: str
    clock: Callable[[], float] = time.monotonic
    on_set: Callable[[str, str], None] = lambda key, value: None
    hosts: Hosts | None = None
    address: str = ""
    master_port: int = 0
    failure: Failure | None = None
    over: bool = False
    _listener: socket.socket | None = None
    _lines: list[_Line] = field(default_factory=list)
    _selector: selectors.BaseSelector = field(default_factory=selectors.DefaultSelector)
    _workers: int = 0
    _done: bool = False
    _refused: set[str] = field(default_factory=set)

    @property
    def number(self) -> int:
        """Which host this is."""
        return self.rendezvous.number

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        descriptor: int = self._selector.fileno()  # type: ignore[attr-defined]
        return descriptor

    def join(self, workers: int) -> Hosts:
        """Meet the others; how many workers each of them has.

        Raises:
            LaunchError: if not all come before the deadline, or one is refused.
        """
        self._workers = workers
        if self.number == 0:
            self._listen()
        else:
            self._connect()
        started, said = self.clock(), False
        while self.hosts is None:
            waited = self.clock() - started
            if waited > self.rendezvous.deadline_s:
                raise LaunchError(
                    f"{self._absent()} within {self.rendezvous.deadline_s:g} s; start the others, or fewer"
                )
            if waited > SAY_AFTER_S and not said:
                said = True
                _say(f"{self._absent()} yet; waiting for {self.rendezvous.deadline_s:g} s in all")
            for _ in self._selector.select(0.5):
                pass
            self.poll()
            if self.failure is not None:
                raise LaunchError(self.failure.text)
        return self.hosts

    def poll(self) -> None:
        """Handle what has come in."""
        for key, _ in self._selector.select(0):
            if key.fileobj is self._listener:
                self._accept()
            else:
                self._hear(key.data)
        for line in [line for line in self._lines if not line.channel.established]:
            if self.clock() - line.since > HANDSHAKE_DEADLINE_S:
                self._drop(line)

    def set(self, key: str, value: str) -> None:
        """Pass on to all hosts what a worker of this one leaves for all."""
        self._tell({"op": "set", "key": key, "value": value})

    def fail(self, text: str, exit_code: int) -> None:
        """This host has failed: all end."""
        if not self.over and self.failure is None:
            self.failure = Failure(text, exit_code)
            self._tell({"op": "failed", "number": self.number, "text": text[-4000:], "exit_code": exit_code})

    def done(self) -> None:
        """The workers of this host have ended in good order."""
        self._done = True
        if self.number:
            self._tell({"op": "done"})
        else:
            self._end_if_all_done()

    def close(self) -> None:
        """Let go of all lines."""
        for line in list(self._lines):
            self._drop(line)
        if self._listener is not None:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        self._selector.close()

    def _listen(self) -> None:
        where = (self.rendezvous.address, self.rendezvous.port)
        try:
            family = socket.getaddrinfo(*where, type=socket.SOCK_STREAM)[0][0]
            backlog = self.rendezvous.nodes + MOST_STRANGERS
            self._listener = socket.create_server(where, family=family, backlog=backlog)
        except OSError as error:
            raise ConfigurationError(
                f"host 0 cannot listen on {where[0]}:{where[1]}: {error.strerror or error}; --rendezvous names an "
                "address of the first host, and a port that is free there"
            ) from error
        self._listener.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ)
        self.address = self._listener.getsockname()[0]
        self._start_if_all_joined()

    def _connect(self) -> None:
        where = (self.rendezvous.address, self.rendezvous.port)
        until = self.clock() + self.rendezvous.deadline_s
        said = self.clock() + SAY_AFTER_S
        while True:
            try:
                line = self._greeted(where)
                break
            except OSError as error:
                if self.clock() > until:
                    raise LaunchError(
                        f"no host 0 at {where[0]}:{where[1]} within {self.rendezvous.deadline_s:g} s: "
                        f"{error.strerror or error}"
                    ) from error
                if self.clock() > said:
                    said = float("inf")
                    _say(f"no host 0 at {where[0]}:{where[1]} yet; waiting for {self.rendezvous.deadline_s:g} s in all")
                time.sleep(0.1)
        try:
            while not line.channel.established:
                if not self._selector.select(HANDSHAKE_DEADLINE_S) or line.read() is None:
                    raise Refused("the connection was closed")
        except (Refused, OSError) as error:
            raise ConfigurationError(
                f"host 0 at {where[0]}:{where[1]} did not accept this host: {error}; do both have the same secret?"
            ) from error
        self.address = line.socket.getsockname()[0]
        line.number = 0
        line.send({"op": "join", "number": self.number, "workers": self._workers, "version": self.version})

    def _greeted(self, where: tuple[str, int]) -> _Line:
        """A line on which the other end has shown that it is there; a forwarder may accept in its place.

        Raises:
            OSError: where it is not, or not yet.
        """
        line = self._add(socket.create_connection(where, timeout=SEND_DEADLINE_S), Role.CLIENT)
        try:
            while not line.channel.greeted:
                if not self._selector.select(HANDSHAKE_DEADLINE_S) or line.read() is None:
                    raise ConnectionError("the connection was closed")
        except BaseException:
            self._drop(line)
            raise
        return line

    def _add(self, connection: socket.socket, role: Role) -> _Line:
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)  # a host that vanishes sends nothing
        for option, value in KEEPALIVE.items():
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        peer = str(connection.getpeername()[0])
        line = _Line(connection, Channel(self.rendezvous.secret, role), peer, self.clock())
        self._lines.append(line)
        self._selector.register(connection, selectors.EVENT_READ, line)
        line.flush()
        return line

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if sum(not line.channel.established for line in self._lines) >= MOST_STRANGERS:
            connection.close()
            return
        try:
            self._add(connection, Role.SERVER)
        except OSError:
            connection.close()

    def _drop(self, line: _Line) -> None:
        self._lines.remove(line)
        self._selector.unregister(line.socket)
        line.socket.close()

    def _hear(self, line: _Line) -> None:
        try:
            messages = line.read()
        except (Refused, OSError):
            messages = None
        if messages is None:
            self._drop(line)
            stranger = line.channel.greeted and not line.channel.established
            if stranger and line.peer not in self._refused and len(self._refused) < MOST_STRANGERS:
                self._refused.add(line.peer)
                _say(f"{line.peer} was refused: it does not know the job's secret; if it is a host, give it the same")
            if line.number is not None and not self.over and self.failure is None:
                self.failure = Failure(f"the connection to host {line.number} ({line.peer}) was lost", 1)
                self._tell({"op": "failed", "number": line.number, "text": self.failure.text, "exit_code": 1})
            return
        for message in messages:
            self._handle(line, message)

    def _handle(self, line: _Line, message: Message) -> None:
        match message["op"]:
            case "join":
                self._welcome(line, message)
            case "start":
                self.hosts = Hosts(tuple(message["sizes"]))
                self.master_port = message["master_port"]
            case "set":
                self.on_set(message["key"], message["value"])
                self._tell(message, but=line)
            case "failed":
                if self.failure is None:
                    self.failure = Failure(f"host {message['number']}: {message['text']}", message["exit_code"])
                    self._tell(message, but=line)
            case "done":
                line.done = True
                self._end_if_all_done()
            case "end":
                self.over = True

    def _welcome(self, line: _Line, message: Message) -> None:
        number, taken = message["number"], {other.number for other in self._lines} | {0}
        problem = ""
        if message["version"] != self.version:
            problem = f"it has unisono {message['version']}, host 0 has {self.version}"
        elif number in taken or not 0 < number < self.rendezvous.nodes:
            problem = f"--node-rank {number} is taken, or not below --nnodes {self.rendezvous.nodes}"
        if problem:
            text = f"the host at {line.peer} was refused: {problem}"
            with suppress(OSError):
                line.send({"op": "failed", "number": 0, "text": text, "exit_code": 2})
            return
        line.number, line.workers = number, message["workers"]
        self._start_if_all_joined()

    def _start_if_all_joined(self) -> None:
        joined = sorted((line for line in self._lines if line.number is not None), key=lambda line: line.number or 0)
        if len(joined) == self.rendezvous.nodes - 1:
            self.hosts = Hosts((self._workers, *(line.workers for line in joined)))
            self.master_port = free_port(self.rendezvous.address)
            self._tell({"op": "start", "sizes": list(self.hosts.sizes), "master_port": self.master_port})

    def _end_if_all_done(self) -> None:
        if self._done and all(line.done for line in self._lines if line.number is not None):
            self.over = True
            self._tell({"op": "end"})

    def _tell(self, message: Message, but: _Line | None = None) -> None:
        for line in list(self._lines):
            if line.number is not None and line is not but:
                try:
                    line.send(message)
                except OSError:  # its end is noticed when it is read next
                    continue

    def _absent(self) -> str:
        if self.number:
            return "host 0 has not begun"
        here = {line.number for line in self._lines}
        late = [str(n) for n in range(1, self.rendezvous.nodes) if n not in here]
        return f"host{'s' * (len(late) > 1)} {', '.join(late)} of {self.rendezvous.nodes} did not come"


def _say(text: str) -> None:
    print(f"unisono: {text}", file=sys.stderr, flush=True)
