"""``unisono chaos --hosts``: hosts that are killed, stopped or cut off, beside the same run undisturbed.

Every host is a launcher of its own, in a network namespace of its own where the machine allows that; links are cut
there. What is seen from outside is the run's record: a step that is on it is committed.
"""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from unisono.check.chaos import FIRST, GAP, STOP_DEADLINE_S, Say
from unisono.check.observed import Observed, Row
from unisono.check.one_host import Order
from unisono.check.strike import Strike
from unisono.check.trials import arguments, judge_rolled_back, with_snapshots
from unisono.config import Config
from unisono.errors import WorkerFailed
from unisono.launch.namespaces import Namespaces, unavailable
from unisono.launch.nodes import free_port
from unisono.launch.possible import survives_hosts
from unisono.launch.secret import VARIABLE
from unisono.observe.records import EVENTS

LOOPBACK = "127.0.0.1"
LOOK_S = 0.002
LATE_S, HELD_S, APART_S = 60.0, 4.0, 5.0
"""Until a run must have gone on; for how long a fault lasts that ends by itself; from one to the next."""
DEADLINE_S = 20.0
MOMENTS = ("backward", "data", "mid-update", "forward", "mid-reduce", "mid-commit")
CUT_BOUND_S = 3.0
"""In which the majority goes on."""
PORT, WITNESS_PORT = 29600, 29601

FAULTS = {
    "host-worker": 2,
    "host-worker-stop": 2,
    "host-workers": 2,
    "host": 3,
    "host-again": 3,
    "coordinator": 3,
    "coordinator-again": 3,
    "coordinator-stopped": 3,
    "host-witness": 2,
    "host-fenced": 2,
    "cut": 3,
    "cut-coordinator": 3,
    "cut-one-way": 3,
    "cut-halves": 2,
    "cut-halves-witness": 4,
}
"""Each with the hosts that it takes."""
CUTS = tuple(name for name in FAULTS if name.startswith("cut"))


def why_not_between_hosts(fault: str) -> str:
    """Why a fault cannot happen on this machine; empty where it can."""
    reason = unavailable() if fault in CUTS else None
    return "" if reason is None else f"needs hosts whose links can be cut: {reason}"


