"""Where a launcher keeps its vote: on a disk before it is given, so that one that starts again stands by it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Called with a voter's record; nothing is kept until it is told of a file."""

    path: Path | None = None

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep it, whole or not at all.

        Raises:
            OSError: where it cannot be written; then it does not count.
        """
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump(record, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)

    def keep_in(self, path: Path | None, record: dict[str, Any]) -> None:
        """From now on in a file, and what holds already too.

        Raises:
            OSError: where it cannot be written.
        """
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self(record)
