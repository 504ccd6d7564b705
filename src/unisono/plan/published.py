"""Runs in the words of the published ones: rows of plain values, each made a job, or the reason why it cannot be.

The schema is that of ``data/published-runs.json.gz``. What a row does not say and a framework has a known default for
is assumed, and said; what would decide the answer is never guessed.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from unisono.errors import ConfigurationError
from unisono.plan.division import RECOMPUTE, Division, Pipelining, Recompute, refuse_impossible
from unisono.plan.hardware import DEVICES, GB, LINKS, Cluster, Device, Link
from unisono.plan.jobs import Job
from unisono.plan.transformer import NAMED, Transformer

GIGABIT = GB / 8
"""A gigabit, in bytes."""
HEAD_WIDTH = 128
SILENT = "recompute=none"
"""Assumed of a row's time; its memory is that of the least recomputation that fits."""


@dataclass(frozen=True, slots=True)
class Run:
    """A row that can be judged.

    Attributes:
        framework: by `FRAMEWORKS`, or as the row has it.
        assumed: what the row did not say.
    """

    job: Job
    framework: str
    assumed: tuple[str, ...]

    @property
    def ways(self) -> tuple[Job, ...]:
        """The job; where the row does not say what is computed again, with more of that, too."""
        if SILENT not in self.assumed:
            return (self.job,)
        return tuple(replace(self.job, division=replace(self.job.division, recompute=level)) for level in RECOMPUTE)


FRAMEWORKS = (
    ("nanotron-2024", r"nanotron.*mid.2024"),
    ("nanotron", r"nanotron"),
    ("llm-foundry", r"llm-foundry|mosaic|composer"),
    ("internlm", r"internlm|internevo"),
    ("torchtitan", r"torchtitan"),
    ("automodel", r"automodel"),
    ("megatron-deepspeed", r"megatron-deepspeed"),
    ("megatron-bridge", r"nemo|megatron-bridge"),
    ("megatron", r"megatron|primus"),
)
"""Frameworks by words that their names have; the first that fits."""


def framework(words: object) -> str:
    """The framework that is meant.

    >>> framework("Megatron-Bridge / NeMo container 26.04"), framework("nanotron"), framework(None)
    ('megatron-bridge', 'nanotron', 'default')
    """
    text = str(words or "").lower()
    return next((name for name, pattern in FRAMEWORKS if re.search(pattern, text)), text.split(" ")[0] or "default")


class _Missing(Exception):
    """A row cannot be judged; what is said is why."""


@dataclass(slots=True)
class _Row:
    """A row's values, and what had to be assumed as they were asked for."""

    values: Mapping[str, Any]
    assumed: list[str] = field(default_factory=list)

    def number(self, name: str, default: int | None = None) -> int:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise _Missing(f"{name} is missing")
            self.assumed.append(f"{name}={default}")
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not is_number or value != int(value) or value < 1:
            raise _Missing(f"{name} is {value!r}; give a whole number from 1")
        return int(value)

    def text(self, name: str) -> str:
        value = self.values.get(name)
        return "" if value is None else str(value).lower()

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name)
        if value is None:
            self.assumed.append(f"{name}={str(default).lower()}")
        elif not isinstance(value, bool):
            raise _Missing(f"{name} is {value!r}; give true or false")
        return default if value is None else bool(value)


def run(values: Mapping[str, Any]) -> Run | str:
    """A row as a job; or, where it cannot be judged, the reason."""
    row = _Row(values)
    try:
        model = _model(row)
        cluster = _cluster(row)
        tokens = row.number("seq")
        division = _division(row, cluster, model)
        refuse_impossible(model, division)
        if cluster.devices != division.devices:
            raise _Missing(f"tp x pp x dp x cp is {division.devices}, and num_gpus is {cluster.devices}; correct one")
        job = Job(model, tokens, division, cluster, _eighth(row, cluster.device))
    except (_Missing, ConfigurationError) as error:
        return str(error)
    return Run(job, framework(values.get("framework")), tuple(row.assumed))


_KNOWN_SHAPES: Mapping[str, Transformer] = {
    # https://huggingface.co/internlm/internlm-7b/blob/main/config.json
    "internlm-7b": Transformer("internlm-7b", 32, 4096, 32, 32, 11008, 103_168),
}


