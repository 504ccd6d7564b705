"""Where a launcher keeps its vote: on a disk before it is given, so that one that starts again stands by it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Called with a voter's record; in memory until it is told of a file."""

    path: Path | None = None
    _record: dict[str, Any] = field(default_factory=dict)

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep it, whole or not at all.

        Raises:
            OSError: where it cannot be written; then it does not count.
        """
        self._record = record
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)

    def keep_in(self, path: Path | None) -> None:
        """From now on in a file, and what has been said so far too."""
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        if self._record:
            self(self._record)
