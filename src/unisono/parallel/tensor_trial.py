"""A trial of a tensor plan: its regions are computed whole and divided, in one process, and compared.

Whether code between two layers works with a part of its activations cannot be seen in it: a view with a fixed number of
heads fails, one with another order of heads gives another result. So every kind of region is computed once on random
values, forward and backward, by threads that stand for the workers. What random functions draw for, and which gradients
have to be summed, is seen there too.
"""

import copy
import threading
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from unisono.comm.tensor_group import ThreadTensorGroup
from unisono.errors import ConfigurationError
from unisono.parallel.recompute import blocks
from unisono.parallel.tensor import Findings, Part, TensorParallel, drawn
from unisono.plan.flow import Flow, ModuleCall
from unisono.plan.sharding import (
    Region,
    TensorPlan,
    indivisible,
    nearest,
    pairs,
    regional,
    tensor_plan,
    within,
    without,
)
from unisono.run.digest import tensor_bytes

TOLERANCE = 1e-3
"""Of the largest value: rounding stays far below, and a wrong division far above."""
DEGREES = (2, 3, 4, 5, 6, 7, 8)
"""Degrees that are tried for the sentence that says which are possible."""


class _Differs(Exception):
    """A divided region does not compute what the whole one does."""


@dataclass(frozen=True, slots=True)
class ProvenPlan:
    """A plan of which all regions have passed their trial.

    Attributes:
        findings: of each region, by path.
    """

    plan: TensorPlan
    findings: Mapping[str, Findings]


def proven_plan(
    model: nn.Module,
    flow: Flow,
    given: Mapping[str, str],
    degree: int,
    *,
    sequence: bool = False,
    head: bool = False,
) -> ProvenPlan:
    """The plan for a model, tried.

    Arguments:
        given, sequence, head: see `tensor_plan`.
        degree: workers that divide.

    Raises:
        ConfigurationError: where nothing can be divided, or not by this degree, or not as the user or the model says.
    """
    layers = blocks(model)
    plan = tensor_plan(model, flow, layers, given, sequence=sequence, head=head)
    trials = _Trials(model, flow)
    while plan.regions:
        findings: dict[str, Findings] = {}
        left: dict[str, str] = {}
        for region in plan.regions:
            found = trials.of(plan, region, degree)
            if isinstance(found, Findings):
                findings[region.path] = replace(found, summed=tuple(_join(region.path, name) for name in found.summed))
            elif plan.source != "derived":
                raise ConfigurationError(f"{plan.source} divides {region.path}, which cannot be: {found}")
            else:
                left |= _cannot_be(trials, plan, flow, region, degree)
        if not left:
            return ProvenPlan(plan, findings)
        plan = without(plan, flow, layers, left, sequence=sequence)
    why = next((f": {path}: {reason}" for path, reason in plan.left.items()), "")
    raise ConfigurationError(
        f"layout.tensor is {degree}, and no part of the model can be divided{why}; tensor parallelism needs nn.Linear "
        "layers that lead to one other alone, each head's outputs side by side; use layout.tensor=1, or layout.pipeline"
    )


def _cannot_be(trials: "_Trials", plan: TensorPlan, flow: Flow, region: Region, degree: int) -> dict[str, str]:
    """Modules of a region that have to stay whole, and why.

    Raises:
        ConfigurationError: for those that another degree divides.
    """
    left: dict[str, str] = {}
    for pair in pairs(plan, flow, region):
        found = trials.of(plan, region, degree, pair)
        if isinstance(found, Findings):
            continue
        others = [d for d in DEGREES if d != degree and isinstance(trials.of(plan, region, d, pair), Findings)]
        if others:
            raise ConfigurationError(
                f"{' and '.join(sorted(pair))} cannot be divided by tensor={degree}, which would cut what is computed "
                f"together, a head for example ({found}); use {nearest(degree, [1, *others])}"
            )
        left |= dict.fromkeys(sorted(pair), found)
    return left or {
        path: "the region's divided layers do not go together" for path in plan.styles if within(path, region.path)
    }


def _join(path: str, name: str) -> str:
    return f"{path}.{name}" if path else name


