"""What becomes of a run that loses a worker: decided once, from the layout and the memory; and what is kept for it."""

import functools
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from unisono.comm.arena import Region, mapped
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.config import TrainingConfig
from unisono.events import readable
from unisono.launch.possible import rolls_back, survives, survives_hosts
from unisono.launch.world import World
from unisono.optim.newton import NewtonCG
from unisono.preparation import Prepared
from unisono.state.portions import Portion, portions
from unisono.state.snapshots import IMAGES, Images, Snapshots
from unisono.state.training_state import TrainingState


@dataclass(frozen=True, slots=True)
class Protection:
    """Of one run.

    Attributes:
        goes_on: the others go on in their processes.
        starts_again: all workers start again, from a snapshot.
        rules: for the launcher (see `fault.rules.Rules`); None where there is none, or nothing is survived.
        missing: why the loss of a worker ends the run, where that should not be so.
    """

    goes_on: bool
    starts_again: bool
    rules: dict[str, Any] | None
    missing: str = ""


def protected(prepared: Prepared, config: TrainingConfig, world: World, room_bytes: int, *, trains: bool) -> Protection:
    """How this run is protected.

    Arguments:
        room_bytes: of this host's memory that workers leave.
        trains: the state changes, and is lost with whoever has it alone.
    """
    if world.launcher != "unisono":
        return Protection(goes_on=False, starts_again=False, rules=None)
    alone = len(prepared.place.hosts.sizes) == 1
    goes_on = survives_hosts(config) if world.spans else alone and survives(config, prepared.host.slots)
    goes_on = goes_on and not isinstance(prepared.optimizer, NewtonCG)  # nobody has a part of its step alone
    one_result = config.wire.inexact is None or not world.spans  # else hosts' images of a step may differ
    again = not goes_on and trains and world.trainings == 1 and rolls_back(config) and one_result
    shards, state_bytes = prepared.shards, prepared.host.state_bytes
    kept_bytes = state_bytes if shards is None else 2 * state_bytes // shards.hosts  # and the neighbour's
    wanted_bytes, missing = IMAGES * kept_bytes, ""
    if again and wanted_bytes > room_bytes:
        again = False
        missing = (
            f"a lost worker ends this run: snapshots of its state would take {readable(wanted_bytes)} of this host's "
            f"memory, and {readable(room_bytes)} are left; checkpoint.every says how much may be lost"
        )
    tells = again or (world.spans and bool(missing))  # launchers of hosts decide together, whoever lacks memory
    if not (goes_on or tells) and (world.spans or not alone):  # the workers of each set find out for themselves
        return Protection(goes_on=False, starts_again=False, rules=None, missing=missing)
    rules = {
        **config.fault.model_dump(),
        **({} if goes_on or tells else {"on_loss": "stop"}),
        "rolls_back": tells,
        "several_hosts": world.spans,
        "deadline_s": config.deadline_s,
        "slots": prepared.host.slots,
        "together": 1 if again else config.layout.model_workers,  # one ends, and then all are ended
        "run_dir": config.run_dir,
    }
    return Protection(goes_on and config.fault.on_loss != "stop", again, rules, missing)


def snapshots_of(
    prepared: Prepared,
    config: TrainingConfig,
    group: HostGroup | HierarchicalGroup,
    local: HostGroup,
    state: TrainingState,
    world: World,
) -> Snapshots:
    """Where copies of the state are kept that outlive this worker."""
    parts, shards, place = state.parts(), prepared.shards, prepared.place
    here = (local.rank, local.size) if shards is not None else (group.rank, group.size)
    rank, workers = (world.local_rank, world.local_size) if world.spans else here

    @functools.cache
    def divide(hosts: int) -> list[list[Region]]:
        return portions(prepared.layout, sum(part.nbytes for part in parts), prepared.shards_of(hosts, config))

    def images(portion: Portion, size_bytes: int) -> Images:
        return Images(mapped(world.snapshots(portion.name, size_bytes), size_bytes), portion, divide, workers)

    own = Portion(place.host, shards.hosts) if shards is not None else Portion()
    kept = world.kept_snapshots() if world.spans else {}  # hosts that one launcher plays are always the same
    older = {Portion.named(name): size_bytes for name, size_bytes in kept.items() if name != own.name}
    return Snapshots(
        images(own, Images.size_bytes(own, divide, workers)),
        parts,
        rank,
        workers,
        config.fault.snapshot_every,
        older=[images(portion, size_bytes) for portion, size_bytes in older.items()],
        mates=_Mates(local, group) if own.hosts > 1 and isinstance(group, HierarchicalGroup) else None,
        forget=functools.partial(world.release_snapshots, own.name),
    )


@dataclass(frozen=True, slots=True)
class _Mates:
    """Those with whom a worker keeps snapshots (see `state.snapshots.Mates`)."""

    local: HostGroup
    group: HierarchicalGroup

    def barrier(self, operation: str) -> None:
        self.local.barrier(operation)

    def pass_on(self, own: Tensor, before: Tensor, operation: str) -> None:
        self.group.leaders.shift(own, before, operation)
