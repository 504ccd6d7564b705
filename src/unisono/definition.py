"""What a run is, apart from its code: recorded in its checkpoints, and compared when it is resumed."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from unisono.config import TrainingConfig
from unisono.data.feed import size_of
from unisono.errors import ConfigurationError
from unisono.optim.classes import described
from unisono.preparation import Objects, Prepared

_SETTINGS = ("seed", "init", "global_batch_size", "micro_batch_size", "precision", "clip", "schedule", "scaling")
_FIXED = ("seed", "global_batch_size", "micro_batch_size", "samples")
"""What decides which samples a step uses: it cannot change in the middle of a run."""
_AGREED = ("mode", "replicas", "period", "after", "fragments", "delay", "clients")
"""What decides what replicas that train apart have of their own after a step, and what of it is under way."""


def definition(objects: Objects, config: TrainingConfig, steps: int, prepared: Prepared) -> dict[str, Any]:
    """The run's definition, as plain data."""
    settings = config.model_dump(mode="json")
    result: dict[str, Any] = {key: settings[key] for key in _SETTINGS} | {
        "samples": size_of(objects.data, "training"),
        "task": dict(objects.definition()) if objects.definition else {},
        "optimizer": described(prepared.optimizer, prepared.layout.flat.replicas),
    }
    if config.clip is not None:  # a number alone is the limit of the norm
        result["clip"] = config.clip.norm or config.clip.model_dump(mode="json", exclude_defaults=True)
    if config.layout.tensor > 1:
        keys = ("tensor", "sequence_parallel", "loss_parallel", "tensor_plan")
        result["divided_layers"] = {key: value for key in keys if (value := settings["layout"][key])}
    if config.sync.relaxed:
        result["sync"] = {key: value for key, value in settings["sync"].items() if key not in ("record", "replay")}
    if config.schedule.name != "constant":
        result["schedule_steps"] = config.schedule.decay_steps or steps
    return result


def differences(mine: Mapping[str, Any], recorded: Mapping[str, Any], path: Path) -> list[str]:
    """One phrase for every part in which the run in ``path`` was another.

    Raises:
        ConfigurationError: for a difference that would repeat or skip samples.
    """
    own, theirs = (of.get("sync", {}) for of in (mine, recorded))
    for key in _AGREED if own.get("replicas") or theirs.get("replicas") else ():
        if own.get(key) != theirs.get(key):
            why = "its replicas are in the middle of what they agree on"
            raise ConfigurationError(
                f"sync.{key} is {own.get(key) or 'not used'}, but the run in {path} has {theirs.get(key) or 'none'}, "
                f"and {why if theirs.get('replicas') else 'no replicas'}; resume with the same value, or start another "
                "run from its weights (start_from)"
            )
    for key in _FIXED:
        if recorded.get(key) != mine[key]:
            raise ConfigurationError(
                f"{key} is {mine[key]}, but the run in {path} has {recorded.get(key)}; it is part of what the run is: "
                "resume with the same value, or start another run"
            )
    return list(_changes("", mine, recorded))


def _changes(name: str, mine: Any, recorded: Any) -> Iterator[str]:
    """One phrase for every leaf of plain data that changed."""
    if isinstance(mine, Mapping) and isinstance(recorded, Mapping):
        for key in {**recorded, **mine}:
            yield from _changes(f"{name}.{key}" if name else key, mine.get(key), recorded.get(key))
    elif isinstance(mine, list) and isinstance(recorded, list) and len(mine) == len(recorded):
        for i, (a, b) in enumerate(zip(mine, recorded, strict=True)):
            yield from _changes(f"{name}[{i}]", a, b)
    elif mine != recorded:
        yield f"{name} was {recorded}, is {mine}"
