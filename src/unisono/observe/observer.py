"""The contract of everything that watches a run."""

from typing import Protocol

from unisono.events import Event


class Observer(Protocol):
    """Hears every event on rank 0, and is closed when the run ends, in whatever way."""

    def __call__(self, event: Event) -> None:
        """Take note of an event."""

    def close(self) -> None:
        """Let go of files and the terminal."""
