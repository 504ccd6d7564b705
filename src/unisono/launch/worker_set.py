"""One set of workers on this host: started by the fork server, served, kept alive, and ended together."""

import contextlib
import os
import selectors
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import replace

from unisono.comm.header import Course
from unisono.errors import ConfigurationError, HostLeaves, LaunchError, UnisonoError, WorkerFailed
from unisono.fault.rules import Death, Verdict
from unisono.launch.attempt import Attempt, StartAgain
from unisono.launch.board import Board
from unisono.launch.control import JOINS, MEMBERS, ROLLED_BACK, ArenaKeeper, Message, pair, receive, send
from unisono.launch.door import opened, visitor
from unisono.launch.nodes import Failure, Nodes
from unisono.launch.process import kill_group
from unisono.launch.quorum import Quorum
from unisono.launch.retreat import Retreat, is_consequence
from unisono.launch.span import Span
from unisono.launch.survival import Subject, Survival
from unisono.launch.task import STANDARD_ERROR, Ending, Task
from unisono.launch.worker_process import Heard, WorkerProcess

END_DEADLINE_S = 5.0
CONSEQUENCE_PATIENCE_S = 0.5
"""How long the cause of a failure is waited for once its consequence is known."""
INTERRUPTED = 130
AGAIN = {
    Verdict.RESTART: " before training began; all start again",
    Verdict.REJOIN: "; other hosts go on, and all workers of this one start again and join them",
    Verdict.ROLL_BACK: ", and its state with it; all start again, from the newest snapshot",
}
"""The ends of workers after which all start again, in words."""


def _error_of(failure: Failure) -> UnisonoError:
    """What was told by a worker, or by another host, as this process's error."""
    error = UnisonoError(failure.text)
    error.exit_code = failure.exit_code
    return error


