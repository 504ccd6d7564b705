"""Messages with tags between the members of a group that share memory: a ring of bytes from each member to each.

What does not fit a ring is written as the receiver reads; what comes before anyone asks for it is kept. Messages move
whenever anyone waits, and on a thread while some are under way, so that a program's order of calls cannot lock it up.
"""

import struct
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from unisono.comm.arena import Arena, Region
from unisono.comm.meeting import MeetingError
from unisono.comm.words import store_fence

RING_BYTES = 1 << 19
HEADER_BYTES = 128
CHANNEL_BYTES = RING_BYTES + HEADER_BYTES
FRAME = struct.Struct("<qq")  # tag, bytes

_WRITTEN, _READ = 0, 8  # words that different members write lie in different lines


@dataclass(slots=True, eq=False)
class Request:
    """A message that is to be sent or received.

    Attributes:
        peer: the other member; for a receive from anyone, the sender once it is known, -1 before.
        tag: tells messages between two members apart.
        data: the bytes to send, or the memory to fill.
        finished: called when it is over.
        done, error, moved: how far it is.
    """

    peer: int
    tag: int
    data: memoryview
    finished: Callable[[], None] = lambda: None
    done: bool = False
    error: MeetingError | None = None
    moved: int = 0

    def finish(self, error: MeetingError | None = None) -> None:
        """It is over."""
        self.done, self.error = True, error
        self.finished()


@dataclass(slots=True, eq=False)
class _Arriving:
    """A message that is being read."""

    tag: int
    size_bytes: int
    data: memoryview
    request: Request | None
    moved: int = 0


@dataclass(slots=True)
class _Incoming:
    """All from one sender: what is being read, and what was read before anyone asked for it."""

    words: memoryview
    ring: memoryview
    current: _Arriving | None = None
    kept: deque[_Arriving] = field(default_factory=deque)
    posted: deque[Request] = field(default_factory=deque)


@dataclass(slots=True)
class _Outgoing:
    words: memoryview
    ring: memoryview
    queue: deque[Request] = field(default_factory=deque)


