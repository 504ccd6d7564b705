"""Text files as samples: bytes read through memory maps, so that a corpus of any size trains in constant memory."""

import bisect
import glob
import hashlib
import mmap
import os
import sysconfig
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from unisono.errors import DataError

VALIDATION_SHARE = 10
"""One file of this many is held out."""
OPEN_FILES = 64
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True, slots=True)
class TextFile:
    """Bytes [start, stop) of a file; ``name`` is its path below the corpus's root."""

    path: Path
    name: str
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Corpus:
    """Files in order of name, divided into training and validation.

    A file goes to validation by a hash of its name, so that a corpus that grows keeps its division. Where that leaves
    one of the two empty (a single file, say), the last tenth of the bytes is held out instead.
    """

    train: tuple[TextFile, ...]
    validation: tuple[TextFile, ...]

    def digest(self) -> str:
        """SHA-256 over the names and bytes of all files."""
        whole = hashlib.sha256()
        for file in sorted({(f.path, f.name) for f in (*self.train, *self.validation)}, key=lambda f: f[1]):
            whole.update(file[1].encode() + b"\0")
            with file[0].open("rb") as stream:
                while chunk := stream.read(1 << 20):
                    whole.update(chunk)
        return whole.hexdigest()


def corpus(pattern: str | None) -> Corpus:
    """The files that a path or glob names; by default the sources of Python's standard library, tests left out.

    Raises:
        DataError: where there are none, or they are empty.
    """
    found = _standard_library() if pattern is None else _matching(pattern)
    files = [TextFile(path, name, 0, size) for path, name in found if (size := path.stat().st_size)]
    if not files:
        raise DataError(f"no text in {pattern}; give a file, a directory, or a glob that matches files with text")
    held_out = [f for f in files if _hash(f.name) % VALIDATION_SHARE == 0]
    rest = [f for f in files if _hash(f.name) % VALIDATION_SHARE]
    if not held_out or not rest:
        rest, held_out = _cut(files)
    return Corpus(tuple(rest), tuple(held_out))


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _standard_library() -> list[tuple[Path, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for directory, below, names in os.walk(root):
        below[:] = [name for name in below if name not in _LEFT_OUT]  # installed packages are not walked at all
        found += [Path(directory, name) for name in names if name.endswith(".py")]
    return sorted(((p, p.relative_to(root).as_posix()) for p in found), key=lambda item: item[1])


def _matching(pattern: str) -> list[tuple[Path, str]]:
    base = Path(pattern)
    if base.is_file():
        return [(base, base.name)]
    if base.is_dir():
        paths = [p for p in base.rglob("*") if p.is_file()]
        return sorted(((p, p.relative_to(base).as_posix()) for p in paths), key=lambda item: item[1])
    paths = [Path(p) for p in glob.glob(pattern, recursive=True) if Path(p).is_file()]
    if not paths:
        raise DataError(f"no file at {pattern}; give an existing file, directory, or glob")
    return sorted(((p, p.as_posix()) for p in paths), key=lambda item: item[1])


def _cut(files: Sequence[TextFile]) -> tuple[list[TextFile], list[TextFile]]:
    """The first nine tenths of the bytes, and the rest."""
    total = sum(f.stop for f in files)
    left = total - max(1, total // VALIDATION_SHARE)
    train, held_out = [], []
    for f in files:
        inside = min(left, f.stop)
        if inside:
            train.append(TextFile(f.path, f.name, 0, inside))
        if inside < f.stop:
            held_out.append(TextFile(f.path, f.name, inside, f.stop))
        left -= inside
    return train, held_out


class Bytes:
    """The bytes of files, one behind the other; files are mapped as they are needed, a few at a time."""

    def __init__(self, files: Sequence[TextFile]) -> None:
        self._files = files
        self._ends = list(accumulate(f.stop - f.start for f in files))
        self._maps: OrderedDict[int, mmap.mmap] = OrderedDict()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def read(self, start: int, size: int) -> bytes:
        """Bytes [start, start + size)."""
        parts = []
        index = bisect.bisect_right(self._ends, start)
        while size > 0:
            file = self._files[index]
            before = self._ends[index] - (file.stop - file.start)
            at = file.start + start - before
            part = self._map(index)[at : min(at + size, file.stop)]
            parts.append(part)
            start, size, index = start + len(part), size - len(part), index + 1
        return b"".join(parts)

    def chunks(self, size: int) -> Iterator[bytes]:
        """All bytes, ``size`` at a time."""
        for start in range(0, len(self), size):
            yield self.read(start, min(size, len(self) - start))

    def _map(self, index: int) -> mmap.mmap:
        found = self._maps.get(index)
        if found is None:
            if len(self._maps) >= OPEN_FILES:
                self._maps.popitem(last=False)[1].close()
            with self._files[index].path.open("rb") as stream:
                found = self._maps[index] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            self._maps.move_to_end(index)
        return found


class Windows:
    """Samples of next-byte prediction: ``context`` bytes, and the same shifted by one; they do not overlap.

    Raises:
        DataError: where the files are shorter than one window.
    """

    draws = False

    def __init__(self, files: Sequence[TextFile], context: int, split: str) -> None:
        self.bytes = Bytes(files)
        self._context = context
        if len(self) < 1:
            raise DataError(
                f"the {split} split has {len(self.bytes)} bytes; a sample takes {context + 1}: "
                "give more text, or a smaller context"
            )

    def __len__(self) -> int:
        return max(0, (len(self.bytes) - 1) // self._context)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        data = self.bytes.read(index * self._context, self._context + 1)
        window = torch.frombuffer(bytearray(data), dtype=torch.uint8).long()
        return window[:-1], window[1:]
