"""How a transformer is divided over devices, and the bytes that each of these needs, by kind.

Activations: Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, with the widths
that keys, values and MLPs really have. States: Rajbhandari et al., ZeRO, 2020. In flight: 1F1B, Narayanan et al., 2021.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from typing import Literal, get_args

from unisono.errors import ConfigurationError
from unisono.plan.transformer import Transformer, is_number

STATE_BYTES: Mapping[str, int] = {"parameters": 2, "gradients": 2, "optimizer": 12}
"""Of a parameter, with Adam in mixed precision: 16 bits to compute with, and 32-bit copy and moments."""
HALF, FULL, MASK = 2, 4, 1
"""Bytes of a number that one computes with, of one in 32 bits, and of a dropout's choice."""

Recompute = Literal["none", "selective", "full"]
Attention = Literal["flash", "unfused"]


@dataclass(frozen=True, slots=True)
class Division:
    """Over devices.

    Attributes:
        tensor: devices that divide each layer.
        pipeline: stages.
        data: replicas.
        zero: what replicas divide: 1 the optimizer's state, 2 gradients too, 3 parameters too.
        micro_batch: sequences.
        micro_batches: of a replica in a step.
        sequence: what is beside matrices is divided by the tensor's devices too (sequence parallelism).
        recompute: what is computed again: nothing, attention's scores, or layers as a whole.
        attention: "unfused" keeps its scores.
    """

    tensor: int = 1
    pipeline: int = 1
    data: int = 1
    zero: int = 0
    micro_batch: int = 1
    micro_batches: int = 1
    sequence: bool = False
    recompute: Recompute = "none"
    attention: Attention = "flash"

    @property
    def devices(self) -> int:
        """All of them."""
        return self.tensor * self.pipeline * self.data

    @classmethod
    def read(cls, words: Sequence[str]) -> "Division":
        """From KEY=VALUE.

        >>> Division.read(["tensor=8", "sequence=true", "recompute=selective"]).devices
        8

        Raises:
            ConfigurationError: for what is no key or value of it.
        """
        given: dict[str, object] = {}
        choices = {"recompute": get_args(Recompute), "attention": get_args(Attention), "sequence": ("true", "false")}
        for word in words:
            key, _, value = word.partition("=")
            if key not in (known := [field.name for field in fields(cls)]):
                near = get_close_matches(key, known, 1)
                hint = f"; did you mean {near[0]}?" if near else ""
                raise ConfigurationError(f"{key!r} is no part of a division{hint}; use {', '.join(known)}")
            if key in given:
                raise ConfigurationError(f"{key} is given twice; give it once")
            if key in choices:
                if value not in choices[key]:
                    raise ConfigurationError(f"{key} is {value!r}; give {' or '.join(choices[key])}")
                given[key] = value == "true" if key == "sequence" else value
            elif not is_number(value) or (int(value) > 3 if key == "zero" else int(value) < 1):
                raise ConfigurationError(f"{key} is {value!r}; give {'0 to 3' if key == 'zero' else 'a number from 1'}")
            else:
                given[key] = int(value)
        return cls(**given)  # type: ignore[arg-type]


def layer_bytes(model: Transformer, tokens: int, division: Division) -> float:
    """What a layer keeps of one micro-batch on one device, from its forward to its backward.

    Arguments:
        tokens: of a sequence.
    """
    beside = division.tensor if division.sequence else 1
    if division.recompute == "full":
        return HALF * model.hidden * division.micro_batch * tokens / beside
    inputs = HALF * 4 * model.hidden  # of two norms, of attention and of the MLP
    masks = 2 * MASK * model.hidden if model.dropout else 0
    projected = HALF * (2 * model.query_width + 2 * model.kv_width)  # queries, keys, values, and what is projected last
    mlp = HALF * (3 if model.gated else 2) * model.ffn
    scores = 0
    if division.recompute == "none" and division.attention == "unfused":
        scores = (HALF + (MASK + HALF if model.dropout else 0)) * model.heads * tokens
    each = (inputs + masks) / beside + (projected + mlp + scores) / division.tensor
    return each * division.micro_batch * tokens


def layers_of(model: Transformer, division: Division, stage: int) -> int:
    """How many a stage (from 0) has."""
    return model.layers * (stage + 1) // division.pipeline - model.layers * stage // division.pipeline


def stage_bytes(model: Transformer, tokens: int, division: Division, stage: int) -> dict[str, float]:
    """Bytes of a device of a stage (from 0), by kind."""
    last = stage == division.pipeline - 1
    layers = layers_of(model, division, stage)
    elements = layers * model.layer_parameters
    if stage == 0:
        elements += (model.vocab + model.positions) * model.hidden
    if last and (division.pipeline > 1 or not model.tied):  # the last stage of a pipeline has a copy of tied ones
        elements += model.vocab * model.hidden
    elements += model.hidden * (2 if model.biased else 1) if last else 0
    shared = layers * 2 * model.hidden * model.kv_width  # several devices may need the same keys and values
    copies = division.tensor / min(division.tensor, model.kv_heads)
    own = (elements + (copies - 1) * shared) / division.tensor
    shares = {"optimizer": division.zero >= 1, "gradients": division.zero >= 2, "parameters": division.zero >= 3}
    kinds = {kind: own * size / (division.data if shares[kind] else 1) for kind, size in STATE_BYTES.items()}
    in_flight = min(division.pipeline - stage, division.micro_batches)
    kinds["activations"] = layers * layer_bytes(model, tokens, division) * in_flight
    kinds["working"] = _working_bytes(model, tokens, division)
    if last:  # the last norm's input, the output's, and logits in 32 bits
        ends = (2 * HALF * model.hidden + FULL * model.vocab) / division.tensor
        kinds["logits"] = ends * division.micro_batch * tokens
    return kinds


def _working_bytes(model: Transformer, tokens: int, division: Division) -> float:
    """What the layer takes that is being computed: again, where that is so, and two layers' gathered parameters."""
    again = layer_bytes(model, tokens, replace(division, recompute="none")) - layer_bytes(model, tokens, division)
    gathered = 2 * HALF * model.layer_parameters / division.tensor if division.zero == 3 and division.data > 1 else 0
    return again + gathered


def refuse_impossible(model: Transformer, division: Division) -> None:
    """Check a division.

    Raises:
        ConfigurationError: where the model cannot be divided so.
    """
    if division.pipeline > model.layers:
        raise ConfigurationError(
            f"pipeline is {division.pipeline}, and {model.name} has {model.layers} layers; use fewer"
        )
    if division.zero and division.data == 1:
        raise ConfigurationError(f"zero is {division.zero}, and there is one replica; give data, or leave zero out")
    if division.sequence and division.tensor == 1:
        raise ConfigurationError("sequence is true, and one device computes a layer; give tensor, or leave it out")
    if model.heads % division.tensor or model.ffn % division.tensor:
        raise ConfigurationError(
            f"tensor is {division.tensor}, which does not divide the {model.heads} heads and {model.ffn} wide MLPs of "
            f"{model.name}; use a number that does"
        )
