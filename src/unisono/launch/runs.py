"""Where a run's records go, and with how many workers it starts: decided by the launcher before any worker starts."""

import fcntl
import os
import re
import time
from collections.abc import Iterable
from pathlib import Path

from unisono.config import Config, Layout, more_replicas_than_micro_batches
from unisono.errors import ConfigurationError
from unisono.launch.launcher import shares_memory

ROOT = Path("runs")
POLL_S = 0.02
_HALF_WRITTEN = ("config.yaml.tmp", "report.html.tmp")
_COMPILER = "torch._dynamo"
"""What fake tensors and activation checkpointing import when they are first used: 0.8 s in every worker."""

_DETERMINISM = "torch._inductor.config"
"""What torch imports as soon as deterministic kernels are asked for, as on devices: 1.2 s in every worker, and after
each loss once more."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def default_workers() -> int:
    """One worker a core, where workers can share memory."""
    return cores() if shares_memory() else 1


def preloads(config: Config, layouts: Iterable[Layout]) -> list[str]:
    """What workers should share already imported: the user's modules, and what the layouts need."""
    wanted = any(layout.stages > 1 or layout.recompute != "none" for layout in layouts)
    device = [_DETERMINISM] if config.device != "cpu" else []
    return [*config.preload, *([_COMPILER] if wanted else []), *device]


def choose_workers(config: Config, wanted: int | None = None, bounds: tuple[int, int] | None = None) -> int:
    """The number wanted, the layout's, or one for each core and its threads, never more than there is work for.

    Arguments:
        bounds: the least and the most that it may be.

    Raises:
        ConfigurationError: for a number that the layout cannot have.
    """
    layout, each = config.layout, config.layout.model_workers
    if bounds is not None:
        least, most = bounds
        layout.refuse_broken_replicas(least)
        layout.refuse_broken_replicas(most)
        wanted = min(most, max(least, choose_workers(config) if layout.data is None else each * layout.data))
    if wanted is None and layout.data is None:
        if config.device != "cpu":
            return each
        replicas = min(default_workers() // config.threads // each, config.micro_batches)
        return each * max(1, replicas)
    workers = each * layout.data if wanted is None and layout.data is not None else wanted or each
    replicas = layout.replicas(workers)
    if replicas > config.micro_batches:
        raise ConfigurationError(more_replicas_than_micro_batches(replicas, config.micro_batches, each))
    return workers


def workers_here(config: Config, wanted: int | None, nodes: int) -> int:
    """Workers on this host, one of ``nodes``: the number wanted, its part of the layout's, or one for each core.

    Raises:
        ConfigurationError: where the layout's workers cannot be divided.
    """
    if wanted is not None:
        config.layout.refuse_broken_replicas(wanted, "this host")
        return wanted
    each = config.layout.model_workers
    if config.layout.data is None:
        most = max(1, config.micro_batches // nodes)
        return each * max(1, min(default_workers() // config.threads // each, most))
    if config.layout.data % nodes:
        workers = f"{config.layout.data * each} workers" + (f" in replicas of {each}" if each > 1 else "")
        raise ConfigurationError(
            f"the layout has {workers}, which {nodes} hosts do not divide; say how many each has with -n"
        )
    return config.layout.data // nodes * each


def next_run_dir(given: str | None, task: str, *, resume: bool) -> Path:
    """The directory of a run: the one given, the last of the task where it is resumed, else the next free one.

    Raises:
        ConfigurationError: where there is no run to resume, or a run has been in the directory already.
    """
    if given is not None:
        path = Path(given)
        if not resume and _has_checkpoints(path):
            raise ConfigurationError(f"{path} holds a run already; resume it with --resume, or give another run_dir")
        if resume and not _has_checkpoints(path):
            raise ConfigurationError(f"no checkpoint in {path} to resume from; start the run without --resume")
        return path
    name = re.sub(r"[^A-Za-z0-9_.]+", "-", task.rpartition(":")[2])
    existing = sorted(
        int(p.name.rpartition("-")[2]) for p in ROOT.glob(f"{name}-*") if p.name.rpartition("-")[2].isdigit()
    )
    if resume:
        saved = [number for number in existing if _has_checkpoints(ROOT / f"{name}-{number:03d}")]
        if not saved:
            raise ConfigurationError(
                f"no run of task {task} in {ROOT}/ has a checkpoint to resume; start one, or give run_dir=DIRECTORY"
            )
        return ROOT / f"{name}-{saved[-1]:03d}"
    return ROOT / f"{name}-{(existing[-1] if existing else 0) + 1:03d}"


def _has_checkpoints(path: Path) -> bool:
    """Whether a run has saved anything in a directory; one that ended before may be started there again."""
    return any((path / "checkpoints").glob("step-*[0-9]"))


def lock(run_dir: Path, patience_s: float) -> int:
    """Make a run's directory, and keep other runs out while this one lives: a death frees the descriptor's lock.

    Arguments:
        run_dir: the directory.
        patience_s: for how long one who holds it may still be about to let go of it.

    Raises:
        ConfigurationError: where the directory cannot be made, or another run is at work there.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(run_dir, os.O_RDONLY)
    except OSError as error:
        raise ConfigurationError(f"cannot write into run_dir {run_dir}: {error.strerror}; choose another") from error
    until = time.monotonic() + patience_s
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return descriptor
        except OSError as error:
            if time.monotonic() > until:
                os.close(descriptor)
                raise ConfigurationError(
                    f"another run is at work in {run_dir}; wait for its end, or give another run_dir"
                ) from error
        time.sleep(POLL_S)


def sweep(run_dir: Path) -> None:
    """Remove what a worker that was killed had begun to write of a run's records."""
    for name in _HALF_WRITTEN:
        (run_dir / name).unlink(missing_ok=True)


def write_config(run_dir: Path, text: str) -> None:
    """Store the resolved configuration, whole or not at all.

    Raises:
        ConfigurationError: where the directory cannot be written.
    """
    try:
        temporary = run_dir / "config.yaml.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.rename(run_dir / "config.yaml")
    except OSError as error:
        raise ConfigurationError(f"cannot write into run_dir {run_dir}: {error.strerror}; choose another") from error
