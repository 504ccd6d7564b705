"""``unisono bench control``: the coordinator of many launchers, on one core: how late what they report is heard, and
how long a change of the workers takes until all know of it.

The coordinator is the one that runs train under. The launchers of the other hosts are as little as can answer it, in
one process on another core: real connections, real frames, and no workers.
"""

import heapq
import os
import random
import secrets
import selectors
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from unisono.launch.channel import Channel, Role
from unisono.launch.control import Message
from unisono.launch.launcher import Launcher
from unisono.launch.lines import allow_lines
from unisono.launch.nodes import Nodes, Rendezvous, free_port
from unisono.launch.task import STANDARD_ERROR

LOOPBACK, VERSION = "127.0.0.1", "bench"
DEADLINE_S = 120.0
TURN_S = 0.001
SETTLE_S = 2.0
"""Before anything is measured: all have joined, and have been heard."""
READ_BYTES = 1 << 20


def bench(launcher: Launcher, launchers: int, workers: int, events: int, seconds: float) -> dict[str, Any]:
    """Measure.

    Arguments:
        launchers: of other hosts.
        workers: of each.
        events: workers that end or come, a second.
    """
    arguments = {
        "launchers": launchers,
        "workers": workers,
        "events": events,
        "seconds": seconds,
        "port": free_port(LOOPBACK),
        "secret": secrets.token_hex(16),
    }
    ending = launcher.run({"call": "unisono.bench.control:side", "arguments": arguments}, 2, output=STANDARD_ERROR)
    coordinator, crowd = ending.results
    return {"launchers": launchers, "workers": launchers * workers, "events_a_second": events, **coordinator, **crowd}


def side(launchers: int, workers: int, events: int, seconds: float, port: int, secret: str) -> dict[str, Any]:
    """One of the two processes, each on a core of its own."""
    rank = int(os.environ["RANK"])
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[rank % len(os.sched_getaffinity(0))]})
    meeting = Rendezvous(LOOPBACK, port, launchers + 1, 0, secret.encode(), DEADLINE_S)
    if rank == 0:
        return _coordinate(meeting, seconds)
    crowd = Crowd(meeting, workers, events)
    crowd.join()
    return crowd.run(seconds)


def _coordinate(meeting: Rendezvous, seconds: float) -> dict[str, Any]:
    """Be the coordinator of a crowd."""
    nodes = Nodes(meeting, VERSION)
    late_s: list[float] = []
    generations: list[float] = []
    try:
        nodes.join(1)
        coordination = nodes.coordination
        assert coordination is not None
        coordination.limit_s = 1.5
        coordination.begin_deciding(nodes.clock())
        hear: Callable[[int, Mapping[str, Any], float], None] = coordination.heard

        def heard(number: int, message: Mapping[str, Any], now: float) -> None:
            hear(number, message, now)
            if "at" in message and message["at"] > begin:
                late_s.append(time.monotonic() - message["at"])

        coordination.heard = heard  # type: ignore[method-assign]
        begin = time.monotonic() + SETTLE_S
        used_s, end = None, begin + seconds
        with selectors.DefaultSelector() as selector:
            selector.register(nodes, selectors.EVENT_READ)
            while (now := time.monotonic()) < end:
                if used_s is None and now >= begin:
                    used_s = time.process_time()
                selector.select(TURN_S)
                nodes.poll()
                generations += [now for _ in nodes.take_decided() if now >= begin]
        assert used_s is not None
        used_s = time.process_time() - used_s
        hosts = len(coordination.current.hosts)
    finally:
        nodes.fail("over", 0)
        nodes.close()
    if hosts != meeting.nodes:
        raise RuntimeError(f"{meeting.nodes - hosts} hosts that were well were taken for lost")
    return {
        **_spread("report", late_s),
        "generations_a_second": round(len(generations) / seconds, 2),
        "coordinator_busy": round(used_s / seconds, 3),
    }


@dataclass(slots=True, eq=False)
class _Launcher:
    """Of one of the crowd.

    Attributes:
        accepted: the last generation that it voted for, and the workers that change in it, by host.
        waiting: the workers that it has reported, and since when, until it is told of them.
    """

    number: int
    socket: socket.socket
    channel: Channel
    accepted: tuple[int, Any] | None = None
    waiting: tuple[list[int], float] | None = None
    slots: list[int] = field(default_factory=list)


