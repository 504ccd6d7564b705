"""The launchers of a run's hosts: they find each other, pass on what workers leave for each other, and end together.

Launcher 0 listens, and all meet there. From then on one of them, the coordinator, hears all and tells all; where a run
survives the loss of hosts, another takes its place (`fault.coordination`). Training itself does not pass here.
"""

import secrets
import selectors
import socket
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unisono.errors import ConfigurationError, LaunchError
from unisono.fault.coordination import MEETING, Coordination, Report
from unisono.fault.generation import WITNESS, Acceptor, Generation
from unisono.launch.channel import Refused, Role, encode
from unisono.launch.control import Message
from unisono.launch.ledger import Ledger
from unisono.launch.lines import HANDSHAKE_DEADLINE_S, MOST_STRANGERS, SEND_DEADLINE_S, Dial, Line, Lines, allow_lines
from unisono.plan.hosts import Hosts

SAY_AFTER_S = 5.0
DIAL_S = 0.5
"""For a connection to another launcher, while a host is missing."""


@dataclass(frozen=True, slots=True)
class Rendezvous:
    """Where the launchers meet.

    Attributes:
        address, port: where launcher 0 listens.
        nodes, number: how many launchers there are, and which this one is.
        secret: the job's.
        deadline_s: seconds until all must be there.
        witness: where one listens that votes and trains nothing.
    """

    address: str
    port: int
    nodes: int
    number: int
    secret: bytes
    deadline_s: float = 300.0
    witness: tuple[str, int] | None = None


def parse_rendezvous(text: str, option: str = "--rendezvous") -> tuple[str, int]:
    """Address and port.

    Raises:
        ConfigurationError: for anything that is not HOST:PORT.

    >>> parse_rendezvous("10.0.0.1:29400")
    ('10.0.0.1', 29400)
    """
    address, separator, port = text.rpartition(":")
    if not separator or not address or not port.isdigit() or not 0 < int(port) < 1 << 16:
        raise ConfigurationError(f"{option} is {text!r}; give HOST:PORT of the first host, 10.0.0.1:29400 for example")
    return address.strip("[]"), int(port)


