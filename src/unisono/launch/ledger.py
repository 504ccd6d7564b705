"""Where a launcher keeps its vote: on a disk before it is given, so that one that starts again stands by it."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Ledger:
    """Called with a voter's record; nothing is kept until it is told of a file.

    Attributes:
        run: whose votes they are.
    """

    path: Path | None = None
    run: str = ""

    def __call__(self, record: dict[str, Any]) -> None:
        """Keep it, whole or not at all.

        Raises:
            OSError: where it cannot be written; then it does not count.
        """
        if self.path is None:
            return
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            json.dump({**record, "run": self.run}, file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(self.path)

    def read(self, path: Path | None) -> dict[str, Any] | None:
        """What a launcher before this one has kept of the same run; None where nothing can be read."""
        try:
            record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path is not None else {}
        except (OSError, ValueError):
            return None
        return record if record.get("run") == self.run else None

    def keep_in(self, path: Path | None, record: dict[str, Any]) -> None:
        """From now on in a file, and what holds already too.

        Raises:
            OSError: where it cannot be written.
        """
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self(record)
