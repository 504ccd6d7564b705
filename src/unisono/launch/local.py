"""Workers on this host: started from a fork server, watched, and ended together."""

import contextlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FrameType, TracebackType
from typing import Any, Self

from unisono.comm.header import Course
from unisono.errors import ConfigurationError, LaunchError, UnisonoError, WorkerFailed
from unisono.fault.rules import Verdict
from unisono.launch.board import Board
from unisono.launch.control import ADDRESS, HOSTS, JOINS, ArenaKeeper, Message, pair, receive, send
from unisono.launch.nodes import Failure, Nodes, free_port
from unisono.launch.process import kill_group
from unisono.launch.survival import POLL_S, Subject, Survival
from unisono.plan.hosts import Hosts, evenly

END_DEADLINE_S = 5.0
CONSEQUENCE_PATIENCE_S = 0.5
"""How long the cause of a failure is waited for once its consequence is known."""
INTERRUPTED = 130
LOOPBACK = "127.0.0.1"
STANDARD_OUTPUT, STANDARD_ERROR = 1, 2


@dataclass(slots=True)
class _Worker:
    rank: int
    control: socket.socket
    log: int | None
    pid: int = 0
    handle: int = -1
    stacks: int = -1
    joins: bool = False
    status: int | None = None
    lost: bool = False  # and the others go on
    fatal: bool = False  # and they do not
    result: Any = None
    error: Message | None = None

    @property
    def subject(self) -> Subject:
        """As it is watched."""
        return Subject(self.rank, self.pid, self.handle, self.stacks)

    def close(self) -> None:
        """Let go of what leads to it."""
        self.control.close()
        for descriptor in (self.handle, self.log, self.stacks):
            if descriptor is not None and descriptor >= 0:
                os.close(descriptor)


class Heard(Enum):
    """What came over a worker's line."""

    MESSAGE = "message"
    NOTHING = "nothing"
    END = "end"


@dataclass(slots=True)
class Ending:
    """How a set of workers ended in good order: their results by rank, and whether the user had interrupted.

    A worker that was lost, or that left before the end, has none.
    """

    results: list[Any]
    interrupted: bool = False

    @property
    def result(self) -> Any:
        """That of the first worker that has one."""
        return next((result for result in self.results if result is not None), None)


@dataclass(frozen=True, slots=True)
class _Task:
    """What workers are started with, and again those who take a lost one's place."""

    target: Message
    show_all: bool
    output: int


class _StartAgain(Exception):
    """A worker was lost before training began: all start once more."""


def _error_of(failure: Failure) -> UnisonoError:
    """What was told by a worker, or by another host, as this process's error."""
    error = UnisonoError(failure.text)
    error.exit_code = failure.exit_code
    return error


