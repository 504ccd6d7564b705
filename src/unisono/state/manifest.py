"""The manifest of a checkpoint: what was saved, and checksums of every chunk of every file and of itself.

Canonical JSON with a checksum of the rest as its first key. Every byte of it counts: a manifest whose bytes are not
exactly those that its contents lead to is damaged.
"""

import hashlib
import json
import zlib
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from unisono.errors import CheckpointError

FORMAT = 1
CHUNK_BYTES = 4 << 20
NAME = "manifest.json"


class SavedTensor(BaseModel):
    """One tensor: the file that holds it."""

    model_config = ConfigDict(frozen=True)
    file: str
    dtype: str
    shape: tuple[int, ...]


class SavedFile(BaseModel):
    """One file: its size, and the CRC-32 of each chunk of `CHUNK_BYTES`."""

    model_config = ConfigDict(frozen=True)
    size_bytes: int
    chunks: tuple[int, ...]


class Manifest(BaseModel):
    """What a checkpoint holds.

    Attributes:
        step, digest: of the state.
        tensors: by name, ``parameter/...``, ``optimizer/...``, ``buffer/...``.
        files: by name inside the checkpoint's directory.
        ties: names of parameters that share the memory of another, and which.
        plain_buffers: buffers that belong to a plain ``state_dict`` (others are not persistent).
        run: what defines the run, for comparison on resume.
        fingerprint: facts of the machine that change bits.
        validation: metrics of this state, where it was evaluated.
        best: the best value of the deciding metric so far, and the evaluations since.
    """

    model_config = ConfigDict(frozen=True)
    format: int = FORMAT
    step: int
    digest: str
    tensors: dict[str, SavedTensor]
    files: dict[str, SavedFile]
    ties: dict[str, str]
    plain_buffers: tuple[str, ...]
    run: dict[str, Any]
    fingerprint: dict[str, Any]
    validation: dict[str, float] | None = None
    best: dict[str, Any] | None = None


def checksums(data: bytes | memoryview) -> tuple[int, ...]:
    """The CRC-32 of each chunk."""
    view = memoryview(data)
    return tuple(zlib.crc32(view[i : i + CHUNK_BYTES]) for i in range(0, len(view), CHUNK_BYTES))


def encode(manifest: Manifest) -> bytes:
    """The manifest's bytes."""
    body = json.dumps(manifest.model_dump(mode="json"), sort_keys=True, indent=1)
    checksum = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"checksum": "{checksum}",\n"manifest": {body}}}\n'.encode()


def decode(data: bytes, where: Path) -> Manifest:
    """The manifest that the bytes hold.

    Raises:
        CheckpointError: where a single byte is not as it was written.
    """
    try:
        loaded = json.loads(data)
        manifest = Manifest.model_validate(loaded["manifest"])
        if loaded["manifest"].get("format") != FORMAT:
            raise ValueError(f"format {loaded['manifest'].get('format')}, this version reads {FORMAT}")
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{where} is damaged: {str(error).splitlines()[0]}") from None
    if encode(manifest) != data:
        raise CheckpointError(f"{where} is damaged: its checksum does not match")
    return manifest


def read(directory: Path) -> Manifest:
    """The manifest of a checkpoint."""
    path = directory / NAME
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    return decode(data, path)
