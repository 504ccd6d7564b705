"""Commands that look at this machine or at a run: ``doctor`` and ``report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import ConfigFile, JsonOption, Overrides, WorkersOption, launcher_here


def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers, and whether two workers agree on it.

    Example: unisono doctor
    """
    with launcher_here() as launcher:
        from unisono.check.doctor import examine

        findings = examine(launcher)
        if as_json:
            typer.echo(
                json.dumps({"healthy": all(f.good for f in findings), "findings": [f.as_dict() for f in findings]})
            )
        else:
            for finding in findings:
                typer.echo(f"{'ok  ' if finding.good else 'BAD '} {finding.name:<16} {finding.text}")
        if not all(f.good for f in findings):
            raise typer.Exit(1)


def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    with_profile: Annotated[
        bool, typer.Option("--profile", help="Show parameters, operations and activations, module by module.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a layout is made of: its stages, how long workers wait, the memory of each; nothing is trained.

    Example: unisono plan configs/lm.yaml layout.pipeline=2 layout.data=2 layout.recompute=full --profile
    """
    from unisono.check.plan import plan as make
    from unisono.check.plan import prepared_without_values, profile, profile_as_text
    from unisono.config import load
    from unisono.launch.runs import choose_workers

    settings = load(config, overrides or [])
    prepared, found = prepared_without_values(settings, choose_workers(settings, workers))
    made = make(prepared, found, settings)
    rows = profile(prepared, found) if with_profile else None
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), **({"profile": rows} if rows is not None else {})}))
        return
    if rows is not None:
        typer.echo(profile_as_text(rows))
    typer.echo(made.as_text())


def report(run_dir: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)]) -> None:
    """Make report.html anew from what a run has recorded.

    Example: unisono report runs/lm-001
    """
    from unisono.observe.report import write_report

    typer.echo(str(write_report(run_dir)))
