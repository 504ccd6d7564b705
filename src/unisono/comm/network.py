"""A wire over torch.distributed: gloo on CPU, NCCL on CUDA devices, any other backend by its name.

The process group is our own and known to nobody else: a program's default group is left alone. Its sockets are found by
comparing open descriptors around its creation, so a process makes one wire after the other.
"""

import contextlib
import gc
import os
import socket
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store

from unisono.comm.wire import Addressed, Pending, Wire
from unisono.errors import ConfigurationError, GroupError, LaunchError, PeerLost, Revoked, WaitTimeout

MESSAGES_A_TAG = 64
LOOK_S = 0.01

Explain = Callable[[int, str, str], GroupError]
"""(suspected member, operation, what happened) -> the error to raise."""


@dataclass(frozen=True, slots=True)
class Link:
    """How the members of a wire find each other.

    Attributes:
        backend: "gloo", "nccl", or the name of another backend that torch.distributed knows.
        store: where addresses are exchanged; every generation of every wire has a prefix of its own.
        address: this host's address that the others can reach, None for the one that its name resolves to.
        deadline_s: seconds that any wait may take.
        device: where tensors lie.
        connect_s: seconds that a connection may take, once the others have said where they are; default: as any wait.
        useless: asked again and again while a wire is made: whether it is of no use any more.
    """

    backend: str
    store: Store
    address: str | None
    deadline_s: float
    device: torch.device
    connect_s: float | None = None
    useless: Callable[[], bool] | None = None


class NetworkWire:
    """A `Wire` over a process group of its own.

    Arguments:
        link: how to find the others.
        name: the same for all members, different for every wire and generation.
        rank, size: this member's number, and how many there are.
        explain: makes the error for a member that does not answer; default: one that names the member's number.

    Attributes:
        sent_bytes: payload that this member has sent since `take_sent_bytes`.
        awaits: a thread is in the transport, and waits.

    Raises:
        LaunchError: if not all members come together before the deadline.
    """

    def __init__(self, link: Link, name: str, rank: int, size: int, explain: Explain | None = None) -> None:
        self.rank = rank
        self.size = size
        self.ordered = link.backend != "gloo"
        self.sent_bytes = 0
        self._link = link
        self._explain = explain or _plainly
        self._revoked = False
        self.awaits = False
        self._open = True
        before = _connected()
        try:
            self._group: Any = _made(link, PrefixStore(name, link.store), rank, size)
        except (RuntimeError, ValueError) as error:
            raise LaunchError(f"member {rank} of {size} of {name} found no way to the others: {error}") from error
        self._sockets = _connected() - before

    def post(self, sends: Sequence[Addressed], receives: Sequence[Addressed], tag: int) -> "_Posted":
        """Start sending and receiving."""
        works: list[tuple[int, Any]] = []
        numbers: dict[tuple[str, int], int] = {}

        def number(direction: str, peer: int) -> int:
            used = numbers.get((direction, peer), 0)
            numbers[direction, peer] = used + 1
            return tag * MESSAGES_A_TAG + used

        peer = self.rank
        try:
            with self._coalesced() as together:
                for tensor, peer in receives:
                    if tensor.numel():
                        works.append((peer, self._group.recv([tensor], peer, number("in", peer))))
                for tensor, peer in sends:
                    if tensor.numel():
                        works.append((peer, self._group.send([tensor], peer, number("out", peer))))
                        self.sent_bytes += tensor.nbytes
        except RuntimeError as error:  # raised where it is waited for, which knows the operation
            return _Posted(self, [(peer, _Failed(error)), *works])
        return _Posted(self, [(peer, together.work)] if together.work is not None else works)

    @contextlib.contextmanager
    def _coalesced(self) -> "Any":
        """NCCL wants sends and receives that depend on each other in one call."""
        together = _Coalesced()
        if not self.ordered or self._link.device.type == "cpu":
            yield together
            return
        self._group._start_coalescing(self._link.device)
        yield together
        together.work = self._group._end_coalescing(self._link.device)

    def await_work(self, peer: int, work: Any, until: float, operation: str) -> None:
        """Wait for one message."""
        remaining = max(0.001, until - time.monotonic())
        self.awaits = True
        try:
            if self._link.device.type == "cpu":
                work.wait(timedelta(seconds=remaining))
            else:
                while not work.is_completed():  # its own wait would hold up the stream alone, and has no deadline
                    if time.monotonic() > until or self._revoked:
                        raise RuntimeError("not complete")
                    time.sleep(50e-6)
                work.wait(timedelta(seconds=remaining))
        except RuntimeError as error:
            raise self._failure(peer, operation, until, error) from error
        finally:
            self.awaits = False
        if self._revoked:  # nobody waits for it any more, and what it would write to may have another use
            raise Revoked(f"the group was revoked while this worker waited in {operation}")

    def _failure(self, peer: int, operation: str, until: float, error: RuntimeError) -> GroupError:
        if self._revoked:
            return Revoked(f"the group was revoked while this worker waited in {operation}")
        if time.monotonic() >= until - 1e-3:
            return self._explain(peer, operation, f"deadline {self._link.deadline_s:g} s")
        return self._explain(peer, operation, "")

    def take_sent_bytes(self) -> int:
        """What was sent since this was asked last."""
        sent, self.sent_bytes = self.sent_bytes, 0
        return sent

    @property
    def deadline_s(self) -> float:
        """Seconds that any wait may take."""
        return self._link.deadline_s

    def native(self, wire: Wire, tensor: torch.Tensor, tag: int) -> Iterator[Pending]:
        """The transport's own sum over all members, in place; the order of its additions is its own affair."""
        work = self._group.allreduce([tensor], dist.AllreduceOptions())
        self.sent_bytes += 2 * (self.size - 1) * tensor.nbytes // self.size
        yield _Posted(self, [((self.rank + 1) % self.size, work)])

    def revoke(self) -> None:
        """Free every call that waits on this wire, at once, and all later ones; callable from any thread.

        `abort` of gloo frees nobody. Its connected sockets are shut down instead; listening ones stay. That frees all
        but one who is in the middle of receiving a message: gloo tells those whose message has not begun.
        """
        self._revoked = True
        abort = getattr(self._group, "abort", None)
        if self.ordered and abort is not None:
            abort()
        for descriptor, inode in self._sockets:
            _shut(descriptor, inode)

    def close(self) -> None:
        """Let go of the connections; the others' calls fail from now on."""
        if self._open:
            self._open = False
            self.revoke()
            self._group = None
            gc.collect()


