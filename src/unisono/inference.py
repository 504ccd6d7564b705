"""A trained model's figures on a dataset, and its outputs, from all workers: every sample counts once, whoever is lost.

Batches are shared out; what a lost worker had is done by the others. A batch has the same samples, and so gives the
same bits, on any number of workers.
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from unisono.assembly import assemble
from unisono.config import TrainingConfig
from unisono.data.feed import Feed
from unisono.errors import Regrouped
from unisono.filling import Restored
from unisono.launch.membership import device_of
from unisono.launch.world import World
from unisono.predictions import Post, Writer
from unisono.preparation import Objects

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Predicted:
    """What `Trainer.predict` has written.

    Attributes:
        directory: of the files; see `read_predictions`.
        samples: how many there are.
        names: of what there is for each.
    """

    directory: str
    samples: int
    names: list[str]


class Inference:
    """A model on this worker and all others; a context manager.

    Arguments:
        objects: the user's; what is looked at is ``objects.validation``.
        config: the run's, with the weights to begin with in ``start_from``.
        stopping: whether this worker was asked to stop.
    """

    def __init__(self, objects: Objects, config: TrainingConfig, world: World, stopping: Callable[[], bool]) -> None:
        held_out = objects.validation
        assert held_out is not None
        self._config, self._stopping = config, stopping
        world.begin_training()
        device = device_of(config, world)
        self._feed = Feed(held_out, config.seed, "validation", objects.collate, device)
        self._worker, _ = assemble(
            *(objects, config, world, device, lambda step: 1.0, None, lambda prepared, load: Restored(), stopping),
            trains=False,
        )
        self._open = ExitStack()
        self._open.callback(world.release_arena)
        self._open.push(lambda kind, error, trace: self._worker.release(error))
        self._worker.group.begin_work()

    def __enter__(self) -> "Inference":
        return self

    def __exit__(self, *exception: Any) -> None:
        self._open.__exit__(*exception)

    def evaluate(self) -> dict[str, float]:
        """Means over all samples: ``loss``, and the metrics.

        Raises:
            KeyboardInterrupt: where this worker, or another, was asked to stop.
        """
        evaluator = self._worker.evaluator
        assert evaluator is not None
        metrics = self._to_the_end(lambda: evaluator.evaluate(0))
        self._worker.group.end()
        return metrics

    def predict(self, directory: Path, post: Post | None) -> Predicted:
        """Write the outputs for all samples into a directory, which is empty or new.

        Raises:
            PredictionError: where it cannot be written.
            ConfigurationError: where the model's outputs have no row for each sample.
            KeyboardInterrupt: where this worker, or another, was asked to stop.
        """
        group = self._worker.group
        writer = Writer(self._worker.replica, self._feed, directory, self._config.micro_batch_size, post)
        files = self._to_the_end(lambda: writer.write_all(group, self._stopping))
        if group.chief:
            writer.finish(files)
        group.barrier("end of the predictions")
        group.end()
        return Predicted(str(directory), self._feed.size, writer.names(files))

    def _to_the_end(self, work: Callable[[], T | None]) -> T:
        """Do something with all workers, again where other hosts than before go on, and agree on the chief."""
        while True:
            try:
                done = work()
                self._worker.group.conclude()
                break
            except Regrouped:
                continue
        if done is None:
            raise KeyboardInterrupt
        return done
