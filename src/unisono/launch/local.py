"""Workers on this host: sets of them, one after another, from one fork server."""

import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import FrameType, TracebackType
from typing import Self

from unisono.errors import ConfigurationError, HostLeaves, LaunchError
from unisono.fault.rules import Death, Rules
from unisono.launch.attempt import Attempt, StartAgain
from unisono.launch.board import Board
from unisono.launch.control import (
    ADDRESS,
    BEFORE,
    GENERATION,
    HOSTS,
    RUN_DIR,
    SPANS,
    ArenaKeeper,
    Message,
    pair,
    receive,
    send,
)
from unisono.launch.nodes import Nodes, free_port
from unisono.launch.quorum import Quorum
from unisono.launch.retreat import Retreat
from unisono.launch.survival import POLL_S
from unisono.launch.task import STANDARD_OUTPUT, Elastic, Ending, Task
from unisono.launch.worker_set import END_DEADLINE_S, WorkerSet
from unisono.plan.hosts import Hosts, evenly

LOOPBACK = "127.0.0.1"
STOPS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
"""Ctrl-C, a scheduler's end, and its warning before that."""


class LocalLauncher:
    """Starts sets of workers on this host, one after another, from one fork server; a context manager.

    The server starts to import torch at once; what the caller does until the first `run` overlaps with it.

    Arguments:
        environment: variables for the server and its workers.
        nodes: the launchers of the other hosts, where the run spans several.

    Attributes:
        each_turn: called again and again while workers run, at least every `turn_s`; chaos looks and strikes there.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ, nodes: Nodes | None = None) -> None:
        self._nodes = nodes
        self.each_turn: Callable[[WorkerSet], None] | None = None
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
        self._set: WorkerSet | None = None
        self._waits = False  # until others, who train already, let this host in: its end is not theirs

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and whatever it started."""
        if self._set is not None:
            self._set.kill()
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

    def kill_server(self) -> None:
        """End the fork server, and with it its workers, without warning: what chaos does."""
        self._process.kill()

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
        elastic: Elastic | None = None,
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
            elastic: how many there may be later, on this host alone.
            show_all: every worker's output is shown, not only rank 0's.
            output: the descriptor that it goes to; the error's, where this process prints a result for programs.

        Raises:
            UnisonoError: what the first failing worker raised; the others have been ended.
            KeyboardInterrupt: for Ctrl-C before any worker has begun.
            SystemExit: with code 0, for another signal that asks for an end, before any has.
        """
        previous = {s: signal.signal(s, self._on_signal) for s in STOPS}
        try:
            self._await_server()
            room = elastic or Elastic(workers, workers)
            board = Board()
            placed, first = self._place(
                workers, room.most + room.spares if elastic else workers, hosts, together, board
            )
            task = Task(target, placed, first, self._environment(placed), workers, room, together, show_all, output)
            return self._run(task, board)
        except BaseException as error:
            if self._nodes is not None and not isinstance(error, HostLeaves) and not self._waits:
                text = str(error) if isinstance(error, Exception) else "it was asked to stop"
                self._nodes.fail(text, getattr(error, "exit_code", 1))
            if sys.stdout.isatty():  # a worker that was killed could not give the cursor back
                print("\x1b[?25h", end="", flush=True)
            raise
        finally:
            self._set = None
            self._keeper.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _run(self, task: Task, board: Board) -> Ending:
        """Run a task, and start it again where a worker is lost before anything was trained, or its state with it."""
        attempt, deaths, ended = self._first_attempt(task), list[Death](), None
        while True:
            if attempt.joins and self._nodes is not None:
                self._nodes.rejoin()
            try:
                with WorkerSet(
                    self._placed(task, attempt),
                    self._server,
                    self._keeper,
                    self._nodes,
                    board,
                    attempt,
                    deaths,
                    self.each_turn,
                    self.turn_s,
                ) as current:
                    self._set = current
                    if ended is not None:
                        current.inherit(ended)
                    return current.run()
            except StartAgain as again:
                attempt, ended = again.attempt, self._set
                if ended is not None and ended.interrupts and attempt.rolled_back is None:
                    raise ended.stopped() from None
                if self._nodes is None:
                    board = Board()

    def _first_attempt(self, task: Task) -> Attempt:
        """As what the first workers start; where others train already, once they have let this host in.

        Raises:
            LaunchError: where they have ended before that.
        """
        nodes = self._nodes
        if nodes is None or not nodes.rejoined:
            return Attempt()
        if nodes.rules is None or nodes.coordination is None:
            return Attempt(joins=True)
        rules = Rules.read(nodes.rules)
        retreat = Retreat(Quorum(nodes, rules), task.workers, nodes.coordination.current, Attempt())
        retreat.stop()
        self._waits = True
        retreat.quorum.say("the other hosts train already; waiting until they let this one in")
        with selectors.DefaultSelector() as selector:
            selector.register(nodes, selectors.EVENT_READ)
            while retreat.decided is None:
                selector.select(self.turn_s)
                retreat.tend(None)
                failure = retreat.quorum.failure
                if nodes.over or nodes.failure is not None or failure is not None:
                    ended = nodes.failure.text if nodes.failure is not None else failure or "the others have ended"
                    raise LaunchError(f"this host was not let in again: {ended}")
        self._waits = False
        return replace(retreat.attempt(retreat.decided), restarts=0)

    def _placed(self, task: Task, attempt: Attempt) -> Task:
        """The task among the hosts that start together."""
        generation, nodes = attempt.generation, self._nodes
        if generation is None or nodes is None:
            return task
        hosts = Hosts(tuple(map(len, generation.slots)), generation.hosts)
        first = hosts.rank(generation.hosts.index(nodes.number), 0)
        before = ",".join(map(str, attempt.before))
        environment = {**self._environment(hosts), GENERATION: str(generation.number), BEFORE: before}
        if nodes.run_dir is not None:
            environment[RUN_DIR] = nodes.run_dir
        return replace(task, hosts=hosts, first=first, environment=environment)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._set is not None:
            self._set.interrupt(number)
        elif number == signal.SIGINT:
            raise KeyboardInterrupt
        else:
            print("unisono: asked to stop before any worker had begun", file=sys.stderr, flush=True)
            raise SystemExit(0)

    def _place(self, workers: int, room: int, hosts: int, together: int, board: Board) -> tuple[Hosts, int]:
        """The workers that each host has room for, and the rank of the first that is started here."""
        if self._nodes is None:
            return Hosts(evenly(room, hosts, together)), 0
        self._nodes.on_set, self._nodes.known = board.set, lambda: board.values
        placed = self._nodes.join(workers)
        return placed, placed.rank(self._nodes.number, 0)

    def _environment(self, hosts: Hosts) -> dict[str, str]:
        """Variables for all workers."""
        nodes = self._nodes
        return {
            "MASTER_ADDR": LOOPBACK if nodes is None else nodes.rendezvous.address,
            "MASTER_PORT": str(self._port if nodes is None else nodes.master_port),
            HOSTS: hosts.written(),
            ADDRESS: LOOPBACK if nodes is None else nodes.address,
            **({} if nodes is None else {SPANS: "1"}),
        }

    def _await_server(self) -> None:
        if self._ready:
            return
        message, _ = receive(self._server)
        if message is None:
            raise LaunchError(f"the fork server ended before it was ready (exit code {self._process.wait()})")
        self._ready = True
