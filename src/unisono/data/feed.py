"""Micro-batches of a map-style dataset, the same whoever loads them."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import Subset, TensorDataset, default_collate

from unisono.errors import DataError
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler


class Dataset(Protocol):
    """A map-style dataset: ``dataset[i]`` is a sample, usually a pair (input, target).

    One whose samples draw no random numbers may say so, ``draws = False``, and is read faster.
    One whose samples differ in what they take may have ``cost(i)`` too: workers' shares follow it. One that several
    clients have may say which samples are whose: ``clients``, a sequence of sequences of indices.
    """

    def __len__(self) -> int:
        """Number of samples."""

    def __getitem__(self, index: int, /) -> Any:
        """The sample."""


Collate = Callable[[list[Any]], Any]


def size_of(dataset: object, role: str) -> int:
    """Number of samples of a dataset.

    Raises:
        DataError: for one that has no length or no sample.
    """
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise DataError(
            f"the {role} dataset is a {type(dataset).__name__}, which has no len() or no [i]; give a map-style dataset"
        )
    size = len(dataset)
    if size == 0:
        raise DataError(f"the {role} dataset is empty; give at least one sample")
    return size


class Feed:
    """Loads batches of samples, each sample under random state of its own, so that augmentation is exact.

    To seed it takes longer than to read many a sample; it is left out where samples draw nothing.

    Arguments:
        dataset: the samples.
        seed: the run's seed.
        role: "training" or "validation"; separates their random state, and is named in errors.
        collate: samples -> batch; default: torch's.
        device: where the batch is needed.
    """

    def __init__(self, dataset: Dataset, seed: int, role: str, collate: Collate | None, device: torch.device) -> None:
        self.size = size_of(dataset, role)
        self._dataset = dataset
        self._seed = seed
        self._role = role
        self._collate = collate or default_collate
        self.device = device
        self._isolation = Isolation()
        self._draws = collate is not None or draws(dataset)

    @property
    def cost(self) -> Callable[[int], float] | None:
        """Of a sample, where the dataset has a ``cost(index)``: what it takes, in any unit, tokens for example."""
        given = getattr(self._dataset, "cost", None)
        if not callable(given):
            return None

        def checked(index: int) -> float:
            found = float(given(index))
            if not 0 < found < math.inf:
                raise DataError(
                    f"cost({index}) of the {self._role} dataset is {found:g}; give a positive number for every sample"
                )
            return found

        return checked

    def load(self, indices: Sequence[int], epoch_key: int, where: str) -> object:
        """The batch of the given samples; ``where`` says for an error what needed it."""
        with self._isolation as random:
            batch = self._loaded(random, indices, epoch_key, where)
        if self.device.type == "cpu":
            return batch
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device), batch)

    def _loaded(self, random: Isolation, indices: Sequence[int], epoch_key: int, where: str) -> object:
        if not self._draws:
            random.mark()
            batch = self._batch(indices, where)
            if not random.is_untouched():
                raise DataError(
                    f"the {self._role} dataset says that its samples draw no random numbers (draws = False), and those "
                    f"of {list(indices)[:5]} did ({where}); leave that out"
                )
            return batch

        def seed(*names: int | str) -> None:
            random.seed(derive(self._seed, self._role, *names))

        return self._batch(
            indices, where, lambda index: seed(epoch_key, index), lambda: seed("batch", epoch_key, *indices)
        )

    def _batch(
        self,
        indices: Sequence[int],
        where: str,
        before: Callable[[int], None] | None = None,
        before_all: Callable[[], None] | None = None,
    ) -> object:
        """Read samples and make a batch of them.

        Arguments:
            before: called with the index of each sample, before it is read.
            before_all: called before they are put together.
        """
        samples = []
        for index in indices:
            if before is not None:
                before(index)
            try:
                samples.append(self._dataset[index])
            except Exception as error:
                error.add_note(f"raised by the {self._role} dataset for sample {index} ({where})")
                raise
        if before_all is not None:
            before_all()
        try:
            return self._collate(samples)
        except Exception as error:
            error.add_note(f"raised while making a batch of {self._role} samples {list(indices)} ({where})")
            raise


def draws(dataset: object) -> bool:
    """Whether reading a sample may draw random numbers: not where the dataset says so, or is one of tensors."""
    said = getattr(dataset, "draws", None)
    if isinstance(said, bool):  # and not something else of that name
        return said
    if type(dataset) is Subset:
        return draws(dataset.dataset)
    return type(dataset) not in (TensorDataset, list, tuple)


ORDER_SAMPLES = 1024


class TrainingFeed:
    """The micro-batches of a run; one may be loaded ahead of its step."""

    def __init__(self, feed: Feed, sampler: Sampler) -> None:
        self._feed = feed
        self._sampler = sampler
        self._ahead: tuple[int, int, object] | None = None
        self._order: list[int] = []  # sample indices of the positions from _order_start
        self._order_start = 0

    def _indices(self, first: int) -> list[int]:
        """Sample indices of a micro-batch from its first position; made many at a time, since one costs 70 us."""
        size = self._sampler.micro_batch_size
        at = first - self._order_start
        if not 0 <= at <= len(self._order) - size:
            self._order = self._sampler.at(first, max(ORDER_SAMPLES, size)).tolist()
            self._order_start, at = first, 0
        return self._order[at : at + size]

    def load(self, step: int, micro_batch: int) -> object:
        """A micro-batch, loaded now or before."""
        if self._ahead is not None and self._ahead[:2] == (step, micro_batch):
            batch = self._ahead[2]
            self._ahead = None
            return batch
        first = (step - 1) * self._sampler.global_batch_size + micro_batch * self._sampler.micro_batch_size
        where = f"step {step}, micro-batch {micro_batch}"
        return self._feed.load(self._indices(first), first // self._sampler.size, where)

    @property
    def costs(self) -> Callable[[int], Sequence[float]] | None:
        """Of the micro-batches of a step, 1 on the average; None where the dataset does not say that samples differ."""
        cost = self._feed.cost
        if cost is None:
            return None

        @functools.lru_cache(maxsize=2)  # a step is asked for as it begins, and as its pace is noted
        def of_step(step: int) -> Sequence[float]:
            sampler = self._sampler
            start = (step - 1) * sampler.global_batch_size
            firsts = range(start, start + sampler.global_batch_size, sampler.micro_batch_size)
            sums = [math.fsum(cost(index) for index in self._indices(first)) for first in firsts]
            mean = math.fsum(sums) / len(sums)
            return [each / mean for each in sums]

        return of_step

    def load_ahead(self, step: int, micro_batch: int) -> None:
        """Load a micro-batch now that will be asked for next."""
        self._ahead = (step, micro_batch, self.load(step, micro_batch))
