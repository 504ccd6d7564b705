"""Parameters of which a micro-batch changes a few rows: what is updated, told and kept aside of them is those rows."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from unisono.config import ClipConfig
from unisono.plan.blocks import FlatLayout, aligned
from unisono.sync.sums import Gradient

WORD = 8


@dataclass(frozen=True, slots=True)
class Table:
    """A parameter whose gradient is sparse, and whose update touches nothing else.

    Attributes:
        parameter: its place in the flat order.
        uses: of the parameter.
        group: of the optimizer.
        first, stop: its blocks.
    """

    parameter: int
    uses: tuple[int, ...]
    group: int
    first: int
    stop: int

    def gradients(self, sums: Gradient) -> list[Tensor]:
        """The sparse gradients of a unit's micro-batches."""
        return [gradient for use in self.uses for gradient in sums.rows[use]]

    def total(self, sums: Gradient) -> Tensor | None:
        """Their sum, every row once; None where there is none. Made once."""
        if self.parameter not in sums.totals:
            found = self.gradients(sums)
            sums.totals[self.parameter] = functools.reduce(torch.add, found).coalesce() if found else None
        return sums.totals[self.parameter]


def tables_of(model: nn.Module, flat: FlatLayout, optimizer: Optimizer, clip: ClipConfig | None) -> list[Table]:
    """The embeddings made with ``sparse=True``, all of them, under SGD that changes nothing but what has a gradient.

    Arguments:
        clip: limits of gradients; some of them need the whole gradient.
    """
    if clip is not None and clip.norm is None:
        return []
    sparse = {
        f"{name}.weight".removeprefix(".")
        for name, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse
    }
    tables = []
    for parameter, spec in enumerate(flat.parameters):
        if spec.group is None or not sparse.issuperset(spec.uses) or not _is_plain_sgd(optimizer, spec.group):
            continue
        blocks = flat.blocks_of(parameter)
        tables.append(Table(parameter, tuple(flat.uses_of(parameter)), spec.group, blocks.start, blocks.stop))
    return tables


def _is_plain_sgd(optimizer: Optimizer, group: int) -> bool:
    options = optimizer.param_groups[group]
    further = ("momentum", "weight_decay", "maximize")
    return type(optimizer) is SGD and not any(options.get(name) for name in further)


def rows_bytes(rows: int, row_bytes: int) -> int:
    """Bytes in which some rows are kept: how many, which, and what was in them."""
    return aligned(WORD * (1 + rows)) + rows * row_bytes


def keep_rows(memory: Tensor, rows: Tensor, values: Tensor) -> None:
    """Keep some rows of a table as they are.

    Arguments:
        memory: bytes.
        rows: which, as int64.
    """
    head = memory[: WORD * (1 + len(rows))].view(torch.int64)
    head[0] = len(rows)
    head[1:] = rows
    _kept(memory, len(rows), values).copy_(values[rows])


def put_back_rows(memory: Tensor, values: Tensor) -> None:
    """Let the rows that were kept be as they were."""
    count = int(memory[:WORD].view(torch.int64))
    rows = memory[WORD : WORD * (1 + count)].view(torch.int64)
    values[rows] = _kept(memory, count, values)


def _kept(memory: Tensor, count: int, values: Tensor) -> Tensor:
    size_bytes = values[0].numel() * values.element_size()
    start = aligned(WORD * (1 + count))
    return memory[start : start + count * size_bytes].view(values.dtype).view(count, *values.shape[1:])


def members(tables: Sequence[Table]) -> set[int]:
    """The blocks of tables."""
    return {block for table in tables for block in range(table.first, table.stop)}
