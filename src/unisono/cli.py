"""The command line. Nothing heavy is imported before a command needs it: ``--help`` takes a fraction of a second."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from unisono.errors import ConfigurationError, UnisonoError

if TYPE_CHECKING:
    from unisono.config import Config
    from unisono.launch.launcher import Launcher

INTERRUPTED = 130
ELSEWHERE = Path("(on host 0)")
"""The run's directory, as hosts know it that keep no records."""

app = typer.Typer(
    name="unisono",
    help="Train PyTorch models on any number of workers, with one result.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
checkpoint_app = typer.Typer(help="List, verify and export checkpoints.", no_args_is_help=True)
bench_app = typer.Typer(help="Measure speed and memory beside what one would use instead.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The configuration.", show_default=False)]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Dotted overrides, layout.zero=0 for example.")
]
WorkersOption = Annotated[int | None, typer.Option("-n", "--workers", min=1, help="Workers; default: one per core.")]
HostsOption = Annotated[
    Path | None, typer.Option(help="A file that lists the hosts, this one first: NAME slots=N a line. Uses ssh.")
]
NodesOption = Annotated[int, typer.Option(min=1, help="Hosts; the same command is given on each of them.")]
NodeRankOption = Annotated[int, typer.Option(help="Which host this is, from 0.")]
RendezvousOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where host 0 listens; default: 127.0.0.1:29400.")
]
SecretOption = Annotated[
    Path | None, typer.Option(help="A file with the job's secret, mode 0600; default: $UNISONO_SECRET.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of text.")]


def _version(wanted: bool) -> None:
    if wanted:
        from unisono import __version__

        typer.echo(f"unisono {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which version.")
    ] = False,
) -> None:
    """Train PyTorch models on any number of workers, with one result."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on from the newest intact checkpoint of run_dir, or of the task's last run."),
    ] = False,
    hosts: HostsOption = None,
    nnodes: NodesOption = 1,
    node_rank: NodeRankOption = 0,
    rendezvous: RendezvousOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
) -> None:
    """Train what a configuration describes.

    Example: unisono train configs/lm.yaml steps=200 layout.zero=0 -n 2

    On two hosts, the same command on each but for its number:
    unisono train configs/lm.yaml --nnodes 2 --node-rank 0 --rendezvous 10.0.0.1:29400 --secret-file job.secret
    """
    from unisono.launch.spanning import launchers

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file) as here:
        from unisono.config import load, to_yaml
        from unisono.launch.local import STANDARD_ERROR, STANDARD_OUTPUT
        from unisono.launch.runs import choose_workers, next_run_dir, workers_here

        settings = load(config, overrides or [])
        launcher = here.launcher
        if here.nodes > 1:
            count = workers_here(settings, workers or here.slots, here.nodes)
        else:
            settings = settings if workers is None else _with_workers(settings, workers)
            count = choose_workers(settings)
        as_json = as_json or here.number > 0
        run_dir = next_run_dir(settings.run_dir, settings.task, resume=resume) if here.number == 0 else ELSEWHERE
        settings = settings.model_copy(update={"run_dir": str(run_dir)})
        if as_json:
            settings = settings.model_copy(update={"observe": settings.observe.model_copy(update={"progress": False})})
        else:
            typer.echo(to_yaml(settings, defaults=False) + f"# all keys: {run_dir / 'config.yaml'}\n")
        if settings.preload:
            launcher.preload(settings.preload)
        arguments = {"config": settings.model_dump(mode="json"), "resume": resume}
        output = STANDARD_ERROR if as_json else STANDARD_OUTPUT
        ending = launcher.run({"call": "unisono.tasks.job:train", "arguments": arguments}, count, output=output)
        if as_json and here.number == 0:
            typer.echo(json.dumps({**ending.results[0], "workers": count}))
        elif not as_json and (run_dir / "report.html").exists():
            typer.echo(f"report: {run_dir / 'report.html'}")
        if ending.interrupted:
            if not as_json:
                words = " ".join(sys.argv[1:] if "--resume" in sys.argv else [*sys.argv[1:], "--resume"])
                typer.echo(f"to go on: unisono {words}" + (f" run_dir={run_dir}" if "run_dir=" not in words else ""))
            raise typer.Exit(INTERRUPTED)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def run(
    context: typer.Context,
    script: Annotated[Path, typer.Argument(help="A Python script that uses unisono.Trainer.", show_default=False)],
    workers: WorkersOption = None,
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

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file, len(context.args)) as here:
        target = {"script": str(script), "argv": list(context.args), "backend": backend}
        ending = here.launcher.run(target, workers or here.slots or default_workers(), show_all=all_output)
        if ending.interrupted:
            raise typer.Exit(INTERRUPTED)


@app.command()
def verify(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: Annotated[str, typer.Option(help="Numbers of workers to compare, for example 1,2,3,4.")] = "1,2,3,4",
    hosts: Annotated[
        int, typer.Option(min=1, help="Spread them over this many hosts (sets that share no memory, on this machine).")
    ] = 1,
    steps: Annotated[int, typer.Option(min=1, help="Steps to train with each.")] = 8,
    resume_at: Annotated[
        int | None, typer.Option(min=1, help="Stop after this step, and resume with another number of workers.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Prove that a run's result does not depend on the number of workers: exit code 0 only if all digests are equal.

    Example: unisono verify configs/images.yaml --workers 1,2,3 --steps 20 --resume-at 7
    """
    with _launcher() as launcher:
        from unisono.check.verify import verify as check
        from unisono.config import load

        settings = load(config, overrides or [])
        numbers = _numbers(workers, "--workers")
        if settings.preload:
            launcher.preload(settings.preload)
        report = check(launcher, settings, numbers, steps, resume_at, None if as_json else typer.echo, hosts)
        typer.echo(json.dumps(report.as_dict()) if as_json else report.as_text())
        if not report.equal:
            raise typer.Exit(1)


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what this machine offers, and whether two workers agree on it.

    Example: unisono doctor
    """
    with _launcher() as launcher:
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


@app.command()
def report(run_dir: Annotated[Path, typer.Argument(help="The directory of a run.", show_default=False)]) -> None:
    """Make report.html anew from what a run has recorded.

    Example: unisono report runs/lm-001
    """
    from unisono.observe.report import write_report

    typer.echo(str(write_report(run_dir)))


@checkpoint_app.command("list")
def checkpoint_list(run_dir: Annotated[Path, typer.Argument(show_default=False)], as_json: JsonOption = False) -> None:
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


@checkpoint_app.command("verify")
def checkpoint_verify(path: Annotated[Path, typer.Argument(show_default=False)], as_json: JsonOption = False) -> None:
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


@checkpoint_app.command("export")
def checkpoint_export(
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


@bench_app.command("train")
def bench_train(
    models: Annotated[str, typer.Option(help="small, large, or both.")] = "small,large",
    against: Annotated[
        str | None,
        typer.Option(help="independent, ddp, accelerate, fabric, deepspeed; default: all that are installed."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Compare a training step with DDP, with replicas that never communicate, and with what else is installed.

    Example: unisono bench train --models small --rounds 5
    """
    with _launcher() as launcher:
        from unisono.bench.train import bench

        others = against.split(",") if against else None
        rows = bench(launcher, models.split(","), others, rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps({"rows": rows}))


