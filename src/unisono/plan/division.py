"""How a transformer is divided over devices, and which ways of doing so cannot be."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from difflib import get_close_matches
from typing import Any, Literal, get_args

from unisono.errors import ConfigurationError
from unisono.plan.transformer import Transformer, is_number

Recompute = Literal["none", "selective", "full"]
Attention = Literal["flash", "unfused"]
Pipelining = Literal["1f1b", "gpipe", "interleaved", "zb_h1", "zb_v"]
RECOMPUTE: tuple[Recompute, ...] = get_args(Recompute)
SCHEDULES: tuple[Pipelining, ...] = get_args(Pipelining)
ENDS = 2
"""Embedding and output, which can be stages of their own where devices have several."""
VIRTUAL = ("interleaved", "zb_v")
"""Schedules in which a device has several stages."""


@dataclass(frozen=True, slots=True)
class Division:
    """Over devices.

    Attributes:
        tensor: devices that divide each layer.
        pipeline: stages.
        data: replicas.
        context: devices that divide each sequence.
        expert: devices that divide the experts of a layer; they are among those that compute different tokens.
        zero: what replicas divide: 1 the optimizer's state, 2 gradients too, 3 parameters too.
        shard: replicas that divide it, where groups of them do; 0: all.
        micro_batch: sequences.
        micro_batches: of a replica in a step.
        sequence: what is beside matrices is divided by the tensor's devices too (sequence parallelism).
        recompute: what is computed again: nothing, attention's scores, or layers as a whole.
        attention: "unfused" keeps its scores.
        virtual: stages of each device of a pipeline.
        schedule: of the pipeline.
        period: steps after which replicas exchange what they have learned (local SGD); 1: each step, exactly.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    context: int = 1
    expert: int = 1
    zero: int = 0
    shard: int = 0
    micro_batch: int = 1
    micro_batches: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    attention: Attention = "flash"
    virtual: int = 1
    schedule: Pipelining = "1f1b"
    period: int = 1

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.data * self.context

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.data * self.micro_batch * self.micro_batches

    @classmethod
    def read(cls, words: Sequence[str]) -> "Division":
        """From KEY=VALUE.

        >>> Division.read(["tensor=8", "sequence=true", "recompute=selective"]).devices
        8

        Raises:
            ConfigurationError: for what is no key or value of it.
        """
        return cls(**given(words))


def given(words: Sequence[str]) -> dict[str, Any]:
    """What KEY=VALUE say of a division.

    >>> given(["tensor=8", "sequence=true"])
    {'tensor': 8, 'sequence': True}

    Raises:
        ConfigurationError: for what is no key or value of it.
    """
    found: dict[str, Any] = {}
    known = [field.name for field in fields(Division)]
    for word in words:
        key, _, value = word.partition("=")
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"{key!r} is no part of a division{hint}; use {', '.join(known)}")
        if key in found:
            raise ConfigurationError(f"{key} is given twice; give it once")
        if key in _CHOICES:
            if value not in _CHOICES[key]:
                raise ConfigurationError(f"{key} is {value!r}; give {' or '.join(_CHOICES[key])}")
            found[key] = value == "true" if key == "sequence" else value
        elif not is_number(value) or (int(value) > 3 if key == "zero" else int(value) < (key != "shard")):
            allowed = {"zero": "0 to 3", "shard": "a number, or 0 for all replicas"}.get(key, "a number from 1")
            raise ConfigurationError(f"{key} is {value!r}; give {allowed}")
        else:
            found[key] = int(value)
    return found


_CHOICES: Mapping[str, tuple[str, ...]] = {
    "recompute": RECOMPUTE,
    "attention": get_args(Attention),
    "schedule": SCHEDULES,
    "sequence": ("true", "false"),
}


def refuse_impossible(model: Transformer, division: Division) -> None:
    """Check a division.

    Raises:
        ConfigurationError: where the model cannot be divided so.
    """
    if division.pipeline > model.layers:
        raise ConfigurationError(
            f"pipeline is {division.pipeline}, and {model.name} has {model.layers} layers; use fewer"
        )
    if division.zero and division.data * division.context == 1:
        raise ConfigurationError(f"zero is {division.zero}, and there is one replica; give data, or leave zero out")
    if division.shard and division.data * division.context % division.shard:
        raise ConfigurationError(
            f"shard is {division.shard}, which does not divide {division.data * division.context} replicas"
        )
    if (division.virtual > 1) != (division.schedule in VIRTUAL):
        raise ConfigurationError(
            f"virtual is {division.virtual} and schedule {division.schedule}; {' and '.join(VIRTUAL)} have several "
            "stages a device, the others one"
        )
    if division.pipeline * division.virtual > model.layers + ENDS:
        raise ConfigurationError(
            f"pipeline x virtual is {division.pipeline * division.virtual}, and {model.name} has {model.layers} "
            "layers, an embedding and an output; use fewer"
        )
    others = division.data * division.context * division.tensor
    if division.expert > 1 and (not model.experts or model.experts % division.expert or others % division.expert):
        raise ConfigurationError(
            f"expert is {division.expert}, and {model.name} has {model.experts} experts on tensor x context x data = "
            f"{others} devices; use a number that divides both, or leave it out"
        )
    if division.sequence and division.tensor == 1:
        raise ConfigurationError("sequence is true, and one device computes a layer; give tensor, or leave it out")
    if division.period > 1 and (division.zero in (1, 2) or (division.zero == 3 and not division.shard)):
        raise ConfigurationError(
            f"period is {division.period} and zero {division.zero}; replicas that train on their own have states of "
            "their own: give zero=0, or zero=3 with shard"
        )
    experts = model.expert_ffn if model.experts and division.expert == 1 else 0
    if experts % division.tensor:
        raise ConfigurationError(f"tensor is {division.tensor}, which does not divide experts of {experts}; use expert")
    if model.heads % division.tensor or model.ffn % division.tensor:
        raise ConfigurationError(
            f"tensor is {division.tensor}, which does not divide the {model.heads} heads and {model.ffn} wide MLPs of "
            f"{model.name}; use a number that does"
        )
