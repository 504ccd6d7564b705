"""Which parameters the workers of a tensor-parallel group divide among them: a plan, as data that can be printed.

A linear layer is divided by columns or by rows of its mathematical matrix (Shoeybi et al., Megatron-LM, 2019): layers
of the style ``colwise`` make a part of their outputs on each worker, and the layer of the style ``rowwise`` that they
lead to takes that part, so that one sum over the workers is all that a pair exchanges.
"""

import difflib
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from unisono.errors import ConfigurationError
from unisono.plan.flow import Flow, LinearCall


class Style(StrEnum):
    """How a module's parameters are divided; the words are those of Hugging Face's ``_tp_plan``."""

    COLWISE = "colwise"
    ROWWISE = "rowwise"
    EMBEDDING = "embedding_rowwise"
    GATHERED = "colwise_gather_output"


SYNONYMS = {"colwise_rep": Style.GATHERED}
WHOLE = ("replicate", "sequence_parallel", "replicated_with_grad_allreduce")
"""Styles of what everyone has whole; what its gradient needs is found by a trial."""
ROW, COLUMN = 0, 1  # dimensions of a linear layer's weight, (outputs, inputs)


@dataclass(frozen=True, slots=True)
class Region:
    """A module in which parameters are divided; it takes and returns what it would if they were not.

    Attributes:
        hidden: which of its flattened arguments is the stream of activations, and which leaf of its result; None
            where there is none that is divided along its sequence.
        begins, ends: the stream is divided where it enters, put together where it leaves; else neighbours do.
    """

    path: str
    hidden: tuple[int, int] | None = None
    begins: bool = True
    ends: bool = True


@dataclass(frozen=True, slots=True)
class TensorPlan:
    """How a model is divided.

    Attributes:
        source: who said so.
        styles: of modules, by path.
        entrances: the module, and which of its flattened arguments, where the input of a ``colwise`` layer comes in.
        regions: in the order of their calls.
        left: modules that could have been divided and are not, and why.
    """

    source: str
    styles: Mapping[str, Style]
    entrances: Mapping[str, tuple[str, int]]
    regions: tuple[Region, ...]
    left: Mapping[str, str]

    def parameters(self, region: str | None = None) -> dict[str, int]:
        """Divided parameters: name -> dimension; ``weight`` and ``bias`` of a module as far as it has them.

        Arguments:
            region: only those inside.
        """
        result: dict[str, int] = {}
        for path, style in self.styles.items():
            if region is not None and not within(path, region):
                continue
            result[f"{path}.weight".lstrip(".")] = COLUMN if style is Style.ROWWISE else ROW
            if style in (Style.COLWISE, Style.GATHERED):
                result[f"{path}.bias".lstrip(".")] = ROW
        return result


def within(path: str, region: str) -> bool:
    """Whether a module is another, or inside it."""
    return not region or path == region or path.startswith(f"{region}.")


def tensor_plan(
    model: nn.Module,
    flow: Flow,
    blocks: Sequence[str],
    given: Mapping[str, str],
    *,
    sequence: bool = False,
    head: bool = False,
) -> TensorPlan:
    """The plan for a model: the user's, or its own, or one that follows from its flow.

    Arguments:
        blocks: the model's layers.
        given: the user's: a pattern of a module's path -> its style; ``*`` stands for one part of a path.
        sequence: between the divided layers, what is computed for each position is divided along the sequence.
        head: the layer that makes the model's output is divided too.

    Raises:
        ConfigurationError: for a pattern that names no module, for an unknown style, or for a plan that cannot be.
    """
    own = getattr(model, "_tp_plan", None) or {}
    if given:
        source, styles = "layout.tensor_plan", _matched(model, given, "layout.tensor_plan")
    elif own:
        source, styles = "the model's _tp_plan", _matched(model, own, "the model's _tp_plan")
    else:
        source, styles = "derived", _derived(flow) | (dict.fromkeys(flow.ends, Style.GATHERED) if head else {})
    left = _refused(model, flow, styles)
    if left and source != "derived":
        path, reason = next(iter(left.items()))
        raise ConfigurationError(f"{source} divides {path}, which cannot be: {reason}")
    styles = {path: style for path, style in styles.items() if path not in left}
    if head and Style.GATHERED not in styles.values():
        raise ConfigurationError(
            f"layout.loss_parallel is true, and the tensor plan ({source}) has no {Style.GATHERED} layer whose outputs "
            "could stay divided; name the model's last nn.Linear in layout.tensor_plan, or leave it out"
        )
    plan = TensorPlan(source, styles, {}, (), left)
    return _placed(plan, flow, blocks, sequence=sequence)


def without(
    plan: TensorPlan, flow: Flow, blocks: Sequence[str], left: Mapping[str, str], *, sequence: bool
) -> TensorPlan:
    """The plan without some modules, which are left whole for a reason."""
    styles = {path: style for path, style in plan.styles.items() if path not in left}
    return _placed(TensorPlan(plan.source, styles, {}, (), {**plan.left, **left}), flow, blocks, sequence=sequence)


