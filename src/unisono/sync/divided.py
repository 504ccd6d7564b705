"""A training state divided among servers: the runs and tables that one lock guards, and what updates them."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from unisono.comm.journal import Image
from unisono.optim.blockwise import BlockOptimizer
from unisono.plan.assignment import Run, UpdateClass, contiguous_shares, runs
from unisono.plan.blocks import FlatLayout
from unisono.plan.unit_pool import Words
from unisono.state.layout import StateLayout
from unisono.sync.ownership import OwnedBuffers, OwnedRun, Owner
from unisono.sync.tables import Table, members


@dataclass(frozen=True, slots=True)
class OwnedTable:
    """A table, as one worker updates it.

    Attributes:
        image: by which its blocks are known; old rows are kept as rows.
        values: (rows, ...), in the state.
        changed: the version of its server since which each row is as it is.
    """

    table: Table
    image: Image
    values: Tensor
    changed: Words

    def since(self, version: int) -> Tensor:
        """The rows that were changed after a version."""
        return torch.from_numpy(np.flatnonzero(self.changed > version))

    def rows_since(self, version: int) -> tuple[Tensor, Tensor]:
        """The same, and their values."""
        rows = self.since(version)
        return rows, self.values[rows]


@dataclass(frozen=True, slots=True)
class Server:
    """A part of the state with a lock and a version of its own.

    Attributes:
        members: its runs of parameters, each updated as one, and tables.
        buffers: of the model, on one of the servers, where there are any.
    """

    members: Sequence[OwnedRun | OwnedTable]
    buffers: OwnedBuffers | None

    @property
    def runs(self) -> list[OwnedRun]:
        """Those of its members that are."""
        return [member for member in self.members if isinstance(member, OwnedRun)]

    @property
    def tables(self) -> list[OwnedTable]:
        """Those of its members that are."""
        return [member for member in self.members if isinstance(member, OwnedTable)]

    @property
    def images(self) -> list[Image]:
        """The memory of its members; the buffers' is the last."""
        return [member.image for member in self.members] + ([self.buffers.image] if self.buffers is not None else [])

    @property
    def parts(self) -> list[Run]:
        """Its members as runs, the buffers' among them."""
        return [_run(image) for image in self.images]

    @property
    def dense(self) -> list[Run]:
        """The same without tables."""
        apart = {owned.table.first for owned in self.tables}
        return [run for run in self.parts if run.first not in apart]


def _run(image: Image) -> Run:
    return Run(image.first, image.first + image.count)


def divided(
    layout: StateLayout, update: UpdateClass, count: int, most: int, tables: Sequence[Table]
) -> list[Sequence[Run]]:
    """A state's runs, divided among servers about evenly; as many as are wanted, or as there are runs for.

    Arguments:
        most: elements of a run.
        tables: each is a run of its own.
    """
    blocks, apart = layout.flat.blocks, members(tables)
    dense = runs(layout.flat, update, [block for block in range(len(blocks)) if block not in apart], most)
    everything = sorted([*dense, *(Run(table.first, table.stop) for table in tables)], key=lambda run: run.first)
    costs = [sum(b.stop - b.start for b in blocks[run.first : run.stop]) for run in everything]
    wanted = min(count, len(everything))
    shares = [share for share in contiguous_shares(costs, wanted) if share]
    while len(shares) < wanted:  # one run may cost as much as all others
        longest = max(range(len(shares)), key=lambda number: len(shares[number]))
        share = shares[longest]
        shares[longest : longest + 1] = [share[: len(share) // 2], share[len(share) // 2 :]]
    return [everything[share.start : share.stop] for share in shares]


def dense_elements(flat: FlatLayout, tables: Sequence[Table]) -> int:
    """Elements of parameters that are no tables."""
    apart = members(tables)
    return sum(block.stop - block.start for number, block in enumerate(flat.blocks) if number not in apart)


def servers_of(
    parts: Sequence[Sequence[Run]],
    owner: Owner,
    optimizer: BlockOptimizer,
    tables: Sequence[Table],
    changed: Words,
    numbers: Sequence[int] | None = None,
) -> list[Server]:
    """Servers over a worker's memory; the buffers are the first one's.

    Arguments:
        tables: those of the runs that are.
        changed: of each row of all tables.
        numbers: of those that are prepared, others have no members; default: all.
    """
    buffers, values = owner.prepare_buffers(), owner.state.values
    stops = list(itertools.accumulate(len(values[table.parameter]) for table in tables))
    owned = {
        table.first: OwnedTable(
            table,
            Image(table.first, table.stop - table.first, (), (), ()),
            values[table.parameter],
            changed[stop - len(values[table.parameter]) : stop],
        )
        for table, stop in zip(tables, stops, strict=True)
    }

    def members_of(number: int, part: Sequence[Run]) -> list[OwnedRun | OwnedTable]:
        if numbers is not None and number not in numbers:
            return []
        dense = iter(owner.prepare([run for run in part if run.first not in owned], optimizer))
        return [owned[run.first] if run.first in owned else next(dense) for run in part]

    return [Server(members_of(number, part), None if number else buffers) for number, part in enumerate(parts)]
