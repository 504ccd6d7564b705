"""What a run is made of, and how it is trained: the parts of the configuration, and the whole."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from unisono.config.fitting import refuse_relaxed
from unisono.config.section import Section
from unisono.config.sync import SyncConfig
from unisono.errors import ConfigurationError
from unisono.plan.schedule import virtual

Schedule = Literal["gpipe", "1f1b", "interleaved", "zb_h1", "zb_v"]


class Layout(Section):
    """Where the run is computed; it never changes the result. ``layout: auto`` has it chosen."""

    auto: bool = Field(
        False,
        description="The fastest on this machine is chosen when training begins, from a few measured steps; "
        "`layout: auto` says the same. Of the other keys it goes with memory_gib alone.",
    )
    data: int | None = Field(
        None, ge=1, description="Replicas that share the micro-batches; default: as many as there are workers for."
    )
    pipeline: int = Field(1, ge=1, description="Workers of a replica, each with some of its layers.")
    tensor: int = Field(1, ge=1, description="Workers that divide each layer's matrices among them.")
    sequence_parallel: bool = Field(
        False,
        description="Between divided layers, norms and dropout work on a part of the sequence each; "
        "needs tensor of at least 2.",
    )
    loss_parallel: bool = Field(
        False,
        description="The model's last layer is divided by classes, and the cross-entropy is computed from the parts; "
        "needs tensor of at least 2.",
    )
    tensor_plan: dict[str, str] = Field(
        default_factory=dict,
        description="Modules -> colwise, rowwise, embedding_rowwise, colwise_gather_output; `*` is one part of a name. "
        "Default: the model's `_tp_plan`, or what follows from its flow of values.",
    )
    zero: Literal[0, 1, 2, 3] | None = Field(
        None,
        description="0: every replica keeps and updates a whole state. Default: those of a host share one, of which "
        "each updates a part; on one host 1, 2 and 3 are the same. Between hosts, 1: each keeps a part of the "
        "optimizer's state; 2: and of the sums of gradients; 3: and of the parameters.",
    )
    schedule: Schedule = Field("1f1b", description="The pipeline's timetable.")
    virtual_stages: int = Field(1, ge=1, description="Stages of a pipeline's worker; interleaved has 2 by default.")
    recompute: Literal["none", "selective", "full", "auto"] = Field(
        "none",
        description="Blocks of which activations are dropped and computed again in the backward. "
        "selective: matrix products, attention and convolutions are kept. auto: the least that fits.",
    )
    memory_gib: float | None = Field(
        None, gt=0, description="Memory that a host's workers may take together, for recompute: auto; default: all."
    )
    offload: str | None = Field(
        None,
        description="A directory on a disk: the optimizer's state lies in a file there, and takes memory while it is "
        "updated.",
    )
    cuts: list[str] = Field(
        default_factory=list,
        description="Modules in front of which the model is cut into stages; default: where the slowest is fastest.",
    )

    @model_validator(mode="before")
    @classmethod
    def _auto_in_a_word(cls, found: Any) -> Any:
        return {"auto": True} if found == "auto" else found

    @model_validator(mode="after")
    def _auto_is_free(self) -> Self:
        given = {name for name in self.model_fields_set if getattr(self, name) != type(self).model_fields[name].default}
        if self.auto and (others := sorted(given - {"auto", "memory_gib"})):
            raise ValueError(f"auto chooses {others[0]} too; leave {others[0]} out, or auto")
        return self

    @model_validator(mode="after")
    def _schedule_fits(self) -> Self:
        if self.cuts and self.pipeline == 1:
            raise ValueError("cuts are given and pipeline is 1; set pipeline to as many workers as there are stages")
        for name in ("sequence_parallel", "loss_parallel", "tensor_plan"):
            if getattr(self, name) and self.tensor == 1:
                raise ValueError(f"{name} is given and tensor is 1; set tensor to as many workers as divide each layer")
        try:
            virtual(self.schedule, self.virtual_stages)
        except ConfigurationError as error:
            raise ValueError(str(error)) from None
        return self

    @property
    def model_workers(self) -> int:
        """Workers that compute one replica together."""
        return self.pipeline * self.tensor

    @property
    def stages(self) -> int:
        """Parts into which the model is cut."""
        return self.pipeline * virtual(self.schedule, self.virtual_stages)

    @property
    def rounding(self) -> tuple[object, ...]:
        """What changes the order of sums inside a layer: layouts that agree in it give the same bits."""
        if self.tensor == 1:
            return ()
        return self.tensor, self.sequence_parallel, self.loss_parallel, tuple(sorted(self.tensor_plan.items()))

    def replicas(self, workers: int) -> int:
        """How many replicas a number of workers makes.

        Raises:
            ConfigurationError: where they do not make whole ones, or another number than is asked for.
        """
        each = self.model_workers
        self.refuse_broken_replicas(workers)
        if self.data is not None and self.data * each != workers:
            raise ConfigurationError(
                f"the layout has {self.data * each} workers (data {self.data} x {self._replica()}), but "
                f"{workers} {'are' if workers > 1 else 'is'} there; start {self.data * each} (-n {self.data * each}), "
                f"or use data={workers // each}"
            )
        return workers // each

    def refuse_broken_replicas(self, workers: int, host: str = "") -> None:
        """Check that a number of workers makes whole replicas.

        Arguments:
            host: where they are, for an error, if there are several; the workers of a replica share memory.

        Raises:
            ConfigurationError: where they do not.
        """
        each = self.model_workers
        fewer, more = workers - workers % each, workers + -workers % each
        if workers % each:
            axes = ", ".join(f"layout.{name}={size}" for name, size in self._axes().items())
            near = f"{fewer} or {more}" if fewer else f"{more}"
            there = f" on {host}" if host else ""
            raise ConfigurationError(
                f"{workers} worker{'s' * (workers > 1)}{there} cannot make replicas of {each} ({axes}); "
                f"use {near} workers{' there' if host else ''}, or another layout"
            )

    def _replica(self) -> str:
        """What a replica's workers are, in words."""
        return " x ".join(f"{name} {size}" for name, size in self._axes().items())

    def _axes(self) -> dict[str, int]:
        """The axes of a replica: the pipeline's, and others that are longer than 1."""
        return {"pipeline": self.pipeline} | ({"tensor": self.tensor} if self.tensor > 1 else {})


