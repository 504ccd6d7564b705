"""Which layouts and limits a way of agreeing goes with, from the configuration alone."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from unisono.config.models import TrainingConfig


def refuse_relaxed(config: "TrainingConfig") -> None:
    """Check a configuration in which replicas do not agree at every step.

    Raises:
        ValueError: with what does not fit, and what to change.
    """
    layout, sync, mode = config.layout, config.sync, config.sync.mode
    if sync.stashes:
        _refuse_to_drain(config)
    elif layout.model_workers > 1:
        raise ValueError(f"sync.mode {mode} has whole models: set layout.pipeline and layout.tensor to 1")
    if layout.zero is not None:
        raise ValueError(f"sync.mode {mode} keeps all that it trains in one state; leave layout.zero out")
    if layout.offload is not None:
        raise ValueError(f"sync.mode {mode} keeps its state in memory; leave layout.offload out")
    if config.init == "by_name":
        raise ValueError(f"sync.mode {mode} begins with values that are there as a whole; use init: stream")
    if config.wire.compression != "none":
        raise ValueError(f"wire.compression is for gradients; with sync.mode {mode} use sync.compression")
    if (sync.pushes or sync.stashes) and config.micro_batches % sync.push:
        raise ValueError(
            f"{config.micro_batches} micro-batches cannot be pushed {sync.push} at a time; use a number that divides "
            "them"
        )
    units = config.micro_batches // sync.push
    if sync.accepted is not None and sync.accepted > units:
        raise ValueError(
            f"sync.accepted is {sync.accepted}, and a step has {units} pushes; no more can count in a round"
        )
    if config.device != "cpu":
        raise ValueError(f"sync.mode {mode} works in the CPU's memory so far; leave out device {config.device}")
    if sync.replicas is not None and config.micro_batches % sync.replicas:
        raise ValueError(
            f"{config.micro_batches} micro-batches cannot be shared evenly by sync.replicas {sync.replicas}; use a "
            "number that divides them"
        )


def _refuse_to_drain(config: "TrainingConfig") -> None:
    """Check whether a pipeline need not drain."""
    layout, sync, mode = config.layout, config.sync, config.sync.mode
    if layout.tensor > 1 or layout.data not in (None, 1):
        raise ValueError(f"sync.mode {mode} trains one pipeline of whole layers: leave out layout.data, tensor")
    if layout.stages != layout.pipeline or layout.schedule != "1f1b":
        raise ValueError(f"sync.mode {mode} has a schedule of its own: leave layout.schedule out")
    if mode == "pipedream" and layout.cuts:
        raise ValueError(f"with sync.mode {mode} the result depends on where stages begin: leave layout.cuts out")
    if mode == "pipedream" and sync.stages is None and layout.pipeline == 1:
        raise ValueError(f"mode is {mode} and its stages are missing: set layout.pipeline, or sync.stages")
    if sync.stages is not None and layout.pipeline not in (1, sync.stages):
        raise ValueError(f"sync.stages is {sync.stages} and layout.pipeline is {layout.pipeline}; leave one out")
    if mode == "pipedream_2bw" and sync.push < layout.pipeline - 1:
        raise ValueError(
            f"sync.push is {sync.push}, and with two versions a pipeline of {layout.pipeline} workers would drain; use "
            f"{layout.pipeline - 1} or more"
        )
    if config.clip is not None and config.clip.norm is not None:
        raise ValueError(
            f"clip.norm needs the gradients of all stages at once, and with sync.mode {mode} each is updated by "
            "itself; use clip.value or clip.agc"
        )
