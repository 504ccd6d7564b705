"""Commands that look at this machine or at a run: ``doctor`` and ``report``."""

import json
from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import JsonOption, Overrides, WorkersOption, launcher_here
from unisono.errors import ConfigurationError

TOKENS = 4096
"""Of a sequence, where nothing is said."""


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
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG.yaml or MODEL",
            help="A configuration; or a model: llama3:70b, layers=32,hidden=4096,heads=32,vocab=50000, or the "
            "config.json of Hugging Face Transformers.",
            show_default=False,
        ),
    ],
    overrides: Overrides = None,
    workers: WorkersOption = None,
    cluster: Annotated[
        str | None, typer.Option(help="For a model: the devices, COUNTxDEVICE[:OF A NODE][,LINK], 64xH100:8,ib400.")
    ] = None,
    tokens: Annotated[
        int | None,
        typer.Option(min=1, max=10**9, help="For a model: of a sequence; default: 4096, or what it can take."),
    ] = None,
    with_profile: Annotated[
        bool, typer.Option("--profile", help="Show parameters, operations and activations, module by module.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Say what a layout is made of: its stages, how long workers wait, the memory of each; nothing is trained.

    Of a model by its name or numbers, what no layout gets below: the memory of its training state, and its operations;
    with KEY=VALUE (tensor, pipeline, data, zero, micro_batch, micro_batches, sequence, recompute, attention), what a
    device needs where it is divided so, and what a step computes and sends.

    Example: unisono plan configs/lm.yaml layout.pipeline=2 layout.data=2 layout.recompute=full --profile

    Example: unisono plan llama3:405b --cluster 16384xH100:8 --tokens 8192

    Example: unisono plan gpt:22b tensor=8 micro_batch=4 recompute=selective sequence=true --cluster 8xA100-80
    """
    if not config.endswith((".yaml", ".yml")):
        _refuse_with_model(workers, with_profile)
        _say_of_model(config, overrides or [], cluster, tokens, as_json)
        return
    if cluster is not None or tokens is not None:
        option = "--cluster" if cluster is not None else "--tokens"
        raise ConfigurationError(f"{option} is for a model by its name or numbers, not yet for a configuration's own")
    from unisono.check.plan import plan as make
    from unisono.check.plan import prepared_without_values, profile, profile_as_text
    from unisono.config import load
    from unisono.launch.runs import choose_workers

    settings = load(Path(config), overrides or [])
    prepared, found = prepared_without_values(settings, choose_workers(settings, workers))
    made = make(prepared, found, settings)
    rows = profile(prepared, found) if with_profile else None
    if as_json:
        typer.echo(json.dumps({**made.as_dict(), **({"profile": rows} if rows is not None else {})}))
        return
    if rows is not None:
        typer.echo(profile_as_text(rows))
    typer.echo(made.as_text())


def _refuse_with_model(workers: int | None, with_profile: bool) -> None:
    wrong = {"--workers": workers is not None, "--profile": with_profile}
    if given := [name for name, is_so in wrong.items() if is_so]:
        raise ConfigurationError(f"{given[0]} is for a configuration (CONFIG.yaml), and this is a model by its name")


def _say_of_model(text: str, division: list[str], words: str | None, given: int | None, as_json: bool) -> None:
    from unisono.plan.bounds import Bounds
    from unisono.plan.division import Division
    from unisono.plan.hardware import cluster
    from unisono.plan.occupancy import Occupancy, occupancy
    from unisono.plan.traffic import Traffic, traffic
    from unisono.plan.transformer import transformer

    model, devices = transformer(text), cluster(words) if words is not None else None
    tokens = given or min(TOKENS, model.positions or TOKENS)
    if model.positions and tokens > model.positions:
        raise ConfigurationError(f"--tokens is {tokens}, and {model.name} has {model.positions} positions; give fewer")
    bounds = Bounds(model, tokens, devices)
    parts: list[Bounds | Occupancy | Traffic] = [bounds]
    if division:
        divided = Division.read(division)
        parts.append(occupancy(model, tokens, divided, devices))
        parts += [traffic(model, tokens, divided, devices)] if devices is not None else []
    if as_json:
        typer.echo(json.dumps({key: value for part in parts for key, value in part.as_dict().items()}))
        return
    typer.echo("\n".join(part.as_text() for part in parts))


def report(run_dir: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)]) -> None:
    """Make report.html anew from what a run has recorded.

    Example: unisono report runs/lm-001
    """
    from unisono.observe.report import write_report

    typer.echo(str(write_report(run_dir)))
