"""Handing an arena from one process to others that are not its children: a descriptor over an abstract Unix socket."""

import json
import os
import secrets
import socket
import struct
import time

from torch._C._distributed_c10d import Store

from unisono.comm.arena import Arena
from unisono.comm.descriptor import create_descriptor
from unisono.comm.meeting import MeetingError

KEY = "arena"


def share(store: Store, rank: int, size: int, size_bytes: int, deadline_s: float) -> Arena:
    """An arena that all members of a group map; rank 0 makes it.

    Raises:
        MeetingError: if not all members are on one host, run as one user, and come before the deadline.
    """
    if size == 1:
        return Arena(None, size_bytes)
    until = time.monotonic() + deadline_s
    descriptor = _offer(store, size, size_bytes, until) if rank == 0 else _fetch(store, rank, until)
    try:
        return Arena(descriptor, size_bytes)
    finally:
        os.close(descriptor)


def _host() -> str:
    """This host, and the part of it whose processes can meet."""
    with open("/proc/sys/kernel/random/boot_id") as boot:
        spaces = [os.stat(f"/proc/self/ns/{kind}").st_ino for kind in ("net", "pid")]
        return f"{boot.read().strip()} {spaces}"


def _offer(store: Store, size: int, size_bytes: int, until: float) -> int:
    """Make the memory and give it to all others."""
    descriptor = create_descriptor(size_bytes)
    try:
        name = f"\0unisono-arena-{secrets.token_hex(16)}"
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(name)
            listener.listen(size)
            store.set(KEY, json.dumps({"name": name, "host": _host()}))
            given = 1
            while given < size:
                listener.settimeout(max(0.01, until - time.monotonic()))
                try:
                    connection, _ = listener.accept()
                except TimeoutError as error:
                    raise MeetingError(f"{size - given} of {size} ranks did not join the group in time") from error
                with connection:
                    if _user(connection) == os.getuid():  # others are not counted either
                        socket.send_fds(connection, [b"arena"], [descriptor])
                        given += 1
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _fetch(store: Store, rank: int, until: float) -> int:
    """Take the memory from rank 0."""
    offered = json.loads(store.get(KEY))
    if offered["host"] != _host():
        raise MeetingError(
            f"rank {rank} is on another host than rank 0; the arena is for the ranks of one host: use gloo"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(max(0.01, until - time.monotonic()))
        try:
            connection.connect(offered["name"])
            if _user(connection) != os.getuid():
                raise MeetingError("rank 0 runs as another user; refused")
            _, descriptors, _, _ = socket.recv_fds(connection, 16, 1)
        except OSError as error:
            raise MeetingError(f"rank {rank} did not get the arena from rank 0: {error}") from error
    if not descriptors:
        raise MeetingError(f"rank 0 refused to share its arena with rank {rank}")
    os.set_inheritable(descriptors[0], False)
    return descriptors[0]


def _user(connection: socket.socket) -> int:
    """Whose process is at the other end."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    user: int = struct.unpack("3i", credentials)[1]
    return user
