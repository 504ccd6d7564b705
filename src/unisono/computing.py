"""What a worker computes with: its model over its memory, and all that is wrapped around its layers."""

import functools
from collections.abc import Callable, Sequence

from torch import Tensor, nn

from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.partial import Partial, item_size
from unisono.comm.tensor_group import ArenaTensorGroup
from unisono.config import TrainingConfig
from unisono.data.feed import Feed
from unisono.footprint import chosen_recomputation
from unisono.optim.kfac import KFAC
from unisono.parallel.buffers import Buffers
from unisono.parallel.curvature import Statistics
from unisono.parallel.recompute import Recomputation, blocks, refuse_inside
from unisono.parallel.replicated import Replica
from unisono.parallel.sharded import ShardedValues
from unisono.parallel.stages import Stages
from unisono.parallel.stash import Stash
from unisono.parallel.tensor import TensorParallel
from unisono.plan.blocks import split_name
from unisono.preparation import Objects, Prepared, crews_of
from unisono.rehearsing import rehearse, value_groups
from unisono.run.rng import ModuleRandom
from unisono.state.training_state import TrainingState
from unisono.sync.local import replica_of


def chosen_here(prepared: Prepared, objects: Objects, config: TrainingConfig, feed: Feed) -> str:
    """What is computed again in the backward; the model is as its user made it."""
    if config.layout.recompute != "auto":
        return config.layout.recompute
    found = prepared.division.outline if prepared.division else rehearse(prepared.model, objects.loss, config, feed)
    return chosen_recomputation(prepared, found, config)


def sharded_values(
    prepared: Prepared,
    objects: Objects,
    config: TrainingConfig,
    group: HostGroup | HierarchicalGroup,
    local: HostGroup,
    state: TrainingState,
    feed: Feed,
) -> ShardedValues | None:
    """What brings parameters here that other hosts keep."""
    shards = prepared.shards
    if config.layout.zero != 3 or shards is None or not isinstance(group, HierarchicalGroup):
        return None
    flat = prepared.layout.flat
    layers, members = value_groups(prepared.model, flat, objects.loss, config, feed)
    parameter_of = {use: p for p, spec in enumerate(flat.parameters) for use in spec.uses}
    pieces = [shards.pieces(sorted({parameter_of[name] for name in names})) for names in members]
    whole = prepared.host.state(0)

    def release(segment: int, start: int, stop: int) -> None:
        size, region = item_size(flat.segment_dtypes[segment]), prepared.layout.regions.named[f"values {segment}"]
        local.arena.release(whole.part(region.offset + start * size, (stop - start) * size))

    values = group.values(pieces, state.span, release)
    parameters = dict(prepared.model.named_parameters(remove_duplicate=False))
    return ShardedValues(prepared.model, layers, members, parameters, values)


def tensor_parallel(prepared: Prepared, local: HostGroup, *, loss_parallel: bool) -> TensorParallel | None:
    """This worker's part of the layers that several divide."""
    if prepared.tensor is None:
        return None
    crews = [crew for team in crews_of(prepared.mesh) for crew in team]
    number = next(i for i, crew in enumerate(crews) if local.rank in crew)
    group = ArenaTensorGroup(local, crews[number], prepared.host.meeting(number))
    proven = prepared.tensor
    return TensorParallel(prepared.model, proven.plan, proven.findings, group, loss_parallel=loss_parallel)


def divided_partials(prepared: Prepared, local: HostGroup, tensor: TensorParallel) -> Callable[[int], Partial]:
    """This worker's buffers for sums: its part of those that it divides lies in the crew's first worker's."""
    first = local.slot - tensor.group.rank
    names = [name for name, _ in prepared.layout.flat.uses]
    cuts = {use: tensor.parts[name] for use, name in enumerate(names) if name in tensor.parts}
    return functools.cache(lambda entry: local.partial(entry).part(local.view(first, entry), cuts))


def replica_over(
    prepared: Prepared,
    objects: Objects,
    config: TrainingConfig,
    values: Sequence[Tensor],
    bound: Sequence[nn.Parameter],
    feed: Feed,
    recompute: str,
    tensor: TensorParallel | None,
    sharded: ShardedValues | None,
    stash: Stash | None,
) -> Replica:
    """The model over its parameters.

    Arguments:
        values: of the buffers, which every micro-batch begins with.
    """
    flat, buffers = prepared.layout.flat, [spec.name for spec in prepared.layout.buffers]
    statistics = _statistics(prepared)
    recomputation = None
    if recompute != "none":
        again = blocks(prepared.model, prepared.division)
        refuse_inside(again, [r.path for r in prepared.tensor.plan.regions] if prepared.tensor is not None else [])
        recomputation = Recomputation(prepared.model, again, selective=recompute == "selective")
    local = tensor.local if tensor is not None else {}
    uses = [(name, local.get(name, parameter)) for (name, _), parameter in zip(flat.uses, bound, strict=True)]
    return Replica(
        prepared.model,
        uses,
        Buffers(prepared.model, buffers, values),
        ModuleRandom(prepared.model, config.seed, feed.device, lambda name: split_name(name)[1]),
        objects.loss,
        config.precision,
        feed.device,
        Stages(prepared.model, prepared.division) if prepared.division is not None else None,
        recomputation,
        tensor,
        sharded,
        replica_of(config),
        statistics,
        stash,
    )


def _statistics(prepared: Prepared) -> Statistics | None:
    """What an optimizer learns of the curvature."""
    if not isinstance(prepared.optimizer, KFAC):
        return None
    names = [name for name, _ in prepared.layout.flat.uses]
    return Statistics(prepared.model, names, prepared.optimizer.factor_every)
