"""``unisono chaos``: faults against a real run."""

import functools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unisono.cli.options import ConfigFile, JsonOption, Overrides, WorkersOption
from unisono.errors import ConfigurationError

if TYPE_CHECKING:
    from unisono.check.observed import Row


def chaos(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    faults: Annotated[
        str | None, typer.Option(help="Names, kill-backward,stop for example; default: all.", show_default=False)
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Faults of each kind.")] = 20,
    seed: Annotated[int, typer.Option(help="Of random faults.")] = 0,
    hosts: Annotated[
        bool,
        typer.Option("--hosts", help="Faults of hosts: 2 to 4 launchers on this machine, of -n workers each."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Let workers be killed, stopped, hang, come and go in a real run, and disks be full; compare with one undisturbed.

    For each kind of fault: the time to the next commit, what was computed again, whether the survivors' processes went
    on, and whether the digest is equal: exit code 0 only if it always is.

    Example: unisono chaos configs/lm.yaml -n 4 --faults kill-backward,kill-mid-commit,stop --repeat 5

    Hosts that are killed, stopped, or cut off (which needs root): unisono chaos configs/lm.yaml -n 1 --hosts --repeat 5
    """
    if hosts:
        _of_hosts(config, overrides or [], workers or 1, faults, repeat, as_json)
        return
    from unisono.check.chaos import FAULTS, Chaos, chosen_faults, why_not
    from unisono.config import load
    from unisono.launch.launcher import shares_memory
    from unisono.launch.possible import refuse_impossible, refuse_inexact, rolls_back, survives
    from unisono.launch.runs import choose_workers, preloads
    from unisono.plan.hosts import Hosts

    settings = load(config, overrides or [])
    count = choose_workers(settings, workers or max(2, settings.layout.model_workers * (settings.layout.data or 2)))
    refuse_impossible(settings, Hosts((count,)))
    refuse_inexact(settings)
    survived = survives(settings, count)
    if not shares_memory() or not (survived or rolls_back(settings)):
        raise ConfigurationError(
            "chaos needs a run that survives the loss of workers: on Linux, with fault.on_loss=replace or wait, and "
            "without layout.offload and compression"
        )
    names = chosen_faults(faults, FAULTS, functools.partial(why_not, workers=count, survived=survived), _say)
    from unisono.launch.local import LocalLauncher

    with LocalLauncher() as launcher:
        launcher.preload(preloads(settings, [settings.layout]))
        subject = Chaos(launcher, settings, count, repeat, seed, _say)
        _show(map(subject.run, names), as_json)


def _of_hosts(config: Path, overrides: list[str], workers: int, faults: str | None, repeat: int, as_json: bool) -> None:
    """Faults of hosts."""
    from unisono.check.chaos import chosen_faults
    from unisono.check.host_chaos import FAULTS, HostChaos, why_not_between_hosts
    from unisono.config import load
    from unisono.launch.possible import refuse_impossible, refuse_inexact, rolls_back, survives_hosts
    from unisono.plan.hosts import Hosts

    names = chosen_faults(faults, FAULTS, why_not_between_hosts, _say)
    settings = load(config, overrides)
    refuse_impossible(settings, Hosts((workers,) * max(FAULTS[name] for name in names)))
    refuse_inexact(settings)
    if not (survives_hosts(settings) or rolls_back(settings)):
        raise ConfigurationError(
            "chaos --hosts needs a run that survives the loss of hosts: fault.on_loss=replace or wait, and no "
            "layout.offload and compression"
        )
    subject = HostChaos(settings, workers, repeat, _say)
    _show(map(subject.run, names), as_json)


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _show(found: "Iterable[Row]", as_json: bool) -> None:
    """Rows as they come, or together, even where one more cannot be had; exit code 1 where one is bad."""
    rows = []
    try:
        for row in found:
            rows.append(row)
            if not as_json:
                typer.echo(row.as_text())
    finally:
        if as_json:
            typer.echo(json.dumps({"rows": [row.as_dict() for row in rows]}))
    if not all(row.good for row in rows):
        raise typer.Exit(1)