def regional(plan: TensorPlan, region: Region, only: Collection[str] | None = None) -> TensorPlan:
    """The part of a plan that is inside one region, with paths from there; the region stands alone.

    Arguments:
        only: of the region's divided modules.
    """

    def inside(path: str) -> str:
        return path[len(region.path) :].lstrip(".")

    chosen = [path for path in plan.styles if within(path, region.path) and (only is None or path in only)]
    return TensorPlan(
        plan.source,
        {inside(path): plan.styles[path] for path in chosen},
        {
            inside(path): (inside(plan.entrances[path][0]), plan.entrances[path][1])
            for path in chosen
            if path in plan.entrances
        },
        (Region("", region.hidden),),
        {},
    )


def pairs(plan: TensorPlan, flow: Flow, region: Region) -> list[frozenset[str]]:
    """A region's ``rowwise`` layers, each with the ``colwise`` layers that lead to it."""
    return [
        frozenset((call.path, *(path for path in call.feeders if plan.styles.get(path) is Style.COLWISE)))
        for call in flow.linears
        if within(call.path, region.path) and plan.styles.get(call.path) is Style.ROWWISE
    ]


def indivisible(plan: TensorPlan, shapes: Mapping[str, Sequence[int]], degree: int) -> str | None:
    """Why a model's shapes cannot be divided by ``degree``; None if they can."""
    for name, dim in plan.parameters().items():
        if name in shapes and shapes[name][dim] % degree:
            what = "rows" if dim == ROW else "columns"
            return f"{name} has {shapes[name][dim]} {what}, which tensor={degree} does not divide"
    return None


def nearest(degree: int, possible: Iterable[int]) -> str:
    """The degrees next to one that cannot be.

    >>> nearest(3, [1, 2, 4, 8])
    'tensor=2 or tensor=4'
    """
    below = [d for d in possible if d < degree]
    above = [d for d in possible if d > degree]
    return " or ".join(f"tensor={d}" for d in (*below[-1:], *above[:1]))


def as_text(plan: TensorPlan) -> str:
    """For a reader: like layers of a list in one line."""
    lines: dict[str, list[str]] = {}
    for path, style in plan.styles.items():
        lines.setdefault(f"{_starred(path)}  {style}", []).append(path)
    for path, reason in plan.left.items():
        lines.setdefault(f"{_starred(path)}  whole: {reason}", []).append(path)
    rows = [f"  {line}" + (f"  (x {len(paths)})" if len(paths) > 1 else "") for line, paths in lines.items()]
    return "\n".join([f"tensor plan: {plan.source}", *rows])


