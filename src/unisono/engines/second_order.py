"""One worker's step of Newton's method: the same direction on all workers, from sums over micro-batches.

The optimizer evaluates the loss several times in a step, and asks for its gradient and for products with its curvature.
Each is a sum over micro-batches in the canonical order, so that all workers, however many there are, take the same step
bit for bit. For small models: every worker keeps the graphs of its micro-batches, and solves for the direction itself.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unisono.comm.host import HostGroup
from unisono.data.feed import TrainingFeed
from unisono.engines.meeting import Done, MeetingEngine
from unisono.errors import GroupError, TrainingError
from unisono.optim.newton import NewtonCG
from unisono.optim.numbers import Numbers
from unisono.parallel.micro_batch import Objective
from unisono.parallel.replicated import Replica
from unisono.plan.assignment import micro_batches
from unisono.run.summation import Node, finish, subtrees
from unisono.sync.phases import Phases
from unisono.sync.pulled import PulledValues

WORD = 8


class CommonValues:
    """The training state, of which every worker has a copy of its own.

    Arguments:
        values: this worker's copy.
        numbers: what the optimizer keeps besides.
        versions: one word a block.
    """

    def __init__(self, values: PulledValues, numbers: Numbers, versions: memoryview) -> None:
        self._values = values
        self._numbers = numbers
        self._versions: NDArray[np.uint64] = np.frombuffer(versions, dtype=np.uint64)

    def pull_all(self) -> None:
        """Go on from the state."""
        self._values.pull_everything()

    def pull(self, optimizer: NewtonCG) -> None:
        """As `pull_all`, with the optimizer's numbers."""
        self.pull_all()
        self._numbers.load(optimizer)

    def store(self, optimizer: NewtonCG, step: int) -> None:
        """Let the state after a step be this worker's copy."""
        self._values.push_everything()
        self._numbers.keep(optimizer)
        self.pass_over(step)

    def pass_over(self, step: int) -> None:
        """The state after a step is what it is: whoever joins may know."""
        self._versions[:] = step

    def rate(self, step: int) -> float:
        """There is none: a line search says how far to go."""
        return 0.0


class NewtonEngine(MeetingEngine):
    """Executes the steps of one worker.

    Arguments:
        group: the workers.
        optimizer: over this worker's own parameters.
        replica: the model, over the same.
        feed: loads micro-batches.
        values: what all have in common.
        count: micro-batches in a step.
        snapshot: copies the state to where a checkpoint is written from.
    """

    def __init__(
        self,
        group: HostGroup,
        optimizer: NewtonCG,
        replica: Replica,
        feed: TrainingFeed,
        values: CommonValues,
        count: int,
        phases: Phases,
        snapshot: Callable[[], object],
    ) -> None:
        super().__init__(group, values, phases, snapshot)
        self._optimizer = optimizer
        self._replica = replica
        self._feed = feed
        self._values = values
        self._count = count

    def _do(self, step: int) -> Done:
        """One step of the optimizer.

        Raises:
            TrainingError: where the loss is not a finite number.
        """
        group, phases = self._group, self._phases
        own = micro_batches(self._count, group.size)[group.rank]
        phases.enter("data")
        batches = [self._feed.load(step, m) for m in own]
        self._replica.buffers.invalidate()
        self._values.pull(self._optimizer)
        parts: list[Objective] = []
        evaluated = False

        def evaluate() -> None:
            phases.enter("compute")
            parts[:] = [self._replica.objective(step, m, batch) for m, batch in zip(own, batches, strict=True)]

        def closure() -> list[Any]:
            nonlocal evaluated
            if not evaluated:
                evaluate()
            evaluated = False
            return [(part.output, part.loss) for part in parts]

        evaluate()
        evaluated = True  # for the optimizer's first question
        weights = [torch.tensor(part.weight, dtype=torch.float64) for part in parts]
        weight = float(self._sum(step, own, weights))
        if weight == 0:
            self._values.pass_over(step)
            return Done(0.0, 0.0, {})
        before = float(
            self._optimizer.step(
                closure,
                lambda told: self._sum(step, own, told) / weight,
                lambda number: self._replica.resume(parts[number]),
            )
        )
        parts.clear()
        if before != before or before in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss is {before} at step {step}; begin with other values, or look at the data of that step"
            )
        phases.enter("update")
        group.barrier(f"all of step {step} has been computed")
        if group.rank == 0:
            self._values.store(self._optimizer, step)
        return Done(before * weight, weight, {})

    def _sum(self, step: int, own: range, parts: Sequence[Tensor]) -> Tensor:
        """Over all micro-batches, in the canonical order."""
        self._phases.enter("wait")
        leaves = {Node(0, m): part for m, part in zip(own, parts, strict=True)}
        told = b"\1"
        for node in subtrees(own.start, own.stop, self._count):
            value = finish(leaves, self._count, torch.add, node)
            told += node.code.to_bytes(WORD, "little") + value.contiguous().numpy().tobytes()
        values: dict[Node, Tensor] = {}
        size_bytes = parts[0].numel() * parts[0].element_size() if parts else 0
        for payload in self._group.all_gather(told, f"sums of step {step}"):
            if not payload:
                raise GroupError(f"a worker was lost in step {step}")
            at = 1
            while at < len(payload):
                node = Node.from_code(int.from_bytes(payload[at : at + WORD], "little"))
                data = np.frombuffer(payload, np.uint8, size_bytes, at + WORD).copy()
                values[node] = torch.from_numpy(data).view(parts[0].dtype).view(parts[0].shape)
                at += WORD + size_bytes
        self._phases.enter("compute")
        return finish(values, self._count, torch.add)
