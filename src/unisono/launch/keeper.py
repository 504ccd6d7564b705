"""Under torchrun: a small process that keeps the arena, started by local rank 0, that outlives any worker.

Workers reach it over an abstract Unix socket (no file); both sides check that the other runs as the same user.
"""

import hashlib
import os
import selectors
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Mapping

from unisono.errors import LaunchError
from unisono.launch.control import ArenaKeeper, receive

CONNECT_DEADLINE_S = 60.0


def address(environ: Mapping[str, str]) -> str:
    """The abstract socket's name: one for each start of a job by a user."""
    parts = [
        environ.get(key, "")
        for key in ("TORCHELASTIC_RUN_ID", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT", "GROUP_RANK")
    ]
    job = hashlib.sha256("/".join([str(os.getuid()), *parts]).encode()).hexdigest()[:24]
    return f"\0unisono-{job}"


def same_user(connection: socket.socket) -> bool:
    """Whether the process at the other end runs as this one's user."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", credentials)[1]
    return user == os.getuid()


def connect(environ: Mapping[str, str], local_rank: int, deadline_s: float = CONNECT_DEADLINE_S) -> socket.socket:
    """A line to the keeper; local rank 0 starts it.

    Raises:
        LaunchError: if it does not answer in time, or someone else answers.
    """
    name = address(environ)
    if local_rank == 0:
        subprocess.Popen(
            [sys.executable, "-m", "unisono.launch.keeper", name[1:]],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    until = time.monotonic() + deadline_s
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(name)
        except OSError as error:
            connection.close()
            if time.monotonic() > until:
                raise LaunchError(
                    f"local rank {local_rank} found no process that keeps the shared memory within {deadline_s:g} s; "
                    "is local rank 0 running?"
                ) from error
            time.sleep(0.01)
            continue
        if not same_user(connection):
            connection.close()
            raise LaunchError("the process that keeps the shared memory belongs to another user; refused")
        return connection


def serve(listener: socket.socket, first_deadline_s: float = CONNECT_DEADLINE_S) -> None:
    """Answer workers until the last has gone."""
    keeper = ArenaKeeper()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    open_lines = 0
    served = False
    while open_lines or not served:
        ready = selector.select(None if served else first_deadline_s)
        if not ready:
            break
        for key, _ in ready:
            line = key.fileobj
            assert isinstance(line, socket.socket)
            if line is listener:
                connection, _ = listener.accept()
                if not same_user(connection):
                    connection.close()
                    continue
                selector.register(connection, selectors.EVENT_READ)
                open_lines, served = open_lines + 1, True
                continue
            message, _ = receive(line)
            if message is None:
                selector.unregister(line)
                line.close()
                open_lines -= 1
            elif message["op"] == "arena":
                keeper.answer(line, message)
            elif message["op"] == "release":
                keeper.release(message["name"])
    keeper.close()


def main() -> None:
    """``python -m unisono.launch.keeper NAME``."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind("\0" + sys.argv[1])
    listener.listen(1024)
    serve(listener)


if __name__ == "__main__":
    main()
