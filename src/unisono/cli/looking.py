"""Commands that look at this machine or at a run: ``doctor`` and ``report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import JsonOption, launcher_here


def doctor(
    measured: Annotated[
        bool, typer.Option("--measure", help="Time products, memory and links too, and store them for unisono plan.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what this machine offers, and whether two workers agree on it.

    Example: unisono doctor --measure
    """
    with launcher_here() as launcher:
        from unisono.check.doctor import examine

        findings = examine(launcher)
        if measured:
            from unisono.check.machine import measure
            from unisono.plan.described import profile_path

            findings += measure(launcher, profile_path())
        if as_json:
            typer.echo(
                json.dumps({"healthy": all(f.good for f in findings), "findings": [f.as_dict() for f in findings]})
            )
        else:
            for finding in findings:
                typer.echo(f"{'ok  ' if finding.good else 'BAD '} {finding.name:<16} {finding.text}")
        if not all(f.good for f in findings):
            raise typer.Exit(1)


def report(run_dir: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)]) -> None:
    """Make report.html anew from what a run has recorded.

    Example: unisono report runs/lm-001
    """
    from unisono.observe.report import write_report

    typer.echo(str(write_report(run_dir)))
