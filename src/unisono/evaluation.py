"""Evaluation on a whole dataset, shared out over the workers, with the same bits on any number of them."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from unisono.comm.group import Group
from unisono.data.feed import Feed
from unisono.errors import ConfigurationError
from unisono.parallel.replicated import Replica
from unisono.plan.roster import consecutive, divided
from unisono.run.summation import Node, finish, subtrees

Metrics = Callable[[Any, Any], Mapping[str, Any]]
"""(output, target) -> metrics by name: each a mean over the batch, or a pair (sum, weight)."""

Sums = dict[str, tuple[float, float]]

STOPPED = b"stopped"

RANDOM_KEY = 1 << 62
"""Keeps the random numbers of evaluation apart from those of any training step."""


class Evaluator:
    """Evaluates the committed state.

    Arguments:
        feed: the validation samples; the first ``limit`` of them are used.
        batch_size: samples computed at once; the last batch may be smaller.
        stopping: whether this worker was asked to stop.
    """

    def __init__(
        self,
        group: Group,
        replica: Replica,
        feed: Feed,
        batch_size: int,
        limit: int | None,
        metrics: Metrics | None,
        stopping: Callable[[], bool],
    ) -> None:
        self._group = group
        self._replica = replica
        self._feed = feed
        self._batch_size = batch_size
        self.samples = min(feed.size, limit or feed.size)
        self._metrics = metrics
        self._stopping = stopping

    def rehearse(self, metric: str) -> None:
        """Evaluate the first batch, so that what is wrong is found before hours of training, not after.

        Raises:
            ConfigurationError: where the metrics do not hold ``metric``.
        """
        with self._replica.whole(), evaluating(self._replica.model):
            names = self._leaf(0)
        self._replica.buffers.invalidate()
        if metric not in names:
            raise ConfigurationError(f"validation.metric is {metric!r}; the task has {', '.join(sorted(names))}")

    def evaluate(self, step: int) -> dict[str, float] | None:
        """Means over all samples, the same in every worker: ``loss``, and the metrics.

        Every batch counts once: those of a worker that is lost are evaluated by the others. None where a worker was
        asked to stop meanwhile.
        """
        self._replica.buffers.invalidate()  # other workers may have committed some
        count = -(-self.samples // self._batch_size)
        operation = f"validation after step {step}"
        answers = shared_out(self._group, count, lambda mine: self._evaluated(step, mine, count), operation)
        if answers is None:
            return None
        total: dict[Node, Sums] = {}
        for answer in answers:
            for code, sums in json.loads(answer):
                total[Node.from_code(code)] = {name: (pair[0], pair[1]) for name, pair in sums.items()}
        result = finish(total, count, _add)
        return {name: value / weight if weight else float("nan") for name, (value, weight) in result.items()}

    def _evaluated(self, step: int, batches: Sequence[int], count: int) -> bytes:
        """Sums over some of ``count`` batches, for the others."""
        leaves = {}
        with self._replica.whole(), evaluating(self._replica.model):
            for m in batches:
                if self._stopping():
                    return STOPPED
                self._group.enter("validation", step, m)
                leaves[m] = self._leaf(m)
        found = []
        for run in consecutive(batches):
            for node in subtrees(run.start, run.stop, count):
                values = {Node(0, m): leaves[m] for m in range(node.start, min(node.stop, count))}
                found.append([node.code, finish(values, count, _add, node)])
        return json.dumps(found).encode()

    def _leaf(self, batch_number: int) -> Sums:
        first = batch_number * self._batch_size
        indices = list(range(first, min(first + self._batch_size, self.samples)))
        batch = self._feed.load(indices, 0, f"validation batch {batch_number}")
        output, target, loss, weight = self._replica.evaluate(RANDOM_KEY, batch_number, batch)
        sums: Sums = {"loss": (loss, weight)}
        if self._metrics is not None:
            with torch.no_grad():
                values = self._metrics(output, target)
                if not isinstance(values, Mapping):
                    raise ConfigurationError(
                        f"metrics returned {type(values).__name__}; return a mapping from name to a number, or to a "
                        "pair (sum, weight)"
                    )
                for name, value in values.items():
                    sums[name] = _pair(name, value, len(indices))
        return sums


def shared_out(
    group: Group, count: int, work: Callable[[Sequence[int]], bytes], operation: str, at_once: int | None = None
) -> list[bytes] | None:
    """What all workers answer that do ``count`` pieces of work; those of a lost worker are done by the others.

    Arguments:
        work: does some of them; what it answers is not empty, and is `STOPPED` where this worker was asked to stop.
        at_once: pieces for each worker before all hear of each other; default: all.

    Returns None where somebody was asked to stop.
    """
    found: list[bytes] = []
    waiting, among = list(range(count)), list(range(group.size))
    while waiting:
        size = len(waiting) if at_once is None else at_once * len(among)
        now, waiting = waiting[:size], waiting[size:]
        shares = divided(now, among)
        answers = group.all_gather(work(shares[group.rank]), operation)
        if STOPPED in answers:
            return None
        found += filter(None, answers)
        waiting = sorted(piece for rank in among if not answers[rank] for piece in shares[rank]) + waiting
        among = [rank for rank in among if answers[rank]]
    return found


def _pair(name: str, value: Any, samples: int) -> tuple[float, float]:
    try:
        if isinstance(value, tuple):
            return float(value[0]), float(value[1])
        return float(value) * samples, float(samples)
    except (TypeError, ValueError) as error:
        raise ConfigurationError(f"metric {name} is {value!r}; return a number, or a pair (sum, weight)") from error


def _add(a: Sums, b: Sums) -> Sums:
    return {name: (a[name][0] + b[name][0], a[name][1] + b[name][1]) for name in a}


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation mode, and every module back as it was."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
