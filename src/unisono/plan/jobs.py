"""What is to be judged, as columns: many models, divisions and devices at once, a row each.

The cost model computes on whole columns, so that a search over a hundred thousand divisions, a fit over thousands of
published runs and one question of a user are the same few functions. Columns of one length broadcast with scalars.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from unisono.plan.division import RECOMPUTE, SCHEDULES, Division
from unisono.plan.hardware import Cluster
from unisono.plan.transformer import Transformer

Column = NDArray[np.float64]
"""Numbers of all rows, or one for all; flags are 0 and 1."""
Mask = NDArray[np.bool_]
"""Some of the rows."""


@dataclass(frozen=True)
class Jobs:
    """Columns. Names are those of `Transformer`, `Division` and `Device`; widths are whole, not divided.

    Attributes:
        query, keys: width of all queries, and of all keys (or values), together.
        matrices: of an MLP, 2 or 3.
        common: width of the MLPs of a layer that all tokens pass.
        passed, experts: width of the experts of a layer that a token passes, and of all of them.
        routed: experts that a token passes; 0 where there are none.
        choices: experts of a layer, among which it is routed.
        tokens: of a sequence.
        recompute: index into `RECOMPUTE`.
        schedule: index into `SCHEDULES`.
        flops, slow_flops: operations a second of matrix products in layers, and of all others.
        within, between: bytes a second of one device, one way.
        node: devices of a node.
    """

    layers: Column
    hidden: Column
    query: Column
    keys: Column
    heads: Column
    kv_heads: Column
    common: Column
    passed: Column
    experts: Column
    routed: Column
    choices: Column
    matrices: Column
    vocab: Column
    tied: Column
    positions: Column
    biased: Column
    dropout: Column
    tokens: Column
    tensor: Column
    pipeline: Column
    data: Column
    context: Column
    expert: Column
    zero: Column
    shard: Column
    micro_batch: Column
    micro_batches: Column
    sequence: Column
    recompute: Column
    unfused: Column
    virtual: Column
    schedule: Column
    period: Column
    flops: Column
    slow_flops: Column
    memory_bytes: Column
    memory_bytes_per_s: Column
    within: Column
    between: Column
    node: Column

    @property
    def devices(self) -> Column:
        """All of a job."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def sequences(self) -> Column:
        """Of a step."""
        return self.data * self.micro_batch * self.micro_batches

    @property
    def own_tokens(self) -> Column:
        """Of a micro-batch, on one of the devices that share its sequences."""
        return self.micro_batch * self.tokens / self.context

    @property
    def held_layers(self) -> Column:
        """Of the device that has most."""
        return np.ceil(self.layers / (self.pipeline * self.virtual)) * self.virtual

    @property
    def attention_elements(self) -> Column:
        """Of a layer's matrices beside the MLP."""
        return self.hidden * (2 * self.query + 2 * self.keys)

    @property
    def layer_elements(self) -> Column:
        """Parameters of a layer, its experts and their router not among them."""
        norms = 2 * self.hidden * (1 + self.biased)
        wide = self.query + 2 * self.keys + 2 * self.hidden + (self.matrices - 1) * self.common
        mlps = self.hidden * (self.matrices * self.common + self.choices)
        return self.attention_elements + mlps + norms + self.biased * wide

    @property
    def expert_ways(self) -> Column:
        """Devices that divide a layer's experts: those of ``expert``, else those that divide all matrices."""
        return np.where(self.expert > 1, self.expert, self.tensor)

    @property
    def expert_elements(self) -> Column:
        """Parameters of all experts of a layer."""
        return self.matrices * self.hidden * self.experts

    @property
    def model_flops(self) -> Column:
        """Of a step: forward and backward, without what causal attention masks or what is computed again."""
        elements = self.layers * (self.attention_elements + self.matrices * self.hidden * (self.common + self.passed))
        attention = self.layers * 2 * self.tokens * self.query
        return self.sequences * self.tokens * 3 * (2 * (elements + self.hidden * self.vocab) + attention)

    def __len__(self) -> int:
        return max(np.size(getattr(self, field.name)) for field in fields(self))

    def take(self, which: Any) -> "Jobs":
        """Some of the rows, by number or by a mask."""
        return Jobs(
            **{
                field.name: column[which] if np.ndim(column := getattr(self, field.name)) else column
                for field in fields(self)
            }
        )

    def but(self, **columns: Any) -> "Jobs":
        """The same, with other columns."""
        return replace(self, **{name: np.asarray(column, float) for name, column in columns.items()})


@dataclass(frozen=True, slots=True)
class Job:
    """One row, as things with names.

    Attributes:
        tokens: of a sequence.
        cluster: its devices may be more than the division has.
        eighth: matrix products of layers are computed in 8 bits.
    """

    model: Transformer
    tokens: int
    division: Division
    cluster: Cluster
    eighth: bool = False


def columns(jobs: Sequence[Job]) -> Jobs:
    """Rows as columns."""
    rows = [_row(job) for job in jobs]
    return Jobs(**{name: np.array([row[name] for row in rows], float) for name in _NAMES})


_NAMES = [field.name for field in fields(Jobs)]


def _row(job: Job) -> dict[str, float]:
    return {**of_model(job.model, job.tokens), **of_division(job.division), **of_cluster(job.cluster, job.eighth)}


def of_model(model: Transformer, tokens: int) -> dict[str, float]:
    """The columns that a model gives: of its layers, what they have on average."""
    sparse = model.layers - model.dense_layers if model.experts else 0
    return {
        "layers": model.layers,
        "hidden": model.hidden,
        "query": model.query_width,
        "keys": model.kv_width,
        "heads": model.heads,
        "kv_heads": model.kv_heads,
        "common": (model.passed_widths - sparse * model.chosen * model.expert_ffn) / model.layers,
        "passed": sparse * model.chosen * model.expert_ffn / model.layers,
        "experts": sparse * model.experts * model.expert_ffn / model.layers,
        "choices": sparse * model.experts / model.layers,
        "routed": model.chosen if model.experts else 0,
        "matrices": 3 if model.gated else 2,
        "vocab": model.vocab,
        "tied": model.tied,
        "positions": model.positions,
        "biased": model.biased,
        "dropout": model.dropout,
        "tokens": tokens,
    }


def of_division(division: Division) -> dict[str, float]:
    """The columns that a division gives."""
    return {
        "tensor": division.tensor,
        "pipeline": division.pipeline,
        "data": division.data,
        "context": division.context,
        "expert": division.expert,
        "zero": division.zero,
        "shard": division.shard or division.data * division.context,
        "micro_batch": division.micro_batch,
        "micro_batches": division.micro_batches,
        "sequence": division.sequence,
        "recompute": RECOMPUTE.index(division.recompute),
        "unfused": division.attention == "unfused",
        "virtual": division.virtual,
        "schedule": SCHEDULES.index(division.schedule),
        "period": division.period,
    }


def of_cluster(cluster: Cluster, eighth: bool = False) -> dict[str, float]:
    """The columns that devices and links give."""
    device = cluster.device
    return {
        "flops": device.quarter_flops if eighth and device.quarter_flops else device.half_flops,
        "slow_flops": device.half_flops,
        "memory_bytes": device.memory_bytes,
        "memory_bytes_per_s": device.memory_bytes_per_s,
        "within": cluster.within.bytes_per_s,
        "between": cluster.between.bytes_per_s,
        "node": cluster.node,
    }
