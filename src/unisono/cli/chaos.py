"""``unisono chaos``: faults against a real run."""

import json
from typing import Annotated

import typer

from unisono.cli.options import ConfigFile, JsonOption, Overrides, WorkersOption
from unisono.errors import ConfigurationError


def chaos(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    faults: Annotated[
        str | None, typer.Option(help="Names, kill-backward,stop for example; default: all.", show_default=False)
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Faults of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Of random faults.")] = 0,
    as_json: JsonOption = False,
) -> None:
    """Let workers be killed, stopped, hang, come and go in a real run, and disks be full; compare with one undisturbed.

    For each kind of fault: the time to the next commit, what was computed again, whether the survivors' processes went
    on, and whether the digest is equal: exit code 0 only if it always is.

    Example: unisono chaos configs/lm.yaml -n 4 --faults kill-backward,kill-mid-commit,stop --repeat 5
    """
    from unisono.check.chaos import Chaos, chosen_faults
    from unisono.config import load
    from unisono.launch.launcher import shares_memory
    from unisono.launch.possible import refuse_impossible, survives
    from unisono.launch.runs import choose_workers, preloads
    from unisono.plan.hosts import Hosts

    names = chosen_faults(faults)
    settings = load(config, overrides or [])
    count = choose_workers(settings, workers or max(2, settings.layout.model_workers * (settings.layout.data or 2)))
    refuse_impossible(settings, Hosts((count,)))
    if not shares_memory() or not survives(settings, count):
        raise ConfigurationError(
            "chaos needs a run that survives in the same processes: at least two workers of one host, device cpu, "
            "layout.tensor=1, and a state that they share"
        )
    from unisono.launch.local import LocalLauncher

    with LocalLauncher() as launcher:
        launcher.preload(preloads(settings, [settings.layout]))
        subject = Chaos(launcher, settings, count, repeat, seed, lambda text: typer.echo(text, err=True))
        rows = []
        for name in names:
            rows.append(subject.run(name))
            if not as_json:
                typer.echo(rows[-1].as_text())
        if as_json:
            typer.echo(json.dumps({"rows": [row.as_dict() for row in rows]}))
        if not all(row.good for row in rows):
            raise typer.Exit(1)