class _Trials:
    """Trials of regions; of those that are alike, one."""

    def __init__(self, model: nn.Module, flow: Flow) -> None:
        self._model = model
        self._flow = flow
        self._known: dict[object, Findings | str] = {}

    def of(self, plan: TensorPlan, region: Region, degree: int, only: Collection[str] | None = None) -> Findings | str:
        """What was found of a region, or why it cannot be divided."""
        part = regional(plan, region, only)
        module = self._model.get_submodule(region.path)
        call = self._flow.modules[region.path]
        forms = [(tuple(t.shape), t.dtype) if isinstance(t, Tensor) else None for t in _leaves(call)]
        key = (type(module), tuple(part.styles.items()), tuple(part.entrances.items()), part.regions, degree)
        kind = (key, _likeness(module), tuple(forms))
        if kind not in self._known:
            self._known[kind] = self._try(part, region, module, call, degree)
        return self._known[kind]

    def _try(
        self, plan: TensorPlan, region: Region, module: nn.Module, call: ModuleCall, degree: int
    ) -> Findings | str:
        drawers = [path for path in self._flow.drawers if within(path, region.path)]
        if drawers:
            return f"{drawers[0]} draws random numbers by {self._flow.drawers[drawers[0]]}, which cannot be divided"
        shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
        reason = indivisible(plan, shapes, degree)
        if reason is not None:
            return reason
        try:
            with torch.random.fork_rng(devices=[]), torch.enable_grad():
                return _trial(plan, module, call, degree)
        except _Differs as error:
            return str(error)
        except (threading.BrokenBarrierError, MemoryError) as error:
            raise ConfigurationError(
                f"the trial of {region.path or 'the model'} in {degree} parts did not end ({type(error).__name__}); "
                "this says nothing of the model: try again with more memory, or on a machine that is less busy"
            ) from error
        except Exception as error:  # the model's own code, with parts of its activations
            return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _likeness(module: nn.Module) -> tuple[object, ...]:
    """What two modules have to agree in to compute the same from the same parameters, as far as that can be seen."""
    found: list[object] = []
    for path, part in module.named_modules():
        found.append((path, type(part)))
        found += [(name, tuple(p.shape), p.dtype) for name, p in part._parameters.items() if p is not None]
        found += [
            (name, tuple(b.shape), b.dtype, None if b.is_meta else hash(bytes(tensor_bytes(b))))
            for name, b in part._buffers.items()
            if b is not None
        ]
        own = {name: value for name, value in part.__dict__.items() if not name.startswith("_")}
        found += [(name, value if isinstance(value, _PLAIN) else id(value)) for name, value in own.items()]
    return tuple(found)


_PLAIN = (int, float, str, bool, type(None))


@dataclass(frozen=True, slots=True)
class _Computed:
    """What a region computed, and the gradients of what it was given and of its parameters."""

    results: list[Tensor]
    given: list[Tensor | None]
    parameters: dict[str, Tensor | None]
    draws: list[Sequence[int]]
    kept_bytes: int


def _leaves(call: ModuleCall) -> list[Any]:
    return pytree.tree_leaves((call.args, call.kwargs))


def _trial(plan: TensorPlan, module: nn.Module, call: ModuleCall, degree: int) -> Findings:
    torch.manual_seed(0)
    whole = _with_values(module)
    arguments = _arguments(call)
    copies = [copy.deepcopy(whole) for _ in range(degree)]
    expected = _compute(whole, arguments)
    found: list[_Computed | BaseException | None] = [None] * degree
    divided: list[TensorParallel | None] = [None] * degree

    def run(group: ThreadTensorGroup) -> None:
        try:
            divided[group.rank] = parallel = TensorParallel(copies[group.rank], plan, {}, group)
            found[group.rank] = _compute(copies[group.rank], arguments, parallel.local)
        except BaseException as error:
            group.close()
            found[group.rank] = error

    threads = [threading.Thread(target=run, args=(group,)) for group in ThreadTensorGroup.several(degree)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [error for error in found if isinstance(error, BaseException)]
    if errors:
        raise next((error for error in errors if not isinstance(error, threading.BrokenBarrierError)), errors[0])
    parts = [parallel.parts for parallel in divided if parallel is not None]
    return _compare(expected, [one for one in found if isinstance(one, _Computed)], parts)


def _with_values(module: nn.Module) -> nn.Module:
    """A copy of a module with random values; its buffers are the same."""
    result = copy.deepcopy(module)
    result._apply(lambda t: torch.zeros(t.shape, dtype=t.dtype) if t.is_meta else t.cpu())  # type: ignore[no-untyped-call]
    with torch.no_grad():
        for parameter in result.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=parameter.shape[-1] ** -0.5)
            else:
                parameter.uniform_(0.5, 1.5)
    return result.float() if any(p.dtype in (torch.bfloat16, torch.float16) for p in result.parameters()) else result


def _arguments(call: ModuleCall) -> tuple[Any, Any, list[Tensor]]:
    """Arguments with random values, and those that take a gradient."""
    known: dict[int, Tensor] = {}
    wanted: list[Tensor] = []

    def value(form: Tensor) -> Tensor:
        if id(form) not in known:
            if form.is_floating_point():
                dtype = torch.float32 if form.dtype in (torch.bfloat16, torch.float16) else form.dtype
                known[id(form)] = torch.randn(form.shape, dtype=dtype)
            elif form.dtype is torch.bool:
                known[id(form)] = torch.ones(form.shape, dtype=torch.bool)
            else:
                known[id(form)] = torch.zeros(form.shape, dtype=form.dtype)
            if form.requires_grad:
                wanted.append(known[id(form)])
        return known[id(form)]

    args, kwargs = pytree.tree_map_only(Tensor, value, (call.args, call.kwargs))
    return args, kwargs, wanted


