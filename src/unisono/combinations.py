"""What does not go together: optimizers, ways of agreeing, layouts and models, each refused with its reason."""

from collections.abc import Sequence

from torch.optim import Optimizer

from unisono.config import SyncConfig, TrainingConfig
from unisono.errors import ConfigurationError
from unisono.plan.assignment import UpdateClass


def refuse_with_curvature(config: TrainingConfig, several_hosts: bool) -> None:
    """What an optimizer that learns the curvature does not go with."""
    layout, compressed = config.layout, config.wire.compression != "none"
    reasons = {
        "sync.mode": "it learns the curvature of one model, at every step" if config.sync.relaxed else "",
        "layout.tensor": "it needs a layer's inputs and outputs whole" if layout.tensor > 1 else "",
        "layout.zero": "hosts do not share what it learns" if layout.zero and several_hosts else "",
        "wire.compression": "what it learns would be compressed with gradients" if compressed else "",
    }
    for key, reason in reasons.items():
        if reason:
            section, _, name = key.partition(".")
            value = getattr(getattr(config, section), name)
            raise ConfigurationError(
                f"optimizer KFAC and {key} {value} do not go together: {reason}; leave {key} out, or use LAMB or AdamW"
            )


def refuse_with_newton(config: TrainingConfig, several_hosts: bool) -> None:
    """What an optimizer that evaluates the loss several times in a step does not go with."""
    layout = config.layout
    wrong = {
        f"sync.mode {config.sync.mode}": config.sync.relaxed,
        f"layout.pipeline {layout.pipeline}": layout.stages > 1,
        f"layout.tensor {layout.tensor}": layout.tensor > 1,
        f"layout.zero {layout.zero}": layout.zero is not None,
        f"layout.recompute {layout.recompute}": layout.recompute != "none",
        "layout.offload": layout.offload is not None,
        "clip": config.clip is not None,
        f"schedule {config.schedule.name}": config.schedule.name != "constant",
        "schedule.warmup_steps": config.schedule.warmup_steps > 0,
        f"scaling.rule {config.scaling.rule}": config.scaling.rule != "none",
        f"device {config.device}": config.device != "cpu",
        "several hosts": several_hosts,
        "init by_name": config.init == "by_name",
    }
    if found := next((what for what, is_so in wrong.items() if is_so), None):
        raise ConfigurationError(
            f"optimizer NewtonCG and {found} do not go together: it evaluates the whole loss several times in a step, "
            "on the workers of one host; leave that out, or use another optimizer"
        )


def refuse_tied_with_newton(uses: Sequence[Sequence[str]]) -> None:
    """Check a model.

    Arguments:
        uses: the names of each parameter.

    Raises:
        ConfigurationError: for tied weights.
    """
    if tied := next((names for names in uses if len(names) > 1), None):
        raise ConfigurationError(f"NewtonCG cannot train a weight under several names ({', '.join(tied)}) in a run")


def refuse_coupled(optimizer: Optimizer, update: UpdateClass, sync: SyncConfig) -> None:
    """An optimizer that updates everything at once, where parts of the model are updated apart."""
    if sync.relaxed and update is UpdateClass.COUPLED:
        raise ConfigurationError(
            f"optimizer {type(optimizer).__name__} is of no known class, so it would couple what is apart "
            f"(sync.mode {sync.mode}); give it an attribute update_class, or use another"
        )