def free_port(address: str) -> int:
    """A port that is free on one of this host's addresses."""
    with socket.create_server((address, 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


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
        run_dir: where the run's records go, as host 0 says.
        failure: why another host has failed.
        on_set: called with what a worker of another host has left for all.
        known: all that workers have left so far.
        rejoined: the others train already; a launcher before this one was lost.
        rules: of what is trained (see `fault.rules.Rules`), where all hosts start again when one is lost.
        coordination: who trains, once all have met.
    """

    rendezvous: Rendezvous
    version: str
    clock: Callable[[], float] = time.monotonic
    on_set: Callable[[str, str], None] = lambda key, value: None
    known: Callable[[], Mapping[str, str]] = dict
    rejoined: bool = False
    rules: Mapping[str, Any] | None = None
    hosts: Hosts | None = None
    address: str = ""
    master_port: int = 0
    run_dir: str | None = None
    failure: Failure | None = None
    coordination: Coordination | None = None
    _lines: Lines = field(init=False)
    _addresses: dict[int, tuple[str, int]] = field(default_factory=dict)
    _dials: dict[int, Dial] = field(default_factory=dict)
    _ledger: Ledger = field(default_factory=Ledger)
    _unsent: list[Message] = field(default_factory=list)
    _run: str = ""
    _workers: int = 0
    _refused: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._lines = Lines(self.rendezvous.secret, self.clock)
        if self.rendezvous.witness is not None:
            self._addresses[WITNESS] = self.rendezvous.witness

    @property
    def number(self) -> int:
        """Which host this is."""
        return self.rendezvous.number

    @property
    def over(self) -> bool:
        """All hosts have ended in good order."""
        return self.coordination is not None and self.coordination.over

    @property
    def survives(self) -> bool:
        """Whether the others go on where a host is lost."""
        return self.coordination is not None and self.coordination.decides

    def fileno(self) -> int:
        """Readable when `poll` has something to do."""
        return self._lines.fileno()

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
            self._hear_all(0.5)
            if self.failure is not None:
                raise LaunchError(self.failure.text)
        return self.hosts

    def poll(self) -> None:
        """Handle what has come in, and what time brings."""
        self._hear_all(0)
        if self.coordination is not None:
            self._coordinate(self.coordination)

    def survive(self, directory: Path | None, limit_s: float) -> None:
        """From now on hosts may be lost.

        Arguments:
            directory: where this host keeps its votes; None for memory alone.
            limit_s: after which one that is not heard is lost.
        """
        assert self.coordination is not None
        path = directory / f"host-{self.number}.json" if directory is not None else None
        self._ledger.run = self._run
        if self.rejoined:
            self._stand_by_votes(path)
        try:
            self._ledger.keep_in(path, self.coordination.voting.acceptor.written())
        except OSError as error:
            _say(f"votes on which hosts go on cannot be kept in {path}: {error}; none is given until they can")
        self.coordination.limit_s = limit_s
        self.coordination.begin_deciding(self.clock())

    def report(self, report: Report) -> None:
        """What this host's workers do."""
        coordination = self.coordination
        if coordination is not None and report != coordination.report:
            urgent = replace(report, step=0) != replace(coordination.report, step=0)
            coordination.report = report
            if urgent:
                coordination.hurry()

    def rejoin(self) -> None:
        """This host's workers are lost: the others go on, and new ones join them."""
        assert self.coordination is not None
        self.report(replace(self.coordination.report, slots=(), joins=True))
        self.poll()

    def take_decided(self) -> list[Generation]:
        """Generations that were decided since this was asked last."""
        if self.coordination is None:
            return []
        decided, self.coordination.decided = self.coordination.decided, []
        return decided

    def waits_for(self) -> list[int]:
        """Hosts without which it cannot be decided who goes on."""
        return self.coordination.waits_for(self.clock()) if self.coordination is not None else []

    def is_undecided(self) -> bool:
        """Whether this host does not know who goes on."""
        return self.coordination is not None and self.coordination.is_undecided(self.clock())

    def set(self, key: str, value: str) -> None:
        """Pass on to all hosts what a worker of this one leaves for all."""
        self._to_all({"op": "set", "key": key, "value": value})

    def fail(self, text: str, exit_code: int) -> None:
        """This host has failed: all end."""
        if not self.over and self.failure is None:
            self.failure = Failure(text, exit_code)
            self._tell({"op": "failed", "number": self.number, "text": text[-4000:], "exit_code": exit_code})

    def done(self) -> None:
        """The workers of this host have ended in good order."""
        assert self.coordination is not None
        self.report(replace(self.coordination.report, done=True))
        self.poll()

    def close(self) -> None:
        """Let go of all lines."""
        for dial in self._dials.values():
            dial.socket.close()
        self._dials.clear()
        self._lines.close()

    def _listen(self) -> None:
        where = (self.rendezvous.address, self.rendezvous.port)
        allow_lines(self.rendezvous.nodes)
        try:
            self._lines.listen(*where, backlog=self.rendezvous.nodes + MOST_STRANGERS)
        except OSError as error:
            raise ConfigurationError(
                f"host 0 cannot listen on {where[0]}:{where[1]}: {error.strerror or error}; --rendezvous names an "
                "address of the first host, and a port that is free there"
            ) from error
        assert self._lines.listener is not None
        self.address = self._lines.listener.getsockname()[0]
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
                if not _readable(line.socket) or line.read() is None:
                    raise Refused("the connection was closed")
        except (Refused, OSError) as error:
            raise ConfigurationError(
                f"host 0 at {where[0]}:{where[1]} did not accept this host: {error}; do both have the same secret?"
            ) from error
        self.address = line.socket.getsockname()[0]
        self._lines.listen(self.address, 0, backlog=self.rendezvous.nodes + MOST_STRANGERS)
        self._lines.know(line, MEETING)
        line.send(self._about_this_host())

    def _about_this_host(self) -> Message:
        """With what it joins the others."""
        assert self._lines.listener is not None
        where = [self.address, self._lines.listener.getsockname()[1]]
        about = {"number": self.number, "workers": self._workers, "version": self.version}
        return {"op": "join", **about, "where": where}

    def _greeted(self, where: tuple[str, int]) -> Line:
        """A line on which the other end has shown that it is there; a forwarder may accept in its place.

        Raises:
            OSError: where it is not, or not yet.
        """
        line = self._lines.call(*where, SEND_DEADLINE_S)
        try:
            while not line.channel.greeted:
                if not _readable(line.socket) or line.read() is None:
                    raise ConnectionError("the connection was closed")
        except BaseException:
            self._lines.drop(line)
            raise
        return line

    def _hear_all(self, timeout: float) -> None:
        for line in self._lines.select(timeout):
            if line in self._lines.all:  # what another has said may have ended it
                self._hear(line)

    def _hear(self, line: Line) -> None:
        try:
            messages = line.read()
        except (Refused, OSError):
            messages = None
        if messages is None:
            self._lines.drop(line)
            self._lost(line)
            return
        if line.called is not None and line.channel.established:
            self._lines.know(line, line.called)
            line.called = None
            with suppress(OSError):
                line.send({"op": "hail", "number": self.number, "run": self._run})
            self._is_up(line)
        for message in messages:
            try:
                self._handle(line, message)
            except (ValueError, KeyError, TypeError):  # it knows the secret, and says what no launcher would
                if line in self._lines.all:
                    self._lines.drop(line)
                    self._lost(line)
                return

    def _lost(self, line: Line) -> None:
        """A line has ended."""
        if line.called is not None and self.coordination is not None:
            self.coordination.line_is_down(line.called, self.clock())
        stranger = line.channel.greeted and not line.channel.established and line.called is None
        if stranger and line.peer not in self._refused and len(self._refused) < MOST_STRANGERS:
            self._refused.add(line.peer)
            _say(f"{line.peer} was refused: it does not know the job's secret; if it is a host, give it the same")
        if line.number is None or self.over or self.failure is not None:
            return
        if self.survives and self.coordination is not None:
            if self._lines.to(line.number) is None:
                self.coordination.line_is_down(line.number, self.clock())
            return
        self.failure = Failure(f"the connection to host {line.number} ({line.peer}) was lost", 1)
        self._tell({"op": "failed", "number": line.number, "text": self.failure.text, "exit_code": 1})

    def _handle(self, line: Line, message: Message) -> None:
        match message["op"]:
            case "join":
                self._welcome(line, message)
            case "start" if self.hosts is None:
                generation = message.get("generation")
                first = None if generation is None else Generation.read(generation)
                self._start(tuple(message["sizes"]), message["master_port"], message["run"], first)
                self.run_dir, self.rejoined = message["run_dir"], first is not None
                self.rules = message.get("rules")
                found = {int(number): (where[0], where[1]) for number, where in message["where"].items()}
                self._addresses |= {number: where for number, where in found.items() if number != self.number}
                self._addresses[0] = (self.rendezvous.address, self.rendezvous.port)
            case "hail" if self.hosts is None and self.number == MEETING:
                self._lines.know(line, message["number"])  # the others train already
                line.send(self._about_this_host())
            case "hail":
                if message["run"] != self._run or message["number"] not in range(self.rendezvous.nodes):
                    raise ValueError("it belongs to another run")
                self._lines.know(line, message["number"])
                self._is_up(line)
            case "where":
                self._addresses[message["number"]] = message["where"][0], int(message["where"][1])
                if self._hub == self.number:
                    self._tell(message, but=line)
            case "set":
                self.on_set(message["key"], message["value"])
                if self._hub == self.number:
                    self._tell(message, but=line)
            case "failed":
                if self.failure is None:
                    self.failure = Failure(f"host {message['number']}: {message['text']}", message["exit_code"])
                    self._tell(message, but=line)
            case _ if line.number is not None and self.coordination is not None:
                self.coordination.heard(line.number, message, self.clock())

    def _welcome(self, line: Line, message: Message) -> None:
        number, taken = message["number"], {other.number for other in self._lines.all if other is not line}
        problem = ""
        if message["version"] != self.version:
            problem = f"it has unisono {message['version']}, host 0 has {self.version}"
        elif number in taken or number == self.number or number not in range(self.rendezvous.nodes):
            problem = f"--node-rank {number} is taken, or not below --nnodes {self.rendezvous.nodes}"
        elif self.hosts is not None:
            problem = self._not_back(number, message["workers"])
        if problem:
            text = f"the host at {line.peer} was refused: {problem}"
            with suppress(OSError):
                line.send({"op": "failed", "number": 0, "text": text, "exit_code": 2})
            return
        self._lines.know(line, number)
        line.workers = message["workers"]
        line.where = (line.peer, int(message["where"][1]))
        if self.hosts is None:
            self._start_if_all_joined()
        else:
            self._welcome_back(line, number)

    def _start_if_all_joined(self) -> None:
        known = [line for line in self._lines.all if line.number is not None and line.workers]
        joined = sorted(known, key=lambda line: line.number or 0)
        if len(joined) == self.rendezvous.nodes - 1:
            sizes = (self._workers, *(line.workers for line in joined))
            self._addresses |= {line.number or 0: line.where for line in joined if line.where is not None}
            run, port = secrets.token_hex(8), free_port(self.rendezvous.address)
            about = {"sizes": list(sizes), "master_port": port, "run": run, "run_dir": self.run_dir}
            self._tell({"op": "start", **about, "where": self._where()})
            self._start(sizes, port, run)

    def _where(self) -> dict[str, list[str | int]]:
        """Where each host's launcher listens, as far as it is known."""
        return {str(number): list(where) for number, where in self._addresses.items() if number >= 0}

    def _not_back(self, number: int, workers: int) -> str:
        """Why a host cannot come back into the run; empty where it can."""
        assert self.hosts is not None
        if not self.survives:
            return "the run has begun, and hosts cannot join it"
        if self.hosts.sizes[number] != workers:
            return f"it has {workers} workers, and host {number} had {self.hosts.sizes[number]} when the run began (-n)"
        return ""

    def _welcome_back(self, line: Line, number: int) -> None:
        """The launcher of a host that was lost has started again: it learns what the others know, and joins them."""
        assert self.hosts is not None and self.coordination is not None and line.where is not None
        self._addresses[number] = line.where
        self._to_all({"op": "where", "number": number, "where": list(line.where)})
        about = {"sizes": list(self.hosts.sizes), "master_port": self.master_port, "run": self._run}
        about["rules"] = self.rules
        current = self.coordination.current.written()
        with suppress(OSError, ValueError):  # its end is noticed when it is read next
            line.send({"op": "start", **about, "run_dir": self.run_dir, "where": self._where(), "generation": current})
            for key, value in self.known().items():
                line.send({"op": "set", "key": key, "value": value})
        self._is_up(line)

    def _stand_by_votes(self, path: Path | None) -> None:
        """Go on as the voter that this host's launcher was; without its votes, abstain while it counts as that one."""
        assert self.coordination is not None
        record = self._ledger.read(path)
        try:
            before = None if record is None else Acceptor.read(record, self._ledger)
        except ValueError:
            before = None
        if before is not None:
            self.coordination.voting.acceptor.resume(before)
        else:
            self.coordination.voting.abstains = self.coordination.belongs

    def _start(self, sizes: tuple[int, ...], master_port: int, run: str, generation: Generation | None = None) -> None:
        """All are there, or were: then they are at a later ``generation``."""
        self.hosts, self.master_port, self._run = Hosts(sizes), master_port, run
        acceptor = Acceptor(generation or Generation.first(sizes), self._ledger)
        witness = self.rendezvous.witness is not None
        self.coordination = Coordination(self.number, acceptor, float("inf"), witness=witness)
        self.coordination.decides = False
        self.coordination.report = Report(slots=tuple(range(sizes[self.number])))
        self.coordination.begin([line.number for line in self._lines.all if line.number is not None], self.clock())

    def _coordinate(self, coordination: Coordination) -> None:
        """Let time pass for who trains."""
        now = self.clock()
        coordination.tick(now)
        for number in coordination.silent_lines(now) if coordination.decides else ():
            for line in self._lines.all_to(number):
                self._lines.drop(line)
            coordination.line_is_down(number, now)
        self._dial(coordination, now)
        outbox, coordination.outbox = coordination.outbox, []
        for numbers, message in outbox:
            encoded = encode(message)
            for target in filter(None, map(self._lines.to, numbers)):
                with suppress(OSError):  # its end is noticed when it is read next
                    target.send(encoded)
        if self._unsent and (self._hub == self.number or self._lines.to(self._hub) is not None):
            unsent, self._unsent = self._unsent, []
            for message in unsent:
                self._to_all(message)

    def _dial(self, coordination: Coordination, now: float) -> None:
        """Make connections that are wanted."""
        for number in coordination.wanted_lines(now):
            calling = number in self._dials or any(line.called == number for line in self._lines.all)
            if not calling and number in self._addresses:
                try:
                    self._dials[number] = Dial.begin(number, self._addresses[number], now + DIAL_S)
                except OSError:
                    coordination.line_is_down(number, now)
        for dial in list(self._dials.values()):
            state = dial.state()
            if state is None and now < dial.until:
                continue
            del self._dials[dial.number]
            try:
                if not state:
                    raise ConnectionError("not reached")
                line = self._lines.add(dial.socket, Role.CLIENT, self._addresses[dial.number][0])
                line.called = dial.number
            except OSError:
                with suppress(OSError):
                    dial.socket.close()
                coordination.line_is_down(dial.number, now)

    def _is_up(self, line: Line) -> None:
        if self.coordination is not None and line.number is not None:
            self.coordination.line_is_up(line.number, self.clock())

    @property
    def _hub(self) -> int | None:
        """Whose launcher passes messages on to all."""
        return 0 if self.coordination is None else self.coordination.follows

    def _to_all(self, message: Message) -> None:
        """To all other hosts, by way of the one that passes it on."""
        if self._hub == self.number:
            self._tell(message)
            return
        line = self._lines.to(self._hub)
        try:
            if line is None:
                raise ConnectionError("nobody passes it on now")
            line.send(message)
        except OSError:
            self._unsent.append(message)

    def _tell(self, message: Message, but: Line | None = None) -> None:
        """On all lines to other hosts."""
        encoded = encode(message)
        for line in list(self._lines.all):
            if line.number not in (None, WITNESS) and line is not but:
                with suppress(OSError, ValueError):  # its end is noticed when it is read next
                    line.send(encoded)

    def _absent(self) -> str:
        if self.number:
            return "host 0 has not begun"
        here = {line.number for line in self._lines.all}
        late = [str(n) for n in range(1, self.rendezvous.nodes) if n not in here]
        return f"host{'s' * (len(late) > 1)} {', '.join(late)} of {self.rendezvous.nodes} did not come"


def _readable(connection: socket.socket) -> bool:
    """Whether something comes in before the deadline."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, selectors.EVENT_READ)
        return bool(selector.select(HANDSHAKE_DEADLINE_S))


def _say(text: str) -> None:
    print(f"unisono: {text}", file=sys.stderr, flush=True)
