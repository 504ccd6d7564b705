"""Where a run's launcher is spoken to while it trains: an abstract Unix socket, named after the run's directory.

No file, nothing on the network; both ends check that the other runs as the same user.
"""

import hashlib
import os
import socket
from pathlib import Path

from unisono.errors import ConfigurationError
from unisono.launch.control import Message, receive, send
from unisono.launch.keeper import same_user

ANSWER_S = 10.0


def _name(run_dir: Path, host: int) -> str:
    key = f"{os.getuid()}/{run_dir.resolve()}/{host}"
    return f"\0unisono-run-{hashlib.sha256(key.encode()).hexdigest()[:24]}"


def opened(run_dir: Path, host: int = 0) -> socket.socket | None:
    """The end of a host's launcher; None where another has it."""
    door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        door.bind(_name(run_dir, host))
    except OSError:
        door.close()
        return None
    door.listen(8)
    door.setblocking(False)
    return door


def visitor(door: socket.socket) -> tuple[socket.socket, Message] | None:
    """Someone of the same user, and what is asked for."""
    try:
        connection, _ = door.accept()
    except OSError:
        return None
    connection.settimeout(1.0)
    try:
        message, _ = receive(connection) if same_user(connection) else (None, [])
    except (OSError, ValueError):
        message = None
    if message is None:
        connection.close()
        return None
    return connection, message


def ask(run_dir: Path, request: Message, host: int = 0) -> Message:
    """What the launcher of a run answers.

    Arguments:
        host: whose, where the run spans several.

    Raises:
        ConfigurationError: where no run is at work there, or it does not answer.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(ANSWER_S)
        try:
            connection.connect(_name(run_dir, host))
            if not same_user(connection):
                raise ConfigurationError(f"the run in {run_dir} belongs to another user; refused")
            send(connection, request)
            answer, _ = receive(connection)
        except OSError as error:
            raise ConfigurationError(
                f"no run of this host is at work in {run_dir}; give the directory of one that is"
            ) from error
    if answer is None:
        raise ConfigurationError(f"the run in {run_dir} did not answer; it may be at its end")
    return answer