class LocalLauncher:
    """Starts sets of workers on this host, one after another, from one fork server; a context manager.

    The server starts to import torch at once; what the caller does until the first `run` overlaps with it.

    Arguments:
        environment: variables for the server and its workers.
        nodes: the launchers of the other hosts, where the run spans several.

    Attributes:
        survival: what is made of ends and silences.
        each_turn: called again and again while workers run, at least every `turn_s`; chaos looks and strikes there.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, nodes: Nodes | None = None) -> None:
        self._nodes = nodes
        self.survival = Survival()
        self.each_turn: Callable[[], None] | None = None
        self.turn_s = POLL_S
        self._keeper = ArenaKeeper()
        self._server, theirs = pair()
        command = [sys.executable, "-m", "unisono.launch.server", str(theirs.fileno()), str(os.getpid())]
        # One thread in the server: numpy's OpenBLAS would start its pool on import.
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            env={**environment, "OPENBLAS_NUM_THREADS": "1"},
        )
        theirs.close()
        self._port = free_port(LOOPBACK)
        self._ready = False
        self._board = Board()
        self._placed = Hosts((1,))
        self._reported = False
        self._workers: list[_Worker] = []
        self._interrupts = 0
        self._restarts = 0
        self._task = _Task({}, False, STANDARD_OUTPUT)
        self._attached = ""
        self._selector: selectors.BaseSelector

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and whatever it started."""
        self._kill_workers()
        self._server.close()
        self._keeper.close()
        if self._nodes is not None:
            self._nodes.close()
        if not self._ready:  # it still imports, and started nothing yet
            self._process.kill()
        try:
            self._process.wait(END_DEADLINE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def preload(self, modules: Sequence[str]) -> None:
        """Let the server import modules of the user's, so that workers share them already imported.

        Raises:
            ConfigurationError: where one cannot be imported.
        """
        self._await_server()
        for module in modules:
            send(self._server, {"op": "preload", "module": module})
            message, _ = receive(self._server)
            if message is None:
                raise LaunchError(f"the fork server was lost while it imported {module}")
            if "error" in message:
                raise ConfigurationError(f"preload: cannot import {module}: {message['error']}")

    def run(
        self,
        target: Message,
        workers: int,
        *,
        hosts: int = 1,
        together: int = 1,
        show_all: bool = False,
        output: int = STANDARD_OUTPUT,
    ) -> Ending:
        """Run ``target`` in ``workers`` workers until all have ended.

        Arguments:
            target: ``{"call": "module:function", "arguments": {...}}`` or ``{"script": path, "argv": [...]}``.
            workers: on this host, where the run spans several.
            hosts: as many separate sets of workers, which share no memory and reach each other over loopback, as if on
                hosts of their own.
            together: workers that stay in one set.
            show_all: every worker's output is shown, not only rank 0's.
            output: the descriptor that it goes to; the error's, where this process prints a result for programs.

        Raises:
            UnisonoError: what the first failing worker raised; the others have been ended.
        """
        self._await_server()
        self._interrupts = 0
        self._task = _Task(target, show_all, output)
        previous = {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            self._restarts = 0
            while True:
                try:
                    return self._run_set(workers, hosts, together)
                except _StartAgain:
                    self._restarts += 1
        except BaseException as error:
            if self._nodes is not None:
                self._nodes.fail(str(error) or "interrupted", getattr(error, "exit_code", 1))
            if sys.stdout.isatty():  # a worker that was killed could not give the cursor back
                print("\x1b[?25h", end="", flush=True)
            raise
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run_set(self, workers: int, hosts: int, together: int) -> Ending:
        """Start all workers, and wait until they have ended."""
        self._reported = False
        self._workers, self._board, self.survival, self._attached = [], Board(), Survival(), ""
        self._placed, ranks = self._place(workers, hosts, together)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._server, selectors.EVENT_READ)
        try:
            for rank in ranks:
                self._workers.append(self._start(rank))
                self._await_fork(self._workers[-1])
            self._watch()
            self._raise_failure()
            return Ending([w.result for w in self._workers], self._interrupts > 0)
        finally:
            self._kill_workers()
            self.survival.detach()
            self._selector.close()
            for worker in self._workers:
                worker.close()
            self._workers = []
            self._keeper.close()

    def _place(self, workers: int, hosts: int, together: int) -> tuple[Hosts, range]:
        """The hosts of the run, and which ranks are started here."""
        if self._nodes is None:
            return Hosts(evenly(workers, hosts, together)), range(workers)
        self._nodes.on_set = self._board.set
        placed = self._nodes.join(workers)
        first = placed.rank(self._nodes.number, 0)
        return placed, range(first, first + workers)

    def _await_server(self) -> None:
        if self._ready:
            return
        message, _ = receive(self._server)
        if message is None:
            raise LaunchError(f"the fork server ended before it was ready (exit code {self._process.wait()})")
        self._ready = True

    def _start(self, rank: int, *, joins: bool = False) -> _Worker:
        """Ask the server for a worker.

        Arguments:
            joins: those who train already.
        """
        ours, theirs = pair()
        task = self._task
        visible = task.show_all or (rank == 0 and not joins)
        log = None if visible else os.memfd_create(f"unisono-log-{rank}")
        output = task.output if log is None else log
        errors = STANDARD_ERROR if log is None else log
        stacks = os.memfd_create(f"unisono-stacks-{rank}")
        os.set_blocking(stacks, True)
        sys.stdout.flush()
        hosts = self._placed
        host, local_rank = hosts.place(rank)
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(host),
            "WORLD_SIZE": str(hosts.size),
            "LOCAL_WORLD_SIZE": str(hosts.sizes[host]),
            "MASTER_ADDR": LOOPBACK if self._nodes is None else self._nodes.rendezvous.address,
            "MASTER_PORT": str(self._port if self._nodes is None else self._nodes.master_port),
            HOSTS: ",".join(map(str, hosts.sizes)),
            ADDRESS: LOOPBACK if self._nodes is None else self._nodes.address,
            **({JOINS: "1"} if joins else {}),
        }
        send(
            self._server,
            {"op": "fork", "rank": rank, "target": task.target, "environment": environment},
            [theirs.fileno(), output, errors, stacks],
        )
        theirs.close()
        worker = _Worker(rank, ours, log, stacks=stacks, joins=joins)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _await_fork(self, worker: _Worker) -> None:
        while worker.pid == 0:
            self._hear_server()

    def _watch(self) -> None:
        """Serve the workers until all have ended, or one has failed."""
        selector = self._selector
        if self._nodes is not None:
            selector.register(self._nodes, selectors.EVENT_READ, self._nodes)
        patience: float | None = None
        while not self._all_ended():
            timeout = None if patience is None else max(0.0, patience - time.monotonic())
            if self.survival.watching or self.each_turn is not None:
                timeout = self.turn_s if timeout is None else min(timeout, self.turn_s)
            for key, _ in selector.select(timeout):
                if key.data is None:
                    self._hear_server()
                elif key.data is self._nodes:
                    self._nodes.poll()
                elif self._hear_worker(key.data) is Heard.END:
                    selector.unregister(key.fileobj)
            if self.each_turn is not None:
                self.each_turn()
            self._survive()
            cause, consequence = self._failures()
            elsewhere = self._nodes is not None and self._nodes.failure is not None
            if cause or elsewhere or self._interrupts > 1:
                break
            if consequence and patience is None:
                patience = time.monotonic() + CONSEQUENCE_PATIENCE_S
            if patience is not None and time.monotonic() >= patience:
                break

    def _survive(self) -> None:
        """Go on without those who have ended, where that can be; end those who hang.

        Raises:
            _StartAgain: where nothing was trained yet.
        """
        while self._interrupts < 2 and (ended := next(filter(self._is_new_end, enumerate(self._workers)), None)):
            self._let_go(*ended)  # while another is started, more may end
        self._end_late_ones()
        for subject, sentence in self.survival.silent(self.alive):
            self.survival.hung.add(subject.process)
            if self.survival.stops:
                self.survival.failure = WorkerFailed(sentence)
            kill_group(subject.process)

    def _end_late_ones(self) -> None:
        """Those who were to join are not waited for once training is over and all others have ended."""
        header = self.survival.header
        if header is not None and header.course is not Course.OVER:
            return
        late = [w for w in self._workers if w.joins and w.status is None and not w.lost]
        if late and all(w.status is not None for w in self._workers if w not in late):
            for worker in late:
                if not self.survival.trains(worker.rank):
                    worker.lost = True
                    kill_group(worker.pid)

    @property
    def alive(self) -> list[Subject]:
        """The processes of workers that have not ended."""
        return [w.subject for w in self._workers if w.status is None and w.handle >= 0]

    @staticmethod
    def _is_new_end(numbered: tuple[int, _Worker]) -> bool:
        """Whether a worker has ended, not in good order, and nothing was made of it yet."""
        worker = numbered[1]
        return bool(worker.status) and not worker.error and not worker.lost and not worker.fatal

    def _let_go(self, number: int, worker: _Worker) -> None:
        """A worker has ended, not in good order."""
        assert worker.status is not None
        others = [subject.rank for subject in self.alive]
        verdict = self.survival.ended(
            worker.rank, worker.pid, worker.status, self._restarts, others, joins=worker.joins
        )
        if verdict is Verdict.RESTART:
            print(f"unisono: {self._how_it_ended(worker)}, before training began; all start again", file=sys.stderr)
            raise _StartAgain
        worker.lost, worker.fatal = verdict is not Verdict.FAIL, verdict is Verdict.FAIL
        if verdict is Verdict.REPLACE:
            with contextlib.suppress(KeyError):  # its end was heard before
                self._selector.unregister(worker.control)
            worker.close()
            self._workers[number] = self._start(worker.rank, joins=True)
            self._await_fork(self._workers[number])

    def _all_ended(self) -> bool:
        """Whether all workers have ended: those of this host, and in good order those of the others."""
        if any(w.status is None for w in self._workers):
            return False
        if self._nodes is None or any(w.status for w in self._workers):
            return True
        if not self._reported:
            self._reported = True
            self._nodes.done()
        return self._nodes.over

    def _failures(self) -> tuple[bool, bool]:
        """Whether a cause of failure is known, and whether a consequence of one is."""
        causes = [w for w in self._failed if not (w.error and w.error["consequence"])]
        return bool(causes) or self.survival.failure is not None, any(w.error for w in self._workers)

    @property
    def _failed(self) -> list[_Worker]:
        """Workers that have ended with an error, or in no good order and are not taken over from."""
        return [w for w in self._workers if w.error or (w.status and not w.lost)]

    def _hear_server(self) -> None:
        message, descriptors = receive(self._server, 1)
        if message is None:
            raise LaunchError("the fork server was lost; all workers have been ended")
        if message["op"] == "refused":
            raise LaunchError(
                f"the fork server has {message['tasks']} threads; a preloaded module started one: "
                "take it out of preload"
            )
        worker = next((w for w in self._workers if w.pid in (0, message["pid"]) and w.rank == message["rank"]), None)
        if worker is None:  # of an earlier set of workers
            return
        if message["op"] == "forked":
            worker.pid, worker.handle = message["pid"], descriptors[0]
        elif message["op"] == "exited" and worker.pid:
            while self._hear_worker(worker) is Heard.MESSAGE:  # its last words may still be on the way
                pass
            worker.status = message["status"]

    def _hear_worker(self, worker: _Worker) -> "Heard":
        """Handle one message of a worker, if there is one."""
        worker.control.setblocking(False)
        try:
            message, _ = receive(worker.control)
        except BlockingIOError:
            return Heard.NOTHING
        finally:
            worker.control.setblocking(True)
        if message is None:
            return Heard.END
        if message["op"] == "arena":
            self._keeper.answer(worker.control, message)
            self._attach(message)
        elif message["op"] == "output":
            send(worker.control, {"op": "output"}, [self._task.output, STANDARD_ERROR])
        elif message["op"] in ("set", "get"):
            send(worker.control, self._board.answer(message))
            if self._nodes is not None and message["op"] == "set":
                self._nodes.set(message["key"], message["value"])
        elif message["op"] == "release":
            self._keeper.release(message["name"])
            if message["name"] == self._attached:
                self.survival.detach()
        elif message["op"] == "result":
            worker.result = message["value"]
        elif message["op"] == "error" and worker.error is None:
            worker.error = message
        return Heard.MESSAGE

    def _attach(self, message: Message) -> None:
        """Watch an arena from the first time that it is asked for."""
        descriptor = self._keeper.descriptor(message["name"])
        if message.get("rules") and descriptor is not None and message["name"] != self._attached:
            self._attached = message["name"]
            self.survival.attach(descriptor, message["rules"])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The first interrupt is passed on, and workers end in good order; the second ends them at once."""
        self._interrupts += 1
        if self._interrupts == 1:
            print("unisono: stopping after this step; once more to stop at once", file=sys.stderr, flush=True)
            for worker in self._workers:
                if worker.handle >= 0 and worker.status is None:
                    signal.pidfd_send_signal(worker.handle, signal.SIGINT)
        else:
            self._kill_workers()

    def _raise_failure(self) -> None:
        if self._interrupts > 1:
            raise KeyboardInterrupt
        elsewhere = self._nodes.failure if self._nodes is not None else None
        if elsewhere is not None and not self._failures()[0]:
            raise _error_of(elsewhere)
        failed = self._failed
        if self.survival.failure is not None:
            raise self.survival.failure
        if not failed:
            return
        failed.sort(key=lambda w: (bool(w.error and w.error["consequence"]), w.error is None, w.rank))
        worker = failed[0]
        if worker.error is None and self._interrupts and os.waitstatus_to_exitcode(worker.status or 0) == INTERRUPTED:
            raise KeyboardInterrupt
        if worker.error is None:
            raise WorkerFailed(self._how_it_ended(worker))
        if worker.error["ours"]:
            raise _error_of(Failure(worker.error["text"], worker.error["exit_code"]))
        raise WorkerFailed(f"worker {worker.rank} of {self._placed.size} failed:\n{worker.error['text'].rstrip()}")

    def _how_it_ended(self, worker: _Worker) -> str:
        assert worker.status is not None
        code = os.waitstatus_to_exitcode(worker.status)
        how = f"ended with exit code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        text = f"worker {worker.rank} of {self._placed.size} (process {worker.pid}) {how}; the others have been ended"
        if worker.log is not None and (size := os.fstat(worker.log).st_size):
            last = os.pread(worker.log, 2000, max(0, size - 2000)).decode(errors="replace").strip()
            text += f"; its last output:\n{last}"
        return text

    def _kill_workers(self) -> None:
        """End what still runs, and wait until it has."""
        alive = [w for w in self._workers if w.status is None and w.handle >= 0]
        for worker in alive:
            kill_group(worker.pid)
        until = time.monotonic() + END_DEADLINE_S
        for worker in alive:
            readable = selectors.DefaultSelector()
            readable.register(worker.handle, selectors.EVENT_READ)
            readable.select(max(0.0, until - time.monotonic()))
            readable.close()
