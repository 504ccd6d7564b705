"""A link with delay and loss, for connections that go through it: a proxy that holds bytes back.

TCP hides loss as delay: a lost segment arrives when it is sent again. So a part of the chunks waits that much longer.
"""

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

CHUNK_BYTES = 1 << 14


class Proxy:
    """Forwards connections to a target.

    Arguments:
        delay_s: each way, for every chunk.
        loss: the part of chunks that is "lost", and comes ``resend_s`` later.
    """

    def __init__(self, target: tuple[str, int], delay_s: float, loss: float = 0.0, resend_s: float = 0.2) -> None:
        self._target = target
        self._delay_s, self._loss, self._resend_s = delay_s, loss, resend_s
        self._random = random.Random(0)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._open: list[socket.socket] = []
        self.address: tuple[str, int] = self._listener.getsockname()
        self._threads = [threading.Thread(target=self._serve, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        """Cut all connections."""
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for connection in self._open:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in self._open:
            connection.close()

    def _serve(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(self._target)
            except OSError:  # nobody listens there yet
                near.close()
                continue
            self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                self._threads.append(threading.Thread(target=self._forward, args=(source, sink), daemon=True))
                self._threads[-1].start()

    def _forward(self, source: socket.socket, sink: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(CHUNK_BYTES):
                time.sleep(self._delay_s + (self._resend_s if self._random.random() < self._loss else 0.0))
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)


@contextmanager
def proxy(target: tuple[str, int], delay_s: float, loss: float = 0.0) -> Iterator[tuple[str, int]]:
    """The address of a proxy."""
    through = Proxy(target, delay_s, loss)
    try:
        yield through.address
    finally:
        through.close()
