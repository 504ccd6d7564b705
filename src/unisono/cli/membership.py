"""Commands about which hosts train: a witness that votes, and the word that a host is dead."""

from pathlib import Path
from typing import Annotated

import typer

from unisono.cli.options import SecretOption
from unisono.errors import ConfigurationError


def witness(
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="Where launchers reach it; they are given it with --witness.")
    ] = "127.0.0.1:29500",
    secret_file: SecretOption = None,
    state: Annotated[
        Path | None, typer.Option(help="Where it keeps its votes; default: ~/.local/state/unisono/witness.")
    ] = None,
) -> None:
    """Vote on which hosts go on, and train nothing: so that half of a run's hosts, one of two for example, can.

    Run it on a machine that fails for other reasons than the hosts do; until Ctrl-C.

    Example: unisono witness --listen 10.0.0.9:29500 --secret-file job.secret   and, on each host:
    unisono train configs/lm.yaml --nnodes 2 --node-rank 0 --witness 10.0.0.9:29500 ...
    """
    import os

    from unisono.launch.nodes import parse_rendezvous
    from unisono.launch.secret import find_secret
    from unisono.launch.witness import Witness, default_state

    address, port = parse_rendezvous(listen, "--listen")
    voter = Witness(find_secret(secret_file, os.environ), state or default_state(), typer.echo)
    try:
        port = voter.listen(address, port)
        typer.echo(f"witness at {address}:{port}, votes in {voter.directory}")
        while True:
            voter.turn()
    finally:
        voter.close()


def fence(
    host: Annotated[int, typer.Argument(min=0, help="The number of the host that is dead.", show_default=False)],
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run.", show_default=False)],
) -> None:
    """Vouch that a host is dead (switched off, ended by its scheduler), so that those which are left can go on.

    Give it on a host that is left. A host that is still heard there cannot be fenced; where one that is not heard is
    alive after all, both would train.

    Example: unisono fence 1 runs/lm-001
    """
    from unisono.launch.door import ask

    answers = []
    for number in _hosts_of(run_dir):
        if number != host:
            try:
                answers.append(ask(run_dir, {"op": "fence", "host": host}, number))
            except ConfigurationError:  # it is not on this machine
                continue
    if not answers:
        raise ConfigurationError(f"no run over several hosts is at work in {run_dir} on this machine")
    for answer in answers:
        if "error" in answer:
            raise ConfigurationError(answer["error"])
    typer.echo(answers[0]["text"])


def _hosts_of(run_dir: Path) -> list[int]:
    """The hosts that have voted in a run."""
    from unisono.launch.quorum import DIRECTORY

    names = [path.stem.removeprefix("host-") for path in (run_dir / DIRECTORY).glob("host-*.json")]
    return sorted(int(name) for name in names if name.isdigit())
