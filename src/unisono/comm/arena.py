"""The arena: memory that the workers of one host share, and the regions it is divided into.

The launcher creates it (``memfd_create``: no file, freed by the kernel with its last process) and hands the descriptor
on; every worker maps the same bytes. It is not inherited by what workers fork, and not kept across an exec.
"""

import contextlib
import ctypes
import mmap
import os
from dataclasses import dataclass, field

import torch
from torch import Tensor

from unisono.errors import LaunchError

PAGE = 4096
LINE = 64
_MAP_FIXED, _MADV_PAGEOUT = 0x10, 21  # of Linux; Python has no names for them


@dataclass(frozen=True, slots=True)
class Region:
    """Bytes [offset, offset + size_bytes) of an arena."""

    offset: int
    size_bytes: int

    def part(self, offset: int, size_bytes: int) -> "Region":
        """A region inside this one."""
        assert offset >= 0 and offset + size_bytes <= self.size_bytes
        return Region(self.offset + offset, size_bytes)


@dataclass(slots=True)
class Regions:
    """Hands out regions one behind the other; the same calls give the same regions in every worker."""

    size_bytes: int = 0
    named: dict[str, Region] = field(default_factory=dict)

    def add(self, name: str, size_bytes: int, alignment: int = LINE) -> Region:
        """The next region, aligned."""
        offset = -(-self.size_bytes // alignment) * alignment
        region = self.named[name] = Region(offset, size_bytes)
        self.size_bytes = offset + size_bytes
        return region


class Arena:
    """A mapping of shared bytes; ``descriptor=None`` maps private memory, for a world of one.

    Example:
        >>> arena = Arena(None, 4096)
        >>> arena.words(Region(0, 16))[0] = 7
        >>> arena.tensor(Region(0, 16), torch.int64).tolist()
        [7, 0]
    """

    def __init__(self, descriptor: int | None, size_bytes: int) -> None:
        try:
            if descriptor is None:  # pages that nobody touches are not reserved either, as with a descriptor
                flags = mmap.MAP_SHARED | getattr(mmap, "MAP_NORESERVE", 0)
                self._mapping = mmap.mmap(-1, size_bytes, flags=flags)
            else:
                self._mapping = mmap.mmap(descriptor, size_bytes)
        except (OSError, ValueError) as error:
            raise LaunchError(f"cannot map {size_bytes / 2**30:.2f} GiB of shared memory: {error}") from error
        if descriptor is not None and hasattr(mmap, "MADV_DONTFORK"):
            self._mapping.madvise(mmap.MADV_DONTFORK)  # a forked child would keep writing after its parent is fenced
        self._tensor = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._bytes = memoryview(self._mapping)

    def release(self, region: Region) -> None:
        """Give back the memory of the whole pages inside a region: they read as zeros, and cost nothing."""
        first, stop = -(-region.offset // PAGE) * PAGE, (region.offset + region.size_bytes) // PAGE * PAGE
        if stop > first and hasattr(mmap, "MADV_REMOVE"):
            with contextlib.suppress(OSError):  # pages of a file on a disk that has no holes stay as they are
                self._mapping.madvise(mmap.MADV_REMOVE, first, stop - first)

    def map_file(self, region: Region, descriptor: int, offset: int) -> None:
        """Let whole pages be those of a file; what was in them is lost.

        Raises:
            LaunchError: where the system refuses.
        """
        address, libc = self._tensor.data_ptr() + region.offset, ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        flags = mmap.MAP_SHARED | _MAP_FIXED
        placed = libc.mmap(
            *(ctypes.c_void_p(address), ctypes.c_size_t(region.size_bytes), mmap.PROT_READ | mmap.PROT_WRITE),
            *(flags, descriptor, ctypes.c_long(offset)),
        )
        if placed != address:
            raise LaunchError(f"cannot map {region.size_bytes} bytes of a file: {os.strerror(ctypes.get_errno())}")
        self._mapping.madvise(mmap.MADV_DONTFORK, region.offset, region.size_bytes)

    def page_out(self, region: Region) -> None:
        """Write pages of a file to its disk, and let them leave memory."""
        first, stop = region.offset // PAGE * PAGE, -(-(region.offset + region.size_bytes) // PAGE) * PAGE
        self._mapping.flush(first, stop - first)  # pages that are not written yet stay
        address = ctypes.c_void_p(self._tensor.data_ptr() + first)
        ctypes.CDLL(None).madvise(address, ctypes.c_size_t(stop - first), _MADV_PAGEOUT)

    def words(self, region: Region) -> memoryview:
        """The region as unsigned 64-bit words; an assignment is one aligned store."""
        return self._bytes[region.offset : region.offset + region.size_bytes].cast("Q")

    def bytes(self, region: Region) -> memoryview:
        """The region as bytes."""
        return self._bytes[region.offset : region.offset + region.size_bytes]

    def tensor(self, region: Region, dtype: torch.dtype) -> Tensor:
        """The region as a flat tensor."""
        return self._tensor[region.offset : region.offset + region.size_bytes].view(dtype)


class DeviceMemory:
    """Regions on an accelerator, made as they are first asked for; the words stay in the host's arena."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._tensors: dict[Region, Tensor] = {}

    def __call__(self, region: Region) -> Tensor:
        """The region's bytes on the device."""
        if region not in self._tensors:
            self._tensors[region] = torch.zeros(region.size_bytes, dtype=torch.uint8, device=self._device)
        return self._tensors[region]


def mapped(descriptor: int | None, size_bytes: int) -> Arena:
    """The arena; the mapping keeps what it needs, so that the descriptor does not keep the memory."""
    try:
        return Arena(descriptor, size_bytes)
    finally:
        if descriptor is not None:
            os.close(descriptor)