class Channels:
    """One member's ends of all rings."""

    def __init__(self, arena: Arena, region: Region, rank: int, size: int) -> None:
        self._lock = threading.RLock()
        self._anyone: deque[Request] = deque()

        def ends(sender: int, receiver: int) -> tuple[memoryview, memoryview]:
            part = region.part((sender * size + receiver) * CHANNEL_BYTES, CHANNEL_BYTES)
            return arena.words(part.part(0, HEADER_BYTES)), arena.bytes(part.part(HEADER_BYTES, RING_BYTES))

        self._out = [_Outgoing(*ends(rank, peer)) for peer in range(size)]
        self._in = [_Incoming(*ends(peer, rank)) for peer in range(size)]
        self._under_way = 0
        self._wake = threading.Event()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, request: Request) -> None:
        """Send in the order of calls; what fits is written at once."""
        with self._lock:
            self._out[request.peer].queue.append(request)
            self._under_way += 1
            self._write(self._out[request.peer])
        self._keep_moving()

    def receive(self, request: Request) -> None:
        """Receive the first message of that tag that nobody has asked for; ``peer`` -1 for anyone's."""
        with self._lock:
            self._under_way += 1
            sources = self._in if request.peer < 0 else [self._in[request.peer]]
            for peer, source in enumerate(sources):
                found = next((a for a in (*source.kept, source.current) if a and _is_for(a, request)), None)
                if found is not None:
                    found.request = request
                    request.peer = request.peer if request.peer >= 0 else peer
                    if found in source.kept:
                        source.kept.remove(found)
                        self._deliver(found)
                    break
            else:
                (self._anyone if request.peer < 0 else self._in[request.peer].posted).append(request)
            self.move()
        self._keep_moving()

    def cancel(self, request: Request, error: MeetingError) -> None:
        """Nobody waits for it any more; bytes of it that arrive yet are dropped."""
        with self._lock:
            if request.done:
                return
            for queue in (self._anyone, *(source.posted for source in self._in)):
                if request in queue:
                    queue.remove(request)
            for source in self._in:  # what arrives yet must not land in memory that its owner uses again
                if source.current is not None and source.current.request is request:
                    source.current.data = memoryview(bytearray(source.current.size_bytes))
            self._finish(request, error)

    def move(self, *, waits: bool = False) -> None:
        """Move on what can be moved; where another thread does so already, at once return, or wait for it."""
        if self._under_way and self._lock.acquire(blocking=waits):
            try:
                for out in self._out:
                    if out.queue:
                        self._write(out)
                for peer, source in enumerate(self._in):
                    self._read(peer, source)
            finally:
                self._lock.release()

    def close(self) -> None:
        """Stop the thread."""
        self._closed = True
        self._wake.set()
        if self._thread is not None:
            self._thread.join()

    def _keep_moving(self) -> None:
        """While anything is under way, a thread moves it on, should nobody wait."""
        if not self._under_way:
            return
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="unisono-messages", daemon=True)
            self._thread.start()
        self._wake.set()

    def _run(self) -> None:
        while not self._closed:
            self._wake.wait()
            self._wake.clear()
            while self._under_way and not self._closed:
                time.sleep(1e-3)
                self.move()

    def _finish(self, request: Request, error: MeetingError | None = None) -> None:
        self._under_way -= 1
        request.finish(error)

    def _write(self, out: _Outgoing) -> None:
        words = out.words
        while out.queue:
            request = out.queue[0]
            written, size = words[_WRITTEN], len(request.data)
            if request.moved == 0:
                if RING_BYTES - (written - words[_READ]) < FRAME.size:
                    return
                written = _put(out.ring, written, memoryview(FRAME.pack(request.tag, size)))
                store_fence()
                words[_WRITTEN] = written
                request.moved = FRAME.size
            while (left := size + FRAME.size - request.moved) > 0:
                room = RING_BYTES - (words[_WRITTEN] - words[_READ])
                if room == 0:
                    return
                start = request.moved - FRAME.size
                part = request.data[start : start + min(room, left)]
                written = _put(out.ring, words[_WRITTEN], part)
                store_fence()
                words[_WRITTEN] = written
                request.moved += len(part)
            out.queue.popleft()
            if not request.done:
                self._finish(request)

    def _read(self, peer: int, source: _Incoming) -> None:
        words = source.words
        while True:
            available = words[_WRITTEN] - words[_READ]
            if source.current is None:
                if available < FRAME.size:
                    return
                header = bytearray(FRAME.size)
                words[_READ] = _take(source.ring, words[_READ], memoryview(header))
                source.current = self._begin(peer, source, *FRAME.unpack(header))
                continue
            arriving = source.current
            part = min(words[_WRITTEN] - words[_READ], arriving.size_bytes - arriving.moved)
            if part:
                target = arriving.data[arriving.moved : arriving.moved + part]
                words[_READ] = _take(source.ring, words[_READ], target)
                arriving.moved += part
            if arriving.moved < arriving.size_bytes:
                return
            source.current = None
            if arriving.request is not None:
                self._deliver(arriving)
            else:
                source.kept.append(arriving)

    def _begin(self, peer: int, source: _Incoming, tag: int, size_bytes: int) -> _Arriving:
        """A message's first bytes are here: who wants it?"""
        for queue in (source.posted, self._anyone):
            for request in queue:
                if request.tag == tag:
                    queue.remove(request)
                    request.peer = peer
                    fits = len(request.data) == size_bytes
                    data = request.data if fits else memoryview(bytearray(size_bytes))
                    return _Arriving(tag, size_bytes, data, request)
        return _Arriving(tag, size_bytes, memoryview(bytearray(size_bytes)), None)

    def _deliver(self, arriving: _Arriving) -> None:
        request = arriving.request
        assert request is not None
        if request.done:
            return
        if len(request.data) != arriving.size_bytes:
            self._finish(
                request,
                MeetingError(
                    f"rank {request.peer} sent {arriving.size_bytes} bytes with tag {request.tag}, but the tensor that "
                    f"is to receive them has {len(request.data)}"
                ),
            )
            return
        if arriving.data is not request.data:
            request.data[:] = arriving.data
        self._finish(request)


def _is_for(arriving: _Arriving, request: Request) -> bool:
    return arriving.request is None and arriving.tag == request.tag


def _put(ring: memoryview, at: int, data: memoryview) -> int:
    """Write into a ring; where it ends then."""
    start = at % RING_BYTES
    first = min(len(data), RING_BYTES - start)
    ring[start : start + first] = data[:first]
    if first < len(data):
        ring[: len(data) - first] = data[first:]
    return at + len(data)


def _take(ring: memoryview, at: int, into: memoryview) -> int:
    """Read from a ring; where it begins then."""
    start = at % RING_BYTES
    first = min(len(into), RING_BYTES - start)
    into[:first] = ring[start : start + first]
    if first < len(into):
        into[first:] = ring[: len(into) - first]
    return at + len(into)