@bench_app.command("comm")
def bench_comm(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks on this host, for example 2,4.")] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 9,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure algorithms between hosts, for wire.algorithm=auto to choose from.")
    ] = False,
    hosts: HostsOption = None,
    nnodes: NodesOption = 1,
    node_rank: NodeRankOption = 0,
    rendezvous: RendezvousOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare collectives: the arena, gloo, our algorithms over gloo, MPI where it is installed.

    Example: unisono bench comm --ranks 2
    """
    from unisono.bench.comm import as_text, bench
    from unisono.bench.comm import tune as measure

    if not tune and (hosts is not None or nnodes > 1):
        raise ConfigurationError("--hosts and --nnodes are for --tune; without it, all ranks are on this host")
    from unisono.launch.spanning import launchers

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file) as here:
        numbers = _numbers(ranks, "--ranks")
        if tune:
            workers = 1 if here.nodes > 1 else max(2, numbers[0])
            rows = measure(here.launcher, workers, rounds, writes=here.number == 0)
            if not as_json and rows:
                typer.echo(as_text(rows))
        else:
            rows = bench(here.launcher, numbers, rounds, None if as_json else typer.echo)
        if as_json and here.number == 0:
            typer.echo(json.dumps({"rows": rows}))


@bench_app.command("network")
def bench_network(
    rate: Annotated[str, typer.Option(help="Of the link between two hosts, as tc writes it.")] = "100mbit",
    steps: Annotated[int, typer.Option(min=20, help="Steps of DDP, and of what loses nothing.")] = 60,
    methods: Annotated[
        str, typer.Option(help="Ways of moving gradients, besides ddp.")
    ] = "exact,bf16,int8,powersgd,top_k,sign,torch_powersgd",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, about 6 minutes each at 100 Mbit/s.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Compare ways of training over a slow link between two hosts (network namespaces; needs root).

    Example: unisono bench network --rate 100mbit --methods exact,powersgd
    """
    from unisono.bench.network import as_text, bench

    rows = bench(rate, steps, methods.split(","), rounds, None if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
    elif rounds > 1:
        typer.echo("\n".join(["medians:", *(as_text(row, rows[0]) for row in rows)]))


@contextmanager
def _launcher() -> "Iterator[Launcher]":
    """This host's launcher alone."""
    from unisono.launch.spanning import one_host

    with one_host() as started:
        yield started


def _with_workers(settings: "Config", workers: int) -> "Config":
    from unisono.config import Config, validate

    data: dict[str, Any] = settings.model_dump(mode="json")
    data["layout"]["data"] = workers
    return validate(Config, data, "-n")


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"{option} is {text!r}; give whole numbers from 1, for example 1,2,4")
    return numbers


def main(arguments: list[str] | None = None) -> None:
    """The entry point: errors of ours are one sentence and their exit code."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        code = command(args=arguments, prog_name="unisono", standalone_mode=False)
    except UnisonoError as error:
        print(f"unisono: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("unisono: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the command line's library
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
