"""A model on one worker, whole or in stages: a micro-batch's forward and backward, its gradient's way into the sums."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from unisono.comm.partial import Partial, add_entry
from unisono.errors import ConfigurationError, TrainingError
from unisono.parallel.beside import member
from unisono.parallel.buffers import Buffers
from unisono.parallel.curvature import Statistics
from unisono.parallel.entrance import Entrance
from unisono.parallel.micro_batch import Forwarded, Loss, Objective, call, loss_and_weight, rows, split
from unisono.parallel.recompute import Recomputation
from unisono.parallel.sharded import ShardedValues
from unisono.parallel.split import first_part, second_part
from unisono.parallel.stages import Left, Stages
from unisono.parallel.stash import Stash
from unisono.parallel.tensor import TensorParallel
from unisono.plan.schedule import WHOLE
from unisono.run.rng import ModuleRandom


class Replica:
    """A model whose parameters lie in shared memory, and the hooks that take its gradients as they come.

    Arguments:
        model: the model, bound to its memory.
        uses: the parameter of every trained use (see `bind`), in flat order, with its name.
        buffers: its buffers.
        random: its random state.
        loss: the loss function.
        precision: "fp32", or "bf16" for autocast.
        device: where it computes.
        stages: the model cut into stages; None where this worker computes all of it.
        recomputation: which of its blocks are computed again in the backward; None for none.
        tensor: this worker's part of layers that several divide; None where it computes whole layers.
        sharded: brings parameters that other hosts keep; None where all are here.
        replica_of: (step, micro-batch) -> the virtual replica that computes it; 0 for the model itself.
        statistics: of the curvature; None where that is not learned.
        stash: versions of the parameters; None where there is one.
    """

    def __init__(
        self,
        model: nn.Module,
        uses: Sequence[tuple[str, nn.Parameter]],
        buffers: Buffers,
        random: ModuleRandom,
        loss: Loss,
        precision: str,
        device: torch.device,
        stages: Stages | None = None,
        recomputation: Recomputation | None = None,
        tensor: TensorParallel | None = None,
        sharded: ShardedValues | None = None,
        replica_of: Callable[[int, int], int] = lambda step, micro_batch: 0,
        statistics: Statistics | None = None,
        stash: Stash | None = None,
    ) -> None:
        self.model = model
        self._replica_of = replica_of
        self.buffers = buffers
        self.random = random
        self._loss = loss
        self._autocast = precision == "bf16"
        self._device = device
        self._uses = uses
        self._stages = stages
        self._recomputation = recomputation
        self._tensor = tensor
        self._sharded = sharded
        self._statistics = statistics
        self._stash = stash
        self._leaves = list(enumerate(p for _, p in uses) if stash is None else stash.leaves)
        self._last = stages.division.stages - 1 if stages is not None else 0
        names = [name for name, _ in uses]
        numbers = (*range(self._last + 1), WHOLE)
        self._use_sets = {stage: self._of_stage(stage, names) for stage in numbers}
        self._buffer_sets = {stage: self._of_stage(stage, buffers.names) for stage in numbers}
        self._versions = [p._version for _, p in self._leaves]
        self._chain: Sequence[Partial] = ()
        self._on_gradient: Callable[[int], None] | None = None
        self._seen = bytearray(len(uses))
        self._stage = 0
        self._stage_of = {u: stage for stage in range(self._last + 1) for u in self._use_sets[stage]}
        self._takes = [self._take(u) for u in range(len(uses))]
        self._handles = [cast(Any, p).register_post_accumulate_grad_hook(self._take_own(u)) for u, p in self._leaves]

    def _of_stage(self, stage: int, names: Sequence[str]) -> range | list[int]:
        if self._stages is None or stage == WHOLE:
            return range(len(names))
        return [i for i, name in enumerate(names) if self._stages.division.stage_of(name) == stage]

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self.random.close()
        for wrapping in (self._stages, self._recomputation, self._tensor, self._sharded, self._statistics):
            if wrapping is not None:
                wrapping.close()

    def forward(
        self, step: int, micro_batch: int, batch: object, stage: int = 0, arrived: Sequence[tuple[Tensor, bool]] = ()
    ) -> Forwarded:
        """Compute a micro-batch's loss in step ``step`` (from 1), or what the next stage needs.

        Arguments:
            stage: which one, or `WHOLE`.
            arrived: what an earlier stage has sent, and whether it needs gradients.

        Raises:
            TrainingError: where the loss is not a finite number, or the model wrote to its parameters.
        """
        self.buffers.reset()
        if self._stash is not None:
            self._stash.bind(micro_batch)
        if self._sharded is not None:
            self._sharded.begin_forward()
        draws = self.random.enter(step - 1, micro_batch)
        inputs, target = split(batch)
        entrance = Entrance([tensor for tensor, _ in arrived], [needed for _, needed in arrived])
        replica = self._replica_of(step, micro_batch)
        model = member(self.model, replica)
        noted = self._statistics.begin(step) if self._statistics is not None else None
        with self._precision():
            if self._stages is None or stage == WHOLE:
                result = self._loss(call(model, inputs), target)
            else:
                result = self._stages.run(stage, entrance, lambda: self._loss(call(model, inputs), target))
        if isinstance(result, Left):
            made, value, weight = result.tensors, 0.0, 0.0
        else:
            made, value, weight = self._lost(result, step, micro_batch)
        if self._statistics is not None:
            self._statistics.end()
        self._check_versions()
        buffers = self.buffers.gather()
        return Forwarded(micro_batch, stage, made, entrance, value, weight, buffers, draws, None, replica, noted)

    def _precision(self) -> AbstractContextManager[object]:
        """Autocast, entered once for each micro-batch."""
        return torch.autocast(self._device.type, dtype=torch.bfloat16) if self._autocast else nullcontext()

    def _lost(self, result: object, step: int, micro_batch: int) -> tuple[Sequence[Tensor], float, float]:
        loss, weight = loss_and_weight(result)
        if not loss.requires_grad and weight > 0:
            raise ConfigurationError(
                "the loss does not depend on any trained parameter; return what the model's output leads to"
            )
        value = float(loss.item())
        if value != value or value in (float("inf"), float("-inf")):
            raise TrainingError(
                f"the loss is {value} at step {step}, micro-batch {micro_batch}; "
                "lower the learning rate, clip the gradient, or look at the data of that step"
            )
        return [loss], value, weight

    @contextmanager
    def whole(self) -> Iterator[None]:
        """This worker's model is whole, whoever else divides it: what `evaluate` needs. All workers enter it."""
        with ExitStack() as stack:
            for divided in (self._tensor, self._sharded):
                if divided is not None:
                    stack.enter_context(divided.whole())
            yield

    @property
    def divides_values(self) -> bool:
        """Whether parameters have to be brought here."""
        return self._sharded is not None

    def bring_all(self) -> None:
        """All parameters are here from now on; all workers call it."""
        if self._sharded is not None:
            self._sharded.bring_all()

    @torch.no_grad()
    def evaluate(self, key: int, micro_batch: int, batch: object) -> tuple[object, object, float, float]:
        """Output, target, and loss as (sum, weight) of a batch; a mean counts once for every sample.

        ``key`` separates the random numbers that a model may draw while it is evaluated.
        """
        output, target = self.output(key, micro_batch, batch), split(batch)[1]
        with self._precision():
            result = self._loss(output, target)
        loss, weight = loss_and_weight(result)
        samples = 1.0 if isinstance(result, tuple) else float(rows(batch))
        return output, target, float(loss.item()) * samples, weight * samples

    @torch.no_grad()
    def output(self, key: int, micro_batch: int, batch: object) -> object:
        """What the model makes of a batch; as `evaluate`."""
        self.buffers.reset()
        self.random.enter(key, micro_batch)
        with self._precision():
            return call(self.model, split(batch)[0])

    def objective(self, step: int, micro_batch: int, batch: object) -> Objective:
        """A micro-batch's loss in step ``step`` (from 1), which is evaluated several times in it.

        Raises:
            ConfigurationError: where the model writes to its parameters or buffers.
        """
        self.buffers.reset()
        draws, versions = self.random.enter(step - 1, micro_batch), [p._version for _, p in self._leaves]
        inputs, target = split(batch)
        with self._precision():
            output = call(self.model, inputs)
            loss, weight = loss_and_weight(self._loss(output, target))
        changed = zip(self.buffers.names, self.buffers.gather(), strict=True)
        written = [name for name, value in changed if value is not None]
        written += [self._uses[u][0] for (u, p), v in zip(self._leaves, versions, strict=True) if p._version != v]
        if written:
            raise ConfigurationError(
                f"the model writes to {written[0]} in its forward, and the optimizer evaluates the loss several times "
                "in a step; use LayerNorm or GroupNorm for normalisation, or another optimizer"
            )
        return Objective(output, loss, weight, draws)

    def resume(self, objective: Objective) -> None:
        """What is computed again from here on belongs to this micro-batch."""
        self.buffers.reset()
        self.random.resume(objective.draws)

    def backward(
        self,
        forwarded: Forwarded,
        chain: Sequence[Partial],
        *,
        opens: bool,
        gradients: Sequence[Tensor | None] = (),
        on_gradient: Callable[[int], None] | None = None,
    ) -> None:
        """Compute a micro-batch's gradient and add it, with all that belongs to the leaf, along ``chain``.

        Arguments:
            opens: the first partial of the chain starts with no value.
            gradients: of what was made, from the next stage.
            on_gradient: called with each use as soon as its gradient has been added.
        """
        self._open(forwarded, chain, opens=opens, on_gradient=on_gradient)
        roots = _roots(forwarded, gradients)
        if roots:  # a micro-batch of weight 0 need not depend on anything
            torch.autograd.backward([root for root, _ in roots], [gradient for _, gradient in roots])
        elif self._sharded is not None:
            self._sharded.without_backward()
        self._close(forwarded, chain)

    def backward_inputs(
        self,
        forwarded: Forwarded,
        chain: Sequence[Partial],
        *,
        opens: bool,
        gradients: Sequence[Tensor | None] = (),
        on_gradient: Callable[[int], None] | None = None,
    ) -> None:
        """The first part of a backward: the gradients of what has arrived; as `backward`.

        With recomputation it is the whole backward: either part would compute the blocks again.
        """
        if self._recomputation is not None:
            self.backward(forwarded, chain, opens=opens, gradients=gradients, on_gradient=on_gradient)
            return
        self._resume(forwarded)
        weights = [self._uses[u][1] for u in self._use_sets[forwarded.stage]]
        found, forwarded.rest = first_part(_roots(forwarded, gradients), forwarded.entrance.edges, weights)
        forwarded.entrance.receive(found)

    def backward_weights(
        self,
        forwarded: Forwarded,
        chain: Sequence[Partial],
        *,
        opens: bool,
        on_gradient: Callable[[int], None] | None = None,
    ) -> None:
        """The second part of a backward: the gradients of the weights; as `backward`."""
        if forwarded.rest is None:
            return
        self._open(forwarded, chain, opens=opens, on_gradient=on_gradient)
        uses = self._use_sets[forwarded.stage]
        second_part(
            forwarded.rest, [self._uses[u][1] for u in uses], lambda i, gradient: self._takes[uses[i]](gradient)
        )
        self._close(forwarded, chain)

    def _resume(self, forwarded: Forwarded) -> None:
        """What is computed again from here on (activation checkpointing) belongs to this micro-batch."""
        self.buffers.reset()
        if self._stash is not None:
            self._stash.bind(forwarded.micro_batch)
        self.random.resume(forwarded.draws)

    def _open(
        self,
        forwarded: Forwarded,
        chain: Sequence[Partial],
        *,
        opens: bool,
        on_gradient: Callable[[int], None] | None,
    ) -> None:
        """Gradients that come from here on belong to this micro-batch."""
        self._resume(forwarded)
        if self._sharded is not None:
            self._sharded.begin_backward()
        if opens and (self._stages is None or forwarded.stage == WHOLE):
            chain[0].clear()
        elif opens:
            uses, buffers = self._use_sets[forwarded.stage], self._buffer_sets[forwarded.stage]
            entries = [*uses, *(len(self._uses) + b for b in buffers)]
            chain[0].clear(entries, scalars=forwarded.stage == self._last)
        self._chain = chain
        self._stage = forwarded.stage
        self._on_gradient = on_gradient
        self._seen = bytearray(len(self._uses))

    def _close(self, forwarded: Forwarded, chain: Sequence[Partial]) -> None:
        """All gradients have come; the rest of the leaf follows."""
        if self._statistics is not None:
            weight = self._weight_of(forwarded)
            for use, statistic in self._statistics.told(forwarded.noted or {}, weight) if weight else ():
                self._takes[use](statistic)
        for u in self._use_sets[forwarded.stage]:
            if not self._seen[u]:
                add_entry(chain, u, None)
        self._chain = ()
        if self._sharded is not None:
            self._sharded.end()
        self.buffers.add(chain, forwarded.buffers, self._buffer_sets[forwarded.stage])
        if forwarded.stage in (self._last, WHOLE):
            for i, value in enumerate(forwarded.scalars(len(chain[0].scalars))):
                for partial in chain:
                    value = partial.scalars[i] = partial.scalars[i] + value

    def _weight_of(self, forwarded: Forwarded) -> float:
        """Of a micro-batch's loss, which only the last stage knows."""
        if self._stages is None or forwarded.stage == WHOLE:
            return forwarded.weight
        if forwarded.stage == self._last and forwarded.weight != 1.0:
            raise ConfigurationError(
                f"the loss has the weight {forwarded.weight}, which the earlier stages of a pipeline do not know, and "
                "the curvature depends on it; return a mean, or leave layout.pipeline out"
            )
        return 1.0

    def _take_own(self, use: int) -> Callable[[Tensor], None]:
        take = self._takes[use]

        def taken(parameter: Tensor) -> None:
            gradient, parameter.grad = parameter.grad, None
            if gradient is not None:
                take(gradient)

        return taken

    def _take(self, use: int) -> Callable[[Tensor], None]:
        name = self._uses[use][0]

        def take(gradient: Tensor) -> None:
            if not self._chain:
                return
            if self._seen[use]:
                raise ConfigurationError(
                    f"the gradient of {name} came twice in one backward; with activation checkpointing, "
                    "pass use_reentrant=False"
                )
            if self._stage not in (self._stage_of[use], WHOLE):
                raise ConfigurationError(
                    f"{name} is used in stage {self._stage} of the pipeline and belongs to stage "
                    f"{self._stage_of[use]}; use it in one of them alone, or cut the model elsewhere (layout.cuts)"
                )
            self._seen[use] = 1
            own = gradient if self._tensor is None else self._tensor.gradient(name, gradient)
            if own is not None:
                self._add(use, own)
            if self._on_gradient is not None:
                self._on_gradient(use)

        return take

    def _add(self, use: int, gradient: Tensor) -> None:
        """A gradient goes into the sums."""
        if use in self._chain[0].rows:  # dense where it is used in other ways too
            self._chain[0].rows[use].append(gradient if gradient.is_sparse else gradient.to_sparse(1))
        elif len(self._chain) == 1 and not self._chain[0].counts[use] and not gradient.is_sparse:
            self._chain[0].entries[use].copy_(gradient)  # the usual case, without detours
            self._chain[0].counts[use] = 1
        else:
            add_entry(self._chain, use, gradient.to_dense() if gradient.is_sparse else gradient)

    def _check_versions(self) -> None:
        for (use, parameter), version in zip(self._leaves, self._versions, strict=True):
            if parameter._version != version:
                name = self._uses[use][0]
                raise ConfigurationError(
                    f"the model wrote to its parameter {name} in the forward; parameters are shared by all workers: "
                    "make it a buffer, or change it in the optimizer"
                )


def _roots(forwarded: Forwarded, gradients: Sequence[Tensor | None]) -> list[tuple[Tensor, Tensor | None]]:
    """Where a backward begins, with the gradients that it begins with; None is that of a loss."""
    if not gradients:
        return [(made, None) for made in forwarded.made if made.requires_grad]
    pairs = zip(forwarded.made, gradients, strict=True)
    return [(made, gradient) for made, gradient in pairs if made.requires_grad and gradient is not None]
