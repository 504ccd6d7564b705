"""``unisono checkpoint``: list, verify and export checkpoints."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import JsonOption


def list_checkpoints(run_dir: Annotated[Path, typer.Argument(show_default=False)], as_json: JsonOption = False) -> None:
    """List the checkpoints of a run, and whether each is intact.

    Example: unisono checkpoint list runs/lm-001
    """
    from unisono.check.checkpoints import listing
    from unisono.events import readable

    rows = listing(run_dir)
    if as_json:
        typer.echo(json.dumps({"checkpoints": rows}))
    for row in [] if as_json else rows:
        state = "intact" if row["intact"] else f"DAMAGED: {row['reason']}"
        typer.echo(f"step {row['step']:>8}  {readable(row['size_bytes']):>10}  {state}")
    if not rows and not as_json:
        typer.echo(f"no checkpoints in {run_dir}")
    if not all(row["intact"] for row in rows):
        raise typer.Exit(1)


def verify(path: Annotated[Path, typer.Argument(show_default=False)], as_json: JsonOption = False) -> None:
    """Check every byte of a checkpoint, or of all checkpoints of a run.

    Example: unisono checkpoint verify runs/lm-001/checkpoints/step-00000100
    """
    from unisono.check.checkpoints import checked

    results = checked(path)
    damaged = [r for r in results if not r["intact"]]
    if as_json:
        typer.echo(json.dumps({"intact": not damaged, "checkpoints": results}))
    else:
        for r in results:
            typer.echo(
                f"{r['path']}: " + (f"intact, digest {r['digest']}" if r["intact"] else f"DAMAGED: {r['reason']}")
            )
    if damaged:
        raise typer.Exit(1)


def export(
    path: Annotated[Path, typer.Argument(help="A checkpoint, or a run (its newest intact one).", show_default=False)],
    target: Annotated[Path, typer.Argument(help="A directory for the files.", show_default=False)],
) -> None:
    """Write a checkpoint's model as plain safetensors and as a state_dict file for torch.load.

    Example: unisono checkpoint export runs/lm-001 exported
    """
    from unisono.check.checkpoints import exported

    written, said = exported(path, target)
    for line in (*said, *map(str, written)):
        typer.echo(line)
