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


def exported(path: Path, target: Path) -> list[Path]:
    """Export a checkpoint, or a run's newest intact one."""
    if not (path / NAME).exists():
        intact = [row for row in listing(path) if row["intact"]]
        if not intact:
            raise CheckpointError(f"no intact checkpoint in {path}; give a checkpoint, or the directory of a run")
        path = Path(intact[0]["path"])
    return export(path, target)


def _row(path: Path) -> dict[str, Any]:
    size_bytes = sum(f.stat().st_size for f in path.iterdir() if f.is_file())
    row: dict[str, Any] = {"path": str(path), "size_bytes": size_bytes}
    row["step"] = int(path.name.rpartition("-")[2]) if path.name.rpartition("-")[2].isdigit() else -1
    try:
        manifest = verify(path)
    except CheckpointError as error:
        return row | {"intact": False, "reason": str(error), "digest": None}
    return row | {"intact": True, "reason": None, "digest": manifest.digest, "validation": manifest.validation}
