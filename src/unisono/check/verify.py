"""``unisono verify``: the same run in several layouts, and whether all digests are equal."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from unisono.config import Config, Layout, validate
from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher
from unisono.launch.possible import refuse_impossible
from unisono.launch.task import STANDARD_ERROR
from unisono.plan.hosts import Hosts, evenly

TOLERANCE = 5e-5
"""Of the last loss, relative: what another order of sums inside layers may change in a few dozen steps."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One way to run it.

    Attributes:
        name: for the reader.
        layout: in place of the configuration's.
        hosts: its workers on each set that shares no memory with others.
        where: it was asked for, for an error; empty for nothing to say.
    """

    name: str
    layout: Layout
    hosts: Hosts
    where: str = ""

    @property
    def on(self) -> int:
        """How many hosts it is on."""
        return len(self.hosts.sizes)


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        digests: by name of the trial.
        losses: of the last step.
        seconds: that each took.
        steps, resume_at: what was trained, and after which step it was stopped and resumed.
        hosts: over which several workers were spread; one worker is on one.
        what: the trials, in the plural.
        roundings: of the trials: those that share one must have equal digests, all must have close losses.
    """

    digests: dict[str, str]
    losses: dict[str, float]
    seconds: dict[str, float]
    steps: int
    resume_at: int | None
    hosts: int = 1
    what: str = "numbers of workers"
    roundings: Mapping[str, object] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether the result is the same in all trials: bit for bit where sums have one order, and close elsewhere."""
        results = {(self.roundings.get(name), digest) for name, digest in self.digests.items()}
        return len(results) == self._ways and self.loss_difference <= TOLERANCE

    @property
    def _ways(self) -> int:
        """Different orders of sums."""
        return len({self.roundings.get(name) for name in self.digests})

    @property
    def loss_difference(self) -> float:
        """The largest difference of a last loss from the first trial's, relative to it."""
        first, *others = self.losses.values()
        return max((abs(loss - first) / max(abs(first), 1e-30) for loss in others), default=0.0)

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "equal": self.equal,
            "digests": self.digests,
            "losses": self.losses,
            "seconds": {name: round(s, 3) for name, s in self.seconds.items()},
            "steps": self.steps,
            "resume_at": self.resume_at,
            "hosts": self.hosts,
            "loss_difference": self.loss_difference,
        }

    def as_text(self) -> str:
        """For a reader."""
        again = f", stopped after step {self.resume_at} and resumed in another" if self.resume_at else ""
        if self.equal and len(self.digests) == 1:
            return f"one of the {self.what} proves nothing; give several"
        if self.equal:
            on = f" on up to {self.hosts} hosts" if self.hosts > 1 else ""
            if self._ways > 1:
                return (
                    f"equal: {len(self.digests)} {self.what}{on}{again}, one result for each of {self._ways} ways of "
                    f"dividing layers; their losses differ by {self.loss_difference:.1e} at most"
                )
            return f"equal: {len(self.digests)} {self.what}{on}{again}, one result"
        inexact = next((digest for digest in self.digests.values() if digest.startswith("not exact")), None)
        if inexact is not None:
            why = inexact.rpartition(": ")[0]
            return f"NOT EQUAL: {why}; it needs wire.algorithm=canonical and wire.compression=none"
        if self.loss_difference > TOLERANCE:
            return (
                f"NOT EQUAL: the losses differ by {self.loss_difference:.1e}, relative to the first; "
                f"rounding explains {TOLERANCE:.0e}"
            )
        return f"NOT EQUAL: the result depends on the {self.what.removesuffix('s')}"


def numbers_of_workers(config: Config, workers: Sequence[int], hosts: int) -> list[Trial]:
    """A trial for each number of workers, over so many hosts, and the least number on one host where there are several.

    Raises:
        ConfigurationError: for a number that cannot be.
    """
    each = config.layout.model_workers
    if hosts > 1 and each not in workers:
        workers = [each, *workers]
    trials = []
    for count in workers:
        replicas = config.layout.model_copy(update={"data": None}).replicas(count)
        if 1 < replicas < hosts:
            raise ConfigurationError(f"{count} workers cannot be on {hosts} hosts; give --workers from {hosts * each}")
        layout = config.layout.model_copy(update={"data": replicas})
        trials.append(_trial(config, str(count), layout, hosts))
    return trials


def _trial(config: Config, name: str, layout: Layout, hosts: int, where: str = "") -> Trial:
    """A layout over so many hosts, or fewer where it has fewer replicas.

    Raises:
        ConfigurationError: where it cannot be.
    """
    each, replicas = layout.model_workers, layout.data or 1
    placed = Hosts(evenly(replicas * each, min(hosts, replicas), each))
    try:
        refuse_impossible(config.model_copy(update={"layout": layout}), placed)
    except ConfigurationError as error:
        raise ConfigurationError(f"{where}: {error}" if where else str(error)) from None
    return Trial(name, layout, placed, where)


