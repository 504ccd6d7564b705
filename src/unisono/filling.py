"""The first state of a run: initial values, given weights or a checkpoint, the same for all who share it or copy it."""

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from unisono.comm.arena import Region
from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.config import TrainingConfig
from unisono.errors import CheckpointError, UnisonoError
from unisono.parallel.initial import initialise, initialisers, shares
from unisono.preparation import Prepared
from unisono.state.portions import needed
from unisono.state.shared import SharedState
from unisono.state.snapshots import Snapshots
from unisono.state.training_state import TrainingState
from unisono.state.weights import matched, weights

Load = Callable[[Collection[str], Iterable[tuple[str, Tensor]]], None]
"""(names of all that will come, named tensors) -> the state holds them."""


@dataclass(frozen=True, slots=True)
class Restored:
    """What a checkpoint gave besides the state: the step it is at, and the memory of compression."""

    step: int = 0
    compression: Mapping[str, Tensor] = field(default_factory=dict)


def fill(
    prepared: Prepared,
    config: TrainingConfig,
    group: Group,
    local: HostGroup,
    state: TrainingState,
    shared: SharedState | None,
    memory: Callable[[Region], Tensor],
    versions: memoryview,
    restore: Callable[[Prepared, Load], Restored],
    snapshots: Snapshots | None = None,
    committed: int | None = None,
) -> int:
    """Initial values, or those of a checkpoint; the first state's, of which all others are copies. Returns the step.

    Where a snapshot is found, that is what training goes on from.

    Arguments:
        committed: the last step that was, where all start again.
    """
    place, found = prepared.place, None
    if snapshots is not None:
        found = snapshots.look(place.host, len(place.hosts.sizes), group.all_gather)
    if snapshots is not None and found is not None:
        if local.rank == 0:
            _go_back(prepared, group, state, snapshots)
        return _complete(prepared, group, local, state, memory, versions, found.step)
    step, failure, compression = 0, "", Restored().compression
    if config.init == "by_name":
        _initialise(prepared, config, local, shared)
    if group.rank == 0:
        with torch.no_grad():
            for value, parameter in zip(state.values, prepared.originals, strict=True):
                if not parameter.is_meta:
                    value.copy_(parameter)
            for value, (_, buffer) in zip(state.buffers, prepared.tensors.buffers, strict=True):
                value.copy_(buffer)
        try:
            if config.start_from is not None:
                _take_weights(prepared, Path(config.start_from), state)
            restored = restore(prepared, state.load if shared is None else shared.load)
            step, compression = restored.step, restored.compression
            if committed is not None and step < committed:
                raise CheckpointError(
                    f"what is left of the state is not the whole: more was lost at once than one host, or one whose "
                    f"neighbour had not taken its copy yet; step {committed} had been trained: resume from the newest "
                    "checkpoint (--resume)"
                )
            if shared is not None:
                shared.loaded()
        except UnisonoError as error:  # of which all hear, so that none waits
            failure = str(error)
            if shared is not None:
                shared.loaded()
            group.all_gather(json.dumps([step, failure]).encode(), "initial state")
            raise
    elif shared is not None:
        shared.receive()
    said = json.loads(group.all_gather(json.dumps([step, failure]).encode(), "initial state")[0])
    step, failure = int(said[0]), str(said[1])
    if failure:
        raise CheckpointError(failure)
    if local.rank == 0:
        if shared is not None:
            by_name = config.init == "by_name" and config.start_from is None
            divided = prepared.shards is not None and prepared.shards.values
            shared.spread(with_values=step == 0 and not (by_name and divided))
        for part in state.parts() if shared is None else ():
            group.broadcast(part, "initial state")
        group.restore_compression(compression)
    return _complete(prepared, group, local, state, memory, versions, step)


def _go_back(prepared: Prepared, group: Group, state: TrainingState, snapshots: Snapshots) -> None:
    """Let the state of this host be that of the snapshots that are left."""
    shards, size_bytes = prepared.shards, sum(part.nbytes for part in state.parts())
    hosts = range(len(prepared.place.hosts.sizes))
    needs = [needed(prepared.layout, size_bytes, shards, host) for host in hosts]
    transfer = group.leaders.transfer if isinstance(group, HierarchicalGroup) else None
    snapshots.restore(needs, prepared.place.host, transfer)


def _complete(
    prepared: Prepared,
    group: Group,
    local: HostGroup,
    state: TrainingState,
    memory: Callable[[Region], Tensor],
    versions: memoryview,
    step: int,
) -> int:
    """The first worker has this host's state after a step; all begin with it."""
    local.barrier("initial state")
    if local.rank > 0 and is_head(prepared, local):
        first = prepared.mesh.coordinates(local.members[0])["data"]
        state.memory.copy_(memory(prepared.host.state(first)))
    if is_head(prepared, local):
        for block in range(len(versions)):
            versions[block] = step
    group.finish(step)
    group.settle(step)
    return step


def _initialise(prepared: Prepared, config: TrainingConfig, local: HostGroup, shared: SharedState | None) -> None:
    """Each worker of the first state gives some modules their initial values; what holds them follows."""
    done = shared.keep if shared is not None else lambda: None
    members = initialisers(prepared.model)
    further = {name for spec in prepared.layout.flat.parameters for name in spec.uses[1:]}
    own, holding = shares(members, prepared.model, min(local.size, prepared.sharers))
    if local.rank < len(own):
        initialise(config.seed, own[local.rank], further, done)
    local.barrier("initial values")
    if local.rank == 0:
        initialise(config.seed, holding, further, done)


def _take_weights(prepared: Prepared, path: Path, state: TrainingState) -> None:
    """Begin with weights that are given, in place of initial values; buffers that are not among them stay."""
    source = weights(path)
    own = prepared.layout.flat.own
    uses = {spec.tensor.name: spec.uses for spec in own if not spec.is_factor}
    places = {spec.tensor.name: value for spec, value in zip(own, state.values, strict=False) if not spec.is_factor}
    plain = set(prepared.tensors.plain_buffers)
    for spec, value in zip(prepared.layout.buffers, state.buffers, strict=True):
        if spec.name in plain and any(f".{key}".endswith(f".{spec.name}") for key in source.keys):
            uses[spec.name], places[spec.name] = (spec.name,), value
    for name, tensor in matched(source, uses).tensors():
        target = places[name]
        if tensor.shape != target.shape:
            raise CheckpointError(
                f"{name} is {tuple(tensor.shape)} in {path} and {tuple(target.shape)} in the model; the weights are of "
                "another model"
            )
        target.copy_(tensor)
    for values in (state.values, state.buffers):  # replicas begin with what the model has
        each = len(values) // (1 + prepared.layout.flat.replicas)
        for i in range(each, len(values)):
            values[i].copy_(values[i % each])


def is_head(prepared: Prepared, local: HostGroup) -> bool:
    """Whether this worker does what is done once for each state."""
    return local.rank == 0 if prepared.host.replicas == 1 else local.slot % prepared.sharers == 0
