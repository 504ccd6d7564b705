"""What a host's launcher makes of its workers' ends and silences: it watches, decides, and tells the user."""

import contextlib
import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from unisono.comm.header import Course, Header
from unisono.errors import HostLeaves, WorkerFailed
from unisono.fault.notice import Notices
from unisono.fault.rules import MOST_EARLY_ENDS, MOST_RESTARTS, Death, Rules, Verdict, decide, poisoned
from unisono.fault.stacks import answer, ask, source_line, state_of
from unisono.fault.watch import Silence, Watch

POLL_S = 0.05
"""How often a launcher looks who gets on."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A worker's process: its rank, and where its stacks are written."""

    rank: int
    process: int
    handle: int
    stacks: int


@dataclass(slots=True)
class Survival:
    """Of one set of workers.

    Attributes:
        deaths: of workers so far.
        failure: why the run cannot go on, where that was found here.
        hung: processes that were ended because they made no progress.
        limits_s: what each of them was given.
        first: the rank of this host's first worker.
        drain_s: seconds that the run has once it is asked to stop; None for as long as it takes.
        rolled_back: all workers have started again, and there are snapshots.
    """

    deaths: list[Death] = field(default_factory=list)
    failure: WorkerFailed | HostLeaves | None = None
    hung: set[int] = field(default_factory=set)
    limits_s: list[float] = field(default_factory=list)
    first: int = 0
    drain_s: float | None = None
    rolled_back: bool = False
    _notices: Notices | None = None
    _watches: dict[int, Watch] = field(default_factory=dict)  # by the first slot of each
    _trained: set[int] = field(default_factory=set)

    def attach(self, descriptor: int, rules: Mapping[str, Any], first: int = 0) -> None:
        """A training begins, in this arena, or in this one too.

        Arguments:
            first: the place of the arena's first worker; each worker of a device has an arena of its own.
        """
        watch = self._watches[first] = Watch(descriptor, Rules.read(rules))
        if self._notices is None:
            self._notices = Notices(watch.rules.notice_file, watch.rules.notice_command)
            self.drain_s = watch.rules.drain_s

    @property
    def _watch(self) -> Watch | None:
        """That of the first worker, who speaks for all."""
        return self._watches[min(self._watches)] if self._watches else None

    def _over(self, slot: int) -> tuple[Watch, int] | None:
        """The watch over a place, and the place's number there; None before its worker has asked for its arena."""
        for first, watch in self._watches.items():
            if first <= slot < first + watch.rules.slots:
                return watch, slot - first
        return None

    def want(self, workers: int) -> None:
        """So many are to train."""
        if self._watch is not None:
            self._watch.want(workers)

    def dismiss(self, rank: int, *, leave: bool) -> None:
        """Ask a worker to leave after its step, or no longer."""
        if (found := self._over(rank - self.first)) is not None:
            watch, slot = found
            watch.dismiss(slot, leave=leave)

    @property
    def run_dir(self) -> Path | None:
        """Where the records of what is trained go."""
        watch = self._watch
        return Path(watch.rules.run_dir) if watch is not None and watch.rules.run_dir is not None else None

    def detach(self) -> None:
        """It is over."""
        if self._watches:
            self._trained = set()
        for first, watch in self._watches.items():
            self._trained |= {first + slot for slot in range(watch.rules.slots) if watch.trains(slot)}
            watch.close()
        self._watches.clear()
        if self._notices is not None:
            self._notices.close()
            self._notices = None

    def notice(self) -> str | None:
        """What asks the run to stop, for a reader."""
        try:
            return self._notices.arrived() if self._notices is not None else None
        except (OSError, ValueError) as error:  # the command cannot be started, or is none
            self._notices = None
            _say(f"fault.notice_command cannot be run: {error}")
            return None

    @property
    def watching(self) -> bool:
        """Whether there is something to be looked at, again and again."""
        return self._watch is not None

    @property
    def stops(self) -> bool:
        """Whether a worker that hangs ends the run."""
        return self._watch is not None and self._watch.rules.on_loss == "stop"

    @property
    def header(self) -> Header | None:
        """The words of the arena in which is trained; None where nothing is."""
        return self._watch.header if self._watch is not None else None

    @property
    def rules(self) -> Rules | None:
        """Of what is trained; None where nothing is that can be survived."""
        return self._watch.rules if self._watch is not None else None

    def trains(self, rank: int) -> bool:
        """Whether a worker takes part in the training, or has done so in the last."""
        if not self._watches:
            return rank - self.first in self._trained
        found = self._over(rank - self.first)
        return found is not None and found[0].trains(found[1])

    def ended(
        self, worker: Subject, status: int, restarts: int, others: Sequence[int], *, joins: bool, dismissed: bool
    ) -> Verdict:
        """A worker's process has ended, not in good order; what follows. Those who live may go by it on return.

        Arguments:
            status: as ``waitpid`` gives it.
            restarts: how often all have been started again.
            others: ranks of workers that live.
            joins: it was to join those who train, or had done so.
            dismissed: it was asked to leave.
        """
        rank, process = worker.rank, worker.process
        if not self._watches:
            if self.rolled_back and not self._trained and restarts < MOST_RESTARTS:  # not even begun, this time
                return Verdict.RESTART
            return Verdict.FAIL if not joins or self.trains(rank) else Verdict.SHRINK
        if (found := self._over(rank - self.first)) is None:
            return Verdict.RESTART if restarts < MOST_RESTARTS else Verdict.FAIL
        watch, slot = found
        death = replace(watch.death(slot, process), slot=rank - self.first)
        verdict = decide(watch.rules, watch.course, death, self.deaths, restarts, joins=joins)
        survives = verdict in (Verdict.REPLACE, Verdict.SHRINK) and watch.course is Course.TRAINING
        alone = survives and not any(map(self.trains, others))
        if alone and watch.rules.several_hosts:
            verdict = Verdict.REJOIN if verdict is Verdict.REPLACE else Verdict.LEAVE
        elif alone:
            verdict = Verdict.FAIL
            self.failure = WorkerFailed(
                f"worker {rank} (process {process}), the last that trained, has ended {death.where}, and nobody is "
                "left to take over; resume from the newest checkpoint (--resume)"
            )
        elif verdict is Verdict.FAIL and watch.course is Course.TRAINING:
            self._say_why_not(death)
        self.deaths.append(death)
        if verdict is Verdict.LEAVE:
            self.failure = HostLeaves(
                f"worker {rank} (process {process}) has ended {death.where}, and this host leaves; the others go on"
            )
        if verdict in (Verdict.REPLACE, Verdict.SHRINK) and watch.course is Course.TRAINING:
            watch.lose(slot, status, hung=process in self.hung)
            how = watch.header.how(watch.header.losses - 1)
            then = ["the others take over its work"] if death.trained else []
            then += ["another takes its place"] if verdict is Verdict.REPLACE else []
            where = death.where if death.trained else "before it took part"
            if not dismissed:
                _say(
                    f"worker {rank} (process {process}) {how} {where}; {', and '.join(then) or 'its place stays empty'}"
                )
        return verdict

    def _say_why_not(self, death: Death) -> None:
        """A micro-batch of which two workers died would be the end of all; so would a step that nobody gets past."""
        rules = self._watch.rules if self._watch is not None else None
        if rules is None or rules.on_loss == "stop":
            return
        other = poisoned(death, self.deaths, rules.together)
        if other is None and rules.rolls_back:
            self.failure = WorkerFailed(
                f"workers have ended in step {death.step} {MOST_EARLY_ENDS} times, one after another, the last "
                f"(process {death.process}) {death.where}; whatever it is, it is not tried again: look for what ends "
                "them (memory, for example), and resume from the newest checkpoint (--resume)"
            )
        elif other is not None:
            self.failure = WorkerFailed(
                f"two workers died {death.where}: process {other.process}, then process {death.process}, which "
                "computed it in its place; whatever it is, no other worker is given it. To see it alone, with the same "
                f"bits: train with one worker (-n 1), from the newest checkpoint (--resume), to steps={death.step}; "
                f"it is micro-batch {death.micro_batch} of that step"
            )

    def silent(self, subjects: Sequence[Subject]) -> list[tuple[Subject, str]]:
        """Those who make no progress, each with a sentence; a report of all is written."""
        awaited = [subject for subject in subjects if subject.process not in self.hung]
        found = [
            (subject, silence) for watch in self._watches.values() for subject, silence in self._silent(watch, awaited)
        ]
        if not found:
            return []
        running = [subject for subject in subjects if state_of(subject.process) != "T"]
        sizes = {subject.rank: os.fstat(subject.stacks).st_size for subject in running}
        for subject in running:
            ask(subject.handle)
        stacks = {s.rank: answer(s.stacks, sizes[s.rank]) if s in running else "" for s in subjects}
        self.limits_s += [silence.limit_s for _, silence in found]
        told = [(subject, self._sentence(silence, subject, stacks[subject.rank])) for subject, silence in found]
        self._report([sentence for _, sentence in told], subjects, stacks)
        return told

    def _silent(self, watch: Watch, subjects: Sequence[Subject]) -> list[tuple[Subject, Silence]]:
        """Those that one watch is over."""
        places = [(subject, self._over(subject.rank - self.first)) for subject in subjects]
        by_slot = {place[1]: subject for subject, place in places if place is not None and place[0] is watch}
        return [(by_slot[silence.slot], silence) for silence in watch.silent(list(by_slot))]

    def _sentence(self, silence: Silence, subject: Subject, stacks: str) -> str:
        which = "" if silence.micro_batch is None else f", micro-batch {silence.micro_batch}"
        state = state_of(subject.process)
        at = source_line(stacks) or ("its process is stopped" if state == "T" else f"no stack, process state {state}")
        return (
            f"worker {subject.rank} (process {subject.process}) has made no progress for {silence.seconds:.1f} s "
            f"(it may take {silence.limit_s:.1f} s): {silence.activity} of step {silence.step}{which}, at {at}"
        )

    def _report(self, sentences: Sequence[str], subjects: Sequence[Subject], stacks: Mapping[int, str]) -> None:
        """Tell the user; the stacks of all, and what each did last, go into a file where there is a directory."""
        shown, recorded = list(sentences), list(sentences)
        now = time.monotonic()
        for subject in subjects:
            text = stacks[subject.rank].strip() or "no stack: its process does not answer"
            part = f"stacks of worker {subject.rank} (process {subject.process}):\n{text}"
            shown.append(part)
            if (found := self._over(subject.rank - self.first)) is None:
                continue
            watch, slot = found
            flight = [f"{now - o.at_s:12.6f} s ago  {o.text}" for o in watch.header.flight(slot)]
            recorded += [part, f"last operations of worker {subject.rank}:", *flight]
        run_dir = self.run_dir
        if run_dir is not None and run_dir.is_dir():
            path = run_dir / f"hang-{len(list(run_dir.glob('hang-*.txt'))) + 1:03d}.txt"
            with contextlib.suppress(OSError):  # a full disk is no reason to leave the hang as it is
                path.write_text("\n".join(recorded) + "\n", encoding="utf-8")
                shown.append(f"the last operations of all workers are in {path}")
        for line in shown:
            _say(line)


def _say(text: str) -> None:
    print(f"unisono: {text}", file=sys.stderr, flush=True)
