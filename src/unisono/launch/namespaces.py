"""Hosts for tests and measurements on one machine: network namespaces behind a switch, with links that are slow or cut.

Needs root and iproute2. Everything lies inside namespaces that are named after this process, and goes with them.
"""

import os
import shutil
import subprocess
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from unisono.errors import LaunchError

PREFIX = "unisono"
DEVICE = "eth0"
NOBODY = "02:00:00:00:00:00"
"""A hardware address that no host has."""


def unavailable() -> str | None:
    """Why this machine cannot have such hosts; None where it can."""
    if shutil.which("ip") is None or shutil.which("tc") is None:
        return "ip or tc (iproute2) is not installed"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"{PREFIX}-{os.getpid()}-probe"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return None if done.returncode == 0 else f"ip netns add: {done.stderr.strip()}"


class Namespaces:
    """Several hosts with a link each to one switch; a context manager.

    Arguments:
        count: hosts.
        rate: of every link, as tc writes it ("100mbit"); None: as fast as the machine.

    Raises:
        LaunchError: where the machine forbids it.
    """

    def __init__(self, count: int, rate: str | None = None) -> None:
        self.names = [f"{PREFIX}-{os.getpid()}-host{i}" for i in range(count)]
        self.addresses = [f"10.77.0.{i + 1}" for i in range(count)]
        self._switch = f"{PREFIX}-{os.getpid()}-switch"
        self._rate = rate

    def __enter__(self) -> Self:
        _remove_those_of_the_dead()
        try:
            self._make()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def words(self, host: int, words: Sequence[str]) -> list[str]:
        """A command that runs on a host."""
        return ["ip", "netns", "exec", self.names[host], *words]

    def environment(self, host: int, port: int) -> dict[str, str]:
        """What torchrun would set for the one worker of a host; the first host's listens at ``port``."""
        return {
            **os.environ,
            "RANK": str(host),
            "WORLD_SIZE": str(len(self.names)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "GROUP_RANK": str(host),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(port),
            "GLOO_SOCKET_IFNAME": DEVICE,
            "OMP_NUM_THREADS": "1",
        }

    def cut(self, host: int) -> None:
        """Take a host's link down; connections stay, but nothing arrives."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "down")

    def mend(self, host: int) -> None:
        """Put the link up again."""
        _ip("-n", self._switch, "link", "set", f"port{host}", "up")

    def block(self, sender: int, receiver: int) -> None:
        """Let nothing that one host sends arrive at another; what is sent the other way does."""
        wrong = ["lladdr", NOBODY, "dev", DEVICE, "nud", "permanent"]
        _ip("-n", self.names[sender], "neigh", "replace", self.addresses[receiver], *wrong)

    def unblock(self, sender: int, receiver: int) -> None:
        """Let it arrive again."""
        _ip("-n", self.names[sender], "neigh", "del", self.addresses[receiver], "dev", DEVICE)

    def sent_bytes(self, host: int) -> int:
        """Bytes that a host has sent, counted at its interface, headers included."""
        path = f"/sys/class/net/{DEVICE}/statistics/tx_bytes"
        return int(subprocess.run(self.words(host, ["cat", path]), capture_output=True, check=True).stdout)

    def _make(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "switch", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "switch", "up")
        for i, (name, address) in enumerate(zip(self.names, self.addresses, strict=True)):
            _ip("netns", "add", name)
            port = f"port{i}"
            _ip("-n", self._switch, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _ip("-n", self._switch, "link", "set", port, "master", "switch", "up")
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", DEVICE)
            _ip("-n", name, "link", "set", "lo", "up")
            _ip("-n", name, "link", "set", DEVICE, "up")
            if self._rate is not None:
                _limit(name, DEVICE, self._rate)
                _limit(self._switch, port, self._rate)

    def _remove(self) -> None:
        for name in (*self.names, self._switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


def _limit(namespace: str, device: str, rate: str) -> None:
    bucket = ["tbf", "rate", rate, "burst", "128kb", "latency", "200ms"]
    _run(["tc", "-n", namespace, "qdisc", "add", "dev", device, "root", *bucket])


def _ip(*words: str) -> None:
    _run(["ip", *words])


def _run(words: Sequence[str]) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise LaunchError(f"cannot make hosts out of namespaces: {' '.join(words)}: {done.stderr.strip()}")


def _remove_those_of_the_dead() -> None:
    """Namespaces of processes that were killed before they could remove them."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
    for line in listed.splitlines():
        name = line.split()[0]
        parts = name.split("-")
        if parts[0] == PREFIX and len(parts) == 3 and parts[1].isdigit() and not os.path.exists(f"/proc/{parts[1]}"):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)