class WireConfig(Section):
    """How gradients travel between hosts."""

    backend: str = Field("auto", description="gloo, nccl, or another that torch.distributed knows; auto: by device.")
    algorithm: Literal["canonical", "auto", "ring", "tree", "halving_doubling", "native"] = Field(
        "canonical",
        description="canonical is exact; the others change the order of sums. auto: what `bench comm --tune` found.",
    )
    compression: Literal["none", "bf16", "fp16", "int8", "top_k", "sign", "powersgd"] = Field(
        "none", description="Smaller gradients between hosts, with error feedback; not exact."
    )
    lossless: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Without compression: exponents travel in Huffman's code, a sixth fewer bytes, the same bits. "
        "auto: where a trial of some steps finds it quicker.",
    )
    rank: int = Field(4, ge=1, description="powersgd: of the factors.")
    density: float = Field(0.01, gt=0, le=1, description="top_k: the part of each tensor that is sent.")
    warmup_steps: int = Field(
        100, ge=0, description="top_k: steps over which the part that is sent falls from all to density."
    )
    momentum: float = Field(
        0.0, ge=0, lt=1, description="top_k: momentum of what is accumulated, in place of the optimizer's own."
    )
    bucket_bytes: int | None = Field(
        None,
        ge=1,
        description="Gradients leave in buckets of at least this size, while the backward still runs; "
        "default: 1 MiB, and 4 MiB with sign, top_k and powersgd.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.compression != "none" and self.algorithm != "canonical":
            raise ValueError(
                f"compression {self.compression} has its own way of summing; leave wire.algorithm out, "
                f"or set wire.compression=none for {self.algorithm}"
            )
        if self.lossless == "always" and self.compression != "none":
            raise ValueError(f"lossless is for gradients that are not compressed; leave it out with {self.compression}")
        if self.momentum and self.compression != "top_k":
            raise ValueError(f"momentum is for compression top_k, not {self.compression}")
        return self

    @property
    def inexact(self) -> str | None:
        """Why a run over several hosts is not exact, in a few words; None where it is."""
        if self.compression != "none":
            return f"{self.compression} loses a part of each gradient until a later step"
        if self.algorithm != "canonical":
            return f"{self.algorithm} changes the order of sums"
        return None


class ScheduleConfig(Section):
    """The learning rate over time, as a factor on the optimizer's own."""

    name: Literal["constant", "linear", "cosine"] = Field("constant", description="Shape after the warm-up.")
    warmup_steps: int = Field(0, ge=0, description="Steps of linear warm-up.")
    final: float = Field(0.0, ge=0, description="The factor at the end of a linear or cosine decay.")
    decay_steps: int | None = Field(None, ge=1, description="Step at which the decay ends; default: the run's steps.")


class ScalingConfig(Section):
    """How the learning rate follows the global batch size."""

    rule: Literal["none", "linear", "sqrt"] = Field("none", description="Proportional to the size, or to its root.")
    base_batch_size: int = Field(256, ge=1, description="The batch size that the optimizer's rate was chosen for.")


class ClipConfig(Section):
    """How large gradients are made smaller; a number alone is `norm`."""

    norm: float | None = Field(None, gt=0, description="Limit of the norm of all gradients together.")
    value: float | None = Field(None, gt=0, description="Limit of every element's magnitude.")
    agc: float | None = Field(
        None,
        gt=0,
        description="Adaptive: limit of each unit's norm (a row of a matrix, a filter, a vector), as a part of the "
        "norm of its weights.",
    )
    agc_eps: float = Field(1e-3, gt=0, description="agc: the least norm that weights count with.")
    agc_exclude: list[str] = Field(
        default_factory=list,
        description="agc: parameters that are left as they are, by name or pattern, as `head.*`.",
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        given = [name for name in ("norm", "value", "agc") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give one of norm, value and agc, not {' and '.join(given) or 'none'}")
        if self.agc is None and self.agc_exclude:
            raise ValueError("agc_exclude is for agc, which is not given")
        return self


class OptimizerConfig(Section):
    """An optimizer by name, with its arguments; left out, the task's own is used."""

    name: str = Field(
        ...,
        description="A class in torch.optim or in unisono.optim; the section replaces the task's own optimizer.",
    )
    lr: float = Field(1e-3, gt=0, description="Learning rate, before schedule and scaling; of classes that have one.")
    options: dict[str, Any] = Field(default_factory=dict, description="Further arguments of the class.")


class ValidationConfig(Section):
    """Evaluation on the task's validation split."""

    every: int | None = Field(None, ge=1, description="Steps between evaluations; default: once, at the end.")
    samples: int | None = Field(None, ge=1, description="Evaluate the first N samples only; default: all.")
    metric: str = Field("loss", description="The metric that decides what is best.")
    mode: Literal["min", "max"] = Field("min", description="Whether a lower or a higher metric is better.")
    patience: int | None = Field(None, ge=1, description="Stop after this many evaluations without a better one.")


class CheckpointConfig(Section):
    """Checkpoints of the training state."""

    every: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        None,
        description="Steps between checkpoints; default: one, at the end. auto: as many as lose the least, from what "
        "one takes and mtbf_h.",
    )
    mtbf_h: float = Field(
        24.0, gt=0, description="every: auto: hours between failures that end the run (a lost worker does not)."
    )
    keep: int = Field(3, ge=1, description="How many of the newest are kept.")
    keep_best: bool = Field(True, description="Keep the one with the best validation metric too.")
    at_end: bool = Field(True, description="Write one when training ends or is stopped.")


class FaultConfig(Section):
    """What happens when a worker is lost, hangs, or has to leave."""

    on_loss: Literal["replace", "shrink", "wait", "stop"] = Field(
        "replace",
        description="A worker died or made no progress. replace: the others take over what it has not done, and a new "
        "one takes its place. shrink: they go on without it. wait: they finish the step, and wait for the new one. "
        "stop: the run ends.",
    )
    snapshot_every: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Where a worker's state ends with it (on a device, in layers that several divide, with one worker "
        "alone): steps from one copy of it, in memory that outlives workers, to the next. When one is lost, all start "
        "again from the newest, so that at most so many steps are done again. auto: as often as takes 1% of the time.",
    )
    host_deadline_s: float = Field(
        1.5, ge=0.5, description="Seconds after which a host that is not heard is lost, where there are several."
    )
    on_tie: Literal["wait", "stop"] = Field(
        "wait",
        description="Too few hosts are left to decide who goes on. wait: for the others, a witness, or unisono fence. "
        "stop: the run ends.",
    )
    copies: Literal["auto", "always", "never"] = Field(
        "auto",
        description="Workers of a host that have nothing left to do in a step compute micro-batches of late ones too; "
        "whichever copy comes first counts. auto: where each worker has a core of its own.",
    )
    drain_s: float | None = Field(
        None,
        gt=0,
        description="Seconds that a run has, once it is asked to stop, to finish its step, save its state and end; "
        "then it is ended. Default: as long as it takes.",
    )
    notice_file: str | None = Field(
        None, description="A file whose appearance asks the run to stop, as a spot instance's agent may write it."
    )
    notice_command: str | None = Field(
        None, description="A command, run every 5 s, that asks the run to stop by ending with exit code 0."
    )


class ObserveConfig(Section):
    """What is shown and recorded."""

    progress: bool = Field(True, description="Progress on the terminal (rank 0).")
    log_every: int = Field(10, ge=1, description="Steps between records in TensorBoard.")
    tensorboard: bool = Field(True, description="Write TensorBoard files into the run directory.")
    report: bool = Field(True, description="Write report.html at the end.")


class TrainingConfig(Section):
    """What `Trainer` needs besides the objects that only code can give (model, loss, data, optimizer)."""

    global_batch_size: int = Field(..., ge=1, description="Samples in a step, over all workers.")
    micro_batch_size: int = Field(..., ge=1, description="Samples computed at once; divides the global batch size.")
    seed: int = Field(0, ge=0, lt=2**63, description="Decides initial values, order of samples and dropout.")
    init: Literal["stream", "by_name"] = Field(
        "stream",
        description="stream: the model's factory makes all values. by_name: the model is built without values, and "
        "each module makes its own, from seed and name: for models that are whole nowhere.",
    )
    start_from: str | None = Field(
        None,
        description="Weights to begin with: a state_dict, a safetensors file, a directory of Hugging Face or of "
        "torch.distributed.checkpoint, or a checkpoint of another run.",
    )
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16 runs the forward under autocast.")
    threads: int = Field(1, ge=1, description="Intra-op threads of a worker; part of the run, since it changes bits.")
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, or cuda: one device a worker.")
    clip: ClipConfig | None = Field(None, description="Limits of gradients; a number is that of the global norm.")
    schedule: ScheduleConfig = Field(default_factory=lambda: ScheduleConfig())
    scaling: ScalingConfig = Field(default_factory=lambda: ScalingConfig())
    sync: SyncConfig = Field(default_factory=lambda: SyncConfig())
    layout: Layout = Field(default_factory=lambda: Layout())
    wire: WireConfig = Field(default_factory=lambda: WireConfig())
    validation: ValidationConfig = Field(default_factory=lambda: ValidationConfig())
    checkpoint: CheckpointConfig = Field(default_factory=lambda: CheckpointConfig())
    fault: FaultConfig = Field(default_factory=lambda: FaultConfig())
    observe: ObserveConfig = Field(default_factory=lambda: ObserveConfig())
    run_dir: str | None = Field(
        None,
        description="Where records and checkpoints go; default: the next free `runs/TASK-NNN` (`Trainer`: nowhere).",
    )
    deadline_s: float = Field(
        300.0,
        gt=0,
        description="Seconds that a worker may make no progress, or wait for others that make none; a worker that is "
        "slower than that by nature has 20 times what its operations take.",
    )

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.global_batch_size % self.micro_batch_size:
            below = self.global_batch_size - self.global_batch_size % self.micro_batch_size
            nearest = max(below, self.micro_batch_size)
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide global_batch_size {self.global_batch_size}; "
                f"the nearest multiple is {nearest}"
            )
        if self.micro_batches >= 1 << 19:
            raise ValueError(f"{self.micro_batches} micro-batches a step; at most {(1 << 19) - 1} are possible")
        replicas = self.layout.data
        if replicas is not None and replicas > self.micro_batches:
            raise ValueError(more_replicas_than_micro_batches(replicas, self.micro_batches, self.layout.model_workers))
        return self

    @field_validator("clip", mode="before")
    @classmethod
    def _norm_alone(cls, value: Any) -> Any:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        return {"norm": value} if number else value

    @model_validator(mode="after")
    def _clipping_fits(self) -> Self:
        if self.clip is not None and self.clip.agc is not None and self.layout.offload is not None:
            raise ValueError("clip.agc needs whole parameters, and layout.offload works element by element; leave one")
        return self

    @model_validator(mode="after")
    def _sync_fits(self) -> Self:
        if self.sync.relaxed:
            refuse_relaxed(self)
        return self

    @model_validator(mode="after")
    def _interval_fits(self) -> Self:
        if self.checkpoint.every == "auto" and (self.wire.compression != "none" or self.layout.zero):
            raise ValueError(
                "checkpoint.every is auto, which the chief decides alone, and with wire.compression or layout.zero all "
                "hosts take part in a checkpoint; give a number of steps"
            )
        return self

    @property
    def micro_batches(self) -> int:
        """Micro-batches in a step."""
        return self.global_batch_size // self.micro_batch_size


def more_replicas_than_micro_batches(replicas: int, micro_batches: int, each: int = 1) -> str:
    """The sentence for a layout that would leave workers idle; ``each`` workers make a replica."""
    what = "workers" if each == 1 else "replicas"
    return (
        f"{replicas} {what} but only {micro_batches} micro-batch{'es' * (micro_batches > 1)} in a step; "
        f"use at most {micro_batches} {what}, or a smaller micro_batch_size"
    )


class Config(TrainingConfig):
    """Everything that ``unisono train`` reads."""

    task: str = Field(..., description="lm, images, or the import path of your own: package.module:Class.")
    options: dict[str, Any] = Field(default_factory=dict, description="Arguments of the task.")
    optimizer: OptimizerConfig | None = Field(None, description="In place of the task's own.")
    steps: int = Field(..., ge=1, description="Steps to train.")
    preload: list[str] = Field(default_factory=list, description="Modules that workers share already imported.")
