"""``unisono chaos``: faults against a real run, beside the same run undisturbed: what it took to go on, and whether the
result is the same.

Scripted faults strike from inside workers (`check.strike`), at (rank, step, moment); others come from outside, from the
launcher's loop, which also takes the times: it looks at the arena's words every millisecond.
"""

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from unisono.check.observed import Observed, Row
from unisono.check.strike import Storage, Strike
from unisono.check.trials import Trials
from unisono.config import Config
from unisono.errors import ConfigurationError
from unisono.launch.local import LocalLauncher
from unisono.launch.task import Elastic
from unisono.launch.worker_set import WorkerSet
from unisono.plan.assignment import paced_micro_batches
from unisono.state.checkpoint import DIRECTORY, newest_intact, path_of, steps_in, verify

FIRST, GAP = 10, 8
"""The step of the first fault, and steps from one to the next: until then, a lost worker's place is taken again."""
STOP_DEADLINE_S = 1.0
SLEEP_S, SLOW_FACTOR, SLOW_MICRO_BATCHES, SLOW_STEPS = 0.05, 5, 4, 40
SLOW_CORE_MICRO_BATCHES = 8
"""A worker that is slow: compute as a timed sleep, and micro-batches a worker."""
AT_MOMENTS = {
    **{
        f"kill-{moment}": moment for moment in ("data", "forward", "backward", "mid-reduce", "mid-update", "mid-commit")
    },
    "exit": "backward",
    "stop": "backward",
    "hang": "forward",
}
SPECIAL = (
    *("kill-two", "kill-rescue", "kill-entry", "spare", "scale", "sigterm", "everything", "server"),
    *("slow", "slow-core", "disk-full", "disk-read-only", "disk-slow", "clock", "random"),
)
FAULTS = (*AT_MOMENTS, *SPECIAL)
OF_SURVIVORS = ("kill-two", "kill-rescue", "kill-entry", "spare", "scale", "everything", "slow", "slow-core")
"""Faults whose point is what the others do meanwhile: where all start again from a snapshot, they do nothing."""
LEAST = {"kill-two": 3, "kill-rescue": 3, "random": 3}
"""Workers of which enough are left, where they go on."""

Say = Callable[[str], None]