def _starred(path: str) -> str:
    """A path with ``*`` for its first number: a layer's."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path, count=1)


def _matched(model: nn.Module, patterns: Mapping[str, str], source: str) -> dict[str, Style]:
    paths = [path for path, _ in model.named_modules() if path]
    result: dict[str, Style] = {}
    for pattern, word in patterns.items():
        expression = re.compile(r"[^.]+".join(map(re.escape, pattern.split("*"))))
        found = [path for path in paths if expression.fullmatch(path)]
        if not found:
            near = difflib.get_close_matches(pattern, {_starred(path) for path in paths} | set(paths), n=1, cutoff=0.3)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"{source} names {pattern!r}, and the model has no such module{hint}")
        if word in WHOLE:
            continue
        if word not in (*Style, *SYNONYMS):
            known = ", ".join([*Style, *SYNONYMS, *WHOLE])
            raise ConfigurationError(f"{source} gives {pattern!r} the style {word!r}; known styles are {known}")
        result.update(dict.fromkeys(found, SYNONYMS.get(word) or Style(word)))
    return result


def _derived(flow: Flow) -> dict[str, Style]:
    """Linear layers that lead to one other alone, and that one."""
    leads_to: dict[str, set[str]] = {}
    for call in flow.linears:
        for feeder in call.feeders:
            leads_to.setdefault(feeder, set()).add(call.path)
    styles: dict[str, Style] = {}
    for call in flow.linears:
        feeders = [
            path
            for path in sorted(call.feeders)
            if leads_to[path] == {call.path} and path not in flow.ends and path not in styles
        ]
        if feeders and call.path not in styles:
            styles.update(dict.fromkeys(feeders, Style.COLWISE))
            styles[call.path] = Style.ROWWISE
    return styles


def _refused(model: nn.Module, flow: Flow, styles: Mapping[str, Style]) -> dict[str, str]:
    """What cannot have its style, and why."""
    linears = {call.path: call for call in flow.linears}
    leads_to: dict[str, set[str]] = {}
    for call in flow.linears:
        for feeder in call.feeders:
            leads_to.setdefault(feeder, set()).add(call.path)
    refused: dict[str, str] = {}
    for path, style in styles.items():
        module = model.get_submodule(path)
        if style is Style.EMBEDDING:
            if not isinstance(module, nn.Embedding):
                refused[path] = f"it is a {type(module).__name__}, and {style} is for nn.Embedding"
            elif module.max_norm is not None or module.sparse or module.scale_grad_by_freq:
                refused[path] = "its max_norm, sparse or scale_grad_by_freq needs it whole"
        elif type(module).forward is not nn.Linear.forward:
            refused[path] = f"it is a {type(module).__name__}, and {style} is for nn.Linear"
        elif path not in linears:
            refused[path] = "the model does not call it"
        elif flow.calls.get(path, 0) > 1:
            refused[path] = f"the model calls it {flow.calls[path]} times"
        elif style is Style.COLWISE:
            rows = {other for other in leads_to.get(path, ()) if styles.get(other) is Style.ROWWISE}
            if path in flow.ends or not rows or rows != leads_to[path]:
                others = ", ".join(sorted(leads_to.get(path, set()) - rows)) or "the loss"
                refused[path] = f"its output reaches {others}, not rowwise layers alone"
        elif style is Style.ROWWISE and not any(styles.get(f) is Style.COLWISE for f in linears[path].feeders):
            refused[path] = "no colwise layer leads to it"
    partners = {call.path for call in flow.linears if call.path in styles and call.feeders & refused.keys()}
    for path in sorted(partners - refused.keys()):
        if styles[path] is Style.ROWWISE:
            refused[path] = f"it goes with {', '.join(sorted(linears[path].feeders & refused.keys()))}"
    return refused


def _placed(plan: TensorPlan, flow: Flow, blocks: Sequence[str], *, sequence: bool) -> TensorPlan:
    """A plan with its regions and entrances."""
    linears = {call.path: call for call in flow.linears}
    paths: dict[str, None] = {}
    for path, style in plan.styles.items():
        if style in (Style.EMBEDDING, Style.GATHERED):
            paths[path] = None
        elif style is Style.ROWWISE:
            feeders = [f for f in linears[path].feeders if plan.styles.get(f) is Style.COLWISE]
            paths[_region_of([path, *feeders], blocks)] = None
    found = [path for path in paths if path in flow.modules]
    order = {path: i for i, path in enumerate(flow.modules)}
    regions = [Region(path) for path in sorted(found, key=order.__getitem__)]
    if sequence:
        regions = _chained(regions, flow, set(blocks))
    entrances = {
        path: _entrance(linears[path], plan.styles, flow, next(r.path for r in regions if within(path, r.path)))
        for path, style in plan.styles.items()
        if style in (Style.COLWISE, Style.GATHERED)
    }
    return TensorPlan(plan.source, plan.styles, entrances, tuple(regions), plan.left)


def _region_of(paths: Sequence[str], blocks: Sequence[str]) -> str:
    """The layer that holds all of these modules, or the innermost module that does."""
    holding = [block for block in blocks if all(within(path, block) for path in paths)]
    if holding:
        return max(holding, key=len)
    first, *others = paths
    path = first.rpartition(".")[0]
    while not all(within(other, path) for other in others):
        path = path.rpartition(".")[0]
    return path


def _entrance(call: LinearCall, styles: Mapping[str, Style], flow: Flow, region: str) -> tuple[str, int]:
    """The outermost module inside the region that takes the layer's input, and uses it for such layers alone."""
    users = flow.users.get(call.given, set())
    parts = call.path.split(".")
    for length in range(1, len(parts)):
        path = ".".join(parts[:length])
        module = flow.modules.get(path)
        if path == region or not within(path, region) or module is None or call.given not in module.given:
            continue
        if all(styles.get(user) is Style.COLWISE for user in users if within(user, path)):
            return path, module.given.index(call.given)
    return call.path, 0


def _chained(regions: Sequence[Region], flow: Flow, blocks: set[str]) -> list[Region]:
    """Regions whose stream of activations is divided along its sequence; where one leads to the next it stays so."""
    streams = {r.path: _stream(flow, r.path) if r.path in blocks else None for r in regions}
    result: list[Region] = []
    for region in regions:
        stream = streams[region.path]
        if stream is None:
            result.append(region)
            continue
        previous = result[-1] if result else None
        begins = True
        if previous is not None and previous.hidden is not None:
            made = flow.modules[previous.path].made[previous.hidden[1]]
            taken = flow.modules[region.path].given[stream[0]]
            users = flow.users.get(made, set())
            begins = made != taken or not all(within(user, region.path) for user in users)
            result[-1] = Region(previous.path, previous.hidden, previous.begins, ends=begins)
        result.append(Region(region.path, stream, begins=begins))
    return result


def _stream(flow: Flow, path: str) -> tuple[int, int] | None:
    """The first argument of a module that has the form (batch, time, ...) of its first result."""
    call = flow.modules[path]
    results = pytree.tree_leaves(call.result)
    at = next((i for i, leaf in enumerate(results) if isinstance(leaf, Tensor)), None)
    if at is None or results[at].dim() < 3 or not results[at].is_floating_point():
        return None
    for i, leaf in enumerate(pytree.tree_leaves((call.args, call.kwargs))):
        if isinstance(leaf, Tensor) and leaf.shape == results[at].shape and leaf.dtype == results[at].dtype:
            return i, at
    return None