class Crowd:
    """The launchers of all other hosts, in one process."""

    def __init__(self, meeting: Rendezvous, workers: int, events: int) -> None:
        self._meeting, self._workers, self._events = meeting, workers, events
        self._selector = selectors.DefaultSelector()
        self._all: list[_Launcher] = []
        self._generation = 1
        self._known_s: list[float] = []
        self._over = False

    def join(self) -> None:
        """Meet the coordinator, one after another, as it lets only so many strangers in at a time."""
        allow_lines(self._meeting.nodes)
        for number in range(1, self._meeting.nodes):
            connection = self._connect()
            channel = Channel(self._meeting.secret, Role.CLIENT)
            while not channel.established:
                connection.sendall(channel.take())
                channel.feed(connection.recv(READ_BYTES))
            one = _Launcher(number, connection, channel, slots=list(range(self._workers)))
            about = {"number": number, "workers": self._workers, "version": VERSION, "where": [LOOPBACK, 1]}
            self._send(one, {"op": "join", **about})
            connection.setblocking(False)
            self._selector.register(connection, selectors.EVENT_READ, one)
            self._all.append(one)

    def run(self, seconds: float) -> dict[str, Any]:
        """Report, and let workers end and come, until the coordinator has seen enough."""
        chance = random.Random(0)
        now = time.monotonic()
        beats = [(now + one.number / len(self._all), one.number) for one in self._all]
        heapq.heapify(beats)
        event_at = begin = now + SETTLE_S
        while not self._over:
            now = time.monotonic()
            while beats[0][0] <= now:
                at, number = heapq.heappop(beats)
                heapq.heappush(beats, (at + 1.0, number))
                self._beat(self._all[number - 1])
            while self._events and begin <= event_at <= now < begin + seconds:
                event_at += 1 / self._events
                one = chance.choice(self._all)
                if one.waiting is None:  # else it would be as before
                    one.slots = list(range(self._workers - (len(one.slots) == self._workers)))
                    one.waiting = one.slots, now
                    self._beat(one)
            for key, _ in self._selector.select(TURN_S):
                try:
                    self._hear(key.data)
                except ConnectionError:
                    self._over = True  # it has seen enough
        return _spread("change", self._known_s)

    def _connect(self) -> socket.socket:
        until = time.monotonic() + DEADLINE_S
        while True:
            try:
                return socket.create_connection((self._meeting.address, self._meeting.port), 5.0)
            except OSError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)

    def _send(self, one: _Launcher, message: Message) -> None:
        one.channel.send(message)
        one.socket.sendall(one.channel.take())

    def _beat(self, one: _Launcher) -> None:
        report = {"step": 1, "slots": one.slots, "stalled": 0, "done": False, "joins": False}
        about = {"generation": self._generation, "follows": 0, "hears": True, "report": report}
        self._send(one, {"op": "beat", "at": time.monotonic(), **about})

    def _hear(self, one: _Launcher) -> None:
        data = one.socket.recv(READ_BYTES)
        if not data:
            raise ConnectionError("closed")
        for message in one.channel.feed(data):
            match message["op"]:
                case "prepare":
                    answer = {"number": message["number"], "ballot": message["ballot"], "accepted": None}
                    self._send(one, {"op": "promise", **answer})
                case "accept":
                    change = message["change"]
                    one.accepted = change["number"], change["slots"]
                    self._send(one, {"op": "accepted", "number": change["number"], "ballot": message["ballot"]})
                case "decided" if one.accepted is not None and one.accepted[0] == message["number"]:
                    self._known(one, dict(one.accepted[1]).get(one.number))
                    self._generation = max(self._generation, message["number"])
                case "generation":
                    told = message["generation"]
                    self._known(one, told["slots"][told["hosts"].index(one.number)])
                    self._generation = max(self._generation, told["number"])
                case "failed":
                    raise ConnectionError(message["text"])

    def _known(self, one: _Launcher, slots: list[int] | None) -> None:
        """A generation has begun, in which this host has these workers."""
        if one.waiting is not None and one.waiting[0] == slots:
            self._known_s.append(time.monotonic() - one.waiting[1])
            one.waiting = None


def _spread(what: str, seconds: Sequence[float]) -> dict[str, Any]:
    """How many, their median and their 99th percentile; zeros where there are none."""
    ordered = sorted(seconds) or [0.0]
    return {
        f"{what}s": len(seconds),
        f"{what}_p50_s": round(ordered[len(ordered) // 2], 4),
        f"{what}_p99_s": round(ordered[int(0.99 * len(ordered))], 4),
    }


def as_text(found: Mapping[str, Any]) -> str:
    """For a reader."""
    return (
        f"{found['workers']} workers report through {found['launchers']} launchers, {found['events_a_second']} of them "
        f"end or come in a second:\n"
        f"  a report is heard after {1000 * found['report_p50_s']:.1f} ms, 99% within "
        f"{1000 * found['report_p99_s']:.1f} ms ({found['reports']} of them)\n"
        f"  a change is known after {1000 * found['change_p50_s']:.0f} ms, 99% within "
        f"{1000 * found['change_p99_s']:.0f} ms ({found['changes']} of them), in "
        f"{found['generations_a_second']} generations a second\n"
        f"  the coordinator is busy for {100 * found['coordinator_busy']:.0f}% of one core"
    )
