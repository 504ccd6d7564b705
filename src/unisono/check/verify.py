"""``unisono verify``: the same run on several numbers of workers, and whether all digests are equal."""

import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from unisono.config import Config, more_workers_than_micro_batches, validate
from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher
from unisono.launch.local import STANDARD_ERROR


@dataclass(frozen=True, slots=True)
class Verification:
    """What `verify` found.

    Attributes:
        digests: by number of workers.
        losses: of the last step, by number of workers.
        seconds: that each took.
        steps, resume_at: what was trained, and after which step it was stopped and resumed.
        hosts: over which several workers were spread; one worker is on one.
    """

    digests: dict[int, str]
    losses: dict[int, float]
    seconds: dict[int, float]
    steps: int
    resume_at: int | None
    hosts: int = 1

    @property
    def equal(self) -> bool:
        """Whether the result does not depend on the number of workers."""
        return len(set(self.digests.values())) == 1

    def as_dict(self) -> dict[str, Any]:
        """As data."""
        return {
            "equal": self.equal,
            "digests": {str(n): digest for n, digest in self.digests.items()},
            "losses": {str(n): loss for n, loss in self.losses.items()},
            "seconds": {str(n): round(s, 3) for n, s in self.seconds.items()},
            "steps": self.steps,
            "resume_at": self.resume_at,
            "hosts": self.hosts,
        }

    def as_text(self) -> str:
        """For a reader."""
        again = f", stopped after step {self.resume_at} and resumed on another number" if self.resume_at else ""
        if self.equal and len(self.digests) == 1:
            return "one number of workers proves nothing; give several, --workers 1,2 for example"
        if self.equal:
            on = f" on up to {self.hosts} hosts" if self.hosts > 1 else ""
            return f"equal: {len(self.digests)} numbers of workers{on}{again}, one result"
        inexact = next((digest for digest in self.digests.values() if digest.startswith("not exact")), None)
        if inexact is not None:
            why = inexact.rpartition(": ")[0]
            return f"NOT EQUAL: {why}; it needs wire.algorithm=canonical and wire.compression=none"
        return "NOT EQUAL: the result depends on the number of workers"


def verify(
    launcher: Launcher,
    config: Config,
    workers: Sequence[int],
    steps: int,
    resume_at: int | None,
    say: Callable[[str], None] | None,
    hosts: int = 1,
) -> Verification:
    """Train ``steps`` steps on each number of workers.

    With ``resume_at`` each run is stopped after that step and resumed on the next number in the list. With several
    ``hosts`` every number of workers is spread over as many sets that share no memory, and one worker on one is added.

    Raises:
        ConfigurationError: for a number of workers, or a step, that cannot be.
    """
    if resume_at is not None and resume_at >= steps:
        raise ConfigurationError(f"--resume-at {resume_at} is not before the last step, {steps}; choose an earlier one")
    for count in workers:
        if count > config.micro_batches:
            raise ConfigurationError(more_workers_than_micro_batches(count, config.micro_batches))
        if 1 < count < hosts:
            raise ConfigurationError(f"{count} workers cannot be on {hosts} hosts; give --workers from {hosts}")
    if hosts > 1 and 1 not in workers:
        workers = [1, *workers]
    digests, losses, seconds = {}, {}, {}
    for i, count in enumerate(workers):
        started = time.monotonic()
        if resume_at is None:
            result = _train(launcher, config, count, hosts, steps, None, resume=False)
        else:
            with tempfile.TemporaryDirectory(prefix="unisono-verify-") as run_dir:
                _train(launcher, config, count, hosts, resume_at, run_dir, resume=False)
                following = workers[(i + 1) % len(workers)]
                result = _train(launcher, config, following, hosts, steps, run_dir, resume=True)
        digests[count], losses[count] = result["digest"], result["loss"]
        seconds[count] = time.monotonic() - started
        if say is not None:
            name = f"{count} worker{'s' * (count > 1)}" + (f" on {hosts} hosts" if min(count, hosts) > 1 else "")
            say(f"{name}: {result['digest']}  loss {result['loss']:.6f}  {seconds[count]:.1f} s")
    return Verification(digests, losses, seconds, steps, resume_at, hosts)


def _train(
    launcher: Launcher, config: Config, workers: int, hosts: int, steps: int, run_dir: str | None, *, resume: bool
) -> dict[str, Any]:
    data = config.model_dump(mode="json")
    decay = config.schedule.decay_steps or config.steps  # the schedule is part of the run, however few steps are taken
    data["schedule"] = {**data["schedule"], "decay_steps": decay}
    data["layout"] = {**data["layout"], "data": workers}
    data["observe"] = {"progress": False, "tensorboard": False, "report": False}
    data |= {"steps": steps, "run_dir": run_dir, "checkpoint": {}, "validation": {}}
    settings = validate(Config, data, "verify").model_dump(mode="json")
    arguments = {"config": settings, "resume": resume, "evaluate": False}
    target = {"call": "unisono.tasks.job:train", "arguments": arguments}
    ending = launcher.run(target, workers, hosts=min(hosts, workers), output=STANDARD_ERROR)
    if ending.interrupted:
        raise KeyboardInterrupt
    result: dict[str, Any] = ending.results[0]
    return result
