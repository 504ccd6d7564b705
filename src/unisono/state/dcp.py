"""Directories of torch.distributed.checkpoint, read tensor by tensor, by one process."""

import io
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from unisono.errors import CheckpointError

METADATA = ".metadata"
_METADATA = "torch.distributed.checkpoint.metadata"
_KNOWN = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "Path"),
}


def names(path: Path) -> list[str]:
    """The tensors that a directory holds."""
    entries = _SafeReader(path).read_metadata().state_dict_metadata
    return [name for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)]


def tensors(path: Path, wanted: list[tuple[str, str]]) -> Iterator[tuple[str, Tensor]]:
    """Tensors under other names: pairs of a name, and the one that the directory has."""
    entries = _SafeReader(path).read_metadata().state_dict_metadata
    for name, key in wanted:
        entry: Any = entries[key]
        target = torch.empty(entry.size, dtype=entry.properties.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that one process reads is what is wanted
            load({key: target}, storage_reader=_SafeReader(path), no_dist=True)
        yield name, target


class _SafeReader(FileSystemReader):
    """Reads the metadata, which is a pickle, without running what it may hold."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What the directory holds, and where."""
        data = (Path(self.path) / METADATA).read_bytes()
        metadata: Metadata = _Restricted(io.BytesIO(data)).load()
        return metadata


class _Restricted(pickle.Unpickler):
    """Knows the classes that the metadata is made of, and no others."""

    def find_class(self, module: str, name: str) -> Any:
        """A class by its name.

        Raises:
            CheckpointError: for one that the metadata has no need of.
        """
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if (module, name) in _KNOWN or dtype:
            return super().find_class(module, name)
        raise CheckpointError(f"the metadata holds {module}.{name}, which may be unsafe and is not read")
