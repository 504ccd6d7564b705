"""Options that several commands have, and what their words mean."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from unisono.errors import ConfigurationError

if TYPE_CHECKING:
    from unisono.launch.launcher import Launcher

INTERRUPTED = 130

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


def whole_numbers(text: str, option: str) -> list[int]:
    """What a list such as 1,2,4 says.

    Raises:
        ConfigurationError: for anything else.
    """
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or min(numbers) < 1:
        raise ConfigurationError(f"{option} is {text!r}; give whole numbers from 1, for example 1,2,4")
    return numbers


@contextmanager
def launcher_here() -> "Iterator[Launcher]":
    """This host's launcher alone."""
    from unisono.launch.spanning import one_host

    with one_host() as started:
        yield started