def _compute(
    module: nn.Module, arguments: tuple[Any, Any, list[Tensor]], local: Mapping[str, nn.Parameter] | None = None
) -> _Computed:
    args, kwargs, wanted = arguments
    leaves = {id(tensor): tensor.clone().requires_grad_() for tensor in wanted}
    args, kwargs = pytree.tree_map_only(Tensor, lambda t: leaves.get(id(t), t), (args, kwargs))
    recording = _Recording()
    parameters = {**dict(module.named_parameters()), **(local or {})}
    own = {parameter.untyped_storage()._cdata for parameter in parameters.values()}
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    with recording, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = module(*args, **kwargs)
    results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor) and leaf.is_floating_point()]
    ends = [(leaf, torch.sin(torch.arange(leaf.numel(), dtype=leaf.dtype)).view(leaf.shape)) for leaf in results]
    ends = [(leaf, weights) for leaf, weights in ends if leaf.requires_grad]
    inputs = [*leaves.values(), *parameters.values()]
    gradients = torch.autograd.grad(
        [leaf for leaf, _ in ends], inputs, [weights for _, weights in ends], allow_unused=True
    )
    given, of_parameters = gradients[: len(leaves)], gradients[len(leaves) :]
    return _Computed(
        results=[leaf.detach() for leaf in results],
        given=list(given),
        parameters=dict(zip(parameters, of_parameters, strict=True)),
        draws=recording.shapes,
        kept_bytes=sum(kept.values()),
    )


def _compare(expected: _Computed, found: Sequence[_Computed], parts: Sequence[Mapping[str, Part]]) -> Findings:
    """What a region needs to be computed in parts.

    Raises:
        _Differs: where that is not what the whole region computes.
    """
    for one in found:
        if [r.shape for r in one.results] != [r.shape for r in expected.results]:
            raise _Differs("its results have another form when it is divided")
        for a, b in zip(one.results, expected.results, strict=True):
            _check("its results are others", _distance(a, b), b)
        for given, wanted in zip(one.given, expected.given, strict=True):
            _check("the gradients of its inputs are others", _distance(given, wanted), wanted)
    largest = max(
        (float(g.abs().max()) for g in expected.parameters.values() if g is not None and g.numel()), default=0
    )
    summed = set()
    for name, gradient in expected.parameters.items():
        several = [one.parameters[name] for one in found]
        if name in parts[0]:
            cuts = [None if gradient is None else gradient.narrow(*part[name]) for part in parts]
            apart = max(map(_distance, several, cuts))
        else:
            apart = max(_distance(one, gradient) for one in several)
            together = _distance(sum(one for one in several if one is not None), gradient)  # type: ignore[arg-type]
            if together < apart:
                apart = together
                summed.add(name)
        _check(f"the gradient of {name} is another", apart, gradient, largest)
    draws = _divided_draws(expected.draws, found[0].draws, len(found))
    return Findings(draws, tuple(sorted(summed)), found[0].kept_bytes / max(1, expected.kept_bytes))


def _divided_draws(
    whole: Sequence[Sequence[int]], part: Sequence[Sequence[int]], degree: int
) -> tuple[int | None, ...]:
    """For each call of a random function: in which dimension its input is divided."""
    if len(whole) != len(part):
        raise _Differs("it calls random functions in another number when it is divided")
    dims: list[int | None] = []
    for a, b in zip(whole, part, strict=True):
        different = [i for i in range(len(a)) if a[i] != b[i]]
        if len(different) > 1 or any(a[i] != b[i] * degree for i in different):
            raise _Differs(f"a random function's input of shape {tuple(a)} has the shape {tuple(b)} when it is divided")
        dims.append(different[0] if different else None)
    return tuple(dims)


def _distance(a: Tensor | None, b: Tensor | None) -> float:
    """The largest difference."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return 0.0 if a is b else float("inf")
    return float((a - b).abs().max()) if a.numel() else 0.0


def _check(what: str, distance: float, expected: Tensor | None, among: float = 0.0) -> None:
    """Whether a difference is no more than rounding.

    Arguments:
        among: the largest value of others like it: a gradient that should be 0 is rounding alone.
    """
    size = float(expected.abs().max()) if expected is not None and expected.numel() else 0.0
    if not distance <= TOLERANCE * size + TOLERANCE / 10 * among + 1e-6:
        raise _Differs(f"{what} when it is divided")


class _Recording(TorchFunctionMode):
    """Notes for which shapes random functions draw, and lets them drop nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[Sequence[int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        drawing: Callable[..., tuple[float, Sequence[int]]] | None = drawn(func)
        if drawing is not None:
            self.shapes.append(tuple(drawing(*args, **(kwargs or {}))[1]))
            if func is not F.scaled_dot_product_attention:
                return args[0] * 1
            kwargs = {**(kwargs or {})}
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            elif "dropout_p" in kwargs:
                kwargs["dropout_p"] = 0.0
        return func(*args, **(kwargs or {}))
