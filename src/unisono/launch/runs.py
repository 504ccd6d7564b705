"""Where a run's records go, and with how many workers it starts: decided by the launcher before any worker starts."""

import os
import re
from pathlib import Path

from unisono.config import Config, more_workers_than_micro_batches
from unisono.errors import ConfigurationError

ROOT = Path("runs")


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def choose_workers(config: Config) -> int:
    """The configured number, or one for each core and its threads, never more than there are micro-batches.

    Raises:
        ConfigurationError: for more workers than micro-batches.
    """
    wanted = config.layout.data
    if wanted is None:
        if config.device != "cpu":
            return 1
        return max(1, min(cores() // config.threads, config.micro_batches))
    if wanted > config.micro_batches:
        raise ConfigurationError(more_workers_than_micro_batches(wanted, config.micro_batches))
    return wanted


def next_run_dir(given: str | None, task: str, *, resume: bool) -> Path:
    """The directory of a run: the one given, the last of the task where it is resumed, else the next free one.

    Raises:
        ConfigurationError: where there is no run to resume, or a run has been in the directory already.
    """
    if given is not None:
        path = Path(given)
        if not resume and _has_trained(path):
            raise ConfigurationError(f"{path} holds a run already; resume it with --resume, or give another run_dir")
        if resume and not path.exists():
            raise ConfigurationError(f"no run in {path}; start it without --resume")
        return path
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", task.rpartition(":")[2])
    existing = sorted(
        int(p.name.rpartition("-")[2]) for p in ROOT.glob(f"{name}-*") if p.name.rpartition("-")[2].isdigit()
    )
    if resume:
        if not existing:
            raise ConfigurationError(
                f"no run of task {task} in {ROOT}/ to resume; start one, or give run_dir=DIRECTORY"
            )
        return ROOT / f"{name}-{existing[-1]:03d}"
    return ROOT / f"{name}-{(existing[-1] if existing else 0) + 1:03d}"


def _has_trained(path: Path) -> bool:
    """Whether a run has taken a step in a directory; one that failed before may be started there again."""
    log = path / "events.jsonl"
    return log.exists() and '"StepFinished"' in log.read_text(encoding="utf-8", errors="replace")


def write_config(run_dir: Path, text: str) -> None:
    """Store the resolved configuration, whole or not at all.

    Raises:
        ConfigurationError: where the directory cannot be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        temporary = run_dir / "config.yaml.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(run_dir / "config.yaml")
    except OSError as error:
        raise ConfigurationError(f"cannot write into run_dir {run_dir}: {error.strerror}; choose another") from error
