"""Which algorithm is the quickest for a size: a table that ``unisono bench comm --tune`` measures, and its reader."""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from unisono.errors import ConfigurationError


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds that an all-reduce took between so many hosts."""

    algorithm: str
    hosts: int
    size_bytes: int
    seconds: float


def table_path() -> Path:
    """Where the table lies: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "unisono" / "wire.json"


def write_table(rows: Sequence[Measured], path: Path) -> None:
    """Store a table, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(encode_table(rows), encoding="utf-8")
    temporary.rename(path)


def encode_table(rows: Sequence[Measured]) -> str:
    """A table as JSON."""
    return json.dumps({"rows": [asdict(row) for row in rows]}, indent=1)


def decode_table(text: str) -> list[Measured]:
    """What `encode_table` made; raises ValueError, KeyError or TypeError for anything else."""
    rows = json.loads(text)["rows"]
    return [Measured(str(r["algorithm"]), int(r["hosts"]), int(r["size_bytes"]), float(r["seconds"])) for r in rows]


def read_table(path: Path) -> list[Measured]:
    """The measured rows.

    Raises:
        ConfigurationError: where there is no table, or it is not one.
    """
    try:
        return decode_table(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigurationError(
            f"wire.algorithm is auto, but there is no table of measurements at {path}; make one on these hosts with "
            "unisono bench comm --tune, or name an algorithm"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} is no table of measurements; make it anew: unisono bench comm --tune"
        ) from error


def quickest(rows: Sequence[Measured], hosts: int, size_bytes: int) -> str:
    """The algorithm that was the quickest at the nearest measured number of hosts and size, by ratio.

    >>> rows = [Measured("tree", 2, 1024, 1e-4), Measured("ring", 2, 1024, 2e-4), Measured("ring", 2, 1 << 20, 1e-3)]
    >>> quickest(rows, 2, 2000), quickest(rows, 2, 10**7)
    ('tree', 'ring')
    """

    def distance(row: Measured) -> tuple[float, float]:
        return _ratio(row.hosts, hosts), _ratio(row.size_bytes, size_bytes)

    nearest = min(distance(row) for row in rows)
    return min((row for row in rows if distance(row) == nearest), key=lambda row: row.seconds).algorithm


def _ratio(a: int, b: int) -> float:
    return max(a, b) / max(1, min(a, b))
