"""Which group a worker joins: from its place in the world and the configuration to hosts, a device, and a network."""

import hashlib
import json
from dataclasses import asdict, replace

import torch
from torch._C._distributed_c10d import Store

from unisono.comm.compression import Compression
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.network import Link
from unisono.comm.tuning import Measured, decode_table, encode_table, read_table, table_path
from unisono.comm.way import Way
from unisono.config import TrainingConfig
from unisono.errors import LaunchError
from unisono.launch.world import World
from unisono.plan.hosts import Hosts, Place
from unisono.run.fingerprint import fingerprint
from unisono.state.layout import StateLayout


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
) -> HierarchicalGroup:
    """The group of several hosts, all of which were given the same run."""
    link = Link(
        backend=_backend(config, device),
        store=world.store(config.deadline_s),
        address=world.address,
        deadline_s=config.deadline_s,
        device=device,
    )
    flat = layout.flat
    name = f"training {world.trainings}"
    travel = replace(way(config), table=_shared_table(link.store, world) if config.wire.algorithm == "auto" else ())
    group = HierarchicalGroup(local, place, link, flat, travel, config.micro_batches, name)
    try:
        agreed = (layout, samples, config.model_dump(exclude={"run_dir", "observe"}))
        mine = hashlib.sha256(repr(agreed).encode()).digest()
        for rank, theirs in enumerate(group.all_gather(mine, "agreement on the run")):
            if theirs != mine:
                raise LaunchError(
                    f"{world.hosts.name(rank)} was given another run than {world.hosts.name(world.rank)} (model, "
                    "configuration or number of samples differ); start all hosts with the same of each"
                )
        group.unlike = _unlike(group, config, device)
    except BaseException as error:
        group.close(error)
        raise
    return group


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
    return Way(wire.bucket_bytes, wire.algorithm, compression)


def _shared_table(store: Store, world: World) -> list[Measured]:
    """Rank 0's measurements, so that all choose alike."""
    key = f"training {world.trainings}/table"
    if world.rank == 0:
        store.set(key, encode_table(read_table(table_path())))
    return decode_table(store.get(key).decode())


def _backend(config: TrainingConfig, device: torch.device) -> str:
    """The transport between hosts."""
    if config.wire.backend != "auto":
        return config.wire.backend
    return "gloo" if device.type == "cpu" else "nccl"