class WorkerSet:
    """Workers that run one task together, from start to end; a context manager.

    Arguments:
        server: the line to the fork server.
        keeper: of arenas.
        nodes: the launchers of the other hosts, where the run spans several.
        attempt: what came before.
        deaths: of workers so far, of all attempts.
        each_turn: called again and again while workers run, at least every ``turn_s``.

    Attributes:
        survival: what is made of ends and silences.
        interrupts: how often it was asked to stop.
        notes: what workers have told that is for whoever looks on.
    """

    def __init__(
        self,
        task: Task,
        server: socket.socket,
        keeper: ArenaKeeper,
        nodes: Nodes | None,
        board: Board,
        attempt: Attempt,
        deaths: list[Death],
        each_turn: Callable[["WorkerSet"], None] | None,
        turn_s: float,
    ) -> None:
        self._task = task
        self._server = server
        self._keeper = keeper
        self._nodes = nodes
        self._board = board
        self._attempt = attempt
        self._joins = attempt.joins
        self._each_turn = each_turn
        self._turn_s = turn_s
        self.survival = Survival(deaths, first=task.first, rolled_back=attempt.rolled_back is not None)
        self._span: Span | None = None
        self._retreat: Retreat | None = None
        if nodes is not None and attempt.rules is not None and attempt.generation is not None:
            self._retreat = Retreat(Quorum(nodes, attempt.rules), task.workers, attempt.generation, attempt)
        self.interrupts = 0
        self._signal: int | None = None  # the first one
        self._orderly = False
        self._drained_by = float("inf")
        self.notes: list[Message] = []
        self._workers: list[WorkerProcess] = []
        self._wanted = task.workers
        self._reported = False
        self._attached: set[str] = set()
        self._trained = 0  # the number of the last training that was watched
        self._short = False  # workers are missing, spares for example
        self._present: dict[int, list[int]] = {}
        self._door: socket.socket | None = None
        self._selector = selectors.DefaultSelector()
        self._selector.register(server, selectors.EVENT_READ)

    def __enter__(self) -> "WorkerSet":
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self._detach()
        self._selector.close()
        for worker in self._workers:
            worker.close()
        self._keeper.renew()

    def run(self) -> Ending:
        """Start all, and serve them until they have ended.

        Raises:
            StartAgain: where one is lost before anything was trained, or its state with it.
            UnisonoError: what the first failing worker raised, or why the run cannot go on.
        """
        for rank in range(self._task.first, self._task.first + self._task.workers):
            self._workers.append(self._start(rank, joins=self._joins))
            self._await_fork(self._workers[-1])
        self.serve()
        self._raise_failure()
        asked = self.interrupts > 0
        return Ending([w.result for w in self._workers], asked and not self._orderly, asked and self._orderly)

    def _start(self, rank: int, *, joins: bool = False) -> WorkerProcess:
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
        sys.stdout.flush()
        host, local_rank = task.hosts.place(rank)
        environment = {
            **task.environment,
            "RANK": str(rank),
            "LOCAL_RANK": str(local_rank),
            "GROUP_RANK": str(host),
            "WORLD_SIZE": str(task.hosts.size),
            "LOCAL_WORLD_SIZE": str(task.hosts.sizes[host]),
            MEMBERS: str(min(task.workers, task.hosts.sizes[host])),
            **({JOINS: "1"} if joins else {}),
            **({} if self._attempt.rolled_back is None else {ROLLED_BACK: str(self._attempt.rolled_back)}),
        }
        send(
            self._server,
            {"op": "fork", "rank": rank, "target": task.target, "environment": environment},
            [theirs.fileno(), output, errors, stacks],
        )
        theirs.close()
        worker = WorkerProcess(rank, ours, log, stacks=stacks, joins=joins)
        self._selector.register(ours, selectors.EVENT_READ, worker)
        return worker

    def _await_fork(self, worker: WorkerProcess) -> None:
        while worker.pid == 0:
            self._hear_server()

    def serve(self) -> None:
        """Serve the workers until all have ended, or one has failed.

        Raises:
            StartAgain: where one is lost before anything was trained, or its state with it.
        """
        selector = self._selector
        if self._nodes is not None:
            selector.register(self._nodes, selectors.EVENT_READ, self._nodes)
        patience: float | None = None
        while not self._all_ended():
            timeout = None if patience is None else max(0.0, patience - time.monotonic())
            if self.survival.watching or self._each_turn is not None or self._nodes is not None:
                timeout = self._turn_s if timeout is None else min(timeout, self._turn_s)
            knocked = False
            for key, _ in selector.select(timeout):
                if key.data is None:
                    self._hear_server()
                elif key.data is self._door:
                    knocked = True
                elif key.data is not self._nodes and self._hear_worker(key.data) is Heard.END:
                    selector.unregister(key.fileobj)
            if self._nodes is not None:
                self._nodes.poll()
            if self._span is not None and not self._reported:
                self._span.tend([w.rank - self._task.first for w in self._workers if w.status is None])
                self.survival.failure = self.survival.failure or self._span.quorum.failure
            if self._retreat is not None and not self._reported:
                self._tend(self._retreat)
            if self._each_turn is not None:
                self._each_turn(self)
            self._look_for_notice()
            if self._retreat is None or not self._retreat.waiting:
                self._survive()
            if self._short:
                self._short = False
                self._fill_up()
            if knocked:
                self._answer_the_door()
            cause, consequence = self._failures()
            elsewhere = self._nodes is not None and self._nodes.failure is not None
            if cause or elsewhere or self.interrupts > 1:
                break
            if consequence and self._retreat is not None:
                self._retreat.stop()
            elif consequence and patience is None:
                patience = time.monotonic() + CONSEQUENCE_PATIENCE_S
            if patience is not None and time.monotonic() >= patience:
                break

    def _tend(self, retreat: Retreat) -> None:
        """All hosts start again together, where that is decided; until then, workers that cannot go on end.

        Raises:
            StartAgain: once it is.
        """
        header = self.survival.header
        if header is not None and header.course is Course.OVER and not retreat.waiting:
            return
        retreat.tend(header)
        self.survival.failure = self.survival.failure or retreat.quorum.failure
        if retreat.decided is not None:
            raise StartAgain(retreat.attempt(retreat.decided))
        if retreat.waiting:
            for worker in self._workers:
                if worker.error is not None and retreat.explains(worker.error):
                    if not worker.error["consequence"]:
                        print(f"unisono: worker {worker.rank}: {worker.error['text']}", file=sys.stderr, flush=True)
                    worker.error = None
                worker.lost = worker.lost or worker.error is None
            if self.alive:
                self.kill()

    def _survive(self) -> None:
        """Go on without those who have ended, where that can be; end those who hang.

        Raises:
            StartAgain: where nothing was trained yet, or a part of the state is lost.
        """
        while self.interrupts < 2 and (ended := next(filter(self._is_new_end, self._workers), None)):
            self._let_go(ended)  # while another is started, more may end
        self._end_late_ones()
        for subject, sentence in self.survival.silent(self.alive):
            self.survival.hung.add(subject.process)
            if self.survival.stops:
                self.survival.failure = WorkerFailed(sentence)
            kill_group(subject.process)

    def _end_late_ones(self) -> None:
        """Those who were to join are not waited for once training is over and all others have ended."""
        header = self.survival.header
        if self._joins or (header is not None and header.course is not Course.OVER):
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

    def _is_new_end(self, worker: WorkerProcess) -> bool:
        """Whether a worker has ended, not in good order, and nothing was made of it yet.

        To end in the middle of training without an error is no good order either.
        """
        if worker.status is None or worker.error or worker.lost or worker.fatal:
            return False
        header = self.survival.header
        training = header is not None and header.course is Course.TRAINING
        rules = self.survival.rules
        leaves_alone = rules is not None and rules.rolls_back and len(self._workers) == 1  # as a script may
        return bool(worker.status) or (training and not worker.finished and not leaves_alone)

    def _let_go(self, worker: WorkerProcess) -> None:
        """A worker has ended, not in good order."""
        assert worker.status is not None
        others = [subject.rank for subject in self.alive]
        verdict = self.survival.ended(
            worker.subject, worker.status, self._attempt.restarts, others, joins=worker.joins, dismissed=worker.leaves
        )
        if verdict is Verdict.RESTART and self._nodes is not None and self._retreat is None:
            verdict = Verdict.FAIL  # the others could not be told
        if verdict in AGAIN and self.interrupts and verdict is not Verdict.ROLL_BACK and self._retreat is None:
            verdict = Verdict.FAIL
        elif verdict in AGAIN:
            how = worker.how_it_ended(self._task.hosts.size)
            print(f"unisono: {how}{AGAIN[verdict]}", file=sys.stderr, flush=True)
            if self._retreat is None:
                raise StartAgain(self._next_attempt(verdict))
            worker.lost = True
            self._retreat.lose()
            return
        if self._span is not None:
            self._span.lose(worker.rank - self._task.first)
        fatal = verdict in (Verdict.FAIL, Verdict.LEAVE)
        worker.lost, worker.fatal = not fatal, fatal
        if verdict is Verdict.REPLACE and not self.interrupts:
            self._fill_up(first=worker.rank)

    def _next_attempt(self, verdict: Verdict) -> Attempt:
        """What all workers start again as."""
        header = self.survival.header
        if verdict is Verdict.ROLL_BACK and header is not None:
            return Attempt(rolled_back=header.committed)
        return replace(self._attempt, restarts=self._attempt.restarts + 1, joins=verdict is Verdict.REJOIN)

    def _fill_up(self, first: int | None = None) -> None:
        """Let workers join until there are as many as are wanted, and spares.

        Arguments:
            first: the place that is taken first.
        """
        staying = [w for w in self._workers if w.status is None and not w.leaves and not w.lost]
        missing = self._wanted + self._task.elastic.spares - len(staying)
        taken = {w.rank for w in self._workers if w.status is None or self._is_new_end(w)}
        free = [rank for rank in self._task.places if rank not in taken]
        for rank in sorted(free, key=lambda rank: (rank != first, rank))[: max(0, missing)]:
            self._seat(rank)

    def _seat(self, rank: int) -> None:
        """Start a worker that joins, in a place that is free."""
        self.survival.dismiss(rank, leave=False)
        number = next((i for i, w in enumerate(self._workers) if w.rank == rank), None)
        if number is not None:
            with contextlib.suppress(KeyError):  # its end was heard before
                self._selector.unregister(self._workers[number].control)
            self._workers.pop(number).close()
        worker = self._start(rank, joins=True)
        self._workers.append(worker)
        self._workers.sort(key=lambda w: w.rank)
        self._await_fork(worker)

    def scale(self, workers: int) -> str:
        """Go on with so many workers; what follows, for a reader.

        Raises:
            ConfigurationError: for a number that cannot be.
        """
        task = self._task
        if not self.survival.watching:
            raise ConfigurationError("the run does not train now, or cannot be scaled in the same processes")
        elastic = task.elastic
        if not elastic.least <= workers <= elastic.most or workers % task.together:
            whole = f", in replicas of {task.together}" if task.together > 1 else ""
            raise ConfigurationError(
                f"{workers} workers are wanted; this run can have {elastic.least} to {elastic.most}{whole} "
                "(--workers MIN:MAX)"
            )
        training = [w for w in self._workers if w.status is None and self.survival.trains(w.rank)]
        waiting = [w for w in self._workers if w.status is None and w not in training]
        self._wanted = workers
        self.survival.want(workers)
        for number, worker in enumerate(training):
            worker.leaves = number >= workers
            self.survival.dismiss(worker.rank, leave=worker.leaves)
        for worker in waiting[max(0, workers - len(training)) + elastic.spares :]:
            worker.leaves = True  # it may have been let in at this moment: it ends like any other
            kill_group(worker.pid)
        self._fill_up()
        return f"{workers} workers are wanted; {len(training)} train now"

    def _answer_the_door(self) -> None:
        """Someone on this host asks for something."""
        came = visitor(self._door) if self._door is not None else None
        if came is None:
            return
        connection, message = came
        with connection, contextlib.suppress(OSError):
            try:
                send(connection, {"text": self._answer(message)})
            except (ConfigurationError, KeyError, TypeError, ValueError) as error:
                send(connection, {"error": str(error)})

    def _answer(self, message: Message) -> str:
        """What follows from what a visitor asks for.

        Raises:
            ConfigurationError: where that cannot be.
        """
        if message.get("op") == "scale" and self._nodes is None:
            return self.scale(int(message["workers"]))
        spanning = self._span or self._retreat
        if message.get("op") == "fence" and spanning is not None:
            return spanning.quorum.fence(int(message["host"]))
        several = "over several hosts" if spanning is not None else "on one host"
        raise ConfigurationError(f"a run {several} does not know {message.get('op')!r}")

    def _all_ended(self) -> bool:
        """Whether all workers have ended: those of this host, and in good order those of the others."""
        if self._retreat is not None and self._retreat.waiting:  # the others may have ended without this host
            return self._nodes is not None and self._nodes.over
        if any(w.status is None for w in self._workers):
            return False
        if self._nodes is None or self._failed:
            return True
        if not self._reported:
            self._reported = True
            self._nodes.done()
        return self._nodes.over

    def _failures(self) -> tuple[bool, bool]:
        """Whether a cause of failure is known, and whether a consequence of one is."""
        explains = is_consequence if self._retreat is None else self._retreat.explains
        causes = [w for w in self._failed if not (w.error and explains(w.error))]
        return bool(causes) or self.survival.failure is not None, any(w.error for w in self._workers)

    @property
    def _failed(self) -> list[WorkerProcess]:
        """Workers that have ended with an error, or in no good order and are not taken over from."""
        return [w for w in self._workers if w.error or (w.status and not w.lost)]

    def _hear_server(self) -> None:
        message, descriptors = receive(self._server, 1)
        if message is None:
            raise LaunchError(
                "the fork server was lost, and all workers with it; go on from the newest checkpoint (--resume)"
            )
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

    def _hear_worker(self, worker: WorkerProcess) -> "Heard":
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
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it has ended since it asked
            self._handle(worker, message)
        return Heard.MESSAGE

    def _handle(self, worker: WorkerProcess, message: Message) -> None:
        if message["op"] == "arena":
            self._keeper.answer(worker.control, message)
            self._attach(message)
        elif message["op"] == "present":
            send(worker.control, {"present": self._present_at(message["training"])})
        elif message["op"] == "kept":
            send(worker.control, {"kept": self._keeper.kept()})
        elif message["op"] == "output":
            send(worker.control, {"op": "output"}, [self._task.output, STANDARD_ERROR])
        elif message["op"] in ("set", "get"):
            send(worker.control, self._board.answer(message))
            if self._nodes is not None and message["op"] == "set":
                self._nodes.set(message["key"], message["value"])
        elif message["op"] == "release":
            self._keeper.release(message["name"])
            if message["name"] in self._attached:
                self._detach()
        elif message["op"] == "note":
            self.notes.append(message)
        elif message["op"] == "result":
            worker.finished, worker.result = True, message["value"]
        elif message["op"] == "error" and worker.error is None:
            worker.error = message

    def _present_at(self, training: int) -> list[int]:
        """The local ranks of the workers that begin a training: those who are there as the first one asks."""
        first = self._task.hosts.rank(self._task.hosts.place(self._task.first)[0], 0)
        waiting = [w for w in self._workers if w.joins and not self.survival.trains(w.rank)]
        staying = [w.rank - first for w in self._workers if w.status is None and not w.leaves and w not in waiting]
        return self._present.setdefault(training, staying)

    def _attach(self, message: Message) -> None:
        """Watch an arena from the first time that it is asked for."""
        descriptor, name = self._keeper.descriptor(message["name"]), message["name"]
        if not message.get("rules") or descriptor is None or name in self._attached:
            return
        if self._attached and self._trained != message["training"]:
            self._detach()
        self._attached.add(name)
        self.survival.attach(descriptor, message["rules"], message["first"])
        if self._trained != message["training"]:
            self._trained = message["training"]
            rules, header = self.survival.rules, self.survival.header
            coordination = self._nodes.coordination if self._nodes is not None else None
            if self._nodes is not None and coordination is not None and rules is not None and header is not None:
                quorum = Quorum(self._nodes, rules)
                if not rules.rolls_back:
                    self._span = Span(quorum, header, self._joins)
                elif self._retreat is None:
                    self._retreat = Retreat(quorum, self._task.workers, coordination.current, self._attempt)
            else:
                self.survival.want(self._wanted)
                self._short = True
            spanning = self._span or self._retreat
            run_dir = spanning.quorum.run_dir if spanning is not None else self.survival.run_dir
            number = self._nodes.number if self._nodes is not None else 0
            self._door = opened(run_dir, number) if run_dir is not None else None
            if self._door is not None:
                self._selector.register(self._door, selectors.EVENT_READ, self._door)

    def _detach(self) -> None:
        """A training is over."""
        self._span = self._retreat = None
        self._attached.clear()
        if self._door is not None:
            self._selector.unregister(self._door)
            self._door.close()
            self._door = None
        self.survival.detach()

    def interrupt(self, number: int) -> None:
        """The first signal lets workers end in good order; the second ends them at once."""
        if number == signal.SIGUSR1 and self._signal is not None:
            return
        if self._signal is None:
            self._stop(number)
        else:
            self.interrupts = 2
            self.kill()

    def inherit(self, before: "WorkerSet") -> None:
        """What the workers before these were asked, and what has come while they ended, holds for these."""
        self._signal = self._signal or before._signal
        self.interrupts = max(self.interrupts, before.interrupts if before.interrupts > 1 else 0)

    def _stop(self, number: int) -> None:
        self.interrupts, self._signal = 1, number
        self._drain(orderly=number != signal.SIGINT, why="stopping after this step; once more to stop at once")

    def stopped(self) -> BaseException:
        """What is raised where it was asked to stop before there was anything to end in good order."""
        return SystemExit(0) if self._orderly else KeyboardInterrupt()

    def _drain(self, *, orderly: bool, why: str) -> None:
        """Let all workers end after their step, within the time that they have."""
        self._orderly = orderly
        self.survival.want(0)  # nobody waits for lost workers' places to be taken
        print(f"unisono: {why}", file=sys.stderr, flush=True)
        if self.survival.drain_s is not None:
            self._drained_by = time.monotonic() + self.survival.drain_s
        for worker in self._workers:
            if worker.handle >= 0 and worker.status is None:
                with contextlib.suppress(ProcessLookupError):
                    signal.pidfd_send_signal(worker.handle, signal.SIGINT)

    def _look_for_notice(self) -> None:
        """Stop where a notice has come; end a run that does not stop in time."""
        if not self.interrupts and (said := self.survival.notice()):
            self.interrupts, self._signal = 1, signal.SIGTERM
            self._drain(orderly=True, why=f"{said}: stopping after this step")
        header = self.survival.header
        if self._signal is not None and not self.interrupts and header is not None and header.course is Course.TRAINING:
            self._stop(self._signal)  # asked of those before these workers
        if time.monotonic() > self._drained_by:
            self._drained_by = float("inf")
            self.survival.failure = WorkerFailed(
                f"the run did not end within {self.survival.drain_s:g} s (fault.drain_s) of being asked to, and was "
                "ended; resume from the newest checkpoint (--resume)"
            )
            self.kill()

    def _raise_failure(self) -> None:
        if self.interrupts > 1:
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
        if worker.error is None and self.interrupts and os.waitstatus_to_exitcode(worker.status or 0) == INTERRUPTED:
            raise self.stopped()
        if worker.error is None:
            raise WorkerFailed(self._end_of(worker))
        if worker.error["leaves"]:
            raise HostLeaves(worker.error["text"])
        if worker.error["ours"]:
            raise _error_of(Failure(worker.error["text"], worker.error["exit_code"]))
        raise WorkerFailed(f"worker {worker.rank} of {self._task.hosts.size} failed:\n{worker.error['text'].rstrip()}")

    def _end_of(self, worker: WorkerProcess) -> str:
        """How a worker that nobody takes over from has ended."""
        said = worker.last_words()
        text = f"{worker.how_it_ended(self._task.hosts.size)}; the others have been ended"
        return f"{text}; its last output:\n{said}" if said else text

    def kill(self) -> None:
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
