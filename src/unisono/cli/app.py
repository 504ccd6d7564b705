"""All commands, and the entry point."""

import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from unisono.cli import bench, chaos, checkpoint, inference, looking, membership, planning, runs
from unisono.cli.options import INTERRUPTED
from unisono.errors import UnisonoError

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

app.command()(runs.train)
app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(runs.run)
app.command()(inference.evaluate)
app.command()(inference.predict)
app.command()(runs.scale)
app.command()(membership.witness)
app.command()(membership.fence)
app.command()(runs.verify)
app.command()(chaos.chaos)
app.command()(planning.plan)
app.command()(planning.simulate)
app.command()(looking.doctor)
app.command()(looking.report)
app.add_typer(checkpoint_app, name="checkpoint")
app.add_typer(bench_app, name="bench")
checkpoint_app.command("list")(checkpoint.list_checkpoints)
checkpoint_app.command()(checkpoint.verify)
checkpoint_app.command()(checkpoint.export)
bench_app.command()(bench.train)
bench_app.command()(bench.comm)
bench_app.command()(bench.pipeline)
bench_app.command()(bench.sharding)
bench_app.command()(bench.memory)
bench_app.command()(bench.plan)
bench_app.command()(bench.network)
bench_app.command()(bench.control)
bench_app.command()(bench.recovery)
bench_app.command()(bench.optimizers)
bench_app.command()(bench.sync)
bench_app.command()(bench.survival)
bench_app.command()(bench.device)


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


def main(arguments: list[str] | None = None) -> None:
    """The entry point: errors of ours are one sentence and their exit code."""
    command: Callable[..., Any] = typer.main.get_command(app)
    try:
        code = command(args=arguments, prog_name="unisono", standalone_mode=False)
    except UnisonoError as error:
        print(f"unisono: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # once more, while this process ends, is no more than once
        print("unisono: interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        show = getattr(error, "show", None)  # a usage error of the command line's library
        if show is None:
            raise
        show()
        sys.exit(getattr(error, "exit_code", 2))
    sys.exit(code if isinstance(code, int) else 0)