def _model(row: _Row) -> Transformer:
    name = row.text("model")
    if "lora" in name:
        raise _Missing("fine-tuning with adapters is not modelled; give a run that trains all parameters")
    if (row.values.get("moe") or row.number("ep", 1) > 1) and not isinstance(row.values.get("moe"), Mapping):
        raise _Missing("the experts' numbers are missing (moe: experts, chosen, expert_ffn)")
    known = _KNOWN_SHAPES.get(name)
    if known is not None and (row.values.get("ffn") is None or row.values.get("layers") is None):
        row.assumed.append(f"ffn={known.ffn}")
        return known
    layers, hidden = row.number("layers"), row.number("hidden")
    heads = row.number("heads", _heads(hidden, row.number("tp", 1)))
    gated = row.flag("gated_mlp", False)
    model = Transformer(
        name or "model",
        layers,
        hidden,
        heads,
        row.number("kv_heads", heads),
        row.number("ffn", 4 * hidden if not gated else None),
        row.number("vocab", _vocab(row)),
        gated=gated,
        tied=row.flag("tied_embeddings", not gated),
        biased=not gated,
        dropout=not gated and "unfused" in row.text("attention"),
    )
    if hidden % heads or heads % model.kv_heads:
        raise _Missing(f"{heads} heads cannot share hidden {hidden} and kv_heads {model.kv_heads}; correct one")
    moe = row.values.get("moe")
    if isinstance(moe, Mapping):
        try:
            given = {key: int(moe[key]) for key in ("experts", "chosen", "expert_ffn")}
            extra = {key: int(moe.get(key, 0)) for key in ("shared_ffn", "dense_layers")}
        except (KeyError, TypeError, ValueError) as error:
            raise _Missing(f"moe lacks {error}; give experts, chosen, expert_ffn as whole numbers") from error
        model = replace(model, **given, **extra)  # type: ignore[arg-type]
    return model


def _heads(hidden: int, tensor: int) -> int:
    """As many as GPT-3 has, where a model is as wide as that; else as many as make heads of nearly `HEAD_WIDTH`.

    >>> _heads(14400, 8), _heads(14336, 8), _heads(4096, 1)
    (96, 112, 32)
    """
    if hidden >= NAMED["gpt:175b"].hidden and hidden % (most := NAMED["gpt:175b"].heads) == 0 and most % tensor == 0:
        return most
    fitting = [count for count in range(tensor, hidden + 1, tensor) if hidden % count == 0] or [1]
    return min(fitting, key=lambda count: abs(math.log(hidden / count / HEAD_WIDTH)))


def _vocab(row: _Row) -> int | None:
    """Of GPT-2's words, as Megatron pads it, where a GPT says nothing."""
    return NAMED["gpt:22b"].vocab if row.text("model").startswith("gpt") else None


_DEVICES = (
    (r"^h100.*96", "H100-96"),
    (r"^h100.*pcie", "H100-PCIe"),
    (r"^h100|^h800", "H100"),
    (r"^h200", "H200"),
    (r"^a100.*40", "A100-40"),
    (r"^a100|^a800", "A100-80"),
    (r"^v100.*16", "V100-16"),
    (r"^v100", "V100-32"),
    (r"^gb300", "GB300"),
    (r"^gb200", "GB200"),
    (r"^b300", "B300"),
    (r"^b200", "B200"),
    (r"^mi300x$", "MI300X"),
    (r"^mi250", "MI250"),
    (r"^tpu ?v4$", "TPUv4"),
    (r"^tpu ?v5p$", "TPUv5p"),
)
"""Devices by the beginnings of the names that rows have."""
_FABRICS = {"A100-40": "ib200", "A100-80": "ib200", "V100-16": "ib100", "V100-32": "ib100"}
"""Between nodes, where a row does not say it; else 400 Gb/s a device."""


def _device(row: _Row) -> Device:
    text = row.text("gpu")
    name = next((name for pattern, name in _DEVICES if re.search(pattern, text)), None)
    exact = next((device for key, device in DEVICES.items() if key.lower() == text), None)
    if name is None and exact is None:
        raise _Missing(f"the device {row.values.get('gpu')!r} is not known; known are {', '.join(DEVICES)}")
    return exact or DEVICES[str(name)]


def _cluster(row: _Row) -> Cluster:
    device = _device(row)
    count = row.number("num_gpus")
    node = row.number("gpus_per_node", min(device.node, 8))
    within, between = LINKS[device.link], LINKS[_FABRICS.get(device.name, "ib400")]
    if links := re.search(r"(\d+) links", row.text("intra_node")):
        within = Link(f"{links[1]} links", int(links[1]) * within.bytes_per_s / 12, "the row")  # of an A100's 12
    if joined := re.search(r"nvlink(72|36)\b", row.text("intra_node")):
        node = int(joined[1])
    rate = _rate(row.text("inter_node"), node)
    if rate == 0:
        raise _Missing(f"inter_node is {row.values['inter_node']!r}, of which nothing is sent; give a rate above 0")
    if rate is not None:
        between = Link(str(row.values["inter_node"]), rate, "the row")
    elif row.values.get("inter_node") is None and count > node:
        row.assumed.append(f"inter_node={between.name}")
    return Cluster(device, count, min(node, count), within, between)


