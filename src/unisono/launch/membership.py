"""Which group a worker joins: from its place in the world and the configuration to hosts, a device, and a network."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from torch._C._distributed_c10d import Store

from unisono.comm.compression import Compression
from unisono.comm.crossing import Apart, Terms
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.network import Link
from unisono.comm.tuning import Measured, decode_table, encode_table, read_table, table_path
from unisono.comm.way import Way
from unisono.config import TrainingConfig
from unisono.errors import HostLeaves, LaunchError
from unisono.launch.store import LauncherStore
from unisono.launch.world import World
from unisono.plan.assignment import Teams
from unisono.plan.hosts import Hosts, Place
from unisono.plan.shards import StateShards
from unisono.run.fingerprint import fingerprint
from unisono.state.layout import StateLayout
from unisono.sync.local import agreements

CONNECT_S = 0.6
"""For a connection to another host, where others go on without one that is cut off; gloo waits five times as long."""


def place_of(world: World, device: torch.device) -> Place:
    """Who shares memory: the workers of a host; on devices, which have memory of their own, nobody."""
    return Place(world.hosts if device.type == "cpu" else Hosts((1,) * world.size), world.rank)


def device_of(config: TrainingConfig, world: World) -> torch.device:
    """Where this worker computes: "cuda" is the device of its local rank."""
    device = torch.device(config.device)
    return torch.device("cuda", world.local_rank) if device.type == "cuda" and device.index is None else device


def join_hosts(
    layout: StateLayout,
    config: TrainingConfig,
    local: HostGroup,
    place: Place,
    world: World,
    device: torch.device,
    samples: int,
    teams: Teams,
    shards: StateShards | None,
    *,
    survives: bool,
) -> HierarchicalGroup:
    """The group of several hosts, all of which were given the same run.

    Arguments:
        survives: the others go on where a host is lost.

    Raises:
        LaunchError: where they were given different runs.
        HostLeaves: where this worker joins, and is not what was there when the run began.
    """
    link = Link(
        backend=_backend(config, device),
        store=world.store(config.deadline_s),
        address=world.address,
        deadline_s=local.deadline_s,
        device=device,
        connect_s=CONNECT_S if survives else None,
        useless=local.gets_nowhere if survives else None,
    )
    if survives and isinstance(link.store, LauncherStore):
        link.store.useless = local.gets_nowhere
    flat = layout.flat
    name = f"training {world.trainings} since generation {world.generation}"
    travel = replace(
        way(config), table=_shared_table(link.store, name, world) if config.wire.algorithm == "auto" else ()
    )
    apart = None
    if config.sync.apart:
        assert config.sync.replicas is not None
        apart = Apart(config.sync.replicas, agreements(config.sync).apart)
    terms = Terms(link, flat, travel, config.micro_batches, teams, name, shards, survives, apart)
    group = HierarchicalGroup(local, place, terms, joins=world.joins)
    given = {"model": layout, "samples": samples, **config.model_dump(exclude={"run_dir", "observe"})}
    described, key = _described(given, config, device), f"{name}/run of host {place.host}"
    if world.joins:
        _refuse_another(described, link.store.get(key).decode(), place)
        return group
    try:
        if survives and local.rank == 0:
            link.store.set(key, described)
        _agree(group, given)
        group.unlike = _unlike(group, config, device)
    except BaseException as error:
        group.close(error)
        raise
    return group


def _described(given: Mapping[str, Any], config: TrainingConfig, device: torch.device) -> str:
    """The run and what this host is made of, in a line."""
    made = asdict(fingerprint(config.threads, device))
    digest = hashlib.sha256(repr({key: repr(part) for key, part in given.items()}).encode()).hexdigest()
    return ", ".join([f"run {digest[:12]}", *(f"{key} {value}" for key, value in made.items())])


def _refuse_another(now: str, before: str, place: Place) -> None:
    """A worker that joins continues what was begun in its place.

    Raises:
        HostLeaves: where it would train something else, or compute it in another way.
    """
    if now != before:
        raise HostLeaves(
            f"{place.hosts.name(place.rank)} cannot join: it was given another run, or is made of something else: "
            f"{now} now, {before} when the run began"
        )


def _agree(group: HierarchicalGroup, given: Mapping[str, Any]) -> None:
    """Refuse hosts that were given different runs.

    Raises:
        LaunchError: with what differs first, and between whom.
    """
    parts = {
        f"{key}.{inner}" if inner else key: part
        for key, value in given.items()
        for inner, part in (value.items() if isinstance(value, dict) else [("", value)])
    }
    mine = {key: repr(part) for key, part in parts.items()}
    digest = hashlib.sha256(repr(mine).encode()).digest()
    if all(theirs == digest for theirs in group.all_gather(digest, "agreement on the run")):
        return
    everyone = [json.loads(data) for data in group.all_gather(json.dumps(mine).encode(), "comparison of the run")]
    name = group.place.hosts.name
    first = everyone[0]
    differences = (
        (rank, key) for rank, theirs in enumerate(everyone) for key in first if theirs.get(key) != first[key]
    )
    rank, key = next(differences)
    if key == "model":
        what = "the models have other parameters, or they lie elsewhere"
    else:
        what = f"{key} is {first[key]} on {name(0)}, {everyone[rank].get(key)} on {name(rank)}"
    raise LaunchError(f"the hosts were given different runs: {what}; start all of them with the same")


def _unlike(group: HierarchicalGroup, config: TrainingConfig, device: torch.device) -> str:
    """In what hosts differ, where that changes the last bits of what they compute."""
    mine = asdict(fingerprint(config.threads, device))
    everyone = [json.loads(p) for p in group.all_gather(json.dumps(mine).encode(), "what hosts are made of")]
    differing = [key for key in mine if any(other[key] != everyone[0][key] for other in everyone)]
    found = (f"{key} ({', '.join(sorted({str(other[key]) for other in everyone}))})" for key in differing)
    return f"hosts differ in {', '.join(found)}" if differing else ""


def way(config: TrainingConfig) -> Way:
    """How gradients travel between hosts."""
    wire = config.wire
    compression = None
    if wire.compression != "none":
        compression = Compression(
            wire.compression, wire.rank, wire.density, wire.momentum, config.seed, wire.warmup_steps
        )
    return Way(wire.bucket_bytes, wire.algorithm, compression, lossless=wire.lossless)


def _shared_table(store: Store, name: str, world: World) -> list[Measured]:
    """Rank 0's measurements, so that all choose alike."""
    key = f"{name}/table"
    if world.rank == 0:
        store.set(key, encode_table(read_table(table_path())))
    return decode_table(store.get(key).decode())


def _backend(config: TrainingConfig, device: torch.device) -> str:
    """The transport between hosts."""
    if config.wire.backend != "auto":
        return config.wire.backend
    return "gloo" if device.type == "cpu" else "nccl"
