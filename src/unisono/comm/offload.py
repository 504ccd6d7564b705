"""Parts of the arena in a file on a disk: they take memory only while they are used.

The file has no name once every worker of the host has opened it, so nothing is left of it when they end.
"""

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from unisono.comm.arena import PAGE, Region
from unisono.comm.host import HostGroup
from unisono.errors import ConfigurationError


class Offload:
    """Regions of a host's arena whose memory is a file's; all its workers make it at the same time.

    Arguments:
        directory: on a disk.
        regions: each begins with a page.

    Raises:
        ConfigurationError: where no file can be made there.
    """

    def __init__(self, group: HostGroup, directory: Path, regions: Sequence[Region]) -> None:
        self._arena = group.arena
        self._regions = regions
        sizes = [-(-region.size_bytes // PAGE) * PAGE for region in regions]
        name, failure = "", ""
        if group.rank == 0:
            try:
                descriptor, name = tempfile.mkstemp(prefix=".unisono-", dir=directory)
                os.posix_fallocate(descriptor, 0, max(1, sum(sizes)))
                os.close(descriptor)
            except OSError as error:
                failure = f"layout.offload: cannot keep {sum(sizes)} bytes in {directory}: {error.strerror}"
        name, _, failure = group.all_gather(f"{name}\n{failure}".encode(), "offload")[0].decode().partition("\n")
        try:
            if failure:
                raise ConfigurationError(failure)
            with open(name, "r+b") as file:
                offset = 0
                for region, size_bytes in zip(regions, sizes, strict=True):
                    self._arena.map_file(Region(region.offset, size_bytes), file.fileno(), offset)
                    offset += size_bytes
            group.barrier("offload")
        finally:
            if group.rank == 0 and name:
                os.unlink(name)

    def page_out(self) -> None:
        """What has been used goes back to the disk."""
        for region in self._regions:
            self._arena.page_out(region)
