"""One run and the same one undisturbed: trained, looked at while it trains, and compared."""

import contextlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from unisono.check.observed import Observed, Row
from unisono.check.strike import Storage, Strike
from unisono.comm.header import Course
from unisono.config import Config, validate
from unisono.errors import UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.launch.possible import survives
from unisono.launch.task import STANDARD_ERROR, Elastic
from unisono.launch.worker_set import WorkerSet
from unisono.observe.records import EVENTS

TURN_S = 0.001
EVERY = 4
"""Steps from one snapshot to the next, where the configuration does not say."""


class Trials:
    """Runs of one configuration.

    Arguments:
        config: what is trained; its length and records are those of each run.
        workers: that begin.

    Attributes:
        launcher: of all runs.
        rolls_back: all workers start again, from a snapshot, when one is lost.
    """

    def __init__(self, launcher: LocalLauncher, config: Config, workers: int) -> None:
        self.launcher = launcher
        self.rolls_back = not survives(config, workers)
        self._config = with_snapshots(config) if self.rolls_back else config
        self._workers = workers
        self._undisturbed: dict[int, tuple[str, Observed]] = {}

    def expected(self, steps: int) -> tuple[str, Observed]:
        """Digest and course of the undisturbed run."""
        if steps not in self._undisturbed:
            seen = self.train(steps, [])
            assert seen.ending is not None, seen.error
            self._undisturbed[steps] = seen.ending.result["digest"], seen
        return self._undisturbed[steps]

    def judge(
        self, row: Row, seen: Observed, steps: int, *, late_s: float = 0.0, killed: int = 1, whole: bool = True
    ) -> None:
        """Compare a run with the undisturbed one.

        Arguments:
            late_s: until a fault is noticed.
            killed: workers that a fault takes.
            whole: nothing was trained twice.
        """
        digest, undisturbed = self.expected(steps)
        result = seen.ending.result if seen.ending is not None else None
        if result is None:
            row.digest_equal, row.note = False, seen.error
            return
        row.digest_equal = row.digest_equal and result["digest"] == digest
        if self.rolls_back:
            judge_rolled_back(row, seen, undisturbed)
            every = self._config.fault.snapshot_every
            if seen.struck_outside or any(note["struck"]["how"] != "clock" for note in seen.strikes):
                row.starts_again, row.may_lose = True, every if isinstance(every, int) else 0
        elif whole:
            row.exactly_once = row.exactly_once and seen.losses == undisturbed.losses
            row.lost_steps += len(seen.losses) - len({step for step, _ in seen.losses})
            if missing := sorted(dict(undisturbed.losses).keys() - dict(seen.losses).keys()):
                row.note = f"steps {', '.join(map(str, missing))} are not on record; {row.note}".rstrip("; ")
        else:  # what was trained twice had the same losses
            row.exactly_once = row.exactly_once and dict(seen.losses) == dict(undisturbed.losses)
        struck = {note["process"] for note in seen.strikes}
        row.survivors_restarted += len(seen.ended - struck)
        for step, at in {note["struck"]["step"]: note["at"] for note in reversed(seen.strikes)}.items():
            if step in seen.committed_at:
                row.recovery_s.append(seen.committed_at[step] - at)
        again = [len([m for part in r["taken_over"].values() for m in part]) for r in seen.of("WorkerLost")]
        row.recomputed_micro_batches = max([row.recomputed_micro_batches, *again])
        if seen.strikes:
            asked = {(n["struck"]["rank"], n["struck"]["step"], n["struck"]["moment"]) for n in seen.strikes}
            row.repetitions = min(row.repetitions, len(asked))
        if seen.strikes and not self.rolls_back:
            step_s = undisturbed.step_s
            share = -(-self._config.micro_batches // max(1, self._workers // self._config.layout.model_workers))
            one = step_s / max(1, share)
            row.bound_s = step_s + killed * share * one + late_s + 0.5 * killed

    def train(
        self,
        steps: int,
        strikes: Sequence[Strike],
        look: Callable[[WorkerSet, int], None] | None = None,
        *,
        elastic: Elastic | None = None,
        run_dir: str | None = None,
        resume: bool = False,
        storage: Storage | None = None,
        struck_outside: bool = False,
        **settings: Any,
    ) -> Observed:
        """Train, and look on.

        Arguments:
            look: called with the last committed step, again and again, while it trains.
            struck_outside: who ends was struck by ``look``, or left.
        """
        seen, processes = Observed(struck_outside=struck_outside), dict[int, int]()

        def turn(workers: WorkerSet) -> None:
            header, now = workers.survival.header, time.monotonic()
            seen.strikes += [note for note in workers.notes if note not in seen.strikes]
            seen.limits_s += [limit for limit in workers.survival.limits_s if limit not in seen.limits_s]
            if header is None or header.course is not Course.TRAINING:
                return
            committed = header.committed
            for step in range(max(seen.committed_at, default=committed - 1) + 1, committed + 1):
                seen.committed_at[step] = now
            alive = {w.rank: w.process for w in workers.alive}
            if not struck_outside and not workers.interrupts:
                seen.ended |= {process for rank, process in processes.items() if alive.get(rank) != process}
            processes.clear()
            processes.update(alive)
            if look is not None:
                look(workers, committed)

        with _directory(run_dir) as directory:
            given = arguments(self._config, steps, directory, strikes, storage, settings, resume)
            target = {"call": "unisono.check.strike:train", "arguments": given}
            together = self._config.layout.model_workers
            count = elastic.least if elastic is not None else self._workers
            self.launcher.each_turn, self.launcher.turn_s = turn, TURN_S
            try:
                seen.ending = self.launcher.run(
                    target, count, elastic=elastic, together=together, output=STANDARD_ERROR
                )
            except UnisonoError as error:
                seen.error = str(error)
            finally:
                self.launcher.each_turn = None
                seen.over_at = time.monotonic()
            if seen.ending is not None and seen.ending.interrupted:
                raise KeyboardInterrupt
            lines = (Path(directory) / EVENTS).read_text(encoding="utf-8").splitlines()
            seen.records = [json.loads(line) for line in lines]
        return seen


def judge_rolled_back(row: Row, seen: Observed, undisturbed: Observed) -> None:
    """Compare a run in which all start again: what was trained twice had the same losses, and how much that was."""
    losses = dict(seen.losses)
    again = all(losses[step] == loss for step, loss in seen.losses)
    row.exactly_once = row.exactly_once and again and losses == dict(undisturbed.losses)
    row.lost_steps = max([row.lost_steps, *(record["lost_steps"] for record in seen.of("RolledBack"))])


def arguments(
    config: Config,
    steps: int,
    run_dir: str,
    strikes: Sequence[Strike],
    storage: Storage | None,
    settings: dict[str, Any],
    resume: bool,
) -> dict[str, Any]:
    """Those of `check.strike.train`: a configuration without records that take time."""
    data = config.model_dump(mode="json")
    decay = config.schedule.decay_steps or config.steps
    data["schedule"] = {**data["schedule"], "decay_steps": decay}
    data["layout"] = {**data["layout"], "data": None}
    data["observe"] = {"progress": False, "tensorboard": False, "report": False}
    data |= {"steps": steps, "run_dir": run_dir, "checkpoint": {}, "validation": {}, **settings}
    return {
        "config": validate(Config, data, "chaos").model_dump(mode="json"),
        "strikes": [strike.as_dict() for strike in strikes],
        "storage": storage.as_dict() if storage is not None else None,
        "resume": resume,
    }


@contextlib.contextmanager
def _directory(given: str | None) -> Iterator[str]:
    """The one given, or one of its own for a while."""
    if given is not None:
        yield given
        return
    with tempfile.TemporaryDirectory(prefix="unisono-chaos-") as own:
        yield own


def with_snapshots(config: Config) -> Config:
    """A configuration that says how many steps may be lost."""
    fault = config.fault
    if fault.snapshot_every == "auto":
        fault = fault.model_copy(update={"snapshot_every": EVERY})
    return config.model_copy(update={"fault": fault})
