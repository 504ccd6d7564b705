"""The ``unisono checkpoint`` commands."""

from pathlib import Path
from typing import Any

from unisono.errors import CheckpointError
from unisono.state.checkpoint import DIRECTORY, path_of, steps_in, verify
from unisono.state.export import export
from unisono.state.manifest import NAME


def listing(run_dir: Path) -> list[dict[str, Any]]:
    """The checkpoints of a run, the newest first, each checked.

    Raises:
        CheckpointError: where there is no such directory.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"no run in {run_dir}; give the directory of a run")
    directory = run_dir / DIRECTORY
    return [_row(path_of(directory, step)) for step in steps_in(directory)]


def checked(path: Path) -> list[dict[str, Any]]:
    """A checkpoint, or all of a run, checked."""
    if (path / NAME).exists():
        return [_row(path)]
    rows = listing(path)
    if not rows:
        raise CheckpointError(f"no checkpoint in {path}; give a checkpoint, or the directory of a run that has one")
    return rows


def exported(path: Path, target: Path) -> tuple[list[Path], list[str]]:
    """Export a checkpoint, or a run's newest intact one: the files, and what there is to say of the choice.

    Raises:
        CheckpointError: where there is none, or the target is there already.
    """
    said: list[str] = []
    if not (path / NAME).exists():
        rows = listing(path)
        intact = [row for row in rows if row["intact"]]
        if not intact:
            raise CheckpointError(f"no intact checkpoint in {path}; give a checkpoint, or the directory of a run")
        said = [f"passed over: {row['reason']}" for row in rows if row["step"] > intact[0]["step"]]
        path = Path(intact[0]["path"])
        said.append(f"exporting {path}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already; give a new or empty directory")
    return export(path, target), said


def _row(path: Path) -> dict[str, Any]:
    size_bytes = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    row: dict[str, Any] = {"path": str(path), "size_bytes": size_bytes}
    row["step"] = int(path.name.rpartition("-")[2]) if path.name.rpartition("-")[2].isdigit() else -1
    try:
        manifest = verify(path)
    except CheckpointError as error:
        return row | {"intact": False, "reason": str(error), "digest": None}
    return row | {"intact": True, "reason": None, "digest": manifest.digest, "validation": manifest.validation}
