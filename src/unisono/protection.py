"""What becomes of a run that loses a worker: decided once, from the layout and the memory that is left."""

from dataclasses import dataclass
from typing import Any

from unisono.config import TrainingConfig
from unisono.events import readable
from unisono.launch.possible import rolls_back, survives, survives_hosts
from unisono.launch.world import World
from unisono.preparation import Prepared
from unisono.state.snapshots import IMAGES


@dataclass(frozen=True, slots=True)
class Protection:
    """Of one run.

    Attributes:
        goes_on: the others go on in their processes.
        starts_again: all workers start again, from a snapshot.
        rules: for the launcher (see `fault.rules.Rules`); None where there is none, or hosts survive nothing.
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
    if world.spans and not goes_on:
        return Protection(goes_on=False, starts_again=False, rules=None)
    whole = prepared.shards is None  # of which all workers can copy a part
    again = not goes_on and trains and whole and world.trainings == 1 and rolls_back(config)
    wanted_bytes, missing = IMAGES * prepared.host.state_bytes, ""
    if again and wanted_bytes > room_bytes:
        again = False
        missing = (
            f"a lost worker ends this run: snapshots of its state would take {readable(wanted_bytes)} of this host's "
            f"memory, and {readable(room_bytes)} are left; checkpoint.every says how much may be lost"
        )
    if not (alone or goes_on or again):  # the workers of each set find out for themselves
        return Protection(goes_on=False, starts_again=False, rules=None, missing=missing)
    rules = {
        **config.fault.model_dump(),
        **({} if goes_on or again else {"on_loss": "stop"}),
        "rolls_back": again,
        "several_hosts": world.spans,
        "deadline_s": config.deadline_s,
        "slots": prepared.host.slots,
        "together": 1 if again else config.layout.model_workers,  # one ends, and then all are ended
        "run_dir": config.run_dir,
    }
    return Protection(goes_on and config.fault.on_loss != "stop", again, rules, missing)
