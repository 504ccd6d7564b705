"""One host's launcher or several: from the command line's options to whoever starts the workers here."""

import os
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

from unisono.errors import ConfigurationError
from unisono.launch.launcher import Launcher, launcher
from unisono.launch.nodes import Nodes, Rendezvous, parse_rendezvous
from unisono.launch.remote import RemoteLaunchers, new_secret, read_hosts, rendezvous_address
from unisono.launch.secret import find_secret


class Here(NamedTuple):
    """This host: its launcher, how many hosts there are, which one it is, how many workers a host file gives it, and
    the launchers of the other hosts."""

    launcher: Launcher
    nodes: int
    number: int
    slots: int | None
    others: Nodes | None = None


@contextmanager
def launchers(
    hosts: Path | None,
    nnodes: int,
    node_rank: int,
    rendezvous: str | None,
    secret_file: Path | None,
    witness: str | None = None,
    script_words: int = 0,
) -> Iterator[Here]:
    """This host's launcher; with a host file, those of the others are started.

    Arguments:
        script_words: so many at the end of the command line belong to a script.
    """
    if hosts is None and nnodes == 1:
        if rendezvous is not None or node_rank or secret_file is not None or witness is not None:
            raise ConfigurationError(
                "--rendezvous, --node-rank, --secret-file and --witness are for several hosts; give --nnodes"
            )
        with one_host() as launcher:
            yield Here(launcher, 1, 0, None)
        return
    from importlib.metadata import version

    remote: AbstractContextManager[object] = nullcontext()
    slots = None
    if hosts is not None:
        if nnodes != 1 or node_rank or any(given is not None for given in (rendezvous, secret_file, witness)):
            raise ConfigurationError(
                "--hosts lists the hosts, and makes a secret of its own; leave --nnodes, --node-rank, --rendezvous, "
                "--secret-file and --witness out"
            )
        listed = read_hosts(hosts)
        address, port = rendezvous_address(listed)
        secret, nnodes, slots = new_secret(), len(listed), listed[0].slots
        remote = RemoteLaunchers(listed, _without_hosts(sys.argv[1:], script_words), f"{address}:{port}", secret)
    else:
        if not 0 <= node_rank < nnodes:
            raise ConfigurationError(f"--node-rank is {node_rank}; with --nnodes {nnodes} give 0 to {nnodes - 1}")
        address, port = parse_rendezvous(rendezvous or "127.0.0.1:29400")
        secret = find_secret(secret_file, os.environ)
    voter = parse_rendezvous(witness, "--witness") if witness is not None else None
    nodes = Nodes(Rendezvous(address, port, nnodes, node_rank, secret, witness=voter), version("unisono"))
    with remote, one_host(nodes) as launcher:
        yield Here(launcher, nnodes, node_rank, slots, nodes)


def _without_hosts(words: list[str], script_words: int) -> list[str]:
    """The command for another host: without the host file, the number of workers, and what only the first prints."""
    end = len(words) - script_words
    result: list[str] = []
    skip = False
    for word in words[:end]:
        attached = word.startswith(("--hosts=", "--workers=")) or (word[:2] == "-n" and word[2:].isdigit())
        if skip:
            skip = False
        elif word in ("--hosts", "-n", "--workers"):
            skip = True
        elif not attached and word != "--json":
            result.append(word)
    return result + words[end:]


@contextmanager
def one_host(nodes: Nodes | None = None) -> Iterator[Launcher]:
    """The fork server starts to import torch first of all; everything else overlaps with it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigurationError(
            "unisono starts its own workers (-n N); under torchrun or another launcher, run a script that uses "
            "unisono.Trainer"
        )
    with launcher(nodes) as started:
        yield started
