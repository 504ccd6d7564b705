"""The order of a step's pushes, on disk: a file a step, without pickle."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unisono.errors import CheckpointError
from unisono.plan.pool import Entry

DIRECTORY = "order"


def path_of(run_dir: Path, step: int) -> Path:
    """Where a step's order lies."""
    return run_dir / DIRECTORY / f"step-{step:08d}.npz"


def write_order(
    run_dir: Path, step: int, order: Sequence[Sequence[Entry]], base: Sequence[int], sums: NDArray[np.float64]
) -> None:
    """Record a step; whole or not at all.

    Arguments:
        base: the version of each server as the step began; on record, each begins with 0.
        sums: loss and weight of each unit, by which a replay sees that it is one.
    """
    rows = []
    for server, entries in enumerate(order):
        for entry in entries:
            read = (version - begun for version, begun in zip(entry.read, base, strict=True))
            rows.append((server, entry.unit, entry.worker, entry.first, entry.stop, *read))
    _write(path_of(run_dir, step), servers=np.array(len(order)), entries=np.array(rows, dtype=np.int64), sums=sums)


def _write(path: Path, **arrays: NDArray[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez_compressed(file, allow_pickle=False, **arrays)
    unfinished.replace(path)


def read_order(run_dir: Path, step: int) -> tuple[list[list[Entry]], NDArray[np.float64]]:
    """What `write_order` wrote: the entries of each server, and the sums.

    Raises:
        CheckpointError: where there is none, or it cannot be read.
    """
    found = _read(path_of(run_dir, step), step, ("servers", "entries", "sums"))
    servers, rows, sums = int(found["servers"]), found["entries"].tolist(), found["sums"]
    order: list[list[Entry]] = [[] for _ in range(servers)]
    for server, unit, worker, first, stop, *read in rows:
        order[server].append(Entry(unit, worker, first, stop, tuple(read)))
    return order, sums


def write_rounds(
    run_dir: Path, step: int, rounds: Sequence[Sequence[int]], sums: Sequence[tuple[float, float]]
) -> None:
    """Record a step that was done in rounds: the units that counted in each, and loss and weight that they came to."""
    rows = [(number, unit) for number, units in enumerate(rounds) for unit in units]
    _write(path_of(run_dir, step), rounds=np.array(rows, dtype=np.int64), sums=np.array(sums))


def read_rounds(run_dir: Path, step: int) -> tuple[list[list[int]], list[tuple[float, float]]]:
    """What `write_rounds` wrote.

    Raises:
        CheckpointError: where there is none, or it cannot be read.
    """
    found = _read(path_of(run_dir, step), step, ("rounds", "sums"))
    sums = [(float(loss), float(weight)) for loss, weight in found["sums"]]
    rounds: list[list[int]] = [[] for _ in sums]
    for number, unit in found["rounds"].tolist():
        rounds[number].append(unit)
    return rounds, sums


def _read(path: Path, step: int, names: Sequence[str]) -> dict[str, NDArray[Any]]:
    try:
        with np.load(path, allow_pickle=False) as found:
            return {name: found[name] for name in names}
    except FileNotFoundError:
        raise CheckpointError(f"{path} is not there: the run was not recorded at step {step}") from None
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; the run cannot be replayed from here on") from error
