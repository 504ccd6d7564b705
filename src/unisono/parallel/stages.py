"""A model in stages: the same code on every worker, computing its own stage's modules, with stand-ins for the others.

A stage's worker calls the whole model. Modules of earlier stages return tensors without values; where the stage
begins, what an earlier stage has sent takes their place; where it ends, what the next stage needs is taken from the
arguments of its first call, and the model's code is left. So a model need not be written for pipelines: masks,
positions and all that depends on the input alone are computed where they are needed; nothing but activations travels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import _pytree as pytree

from unisono.errors import ConfigurationError
from unisono.parallel.entrance import Entrance
from unisono.plan.outline import Call, Cut, TensorForm, next_key
from unisono.plan.partition import Division
from unisono.plan.wrapping import Forward, Wrapping


class _StageDone(BaseException):
    """The stage's last module has returned; the rest of the model's code is not for this worker."""


@dataclass(frozen=True, slots=True)
class Left:
    """What a stage passes on to the next: real tensors, in the order of the cut's leaves."""

    tensors: Sequence[Tensor]


@dataclass(slots=True)
class _Run:
    """One call of the model as one stage."""

    stage: int
    entry: Cut | None
    exit: Cut | None
    entrance: Entrance
    left: Sequence[Tensor] | None = None
    entered: bool = False
    calls: list[tuple[str, dict[str, int]]] = field(default_factory=lambda: [("", {})])  # under way: key, what it calls
    inside: bool = False  # a module that lies within one stage is under way
    known: dict[int, Tensor] = field(default_factory=dict)  # what stands in for it -> what has arrived
    stand_ins: list[Tensor] = field(default_factory=list)