@dataclass(slots=True)
class Hosts:
    """Launchers that run one training; a context manager.

    Arguments:
        count, workers: hosts, and workers of each.
        network: where their links can be cut; None for loopback.
        witness: whether there is one, on a host of its own.
        run_dir: of the run.
    """

    count: int
    workers: int
    network: Namespaces | None
    witness: bool
    run_dir: Path
    processes: list[subprocess.Popen[str]] = field(default_factory=list)
    killed: set[int] = field(default_factory=set)
    _orders: list[str] = field(default_factory=list)
    _open: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> "Hosts":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGCONT)
                process.kill()
            process.communicate()
        self._open.close()

    def start(self, arguments: dict[str, Any]) -> None:
        """Let all begin."""
        secret = secrets.token_hex(16)
        port = PORT if self.network is not None else free_port(LOOPBACK)
        voter = self._start_witness(secret) if self.witness else None
        for number in range(self.count):
            order = Order(number, self.count, self.workers, self._address(0), port, voter, secret, arguments)
            self._orders.append(json.dumps(asdict(order)))
            self.processes.append(self._begin(number))

    def _begin(self, number: int) -> subprocess.Popen[str]:
        """A launcher."""
        words = self._words(number, [sys.executable, "-m", "unisono.check.one_host"])
        log = self._open.enter_context((self.run_dir / f"host-{number}.log").open("a"))
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        assert process.stdin is not None
        process.stdin.write(self._orders[number] + "\n")
        process.stdin.flush()
        return process

    def _start_witness(self, secret: str) -> tuple[str, int]:
        port = WITNESS_PORT if self.network is not None else free_port(LOOPBACK)
        where = (self._address(self.count), port)
        state = str(self.run_dir / "witness")
        words = [sys.executable, "-m", "unisono", "witness", "--listen", f"{where[0]}:{port}", "--state", state]
        environment = {**os.environ, VARIABLE: secret}
        process = subprocess.Popen(
            self._words(self.count, words), stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
        self._open.callback(process.wait)
        self._open.callback(process.kill)
        assert process.stdout is not None
        process.stdout.readline()  # it listens
        self._open.callback(process.stdout.close)
        return where

    def _address(self, number: int) -> str:
        return self.network.addresses[number] if self.network is not None else LOOPBACK

    def _words(self, number: int, words: list[str]) -> list[str]:
        return self.network.words(number, words) if self.network is not None else words

    def kill(self, number: int) -> None:
        """A whole host: its launcher, and with it all that it has started."""
        self.killed.add(number)
        self.processes[number].kill()

    def again(self, number: int) -> None:
        """Start the launcher of a host that was killed."""
        self.processes[number].communicate()
        self.processes[number] = self._begin(number)
        self.killed.discard(number)

    def send(self, number: int, what: signal.Signals) -> None:
        """A signal to a host's launcher alone."""
        self.processes[number].send_signal(what)

    def separate(self, some: Sequence[int], others: Sequence[int], *, one_way: bool = False) -> None:
        """Cut the links between hosts (the witness's comes after the last)."""
        assert self.network is not None
        _each(self.network.block, some, others, one_way=one_way)

    def join(self, some: Sequence[int], others: Sequence[int], *, one_way: bool = False) -> None:
        """Mend them."""
        assert self.network is not None
        _each(self.network.unblock, some, others, one_way=one_way)

    def over(self) -> bool:
        """Whether all that were not killed have ended."""
        return all(p.poll() is not None for n, p in enumerate(self.processes) if n not in self.killed)

    def said(self) -> list[dict[str, Any]]:
        """What each of them saw, of those that were not killed.

        Raises:
            WorkerFailed: where one has ended without a word.
        """
        found = []
        for number, process in enumerate(self.processes):
            output, _ = process.communicate(timeout=LATE_S)
            if number in self.killed:
                continue
            if not output.strip():
                raise WorkerFailed(f"host {number} ended without a word: {self.log(number)[-500:]}")
            found.append(json.loads(output.splitlines()[-1]))
        return found

    def log(self, number: int) -> str:
        """What a host has told its user."""
        return (self.run_dir / f"host-{number}.log").read_text(encoding="utf-8")


def _each(change: Callable[[int, int], None], some: Sequence[int], others: Sequence[int], *, one_way: bool) -> None:
    """Change every link from one of some to one of others, and unless it is one way those back."""
    for a in some:
        for b in others:
            change(a, b)
            if not one_way:
                change(b, a)


class HostChaos:
    """Runs faults of hosts against one configuration.

    Arguments:
        config: what is trained; its length and records are chaos's own.
        workers: of each host.
        repeat: faults of each kind.
        say: told of what happens.
    """

    def __init__(self, config: Config, workers: int, repeat: int, say: Say) -> None:
        self._rolls_back = not survives_hosts(config)  # all hosts start again, from a snapshot, when one is lost
        self._config = with_snapshots(config) if self._rolls_back else config
        self._workers = workers
        self._repeat = repeat
        self._say = say
        self._undisturbed: dict[tuple[int, int], Observed] = {}

    def run(self, fault: str) -> Row:
        """Let one kind of fault happen, again and again; for those that can (see `why_not_between_hosts`)."""
        self._say(f"{fault}: {self._repeat} times")
        row = Row(fault, self._repeat)
        method: Callable[[Row], None] = getattr(self, f"_{fault.replace('-', '_')}")
        method(row)
        if self._rolls_back:
            row.starts_again, row.bound_s = True, None
        return row

    # A worker

    def _host_worker(self, row: Row) -> None:
        """A worker of one of two hosts is killed; every few steps another, at another moment of its step."""
        self._strike_workers(row, "kill")

    def _host_worker_stop(self, row: Row) -> None:
        """The same, and it is stopped (SIGSTOP): when the deadline is over, its launcher ends it."""
        self._strike_workers(row, "stop", STOP_DEADLINE_S)

    def _strike_workers(self, row: Row, how: str, deadline_s: float = DEADLINE_S) -> None:
        size = 2 * self._workers
        strikes = [Strike(n % size, FIRST + GAP * n, MOMENTS[n % len(MOMENTS)], how) for n in range(self._repeat)]
        steps = FIRST + GAP * (self._repeat + 1)
        seen = self._train(2, steps, strikes=strikes, deadline_s=deadline_s)
        for step, at in sorted((s["struck"]["step"], s["at"]) for s in seen.strikes):
            row.recovery_s.append(seen.committed_at[step] - at)
        struck, count = {strike["struck"]["step"] for strike in seen.strikes}, self._config.micro_batches
        changes = [change["taken_over"] for change in seen.of("HostsChanged") if change["step"] in struck]
        row.recomputed_micro_batches = max((count if taken is None else taken for taken in changes), default=0)
        late_s = deadline_s if how == "stop" else 0.0  # until it is noticed
        row.bound_s = 2 * self._expected(2, steps).step_s + 0.5 + late_s  # a step, and the lost worker's share of one
        self._judge(row, seen, 2, steps)

    def _host_workers(self, row: Row) -> None:
        """All of the second of two hosts, which joins again with new ones; every other time in the last step."""
        steps, second = FIRST + 3 * GAP, range(self._workers, 2 * self._workers)
        for number in range(self._repeat):
            step = steps if number % 2 else FIRST + number // 2 % GAP
            seen = self._train(2, steps, strikes=[Strike(rank, step, "backward") for rank in second])
            at = max(note["at"] for note in seen.strikes)
            row.recovery_s.append(seen.committed_at[step] - at)
            self._judge(row, seen, 2, steps)
        row.bound_s = 2 * self._expected(2, steps).step_s + 0.5

    # A host

    def _host(self, row: Row) -> None:
        """The last of three is killed."""
        self._kill(row, 3, 2)

    def _host_again(self, row: Row) -> None:
        """The last of three is killed, and started again a little later."""
        self._come_back(row, 2)

    def _coordinator_again(self, row: Row) -> None:
        """The first of three, at whose address all meet, is killed, and started again a little later."""
        self._come_back(row, 0)

    def _come_back(self, row: Row, number: int) -> None:
        def fault(run: Hosts, watch: "Watching") -> None:
            run.kill(number)
            row.recovery_s.append(watch.next_commit())
            watch.rest(HELD_S)
            run.again(number)

        self._again_and_again(row, 3, fault)
        row.bound_s = CUT_BOUND_S

    def _coordinator(self, row: Row) -> None:
        """The first of three, which coordinates and keeps the records."""
        self._kill(row, 3, 0)

    def _host_witness(self, row: Row) -> None:
        """One of two, which have a witness, in turn."""
        self._kill(row, 2, None, witness=True)

    def _kill(self, row: Row, hosts: int, victim: int | None, *, witness: bool = False) -> None:
        steps = FIRST + 3 * GAP
        for number in range(self._repeat):
            dies = number % hosts if victim is None else victim

            def course(run: Hosts, watch: "Watching", dies: int = dies, number: int = number) -> None:
                watch.until(FIRST + number % GAP)
                run.kill(dies)
                row.recovery_s.append(watch.next_commit())

            self._judge(row, self._train(hosts, steps, course, witness=witness), hosts, steps)
        row.bound_s = CUT_BOUND_S

    def _host_fenced(self, row: Row) -> None:
        """One of two without a witness: the other waits, until somebody vouches for its death."""
        steps = FIRST + 3 * GAP
        for number in range(self._repeat):

            def course(run: Hosts, watch: "Watching", number: int = number) -> None:
                watch.until(FIRST)
                run.kill(number % 2)
                row.exactly_once = row.exactly_once and watch.rest(HELD_S) == 0  # nothing may be committed
                words = [sys.executable, "-m", "unisono", "fence", str(number % 2), str(run.run_dir)]
                subprocess.run(words, check=True, capture_output=True)
                row.recovery_s.append(watch.next_commit())

            self._judge(row, self._train(2, steps, course), 2, steps)
        row.note = "times are from unisono fence; until then nothing was committed"

    def _coordinator_stopped(self, row: Row) -> None:
        """The launcher that coordinates is stopped, and goes on later: another takes its place."""

        def fault(run: Hosts, watch: "Watching") -> None:
            run.send(0, signal.SIGSTOP)
            row.recovery_s.append(watch.next_commit(after_s=1.6))
            watch.rest(HELD_S)
            run.send(0, signal.SIGCONT)

        self._again_and_again(row, 3, fault)
        row.note = "times are to the first commit after its host has gone, or is seen to be healthy"

    # Links

    def _cut(self, row: Row) -> None:
        """The last of three is cut off."""
        self._separate(row, 3, [2], [0, 1])

    def _cut_coordinator(self, row: Row) -> None:
        """The one that coordinates, of three."""
        self._separate(row, 3, [0], [1, 2])

    def _cut_one_way(self, row: Row) -> None:
        """What the first of three sends does not arrive."""
        self._separate(row, 3, [0], [1, 2], one_way=True)

    def _cut_halves_witness(self, row: Row) -> None:
        """Two and two, one half with the witness."""
        self._separate(row, 4, [0, 1], [2, 3, 4], witness=True)

    def _separate(
        self,
        row: Row,
        hosts: int,
        some: Sequence[int],
        others: Sequence[int],
        *,
        one_way: bool = False,
        witness: bool = False,
    ) -> None:
        def fault(run: Hosts, watch: "Watching") -> None:
            run.separate(some, others, one_way=one_way)
            row.recovery_s.append(watch.next_commit(after_s=0.1))
            watch.rest(HELD_S)
            run.join(some, others, one_way=one_way)

        self._again_and_again(row, hosts, fault, network=True, witness=witness)
        row.bound_s = CUT_BOUND_S

    def _cut_halves(self, row: Row) -> None:
        """One and one, without a witness: nobody commits, until the link returns."""

        def fault(run: Hosts, watch: "Watching") -> None:
            run.separate([0], [1])
            watch.rest(0.1)  # what was on its way
            row.exactly_once = row.exactly_once and watch.rest(HELD_S) == 0
            run.join([0], [1])
            row.recovery_s.append(watch.next_commit())

        self._again_and_again(row, 2, fault, network=True)
        row.note = "times are from the link's return; until then nothing was committed"

    def _again_and_again(
        self,
        row: Row,
        hosts: int,
        fault: Callable[[Hosts, "Watching"], None],
        *,
        network: bool = False,
        witness: bool = False,
    ) -> None:
        """One long run; whoever was away comes back before the next fault. It is stopped after the last."""

        def course(run: Hosts, watch: "Watching") -> None:
            watch.until(FIRST)
            for _ in range(self._repeat):
                fault(run, watch)
                watch.all_together(hosts)
                watch.rest(APART_S - HELD_S)
            for number in range(hosts):
                run.send(number, signal.SIGINT)

        seen = self._train(hosts, 100_000, course, network=network, witness=witness)
        self._judge(row, seen, hosts, max(step for step, _ in seen.losses))

    # One run, and what is made of it

    def _expected(self, hosts: int, steps: int) -> Observed:
        """The undisturbed run."""
        key = hosts, steps
        if key not in self._undisturbed:
            self._undisturbed[key] = self._train(hosts, steps, length=steps)
        return self._undisturbed[key]

    def _judge(self, row: Row, seen: Observed, hosts: int, steps: int) -> None:
        """Compare a run with the undisturbed one."""
        expected = self._expected(hosts, steps)
        row.digest_equal = row.digest_equal and seen.digests == expected.digests and len(seen.digests) == 1
        if self._rolls_back:
            judge_rolled_back(row, seen, expected)
            every = self._config.fault.snapshot_every
            row.may_lose = every if isinstance(every, int) else 0
        else:
            row.exactly_once = row.exactly_once and seen.losses == expected.losses
            row.lost_steps += len(seen.losses) - len({step for step, _ in seen.losses})
        row.survivors_restarted += len(seen.ended - {note["process"] for note in seen.strikes})

    def _train(
        self,
        hosts: int,
        steps: int,
        course: Callable[[Hosts, "Watching"], None] = lambda run, watch: None,
        *,
        strikes: Sequence[Strike] = (),
        network: bool = False,
        witness: bool = False,
        length: int | None = None,
        deadline_s: float = DEADLINE_S,
    ) -> Observed:
        seen = Observed()
        with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as directory, ExitStack() as stack:
            links = stack.enter_context(Namespaces(hosts + witness)) if network else None
            run = stack.enter_context(Hosts(hosts, self._workers, links, witness, Path(directory)))
            settings = {"deadline_s": deadline_s}
            run.start(arguments(self._config, length or steps, directory, strikes, None, settings, False))
            watch = Watching(run, seen)
            course(run, watch)
            watch.until_over()
            for said in run.said():
                if "error" in said:
                    raise WorkerFailed(f"a host did not survive: {said['error']}")
                seen.strikes += said["strikes"]
                seen.ended |= set(said["ended"])
                if said["result"] is not None:  # it lost its workers as the others ended
                    seen.digests.add(said["result"]["digest"])
            watch.look()
        return seen


@dataclass(slots=True)
class Watching:
    """Reads a run's record as it is written."""

    run: Hosts
    seen: Observed
    _read_bytes: int = 0

    def look(self) -> int:
        """The last step on record."""
        path, now = self.run.run_dir / EVENTS, time.monotonic()
        if path.exists() and path.stat().st_size > self._read_bytes:
            with path.open("rb") as file:
                file.seek(self._read_bytes)
                lines = file.read().rpartition(b"\n")[0]
            self._read_bytes += len(lines) + 1 if lines else 0
            for line in lines.splitlines():
                record = json.loads(line)
                self.seen.records.append(record)
                if record["event"] == "StepFinished":
                    self.seen.committed_at.setdefault(record["step"], now)
        return max(self.seen.committed_at, default=0)

    def until_over(self) -> None:
        """Until all have ended; as long as steps are committed, they may take their time."""
        last, since = self.look(), time.monotonic()
        while not self.run.over():
            now = self.look()
            last, since = (now, time.monotonic()) if now > last else (last, since)
            if time.monotonic() - since > LATE_S:
                raise WorkerFailed(f"the run does not end after step {last}:\n{self._logs()}")
            time.sleep(LOOK_S)

    def _logs(self) -> str:
        return "\n".join(f"host {n}: {self.run.log(n)[-600:]}" for n in range(self.run.count))

    def until(self, step: int) -> None:
        """Until a step is committed."""
        for _ in self._while(f"step {step}", LATE_S):
            if self.look() >= step:
                return

    def next_commit(self, after_s: float = 0.0) -> float:
        """Seconds until the next one.

        Arguments:
            after_s: commits within this time do not count: they were on their way.
        """
        began = time.monotonic()
        before = self.look()
        for _ in self._while("the next commit", LATE_S):
            now = self.look()
            if time.monotonic() - began < after_s:
                before = now
            elif now > before:
                return self.seen.committed_at[before + 1] - began
        raise AssertionError

    def rest(self, seconds: float) -> int:
        """Look on for a while; the steps that were committed meanwhile."""
        before, until = self.look(), time.monotonic() + seconds
        while time.monotonic() < until:
            time.sleep(LOOK_S)
            self.look()
        return self.look() - before

    def all_together(self, hosts: int) -> None:
        """Until all hosts take part again, where any was away."""
        changes = self.seen.of("HostsChanged")
        if not changes:
            return
        for _ in self._while("all hosts together", LATE_S):
            self.look()
            if len(self.seen.of("HostsChanged")[-1]["hosts"]) == hosts:
                return

    def _while(self, what: str, seconds: float) -> Iterator[None]:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self.run.over():
            yield
            time.sleep(LOOK_S)
        raise WorkerFailed(f"the run did not come to {what} within {seconds:g} s:\n{self._logs()}")