def layouts_in(path: Path, config: Config, hosts: int) -> list[Trial]:
    """A trial for each line of a file, ``data=2 pipeline=2 schedule=1f1b`` for example; ``#`` begins a comment.

    Arguments:
        hosts: over which the replicas of each are spread, as far as it has so many; then the first one of each way of
            dividing layers that only is on several is tried on one host too.

    Raises:
        ConfigurationError: naming the line that cannot be a layout, or where none has several replicas to spread.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"cannot read layouts from {path}: {error}; give a text file, a layout a line"
        ) from error
    trials = []
    for number, line in enumerate(lines, 1):
        name = line.partition("#")[0].strip()
        if not name:
            continue
        where = f"{path}, line {number}"
        words = dict(_setting(word, where) for word in name.split())
        layout = validate(Layout, {"data": 1, **words}, where)
        trials.append(_trial(config, name, layout, hosts, where))
    if not trials:
        raise ConfigurationError(f"{path} holds no layout; give one a line, data=2 pipeline=2 for example")
    if hosts > 1 and all(trial.on == 1 for trial in trials):
        raise ConfigurationError(f"no layout of {path} has replicas for {hosts} hosts; give some of data=2 or more")
    alone = {trial.layout.rounding for trial in trials if trial.on == 1}
    first = {trial.layout.rounding: trial for trial in reversed(trials) if trial.layout.rounding not in alone}
    again = [trial for trial in trials if first.get(trial.layout.rounding) is trial]
    return [_trial(config, f"{trial.name} on one host", trial.layout, 1, trial.where) for trial in again] + trials


def _setting(word: str, where: str) -> tuple[str, Any]:
    key, separator, value = word.partition("=")
    if not separator or not key:
        raise ConfigurationError(f"{where}: {word!r} is not of the form key=value, data=2 for example")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise ConfigurationError(f"{where}: the value of {word!r} is not valid YAML") from error


def verify(
    launcher: Launcher,
    config: Config,
    trials: Sequence[Trial],
    steps: int,
    resume_at: int | None,
    say: Callable[[str], None] | None,
    what: str,
) -> Verification:
    """Train ``steps`` steps in each trial; with ``resume_at`` each is stopped after that step and resumed as the next.

    Raises:
        ConfigurationError: for a step that cannot be.
    """
    if resume_at is not None and resume_at >= steps:
        raise ConfigurationError(f"--resume-at {resume_at} is not before the last step, {steps}; choose an earlier one")
    roundings = {trial.name: trial.layout.rounding for trial in trials}
    if resume_at is not None and len(set(roundings.values())) > 1:
        raise ConfigurationError(
            "the layouts divide layers in several ways (tensor, sequence_parallel, loss_parallel, tensor_plan), and "
            "each is resumed as the next; give those of one way with --resume-at"
        )
    digests, losses, seconds = {}, {}, {}
    for i, trial in enumerate(trials):
        started = time.monotonic()
        if resume_at is None:
            result = _train(launcher, config, trial, steps, None, resume=False)
        else:
            with tempfile.TemporaryDirectory(prefix="unisono-verify-") as run_dir:
                _train(launcher, config, trial, resume_at, run_dir, resume=False)
                following = trials[(i + 1) % len(trials)]
                result = _train(launcher, config, following, steps, run_dir, resume=True)
        name = trial.name
        digests[name], losses[name] = result["digest"], result["loss"]
        seconds[name] = time.monotonic() - started
        if say is not None:
            title = f"{name} worker{'s' * (name != '1')}" if name.isdigit() else name
            title += f" on {trial.on} hosts" if trial.on > 1 else ""
            say(f"{title}: {result['digest']}  loss {result['loss']:.6f}  {seconds[name]:.1f} s")
    hosts = max(trial.on for trial in trials)
    return Verification(digests, losses, seconds, steps, resume_at, hosts, what, roundings)


def _train(
    launcher: Launcher, config: Config, trial: Trial, steps: int, run_dir: str | None, *, resume: bool
) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    decay = config.schedule.decay_steps or config.steps  # the schedule is part of the run, however few steps are taken
    data["schedule"] = {**data["schedule"], "decay_steps": decay}
    data["layout"] = trial.layout.model_dump(mode="json")
    data["observe"] = {"progress": False, "tensorboard": False, "report": False}
    data |= {"steps": steps, "run_dir": run_dir, "checkpoint": {}, "validation": {}}
    settings = validate(Config, data, "verify").model_dump(mode="json")
    arguments = {"config": settings, "resume": resume, "evaluate": False}
    target = {"call": "unisono.tasks.job:train", "arguments": arguments}
    together = trial.layout.model_workers
    ending = launcher.run(target, trial.hosts.size, hosts=trial.on, together=together, output=STANDARD_ERROR)
    if ending.interrupted:
        raise KeyboardInterrupt
    result: dict[str, Any] = ending.results[0]
    return result
