"""How gradients travel between hosts, as data: buckets, the algorithm, compression."""

from collections.abc import Sequence
from dataclasses import dataclass

from unisono.comm.algorithms import ALGORITHMS, AllReduce
from unisono.comm.compression import Compression
from unisono.comm.network import NetworkWire
from unisono.comm.partial import item_size
from unisono.comm.tuning import Measured, quickest
from unisono.comm.wire_state import wire_regions
from unisono.plan.assignment import Teams
from unisono.plan.blocks import FlatLayout
from unisono.plan.exchange import Bucket, buckets

FIRST_BYTES = 1 << 16
"""The least size of a step's first bucket, so that the link has something to send early."""
BUCKET_BYTES, COMPRESSED_BUCKET_BYTES = 1 << 20, 4 << 20
"""Least sizes; the second for what is compressed to little, where messages cost more than an early start brings."""


@dataclass(frozen=True, slots=True)
class Way:
    """How gradients travel.

    Attributes:
        bucket_bytes: the least size of a bucket; None for the default.
        algorithm: "canonical", "native", or one of `ALGORITHMS`; a table's rows for "auto".
        compression: None for none.
        table: measured, for "auto".
        lossless: "always", "never", or "auto": where a trial finds it quicker.
    """

    bucket_bytes: int | None = None
    algorithm: str = "canonical"
    compression: Compression | None = None
    table: Sequence[Measured] = ()
    lossless: str = "never"

    @property
    def may_pack(self) -> bool:
        """Whether gradients may travel packed."""
        return self.lossless != "never" and self.compression is None

    def buckets(self, flat: FlatLayout, teams: Teams, lanes: Sequence[int] = ()) -> tuple[Bucket, ...]:
        """The buckets of a model; their number does not depend on the lanes (default: one for each team)."""
        little = self.compression is not None and self.compression.sends_little
        least = self.bucket_bytes or (COMPRESSED_BUCKET_BYTES if little else BUCKET_BYTES)
        first = least if little else FIRST_BYTES
        item_bytes = [item_size(dtype) for dtype in flat.segment_dtypes]
        return buckets(flat, item_bytes, first, least, teams, lanes or range(teams.count))

    def wire_bytes(self, flat: FlatLayout) -> int:
        """Bytes of a host's memory of compression."""
        return wire_regions(flat, self.compression).size_bytes if self.compression is not None else 0

    def choose(self, wire: NetworkWire, size_bytes: int) -> AllReduce:
        """The algorithm for a bucket."""
        name = self.algorithm
        if name == "auto":
            name = quickest(self.table, wire.size, size_bytes)
        return wire.native if name == "native" else ALGORITHMS[name]