class Chaos:
    """Runs faults against one configuration.

    Arguments:
        config: what is trained; its length and records are chaos's own.
        workers: that begin.
        repeat: faults of each kind.
        seed: of random faults.
        say: told of what happens.
    """

    def __init__(self, launcher: LocalLauncher, config: Config, workers: int, repeat: int, seed: int, say: Say) -> None:
        self._trials = Trials(launcher, config, workers)
        self._config = config
        self._workers = workers
        self._repeat = repeat
        self._seed = seed
        self._say = say

    def run(self, fault: str) -> Row:
        """Let one kind of fault happen, again and again; for those that can (see `why_not`)."""
        self._say(f"{fault}: {self._repeat} times")
        if fault in AT_MOMENTS:
            return self._at_moment(fault, AT_MOMENTS[fault])
        method: Callable[[Row], None] = getattr(self, f"_{fault.replace('-', '_')}")
        row = Row(fault, self._repeat)
        method(row)
        return row

    # Faults at moments of a step

    def _at_moment(self, fault: str, moment: str) -> Row:
        """One run, with a fault every few steps, at another rank each time."""
        how = {"exit": "exit", "stop": "stop", "hang": "hang"}.get(fault, "kill")
        steps, strikes = self._schedule(lambda rank, step: [Strike(rank, step, moment, how)])
        settings: dict[str, Any] = {"deadline_s": STOP_DEADLINE_S} if how in ("stop", "hang") else {}
        row = Row(fault, self._repeat)
        seen = self._trials.train(steps, strikes, **settings)
        self._trials.judge(row, seen, steps, late_s=max(seen.limits_s, default=0.0))
        if seen.limits_s:
            row.note = f"up to {max(seen.limits_s):.1f} s without progress were allowed: 20 times the median operation"
        return row

    def _schedule(self, faults: Callable[[int, int], list[Strike]]) -> tuple[int, list[Strike]]:
        """Steps to train, and faults spread over them and over ranks."""
        strikes = [s for n in range(self._repeat) for s in faults(n % self._workers, FIRST + GAP * n)]
        return FIRST + GAP * (self._repeat + 1), strikes

    def _kill_two(self, row: Row) -> None:
        """Two of them in one step."""

        def faults(rank: int, step: int) -> list[Strike]:
            return [Strike(r % self._workers, step, "backward") for r in (rank, rank + 1)]

        steps, strikes = self._schedule(faults)
        self._trials.judge(row, self._trials.train(steps, strikes), steps, killed=2)

    def _kill_rescue(self, row: Row) -> None:
        """One, and another that computes in its place."""
        steps = FIRST + GAP * (self._repeat + 1)
        strikes = []
        for n in range(self._repeat):
            rank, step = n % self._workers, FIRST + GAP * n
            others = [r for r in range(self._workers) if r != rank]
            strikes += [Strike(rank, step, "forward"), *(Strike(r, step, "rescue") for r in others[:1])]
        self._trials.judge(row, self._trials.train(steps, strikes), steps, killed=2)

    def _kill_entry(self, row: Row) -> None:
        """A worker, and the one that is to take its place, as it enters."""
        steps, strikes = self._schedule(lambda rank, step: [Strike(rank, step, "forward")])
        strikes += [Strike(rank, 0, "entry") for rank in range(self._workers)]
        self._trials.judge(row, self._trials.train(steps, strikes), steps)

    def _spare(self, row: Row) -> None:
        """The spare that waits is killed, and training does not notice."""
        steps, following = FIRST + GAP * (self._repeat + 1), [FIRST]

        def look(workers: WorkerSet, committed: int) -> None:
            waiting = [w for w in workers.alive if not workers.survival.trains(w.rank)]
            if waiting and committed >= following[0] and committed < steps - GAP:
                following[0] = committed + GAP
                os.kill(waiting[0].process, signal.SIGKILL)

        seen = self._trials.train(
            steps, [], look, elastic=Elastic(self._workers, self._workers, 1), struck_outside=True
        )
        self._trials.judge(row, seen, steps)

    def _random(self, row: Row) -> None:
        """Kills and stops at random times, never the last two, nor two at one micro-batch."""
        least = 1 if self._trials.rolls_back else LEAST["random"]
        chance, doomed, struck = random.Random(self._seed), set[int](), set[tuple[int, int | None]]()
        following = [0.0]
        steps = FIRST + 3 * self._repeat + 10 * GAP

        def look(workers: WorkerSet, committed: int) -> None:
            header, now = workers.survival.header, time.monotonic()
            healthy = [w for w in workers.alive if w.process not in doomed and workers.survival.trains(w.rank)]
            if header is None or len(healthy) < least or now < following[0] or len(doomed) >= self._repeat:
                return
            victim = chance.choice(healthy)
            _, step, micro_batch = header.doing(victim.rank)
            work = (step, None if self._trials.rolls_back else micro_batch)  # all of the step is done again there
            if FIRST <= step <= steps - GAP and work not in struck:
                struck.add(work)
                doomed.add(victim.process)
                os.kill(victim.process, chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGSTOP]))
                following[0] = now + chance.choice([0.0, 0.05, 0.2, 0.8])

        seen = self._trials.train(steps, [], look, struck_outside=True, deadline_s=STOP_DEADLINE_S)
        row.repetitions = len(doomed)
        row.note = f"seed {self._seed}"
        self._trials.judge(row, seen, steps)

    def _scale(self, row: Row) -> None:
        """1 to 4 to 2 to 3, in turn."""
        sizes = [n for n in (4, 2, 3, 1) if n % self._config.layout.model_workers == 0]
        steps, done = FIRST + 2 * GAP * (self._repeat + 1), [0]
        asked: list[tuple[int, float]] = []

        def look(workers: WorkerSet, committed: int) -> None:
            if done[0] < self._repeat and committed >= FIRST + 2 * GAP * done[0]:
                workers.scale(sizes[done[0] % len(sizes)])
                asked.append((committed + 1, time.monotonic()))
                done[0] += 1

        elastic = Elastic(self._config.layout.model_workers, max(sizes))
        seen = self._trials.train(steps, [], look, elastic=elastic, struck_outside=True)
        for before, at in asked:
            times = [seen.committed_at[s] for s in range(before, before + 2 * GAP) if s in seen.committed_at]
            row.recovery_s.append(max(b - a for a, b in zip([at, *times], times, strict=False)))
        row.note = "times are the longest pause between two commits after each change"
        self._trials.judge(row, seen, steps)

    # The whole run

    def _sigterm(self, row: Row) -> None:
        """Asked to stop in the middle; resumed, and ended."""
        steps = FIRST + 2 * GAP
        for number in range(self._repeat):
            with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as run_dir:
                asked: list[float] = []

                def look(workers: WorkerSet, committed: int, at: list[float] = asked, n: int = number) -> None:
                    if not at and committed >= FIRST + n % GAP:
                        at.append(time.monotonic())
                        workers.interrupt(signal.SIGTERM)

                first = self._trials.train(steps, [], look, run_dir=run_dir)
                orderly = first.ending is not None and first.ending.preempted
                saved = steps_in(Path(run_dir) / DIRECTORY)
                last = max(first.committed_at, default=0)
                row.lost_steps += last - saved[0] if saved else last
                row.recovery_s.append(first.over_at - asked[0])
                again = self._trials.train(steps, [], run_dir=run_dir, resume=True)
                self._trials.judge(row, again, steps)
                row.digest_equal = row.digest_equal and orderly
        row.bound_s = self._trials.expected(steps)[1].step_s + 0.5
        row.note = "times are from the signal to the end"

    def _everything(self, row: Row) -> None:
        """All workers are killed at once; the run is resumed from its newest intact checkpoint."""
        steps, every = FIRST + 2 * GAP, 5
        for number in range(self._repeat):
            with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as run_dir:
                stop_at = FIRST + number % GAP
                strikes = [Strike(rank, stop_at, "backward") for rank in range(self._workers)]
                first = self._trials.train(steps, strikes, run_dir=run_dir, checkpoint={"every": every})
                row.note = first.error.partition("; ")[2] or first.error
                path, manifest, _ = newest_intact(Path(run_dir) / DIRECTORY)
                verify(path)
                self._trials.judge(row, self._trials.train(steps, [], run_dir=run_dir, resume=True), steps, whole=False)
                row.digest_equal = row.digest_equal and manifest.step >= stop_at - 2 * every

    def _server(self, row: Row) -> None:
        """The fork server is killed: a clear end, and a checkpoint that resumes."""
        steps, every = FIRST + 2 * GAP, 5
        for _ in range(self._repeat):
            with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as run_dir, LocalLauncher() as own:
                mine, self._trials.launcher = self._trials.launcher, own
                try:
                    first = self._trials.train(
                        steps,
                        [],
                        lambda workers, committed: own.kill_server() if committed >= FIRST + every else None,
                        run_dir=run_dir,
                        checkpoint={"every": every},
                    )
                finally:
                    self._trials.launcher = mine
                row.note = first.error
                self._trials.judge(row, self._trials.train(steps, [], run_dir=run_dir, resume=True), steps, whole=False)

    def _disk_full(self, row: Row) -> None:
        self._disk(row, "full")

    def _disk_read_only(self, row: Row) -> None:
        self._disk(row, "read-only")

    def _disk_slow(self, row: Row) -> None:
        self._disk(row, "slow")

    def _disk(self, row: Row, how: str) -> None:
        """Checkpoints cannot be written for a while, or take long; training goes on, and older ones stay intact."""
        steps, every = FIRST + GAP * (self._repeat + 2), 4
        with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as run_dir:
            storage = Storage(how, FIRST, steps - GAP)
            seen = self._trials.train(
                steps, [], run_dir=run_dir, checkpoint={"every": every, "keep": 1000}, storage=storage
            )
            self._trials.judge(row, seen, steps)
            directory = Path(run_dir) / DIRECTORY
            saved = sorted(steps_in(directory))
            for step in saved:
                verify(path_of(directory, step))
            said = sum(r["event"] == "Notice" and "NO CHECKPOINT" in r["text"] for r in seen.records)
            row.note = f"{said} failures told; checkpoints of steps {', '.join(map(str, saved))} are intact"
            row.digest_equal = row.digest_equal and saved[-1] == steps and (saved[0] <= FIRST or how == "slow")

    def _slow(self, row: Row) -> None:
        """One worker computes five times slower, and the others take over what it would hold up."""
        workers, config = self._workers, self._config
        count = SLOW_MICRO_BATCHES * workers

        def sleepers(slow: int | None) -> list[Strike]:
            seconds = {rank: SLEEP_S * (SLOW_FACTOR if rank == slow else 1) for rank in range(workers)}
            return [Strike(rank, 1, "data", "slow", seconds=each) for rank, each in seconds.items()]

        settings: dict[str, Any] = {"global_batch_size": count * config.micro_batch_size}
        even = self._trials.train(SLOW_STEPS, sleepers(None), **settings)
        best = _best_slow_step(workers, count) / SLOW_MICRO_BATCHES * even.step_s
        slow = [
            self._trials.train(SLOW_STEPS, sleepers(number % workers), **settings) for number in range(self._repeat)
        ]
        _judge_slow(row, even, slow, best)

    def _slow_core(self, row: Row) -> None:
        """One of two workers, each pinned to a core, shares it with four busy processes."""
        cores = sorted(os.sched_getaffinity(0))[:2]
        count = 2 * SLOW_CORE_MICRO_BATCHES

        def pin(workers: WorkerSet, committed: int) -> None:
            for subject in workers.alive:
                os.sched_setaffinity(subject.process, {cores[subject.rank]})

        def run() -> Observed:
            return self._trials.train(SLOW_STEPS, [], pin, global_batch_size=count * self._config.micro_batch_size)

        even, slow = run(), []
        for number in range(self._repeat):
            with ExitStack() as stack:
                for _ in range(SLOW_FACTOR - 1):
                    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                    stack.callback(busy.wait)
                    stack.callback(busy.kill)
                    os.sched_setaffinity(busy.pid, {cores[number % 2]})
                slow.append(run())
        best = _best_slow_step(2, count) / SLOW_CORE_MICRO_BATCHES * even.step_s
        _judge_slow(row, even, slow, best)

    def _clock(self, row: Row) -> None:
        """The wall clock is set back and forward by an hour: nothing happens."""
        steps, strikes = self._schedule(lambda rank, step: [Strike(rank, step, "data", "clock")])
        self._trials.judge(row, self._trials.train(steps, strikes, deadline_s=STOP_DEADLINE_S), steps)


