"""Starting the launchers of other hosts over ssh, from a file that lists them; the secret goes in by their input."""

import os
import secrets
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from unisono.errors import ConfigurationError
from unisono.launch.secret import VARIABLE

SHELL = ("ssh", "-o", "BatchMode=yes")
END_DEADLINE_S = 10.0
LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, slots=True)
class Host:
    """A line of a host file: a name or address, and how many workers it takes (None: one per core)."""

    name: str
    slots: int | None


def read_hosts(path: Path) -> list[Host]:
    """The hosts in a file: ``NAME [slots=N]`` a line; empty lines and what follows a # do not count.

    Raises:
        ConfigurationError: for a file that cannot be read, a line that is something else, or no host at all.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the hosts in {path}: {error}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        words = line.partition("#")[0].split()
        if not words:
            continue
        slots = words[1].removeprefix("slots=") if len(words) == 2 and words[1].startswith("slots=") else None
        if len(words) > 2 or (len(words) == 2 and not (slots or "").isdigit()) or slots == "0" or words[0][0] == "-":
            raise ConfigurationError(f"{path}, line {number}: {line.strip()!r}; give NAME or NAME slots=N")
        hosts.append(Host(words[0], int(slots) if slots else None))
    if not hosts:
        raise ConfigurationError(f"{path} lists no host; give one a line, this one first: NAME slots=N")
    return hosts


def rendezvous_address(hosts: Sequence[Host]) -> tuple[str, int]:
    """Where the first host, which is this one, listens: its address, and a free port.

    Raises:
        ConfigurationError: where the first line is not this machine, or is a name that others cannot reach it by.
    """
    name = hosts[0].name
    if name in LOCAL_NAMES and any(host.name not in LOCAL_NAMES for host in hosts):
        raise ConfigurationError(
            f"the first host is {name}, which the others cannot reach; write this machine's name or address there"
        )
    try:
        family, kind, _, _, where = socket.getaddrinfo(name, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.bind(where)
            found = probe.getsockname()
            return str(found[0]), int(found[1])
    except OSError as error:
        raise ConfigurationError(
            f"the first host, {name}, is not this machine ({error.strerror or error}); start the run on the first host"
        ) from error


@dataclass(slots=True)
class RemoteLaunchers:
    """The launchers of all hosts but the first; a context manager that ends them.

    Arguments:
        hosts: as read.
        command: the arguments of ``unisono`` for every host, without those that say which host it is.
        rendezvous: "HOST:PORT" of the first.
        secret: the job's.
        shell: the program that runs a command on a host, and its arguments; the host and the command follow.
    """

    hosts: Sequence[Host]
    command: Sequence[str]
    rendezvous: str
    secret: bytes
    shell: Sequence[str] = SHELL
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def __enter__(self) -> Self:
        try:
            for number, host in enumerate(self.hosts[1:], 1):
                self._start(number, host)
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def words(self, number: int, host: Host) -> list[str]:
        """What runs on a host, as words."""
        own = ["--nnodes", str(len(self.hosts)), "--node-rank", str(number), "--rendezvous", self.rendezvous]
        workers = ["-n", str(host.slots)] if host.slots else []
        return [sys.executable, "-m", "unisono", *self.command, *own, *workers]

    def _start(self, number: int, host: Host) -> None:
        inner = f"cd {shlex.quote(os.getcwd())} && IFS= read -r {VARIABLE} && export {VARIABLE} && exec "
        script = inner + shlex.join(self.words(number, host)) + " < /dev/null"
        local = host.name in LOCAL_NAMES
        command = ["sh", "-c", script] if local else [*self.shell, host.name, f"sh -c {shlex.quote(script)}"]
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=sys.stderr.fileno(), start_new_session=True
            )
        except OSError as error:
            raise ConfigurationError(f"cannot run {command[0]} to reach {host.name}: {error.strerror}") from error
        self._processes.append(process)
        assert process.stdin is not None
        with suppress(BrokenPipeError):
            process.stdin.write(self.secret + b"\n")
            process.stdin.close()

    def _end(self) -> None:
        """Launchers end by themselves with the first one; what does not is ended."""
        for process in self._processes:
            try:
                process.wait(END_DEADLINE_S)
            except subprocess.TimeoutExpired:
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        self._processes.clear()


def new_secret() -> bytes:
    """A secret for one run."""
    return secrets.token_hex(32).encode()
