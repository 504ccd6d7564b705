"""The composition root: a user's objects and settings in, a trained model and its digest out."""

import copy
import functools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from unisono.comm.waiting import wake_on_time
from unisono.config import Layout, ScheduleConfig, SyncConfig, TrainingConfig, validate
from unisono.data.feed import Collate, Dataset
from unisono.errors import ConfigurationError
from unisono.evaluation import Metrics
from unisono.events import Listener
from unisono.inference import Inference, Predicted
from unisono.launch.possible import refuse_impossible, with_replicas
from unisono.launch.process import keep_freed_memory
from unisono.launch.scope import deterministic, interrupts, threads
from unisono.launch.world import World, this_process
from unisono.optim.schedules import Schedule
from unisono.parallel.micro_batch import Loss
from unisono.predictions import Post
from unisono.preparation import Objects, OptimizerFactory
from unisono.state.checkpoint import DIRECTORY, newest_intact
from unisono.training import Job, Result, Training

Weights = str | os.PathLike[str] | None
"""Where a model's values are: as ``start_from``."""


class Trainer:
    """Trains a model on however many workers this process was started with.

    The same script runs under ``python``, ``unisono run -n 4`` and ``torchrun --nproc-per-node 4``, with one result.

    Arguments:
        model: a factory; called under the run's seed.
        loss: ``loss(output, target)`` -> the mean over the micro-batch, or a pair (sum, weight).
        data: a map-style dataset; ``data[i]`` is a pair (input, target), or one object that serves as both. A mapping
            as input is passed to the model by name, a tuple by position.
        optimizer: parameters -> a torch.optim.Optimizer.
        validation: a dataset to evaluate on.
        metrics: ``metrics(output, target)`` -> further figures of the evaluation, each a mean or a pair (sum, weight).
        collate: samples -> batch; default: torch's.
        callbacks: called with every event (see `unisono.events`) on rank 0.
        schedule: a name ("constant", "linear", "cosine"), a `ScheduleConfig`, or step (from 0) -> factor.
        layout: "auto", or a `Layout`.
        checkpoint_every: steps between checkpoints, or "auto"; needs ``run_dir``.
        resume: go on from the newest intact checkpoint in ``run_dir``, unless `fit` is told otherwise.
        settings: all further keys of `TrainingConfig`: global_batch_size, micro_batch_size, seed, precision, clip,
            run_dir and so on; its section ``validation`` is given as ``validate={"every": 100}``.

    Raises:
        ConfigurationError: for anything that cannot be trained, before training starts.

    Example:
        >>> data = [(torch.randn(4), torch.randn(2)) for _ in range(32)]
        >>> trainer = Trainer(
        ...     model=lambda: nn.Linear(4, 2),
        ...     loss=nn.functional.mse_loss,
        ...     data=data,
        ...     optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        ...     global_batch_size=8,
        ...     micro_batch_size=4,
        ...     observe={"progress": False},
        ... )
        >>> trainer.fit(steps=5).step
        5
    """

    def __init__(
        self,
        *,
        model: Callable[[], nn.Module],
        loss: Loss,
        data: Dataset,
        optimizer: OptimizerFactory,
        validation: Dataset | None = None,
        metrics: Metrics | None = None,
        collate: Collate | None = None,
        callbacks: Sequence[Listener] = (),
        schedule: str | ScheduleConfig | Schedule = "constant",
        layout: str | Layout = "auto",
        checkpoint_every: int | str | None = None,
        resume: bool = False,
        **settings: Any,
    ) -> None:
        if isinstance(model, nn.Module):
            raise ConfigurationError(
                "model is a module that is built already; give a function that builds it, "
                f"for example model=lambda: {type(model).__name__}(...), so that it is built under the run's seed"
            )
        if not callable(optimizer):
            raise ConfigurationError(
                f"optimizer is a {type(optimizer).__name__} that is built already; give a function of the parameters, "
                f"for example optimizer=lambda parameters: {type(optimizer).__name__}(parameters, ...)"
            )
        self._objects = Objects(model, loss, data, optimizer, validation, metrics, collate)
        self._callbacks = tuple(callbacks)
        self._resume = resume
        self._probes: tuple[Listener, ...] = ()
        self._schedule = schedule if callable(schedule) else None
        if "validate" in settings:
            settings["validation"] = settings.pop("validate")
        if not callable(schedule):
            settings["schedule"] = {"name": schedule} if isinstance(schedule, str) else schedule
        if layout != "auto":
            settings["layout"] = layout
        if checkpoint_every is not None:
            settings["checkpoint"] = {**dict(settings.get("checkpoint", {})), "every": checkpoint_every}
        self.config = validate(TrainingConfig, settings, "Trainer")
        self.model: nn.Module | None = None
        self._stop = False

    @classmethod
    def from_config(cls, objects: Objects, config: TrainingConfig, callbacks: Sequence[Listener] = ()) -> "Trainer":
        """A trainer for a configuration that has been validated."""
        trainer = cls.__new__(cls)
        trainer._objects, trainer._callbacks, trainer._probes = objects, tuple(callbacks), ()
        trainer._schedule, trainer.config, trainer.model, trainer._stop = None, config, None, False
        trainer._resume = False
        return trainer

    def stop(self) -> None:
        """End training in good order after the step that is being computed; callable from a callback."""
        self._stop = True

    def probe(self, listener: Listener) -> None:
        """Hear the events of every phase, in every worker; tests inject faults with it."""
        self._probes = (*self._probes, listener)

    def fit(self, steps: int, resume: bool | None = None) -> Result:
        """Train until ``steps`` steps have been taken in all; afterwards ``model`` is an ordinary module.

        Arguments:
            steps: the run's length; a run that was stopped goes on to it when resumed.
            resume: go on from the newest intact checkpoint in ``run_dir``; default: as the trainer was told.
        """
        resume = self._resume if resume is None else resume
        world = this_process()
        config = self._checked(world, steps, resume)
        self._stop = False
        keep_freed_memory()
        wake_on_time()
        job = Job(
            objects=self._objects,
            config=config,
            steps=steps,
            resume=resume,
            callbacks=self._callbacks,
            probes=self._probes,
            schedule=self._schedule,
            stopping=lambda: self._stop,
        )
        with self._surroundings(config, world):
            training = Training(job, world)
            self.model = training.model
            try:
                return training.run()
            finally:
                training.close()

    def evaluate(self, data: Dataset | None = None, *, weights: Weights = None) -> dict[str, float]:
        """The mean loss and metrics on a dataset, on all workers: every sample counts once.

        Where the key ``validation.samples`` is set, they are those of the first samples, as while it trains.

        Arguments:
            data: default: the validation dataset.
            weights: of which model: a checkpoint, or any weights that ``start_from`` may name; default: of the one that
                was trained, or else of the newest intact checkpoint in ``run_dir``.

        Raises:
            ConfigurationError: where there is no dataset, or no model.
        """
        with self._inference(data, weights) as inference:
            return inference.evaluate()

    def predict(
        self,
        data: Dataset,
        directory: str | os.PathLike[str],
        *,
        weights: Weights = None,
        post: Post | None = None,
    ) -> Predicted:
        """Write the model's outputs for all samples of a dataset, on all workers; see `read_predictions`.

        Arguments:
            data: map-style; of a pair (input, target) the input is used.
            directory: new or empty.
            weights: as of `evaluate`.
            post: output -> what is kept of it, ``lambda output: output.argmax(-1)`` for example.

        Raises:
            ConfigurationError: where there is no model, or its outputs have no row for each sample.
            PredictionError: where the directory holds anything, or cannot be written.
        """
        with self._inference(data, weights) as inference:
            return inference.predict(Path(directory), post)

    @contextmanager
    def _inference(self, data: Dataset | None, weights: Weights) -> Iterator[Inference]:
        data = self._objects.validation if data is None else data
        if data is None:
            raise ConfigurationError("there is nothing to evaluate: give data, or the trainer a validation dataset")
        world, factory = this_process(), self._objects.model
        trained = self.model
        if weights is None and trained is not None:
            factory = functools.partial(copy.deepcopy, trained)
        elif weights is None:
            if self.config.run_dir is None:
                raise ConfigurationError("there is no model yet: call fit before, or give weights, or run_dir")
            weights = newest_intact(Path(self.config.run_dir) / DIRECTORY)[0]
        start_from = None if weights is None else os.fspath(weights)
        alone = {"run_dir": None, "sync": SyncConfig(), "layout": Layout(), "init": "stream", "start_from": start_from}
        config = self._possible(self.config.model_copy(update=alone), world)
        objects = replace(self._objects, model=factory, data=data, validation=data)
        self._stop = False
        keep_freed_memory()
        wake_on_time()
        with self._surroundings(config, world), Inference(objects, config, world, lambda: self._stop) as inference:
            yield inference

    @contextmanager
    def _surroundings(self, config: TrainingConfig, world: World) -> Iterator[None]:
        """This process as the run needs it, and as it was afterwards."""
        stopping = interrupts(self.stop, watched=world.launcher == "unisono")
        with torch.random.fork_rng(devices=[]), threads(config.threads), stopping, deterministic(config.device):
            yield

    def _checked(self, world: World, steps: int, resume: bool) -> TrainingConfig:
        if steps < 1:
            raise ConfigurationError(f"steps is {steps}; give a whole number from 1")
        config = self._possible(self.config, world)
        if config.run_dir is None and (resume or config.checkpoint.every is not None):
            raise ConfigurationError("checkpoints and resume need a place: give run_dir")
        if config.run_dir is None and config.sync.record:
            raise ConfigurationError("sync.record is on, and the order of pushes needs a place: give run_dir")
        return config

    @staticmethod
    def _possible(config: TrainingConfig, world: World) -> TrainingConfig:
        """The configuration, where this process and the others can do it."""
        config = with_replicas(config, world.beginning)
        refuse_impossible(config, world.beginning)
        if (
            world.launcher == "torchrun"
            and "on_loss" in config.fault.model_fields_set
            and config.fault.on_loss != "stop"
        ):
            raise ConfigurationError(
                f"fault.on_loss is {config.fault.on_loss}, and torchrun ends all workers when one is lost; start the "
                f"script with unisono run -n {world.size}, or set fault.on_loss=stop"
            )
        if config.device.startswith("cuda") and not torch.cuda.is_available():
            raise ConfigurationError(f"device {config.device} is not there; use device cpu")
        if config.device.startswith("cuda") and config.wire.compression != "none":
            raise ConfigurationError(
                f"wire.compression {config.wire.compression} works on the CPU; leave it out with device {config.device}"
            )
        if config.device.startswith("cuda:") and world.local_size > 1:
            raise ConfigurationError(
                f"device {config.device} with {world.local_size} workers on this host; use device cuda, one a worker"
            )
        if config.device == "cuda" and world.local_size > torch.cuda.device_count():
            raise ConfigurationError(
                f"{world.local_size} workers on this host, which has {torch.cuda.device_count()} CUDA devices; "
                "one worker a device is possible"
            )
        return config


__all__ = ["Predicted", "Result", "Trainer"]
