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
ElasticOption = Annotated[
    str | None,
    typer.Option("-n", "--workers", metavar="N or MIN:MAX", help="Workers; default: one per core. MIN:MAX: see scale."),
]
SparesOption = Annotated[
    int, typer.Option(min=0, help="Workers that wait besides, ready to take a lost one's place; on this host alone.")
]
HostsOption = Annotated[
    Path | None, typer.Option(help="A file that lists the hosts, this one first: NAME slots=N a line. Uses ssh.")
]
NodesOption = Annotated[int, typer.Option(min=1, help="Hosts; the same command is given on each of them.")]
NodeRankOption = Annotated[int, typer.Option(help="Which host this is, from 0.")]
RendezvousOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where host 0 listens; default: 127.0.0.1:29400.")
]
WitnessOption = Annotated[
    str | None, typer.Option(metavar="HOST:PORT", help="Where unisono witness votes on which hosts go on.")
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


def workers_range(text: str | None) -> tuple[int | None, tuple[int, int] | None]:
    """What ``--workers`` says: a number, and the least and the most that there may be later.

    Raises:
        ConfigurationError: for anything else.

    >>> workers_range("3"), workers_range("2:8")
    ((3, None), (None, (2, 8)))
    """
    if text is None:
        return None, None
    low, separator, high = text.partition(":")
    numbers = [int(part) if part.isdigit() else 0 for part in ((low, high) if separator else (low,))]
    if min(numbers) < 1 or numbers != sorted(numbers):
        raise ConfigurationError(f"--workers is {text!r}; give a number from 1, or a range such as 2:8")
    return (None, (numbers[0], numbers[1])) if separator else (numbers[0], None)


@contextmanager
def launcher_here() -> "Iterator[Launcher]":
    """This host's launcher alone."""
    from unisono.launch.spanning import one_host

    with one_host() as started:
        yield started