@dataclass(frozen=True, slots=True)
class _Failed:
    """A message that could not even be posted."""

    error: RuntimeError

    def wait(self, timeout: timedelta) -> None:
        raise self.error

    def is_completed(self) -> bool:
        return True


@dataclass(slots=True)
class _Coalesced:
    work: Any = None


class _Posted:
    """Messages of one `NetworkWire.post`."""

    def __init__(self, wire: NetworkWire, works: list[tuple[int, Any]]) -> None:
        self._wire = wire
        self._works = works

    def wait(self, operation: str) -> None:
        """Wait for all."""
        until = time.monotonic() + self._wire.deadline_s
        for peer, work in self._works:
            self._wire.await_work(peer, work, until, operation)
        self._works = []


def _plainly(peer: int, operation: str, deadline: str) -> GroupError:
    if deadline:
        return WaitTimeout(f"{operation}: member {peer} is missing ({deadline})")
    return PeerLost(f"{operation}: member {peer} is gone")


def _made(link: Link, store: Store, rank: int, size: int) -> object:
    """The process group; where that may be of no use any more, made on a thread that can be left behind.

    Gloo waits for a connection that another member is to make, whatever happens: one that has left where it is, and has
    gone on in another generation since, is waited for to the end.
    """
    if link.useless is None:
        return _process_group(link, store, rank, size)
    made: Future[object] = Future()

    def make() -> None:
        try:
            made.set_result(_process_group(link, store, rank, size))
        except BaseException as error:
            made.set_exception(error)

    threading.Thread(target=make, name="unisono-connect", daemon=True).start()
    while not wait([made], LOOK_S).done:
        if link.useless():
            raise LaunchError(f"member {rank} of {size} is not waited for any more")
    return made.result()


def _process_group(link: Link, store: Store, rank: int, size: int) -> object:
    timeout = timedelta(seconds=min(link.deadline_s, link.connect_s or link.deadline_s))
    if link.backend == "gloo":
        options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
        options._timeout = timeout
        make = dist.ProcessGroupGloo.create_device
        options._devices = [
            make(hostname=link.address) if link.address else dist.ProcessGroupGloo.create_default_device()
        ]
        return dist.ProcessGroupGloo(store, rank, size, options)
    if link.backend == "nccl":
        if not dist.is_nccl_available():
            raise ConfigurationError("wire.backend is nccl, which this build of torch lacks; use gloo")
        nccl = dist.ProcessGroupNCCL.Options()
        nccl._timeout = timeout
        return dist.ProcessGroupNCCL(store, rank, size, nccl)
    if link.backend == "mpi" and dist.is_mpi_available():
        return dist.ProcessGroupMPI.create(list(range(size)))
    plugin = dist.Backend._plugins.get(link.backend.upper())
    if plugin is None:
        known = ["gloo", *(["nccl"] if dist.is_nccl_available() else []), *map(str.lower, dist.Backend._plugins)]
        raise ConfigurationError(f"wire.backend is {link.backend!r}; this build of torch has {', '.join(known)}")
    return plugin.creator_fn(store, rank, size, timeout)


def _connected() -> set[tuple[int, int]]:
    """This process's connected TCP sockets: (descriptor, inode)."""
    found = set()
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else []:
        with contextlib.suppress(OSError), _socket(int(name)) as (copy, inode):
            if copy.family in (socket.AF_INET, socket.AF_INET6):
                copy.getpeername()  # fails where it only listens
                found.add((int(name), inode))
    return found


def _shut(descriptor: int, inode: int) -> None:
    """Shut a socket down, if the descriptor still is that socket."""
    with contextlib.suppress(OSError), _socket(descriptor) as (copy, found):
        if found == inode:
            copy.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def _socket(descriptor: int) -> Iterator[tuple[socket.socket, int]]:
    """A copy of a descriptor and its inode; whatever another thread closes or opens meanwhile, it stays what it is.

    Raises:
        OSError: where the descriptor is none of a socket.
    """
    copy = os.dup(descriptor)
    status = os.fstat(copy)
    if not stat.S_ISSOCK(status.st_mode):
        os.close(copy)
        raise OSError(f"descriptor {descriptor} is not a socket")
    with socket.socket(fileno=copy) as duplicate:
        yield duplicate, status.st_ino