def _best_slow_step(workers: int, count: int) -> float:
    """The best step with whole micro-batches where one worker is slower, in the time of one of another."""
    sizes = [len(s) for s in paced_micro_batches(count, [SLOW_FACTOR, *[1.0] * (workers - 1)])]
    return float(max(sizes[0] * SLOW_FACTOR, *sizes[1:]))


def _judge_slow(row: Row, even: Observed, found: Sequence[Observed], best_s: float) -> None:
    """Runs with a slow worker, beside one without, and a step of the best assignment."""
    for slow in found:
        assert slow.ending is not None and even.ending is not None, slow.error or even.error
        row.digest_equal = row.digest_equal and slow.ending.result["digest"] == even.ending.result["digest"]
        row.exactly_once = row.exactly_once and slow.losses == even.losses
    parts = [best_s / slow.step_s for slow in found]
    row.note = f"throughput {statistics.median(parts):.2f} of the best assignment's, {min(parts):.2f} at least"


def why_not(fault: str, workers: int, *, survived: bool) -> str:
    """Why a fault cannot happen in a run; empty where it can.

    Arguments:
        survived: workers go on without one of them; else all start again from a snapshot.

    >>> why_not("kill-two", 2, survived=True)
    'needs at least 3 workers; 2 are there (-n)'
    """
    if not survived and fault in OF_SURVIVORS:
        return (
            "is for runs whose workers go on without one of them; in this layout all start again from a snapshot when "
            "one is lost"
        )
    if survived and workers < LEAST.get(fault, 1):
        return f"needs at least {LEAST[fault]} workers; {workers} are there (-n)"
    if fault == "slow-core" and (workers != 2 or len(os.sched_getaffinity(0)) < 2):
        return "is for two workers (-n 2) on at least two cores"
    return ""


def chosen_faults(text: str | None, known: Collection[str], impossible: Callable[[str], str], say: Say) -> list[str]:
    """What ``--faults`` names; default: all that can happen, and which cannot is said.

    Arguments:
        known: all that there are.
        impossible: why one cannot happen; empty where it can.

    Raises:
        ConfigurationError: for one that is not known, or cannot happen.

    >>> chosen_faults("stop,random", FAULTS, lambda fault: "", print)
    ['stop', 'random']
    >>> chosen_faults(None, ("stop", "hang"), lambda fault: "is left" if fault == "hang" else "", print)
    leaving out hang, which is left
    ['stop']
    """
    names = list(known) if text is None else text.split(",")
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(f"--faults names {unknown[0]!r}; known are {', '.join(known)}")
    reasons = {name: reason for name in names if (reason := impossible(name))}
    for name, reason in reasons.items():
        if text is not None:
            raise ConfigurationError(f"{name} {reason}; leave it out of --faults")
        say(f"leaving out {name}, which {reason}")
    return [name for name in names if name not in reasons]
