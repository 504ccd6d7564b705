"""The store in which workers of several hosts find each other, kept by their launchers, never by a worker."""

import base64
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch._C._distributed_c10d import Store

PAUSE_S = 0.002


class LauncherStore(Store):
    """A torch.distributed store over a worker's line to its launcher.

    Arguments:
        ask: sends a request to the launcher and returns its reply.
        deadline_s: seconds that a key is waited for.

    Attributes:
        useless: asked again and again while a key is waited for: whether it is of no use any more.
    """

    def __init__(self, ask: Callable[[dict[str, Any]], dict[str, Any]], deadline_s: float) -> None:
        super().__init__()
        self.useless: Callable[[], bool] = lambda: False
        self._ask = ask
        self._deadline_s = deadline_s

    def set(self, key: str, value: str | bytes) -> None:
        """Leave a value for all."""
        data = value.encode() if isinstance(value, str) else value
        self._ask({"op": "set", "key": key, "value": base64.b64encode(data).decode()})

    def get(self, key: str) -> bytes:
        """The value of a key, once it is there.

        Raises:
            RuntimeError: if it does not come before the deadline; torch expects this type.
        """
        self.wait([key])
        value: str = self._ask({"op": "get", "key": key})["value"]
        return base64.b64decode(value)

    def check(self, keys: Sequence[str]) -> bool:
        """Whether all keys are there."""
        return all(self._ask({"op": "get", "key": key})["value"] is not None for key in keys)

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:
        """Return once all keys are there."""
        asked_s = timeout.total_seconds() if timeout is not None else 0.0
        until = time.monotonic() + max(asked_s, self._deadline_s)  # what is asked for may be for connections alone
        while not self.check(keys):
            if self.useless():
                raise RuntimeError(f"{', '.join(keys)} is not waited for any more")
            if time.monotonic() > until:
                raise RuntimeError(f"nobody has set {', '.join(keys)} within {self._deadline_s:g} s")
            time.sleep(PAUSE_S)
