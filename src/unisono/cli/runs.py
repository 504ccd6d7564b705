"""Commands that train: ``train``, ``run`` and ``verify``."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import (
    INTERRUPTED,
    ConfigFile,
    ElasticOption,
    HostsOption,
    JsonOption,
    NodeRankOption,
    NodesOption,
    Overrides,
    RendezvousOption,
    SecretOption,
    SparesOption,
    WitnessOption,
    launcher_here,
    whole_numbers,
    workers_range,
)
from unisono.errors import ConfigurationError

ELSEWHERE = Path("(on host 0)")
"""The run's directory, as hosts know it that keep no records."""


def train(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: ElasticOption = None,
    spares: SparesOption = 0,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest intact checkpoint of run_dir, or of the task's last run."),
    ] = False,
    hosts: HostsOption = None,
    nnodes: NodesOption = 1,
    node_rank: NodeRankOption = 0,
    rendezvous: RendezvousOption = None,
    secret_file: SecretOption = None,
    witness: WitnessOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train what a configuration describes.

    Example: unisono train configs/lm.yaml steps=200 layout.zero=0 -n 2

    With two to eight workers, as unisono scale says while it trains, and one that waits for a lost one's place:
    unisono train configs/lm.yaml --workers 2:8 --spares 1

    On two hosts, the same command on each but for its number:
    unisono train configs/lm.yaml --nnodes 2 --node-rank 0 --rendezvous 10.0.0.1:29400 --secret-file job.secret
    """
    from unisono.launch.spanning import launchers

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file, witness) as here:
        from unisono.config import load, to_yaml
        from unisono.launch.possible import refuse_impossible, refuse_inelastic
        from unisono.launch.runs import choose_workers, next_run_dir, preloads, sweep, workers_here
        from unisono.launch.task import STANDARD_ERROR, STANDARD_OUTPUT, Elastic
        from unisono.plan.hosts import Hosts

        settings = load(config, overrides or [])
        launcher = here.launcher
        wanted, bounds = workers_range(workers)
        if settings.layout.auto:
            if here.nodes > 1 or bounds is not None or spares:
                raise ConfigurationError("layout: auto is for a number of workers on one host, so far; give a layout")
            from unisono.check.choosing import settled

            before = None
            if resume:
                before = load(next_run_dir(settings.run_dir, settings.task, resume=True) / "config.yaml").layout
            settings = settled(launcher, settings, wanted, None if as_json else typer.echo, before)
            wanted = None
        elastic = None
        if here.nodes > 1:
            if bounds is not None or spares:
                raise ConfigurationError("--workers MIN:MAX and --spares are for the workers of one host, so far")
            count = workers_here(settings, wanted or here.slots, here.nodes)
        else:
            count = choose_workers(settings, wanted, bounds)
            elastic = Elastic(*(bounds or (count, count)), spares) if bounds or spares else None
            refuse_impossible(settings, Hosts((elastic.most if elastic else count,)))
            refuse_inelastic(settings, elastic)
        if settings.layout.model_workers > 1 or settings.layout.stages > 1:
            from unisono.check.layouts import refuse_what_does_not_fit

            refuse_what_does_not_fit(settings, {"": settings.layout})
        as_json = as_json or here.number > 0
        run_dir = next_run_dir(settings.run_dir, settings.task, resume=resume) if here.number == 0 else ELSEWHERE
        settings = settings.model_copy(update={"run_dir": str(run_dir)})
        if here.others is not None and here.number == 0:
            here.others.run_dir = str(run_dir.absolute())
        if as_json:
            settings = settings.model_copy(update={"observe": settings.observe.model_copy(update={"progress": False})})
        else:
            typer.echo(to_yaml(settings, defaults=False) + f"# all keys: {run_dir / 'config.yaml'}\n")
        launcher.preload(preloads(settings, [settings.layout]))
        if here.number:
            typer.echo(f"unisono: host {here.number} of {here.nodes}; progress and records are on host 0", err=True)
        arguments = {"config": settings.model_dump(mode="json"), "resume": resume}
        output = STANDARD_ERROR if as_json else STANDARD_OUTPUT
        try:
            ending = launcher.run(
                {"call": "unisono.tasks.job:train", "arguments": arguments},
                count,
                elastic=elastic,
                together=settings.layout.model_workers,
                output=output,
            )
        finally:
            sweep(run_dir)
        result = ending.result
        if result is None:  # on one of several hosts
            typer.echo(
                f"unisono: host {here.number} lost its workers as the others ended; they have the result", err=True
            )
            return
        if as_json and here.number == 0:
            typer.echo(json.dumps({**result, "workers": count}))
        elif not as_json and (run_dir / "report.html").exists():
            typer.echo(f"report: {run_dir / 'report.html'}")
        if here.number:
            typer.echo(f"unisono: {result['reason']} after step {result['step']}, digest {result['digest']}", err=True)
        if ending.interrupted or ending.preempted or result["reason"] == "stopped":  # here, or on another host
            if not as_json:
                words = " ".join(sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"])
                typer.echo(f"to go on: unisono {words}" + (f" run_dir={run_dir}" if "run_dir=" not in words else ""))
            raise typer.Exit(0 if ending.preempted else INTERRUPTED)


def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script that uses unisono.Trainer.", show_default=False)],
    workers: ElasticOption = None,
    spares: SparesOption = 0,
    all_output: Annotated[
        bool, typer.Option("--all-output", help="Show every worker's output, not only rank 0's.")
    ] = False,
    backend: Annotated[
        str | None,
        typer.Option(help="arena: programs that use torch.distributed with gloo get the arena in its place."),
    ] = None,
    hosts: HostsOption = None,
    nnodes: NodesOption = 1,
    node_rank: NodeRankOption = 0,
    rendezvous: RendezvousOption = None,
    secret_file: SecretOption = None,
    witness: WitnessOption = None,
) -> None:
    """Run a script in several workers; what follows the script is its own arguments.

    Example: unisono run -n 4 examples/train_mlp.py --steps 100

    A program of torch.distributed, with this host's shared memory in place of gloo:
    unisono run -n 2 --backend arena train_ddp.py
    """
    if backend not in (None, "arena"):
        raise ConfigurationError(f"--backend is {backend!r}; give arena, or leave it out for what the script asks for")
    if backend is not None and (nnodes > 1 or hosts is not None):
        raise ConfigurationError("--backend arena is for the workers of one host; leave --nnodes and --hosts out")
    if not script.is_file():
        raise ConfigurationError(f"no script at {script}; give an existing Python file")
    from unisono.launch.runs import default_workers
    from unisono.launch.spanning import launchers
    from unisono.launch.task import Elastic

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file, witness, len(context.args)) as here:
        target = {"script": str(script), "argv": list(context.args), "backend": backend}
        wanted, bounds = workers_range(workers)
        if (bounds is not None or spares) and (here.nodes > 1 or backend is not None):
            raise ConfigurationError("--workers MIN:MAX and --spares are for the workers of one host, so far")
        least, most = bounds or (1, wanted or here.slots or default_workers())
        count = min(most, max(least, default_workers())) if bounds else most
        elastic = Elastic(least, most, spares) if bounds or spares else None
        ending = here.launcher.run(target, count, elastic=elastic, show_all=all_output)
        if ending.interrupted:
            raise typer.Exit(INTERRUPTED)


def scale(
    run_dir: Annotated[Path, typer.Argument(help="The directory of a run that trains now.", show_default=False)],
    workers: Annotated[int, typer.Argument(min=1, help="How many are to train from now on.", show_default=False)],
) -> None:
    """Let workers join or leave a run of this host while it trains; its result does not change.

    Example: unisono train configs/lm.yaml --workers 1:4   and, meanwhile: unisono scale runs/lm-001 4
    """
    from unisono.launch.door import ask

    answer = ask(run_dir, {"op": "scale", "workers": workers})
    if "error" in answer:
        raise ConfigurationError(answer["error"])
    typer.echo(answer["text"])


def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[
        str | None, typer.Option(help="Numbers of workers to compare; default: 1,2,3,4.", show_default=False)
    ] = None,
    layouts: Annotated[
        Path | None, typer.Option(help="A file of layouts to compare, one a line: data=2 pipeline=2 zero=1 ...")
    ] = None,
    hosts: Annotated[
        int, typer.Option(min=1, help="Spread them over this many hosts (sets that share no memory, on this machine).")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train with each.")] = 8,
    resume_at: Annotated[
        int | None, typer.Option(min=1, help="Stop after this step, and resume in the next layout.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a run's result does not depend on its layout: exit code 0 only if all digests are equal.

    Example: unisono verify configs/images.yaml --workers 1,2,3 --steps 20 --resume-at 7

    In every layout of a file: unisono verify configs/lm.yaml --layouts configs/layouts.txt

    With the replicas on two hosts: unisono verify configs/lm.yaml layout.pipeline=2 --workers 4,8 --hosts 2
    """
    if layouts is not None and workers is not None:
        raise ConfigurationError("--layouts says how many workers there are; leave --workers out")
    with launcher_here() as launcher:
        from unisono.check.layouts import refuse_what_does_not_fit
        from unisono.check.verify import layouts_in, numbers_of_workers
        from unisono.check.verify import verify as check
        from unisono.config import load
        from unisono.launch.possible import refuse_to_compare
        from unisono.launch.runs import preloads

        settings = load(config, overrides or [])
        refuse_to_compare(settings)
        if layouts is not None:
            trials, what = layouts_in(layouts, settings, hosts), "layouts"
        else:
            numbers = whole_numbers(workers or "1,2,3,4", "--workers")
            trials, what = numbers_of_workers(settings, numbers, hosts), "numbers of workers"
        refuse_what_does_not_fit(settings, {trial.where: trial.layout for trial in trials})
        launcher.preload(preloads(settings, [trial.layout for trial in trials]))
        report = check(launcher, settings, trials, steps, resume_at, None if as_json else typer.echo, what)
        typer.echo(json.dumps(report.as_dict()) if as_json else report.as_text())
        if not report.equal:
            raise typer.Exit(1)