class Stages:
    """A worker's model, cut into stages.

    Arguments:
        model: all of it; the parameters of other workers' stages are never read.
        division: where it is cut.
    """

    def __init__(self, model: nn.Module, division: Division) -> None:
        self.division = division
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._calls = {call.key: call for call in _outermost(division)}
        self._cut = {call.key for call in self._calls.values() if _is_cut(division, call)}
        self._run: _Run | None = None
        self._wrapping = Wrapping()
        for path in sorted({call.path for call in self._calls.values()}):
            self._wrapping.add(model.get_submodule(path), partial(self._staged, path))

    def close(self) -> None:
        """The model is as it was."""
        self._wrapping.close()

    def run(self, stage: int, entrance: Entrance, call: Callable[[], Any]) -> Any:
        """What ``call``, which calls the model, returns in the last stage; `Left` in the others.

        Arguments:
            entrance: what the stage before has passed on.
        """
        cuts = self.division.cuts
        run = _Run(
            stage,
            entry=cuts[stage - 1] if stage else None,
            exit=cuts[stage] if stage < len(cuts) else None,
            entrance=entrance,
        )
        self._run = run
        try:
            result = call()
        except _StageDone:
            pass
        finally:
            self._run = None
        if run.entry is not None and not run.entered:
            raise ConfigurationError(_other_order(run.entry))
        if run.exit is None:
            if any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(result)):
                raise ConfigurationError(
                    "the loss needs values that an earlier stage of the pipeline has and the last one has not; "
                    "let it use the model's output, or cut the model elsewhere (layout.cuts)"
                )
            return result
        if run.left is None:
            raise ConfigurationError(_other_order(run.exit))
        return Left(run.left)

    def _staged(self, path: str, forward: Forward) -> Forward:
        def staged(*args: Any, **kwargs: Any) -> Any:
            run = self._run
            if run is None or run.inside:
                return forward(*args, **kwargs)
            key = next_key(*_here(run, path))
            call = self._calls.get(key)
            if call is None:
                return forward(*args, **kwargs)
            if run.exit is not None and key == run.exit.key:
                run.left = self._leave(run, run.exit, args, kwargs)
                raise _StageDone
            if run.entry is not None and key == run.entry.key:
                args, kwargs = self._enter(run, run.entry, args, kwargs)
            elif run.entry is not None and call.stop <= run.entry.unit:
                return self._stand_in(run, call)
            elif run.known:
                args, kwargs = _with_arrived(run, args, kwargs)
            result = self._call(run, call, forward, args, kwargs)
            if run.entry is None and not run.entrance.edges and call.stop == call.first + 1:
                run.entrance.begin_at(result)
            return result

        return staged

    def _call(self, run: _Run, call: Call, forward: Forward, args: Any, kwargs: Any) -> Any:
        """Call a module: one that lies within the stage as a whole, another with an eye on what it calls."""
        if call.key in self._cut:
            run.calls.append((call.key, {}))
            try:
                return forward(*args, **kwargs)
            finally:
                run.calls.pop()
        run.inside = True
        try:
            return forward(*args, **kwargs)
        finally:
            run.inside = False

    def _stand_in(self, run: _Run, call: Call) -> Any:
        """What a module of an earlier stage returns here."""

        def make(form: TensorForm) -> Tensor:
            with self._mode:
                return torch.empty_strided(form.shape, form.stride, dtype=form.dtype)

        return pytree.tree_map_only(TensorForm, make, call.results)

    def _enter(self, run: _Run, cut: Cut, args: Any, kwargs: Any) -> tuple[Any, Any]:
        """The stage begins: what has arrived takes the place of what stands in for it."""
        leaves, form = pytree.tree_flatten((args, kwargs))
        for places, tensor in zip(cut.leaves, run.entrance.tensors, strict=True):
            for i in places:
                if isinstance(leaves[i], FakeTensor):
                    run.known[id(leaves[i])] = tensor
                    run.stand_ins.append(leaves[i])  # alive, so that no other has its identity
                leaves[i] = tensor
        run.entered = True
        args, kwargs = pytree.tree_unflatten(leaves, form)
        return args, kwargs

    def _leave(self, run: _Run, cut: Cut, args: Any, kwargs: Any) -> list[Tensor]:
        """The stage ends: what the next one needs."""
        leaves = pytree.tree_leaves(_with_arrived(run, args, kwargs))
        left = [leaves[places[0]] for places in cut.leaves]
        for tensor in left:
            if not isinstance(tensor, Tensor) or isinstance(tensor, FakeTensor):
                raise ConfigurationError(
                    f"stage {run.stage} has no value for an argument of {cut.path}, where the next stage begins; "
                    "the model's code takes another way than in its rehearsal: cut it elsewhere (layout.cuts)"
                )
        return left


def _here(run: _Run, path: str) -> tuple[str, str, dict[str, int]]:
    """Where a module is called: what `next_key` asks for."""
    within, counts = run.calls[-1]
    return within, path, counts


def _with_arrived(run: _Run, args: Any, kwargs: Any) -> tuple[Any, Any]:
    """Arguments with values where they have arrived."""
    args, kwargs = pytree.tree_map_only(FakeTensor, lambda leaf: run.known.get(id(leaf), leaf), (args, kwargs))
    return args, kwargs


def _other_order(cut: Cut) -> str:
    return (
        f"the model did not call {cut.path}, though it did in its rehearsal; a pipeline needs a model that calls its "
        "modules in the same order for every micro-batch"
    )


def _outermost(division: Division) -> list[Call]:
    """The calls at which a stage may begin, end or stand in: those outside of any call that lies within one stage."""
    result: list[Call] = []
    covered = 0
    for call in division.outline.calls:
        if call.first < covered or call.first == call.stop:
            continue
        result.append(call)
        if not _is_cut(division, call):
            covered = call.stop
    return result


def _is_cut(division: Division, call: Call) -> bool:
    """Whether a stage begins at a call inside this one."""
    return any(
        call.first < cut.unit < call.stop or (call.first == cut.unit and call.key != cut.key) for cut in division.cuts
    )