def _rate(text: str, node: int) -> float | None:
    """Bytes a second of a device, one way, from words such as ``4x Omni-Path 100Gb/s per node``.

    >>> _rate("4x omni-path 100gb/s per node", 8) / GIGABIT, _rate("ndr 400gb/s per gpu", 8) / GIGABIT
    (50.0, 400.0)
    """
    found = re.search(r"(?:(\d+)\s*x\s*[a-z -]*)?(\d+)\s*gb(?:ps|/s|it/s)?\b.*?per (gpu|node)", text)
    if found is None:
        return None
    total = int(found[1] or 1) * int(found[2]) * GIGABIT
    return total / node if found[3] == "node" else total


_SHARDING = ((r"zero-?3|fsdp|hsdp", 3), (r"zero-?2", 2), (r"zero-?1|dist", 1), (r"none|ddp", 0))


def _division(row: _Row, cluster: Cluster, model: Transformer) -> Division:
    tensor, pipeline = row.number("tp"), row.number("pp")
    context = row.number("cp", 1)
    whole = tensor * pipeline * context
    if cluster.devices % whole:
        raise _Missing(f"tp x pp x cp is {whole}, which does not divide num_gpus {cluster.devices}; correct one")
    data = row.number("dp", cluster.devices // whole)
    batch = row.number("gbs")
    if row.values.get("mbs") is None and row.values.get("num_microbatches") is not None:
        each = row.number("num_microbatches") * data
        row.values = {**row.values, "mbs": batch / each}
    micro_batch = row.number("mbs")
    if batch % (data * micro_batch):
        raise _Missing(f"gbs is {batch}, which dp x mbs, {data} x {micro_batch}, does not divide; correct one")
    micro_batches = batch // (data * micro_batch)
    if row.number("num_microbatches", micro_batches) != micro_batches:
        raise _Missing(f"num_microbatches is {row.values['num_microbatches']}, and gbs / dp / mbs is {micro_batches}")
    virtual = row.number("vpp", 1) if pipeline > 1 else 1
    replicas = data * context
    shard = row.number("shard_group", 1) if row.values.get("shard_group") is not None else 0
    if shard > 1 and replicas % shard:
        raise _Missing(f"shard_group is {shard}, which does not divide dp x cp, {replicas}; correct one")
    return Division(
        tensor=tensor,
        pipeline=pipeline,
        data=data,
        context=context,
        expert=row.number("ep", 1),
        zero=_zero(row) if replicas > 1 else 0,
        shard=shard if shard > 1 else 0,
        micro_batch=micro_batch,
        micro_batches=micro_batches,
        sequence=tensor > 1 and row.flag("sequence_parallel", False),
        recompute=_recompute(row),
        attention="unfused" if "unfused" in row.text("attention") else "flash",
        virtual=virtual,
        schedule=_schedule(row, virtual),
    )


def _zero(row: _Row) -> int:
    text = row.text("sharding")
    if not text:
        row.assumed.append("sharding=zero1")
        return 1
    level = next((level for pattern, level in _SHARDING if re.search(pattern, text)), None)
    if level is None:
        raise _Missing(f"sharding is {text!r}; give none, zero1, zero2 or zero3")
    return level


def _recompute(row: _Row) -> Recompute:
    text = row.text("recompute")
    if not text:
        row.assumed.append(SILENT)
        return "none"
    known: tuple[Recompute, ...] = ("full", "selective", "none")
    found = next((name for name in known if text.startswith(name)), None)
    if found is None:
        raise _Missing(f"recompute is {text!r}; give none, selective or full")
    return found


def _schedule(row: _Row, virtual: int) -> Pipelining:
    text = row.text("schedule")
    if "zbv" in text or "v-" in text:
        return "zb_v" if virtual > 1 else "zb_h1"
    if virtual > 1:
        return "interleaved"
    if text and not re.match(r"1f1b|none|zb|gpipe|interleaved", text):
        raise _Missing(f"schedule is {text!r}; give 1f1b, gpipe, interleaved_1f1b, zb or zbv")
    return "zb_h1" if text.startswith("zb") else "gpipe" if text.startswith("gpipe") else "1f1b"


def _eighth(row: _Row, device: Device) -> bool:
    text = row.text("precision")
    if "fp4" in text:
        raise _Missing("products in 4 bits are not modelled; give a precision of 8 or 16 bits")
    wanted = "fp8" in text or "float8" in text
    if wanted and not device.quarter_flops:
        raise _Missing(f"precision is {row.values['precision']!r}, and {device.name} has no products in 8 bits")
    return wanted
