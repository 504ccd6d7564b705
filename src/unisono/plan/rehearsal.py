"""A rehearsal finds a model's outline: its own code runs once on tensors without values (torch's fake tensors).

Nothing is computed, so a model of any size can be rehearsed; what it is, and what its code keeps on it, stay as they
were.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from unisono.errors import ConfigurationError
from unisono.plan.outline import DEAR, Call, Cut, Outline, TensorForm, Unit, entered, form_of, next_key
from unisono.plan.wrapping import Forward, Wrapping
from unisono.run.rng import may_draw


def outline(model: nn.Module, forward: Callable[[], object]) -> Outline:
    """Rehearse a model.

    Arguments:
        model: with or without values.
        forward: calls it on a real micro-batch, and computes the loss.

    Raises:
        ConfigurationError: where the model's code needs values, and thus cannot be rehearsed.
    """
    rehearsal = _Rehearsal(model)
    with rehearsal.on_fakes():
        try:
            forward()
        except Exception as error:
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise ConfigurationError(
                f"the model cannot be cut into stages: its code, run without values, fails {rehearsal.where()} with "
                f"{type(error).__name__}: {reason[0]}; use layout.pipeline=1, or let that code not look at values"
            ) from error
    return rehearsal.result()


@dataclass(slots=True)
class _OpenCall:
    """A call that is under way, or over: `Call`, with the identities of what it was given."""

    path: str
    key: str
    first: int
    time: int
    draws: int
    given: list[int | None]
    forms: list[TensorForm | None]
    stop: int = 0
    results: Any = None
    calls: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Use:
    """Something made earlier is used: in a unit's call, or by code between units.

    Attributes:
        time: counts events.
        units: called so far.
        tensors: identities of what is used.
        inside: the calls that were under way, the outermost first.
    """

    time: int
    units: int
    tensors: frozenset[int]
    inside: tuple[_OpenCall, ...]


@dataclass(slots=True)
class _Cost:
    flops: int = 0
    saved_bytes: int = 0
    dear_bytes: int = 0


class _Rehearsal:
    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._entered = entered(model)
        self._time = 0
        self._units: list[Unit] = []
        self._callers: dict[str, set[int]] = {}  # of each unit: the calls that it is called in
        self._calls: list[_OpenCall] = []
        self._open: list[_OpenCall] = []
        self._uses: list[_Use] = []
        self._made: dict[int, int] = {}  # identity of a tensor -> when it was made
        self._kept: list[object] = []  # so that identities stay unique
        self._state: dict[int, str] = {}  # identity -> name of a parameter or buffer
        self._needed: dict[str, list[int]] = {}
        self._top_calls: dict[str, int] = {}
        self._keyed = 0  # how often random state has been keyed anew
        self._draws: list[tuple[int, int]] = []  # by code between units: when, and after how many keys
        self._inside_unit = False
        self._last_unit = ("", 0)
        self._now = _Cost()
        self._saved: set[int] = set()

    @contextmanager
    def on_fakes(self) -> Iterator[None]:
        """The model's parameters and buffers are fakes, and its calls are noted."""
        wrapping = Wrapping()
        fakes = with_fakes(self._model, self._mode, self._state, self._saved)
        random = torch.random.fork_rng(devices=[])
        counting = _Counting(self._now, self._draw)
        hooks = torch.autograd.graph.saved_tensors_hooks(self._save, lambda tensor: tensor)
        with fakes, random, hooks, torch.enable_grad(), counting, _Between(self):
            try:
                for path, module in list(self._model.named_modules()):
                    if path and _is_looked_at(path, self._entered):
                        wrapping.add(module, partial(self._noting, path, whole=path not in self._entered))
                yield
            finally:
                wrapping.close()

    def where(self) -> str:
        """Where the rehearsal is, for an error."""
        path = self._open[-1].path if self._open else ""
        return f"in module {path}" if path else "in the model's or the loss's own forward"

    def _save(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._saved:
            self._saved.add(key)
            self._kept.append(storage)
            self._now.saved_bytes += storage.nbytes()
        return tensor

    def _counts(self) -> dict[str, int]:
        return self._open[-1].calls if self._open else self._top_calls

    def _noting(self, path: str, forward: Forward, *, whole: bool) -> Forward:
        keys_random_state = may_draw(self._model.get_submodule(path))

        def noted(*args: Any, **kwargs: Any) -> Any:
            if self._inside_unit:
                return forward(*args, **kwargs)
            self._time += 1
            leaves = pytree.tree_leaves((args, kwargs))
            fakes = [leaf if isinstance(leaf, FakeTensor) else None for leaf in leaves]
            given = [None if fake is None else id(fake) for fake in fakes]
            forms = [None if fake is None else form_of(fake) for fake in fakes]
            key = next_key(self._open[-1].key if self._open else "", path, self._counts())
            call = _OpenCall(path, key, len(self._units), self._time, self._keyed, given, forms)
            self._keyed += keys_random_state
            self._kept.append(leaves)
            self._calls.append(call)
            self._open.append(call)
            result = self._unit(call, forward, args, kwargs) if whole else forward(*args, **kwargs)
            self._open.pop()
            self._keyed += keys_random_state
            call.stop = len(self._units)
            call.results = pytree.tree_map_only(Tensor, form_of, result)
            return result

        return noted

    def _unit(self, call: _OpenCall, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        self._use(frozenset(key for key in call.given if key is not None), tuple(self._open))
        self._callers.setdefault(call.path, set()).add(self._open[-2].time if len(self._open) > 1 else 0)
        self._inside_unit = True
        self._end_unit()
        try:
            with self._mode:
                result = forward(*args, **kwargs)
        finally:
            self._inside_unit = False
        tensors = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._last_unit = (call.path, sum(form_of(tensor).size_bytes for tensor in tensors))
        self._units.append(self._costed())
        self._make(tensors)
        return result

    def _costed(self) -> Unit:
        now = self._now
        path, moved_bytes = self._last_unit
        return Unit(path, now.flops, now.saved_bytes, moved_bytes, now.dear_bytes)

    def _end_unit(self) -> None:
        """What has been counted up to here belongs to the unit before."""
        if self._units:
            self._units[-1] = self._costed()
            self._now.flops = self._now.saved_bytes = self._now.dear_bytes = 0

    def _draw(self) -> None:
        """A random number is drawn."""
        if not self._inside_unit:
            self._time += 1
            self._draws.append((self._time, self._keyed))

    def _use(self, tensors: frozenset[int], inside: tuple[_OpenCall, ...]) -> None:
        self._uses.append(_Use(self._time, len(self._units), tensors, inside))

    def _make(self, tensors: Sequence[Tensor]) -> None:
        self._time += 1
        for tensor in tensors:
            if isinstance(tensor, FakeTensor):
                self._made.setdefault(id(tensor), self._time)
        self._kept.append(tensors)

    def between(self, args: Any, result: Any) -> None:
        """A function of torch has been called, on more than a tensor's form."""
        used = [leaf for leaf in pytree.tree_leaves(args) if isinstance(leaf, FakeTensor)]
        here = len(self._units) if self._inside_unit else max(len(self._units) - 1, 0)
        for tensor in used:
            if id(tensor) in self._state:
                self._needed.setdefault(self._state[id(tensor)], []).append(here)
        if self._inside_unit:
            return
        self._time += 1
        if used:
            made = frozenset(id(tensor) for tensor in used if id(tensor) not in self._state)
            self._use(made, tuple(self._open))
        results = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, Tensor)]
        self._make(results)

    def result(self) -> Outline:
        """What was found."""
        self._end_unit()
        calls = tuple(
            Call(c.path, c.key, c.first, c.stop, c.results, sum(form.size_bytes for form in c.forms if form))
            for c in self._calls
        )
        homes = self._homes()
        spans: dict[str, tuple[int, int]] = {}
        for i, unit in enumerate(self._units):  # a module that is called several times stays in one stage
            if not self._may_be_everywhere(unit.path):
                spans[unit.path] = (spans.get(unit.path, (i, i))[0], i)
        parameters = {name for name, _ in self._model.named_parameters(remove_duplicate=False)}
        for name, needed in self._needed.items():
            if name not in parameters:  # buffers are everywhere
                continue
            spans[name] = (min(homes[name], *needed), max(homes[name], *needed))
        together = [span for span in spans.values() if span[1] > span[0]]
        cuts = []
        for position in range(1, len(self._units)):
            if any(first < position <= last for first, last in together):
                continue
            cut = next(filter(None, map(self._cut, [c for c in self._calls if c.first == position < c.stop])), None)
            if cut is not None:
                cuts.append(cut)
        return Outline(tuple(self._units), calls, tuple(cuts), homes)

    def _may_be_everywhere(self, path: str) -> bool:
        """Whether the calls of a module may be in different stages: of one that holds nothing, a dropout for example.

        Its random numbers are keyed by the number of the call, so every stage must see all its calls, or none.
        """
        module = self._model.get_submodule(path)
        holds = next(module.parameters(), None) is not None or next(module.buffers(), None) is not None
        return not holds and len(self._callers[path]) == 1

    def _homes(self) -> dict[str, int]:
        """The unit that every parameter and buffer belongs to."""
        of_unit: dict[str, int] = {}
        for i, unit in enumerate(self._units):
            of_unit.setdefault(unit.path, i)
        homes: dict[str, int] = {}
        for name in dict.fromkeys(self._state.values()):
            path = name.rpartition(".")[0]
            while path and path not in of_unit:
                path = path.rpartition(".")[0]
            homes[name] = of_unit[path] if path in of_unit else min(self._needed.get(name, [0]))
        first = {id(module): path for path, module in self._model.named_modules()}
        for path, module in self._model.named_modules(remove_duplicate=False):  # further names of one module
            for key in (*module._parameters, *module._buffers):
                own = f"{first[id(module)]}.{key}".lstrip(".")
                if own in homes:
                    homes.setdefault(f"{path}.{key}".lstrip("."), homes[own])
        return homes

    def _cut(self, call: _OpenCall) -> Cut | None:
        """The cut in front of a call, where what is needed behind it is among the call's arguments.

        Nor may code between modules draw random numbers on both sides of it from one state.
        """
        before, behind = ({keys for time, keys in self._draws if (time < call.time) == side} for side in (True, False))
        if call.draws in before & behind:
            return None
        given = set(filter(None, call.given))
        for use in self._uses:
            if use.time < call.time:
                continue
            older = {key for key in use.tensors if self._made.get(key, 0) < call.time}
            if not older:
                continue
            later = next((inner for inner in use.inside if inner.time >= call.time), None)
            if later is None or not older <= given & set(filter(None, later.given)):
                return None
        places: dict[int, list[int]] = {}
        forms: dict[int, TensorForm] = {}
        for i, (key, form) in enumerate(zip(call.given, call.forms, strict=True)):
            if key is not None and form is not None and key not in self._state:
                places.setdefault(key, []).append(i)
                forms[key] = form
        leaves = tuple(tuple(found) for found in places.values())
        return Cut(call.first, call.path, call.key, leaves, tuple(forms.values())) if leaves else None


def _is_looked_at(path: str, entered: set[str]) -> bool:
    """Whether a module's calls are noted: those that are looked into, and their children."""
    return path in entered or path.rpartition(".")[0] in entered


@contextmanager
def with_fakes(
    model: nn.Module, mode: FakeTensorMode, names: dict[int, str], storages: set[int] | None = None
) -> Iterator[None]:
    """Every name of a parameter or buffer holds a fake of its own; ``names`` and ``storages`` receive who they are."""
    kept = [(table, dict(table)) for module in model.modules() for table in _tables(module)]
    try:
        for path, module in model.named_modules():
            for table in (module._parameters, module._buffers):
                for key, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    with mode:
                        fake: Tensor = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
                    if isinstance(tensor, nn.Parameter):
                        fake = nn.Parameter(fake, requires_grad=tensor.requires_grad)
                    table[key] = fake
                    names[id(fake)] = f"{path}.{key}" if path else key
                    if storages is not None:
                        storages.add(fake.untyped_storage()._cdata)
        yield
    finally:
        for table, entries in kept:  # what the model's code has kept on its modules is of fakes
            table.clear()
            table.update(entries)


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module._parameters, module._buffers, module.__dict__  # the last one holds the others


class _Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations."""

    def __init__(self, cost: _Cost, drawn: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cost = cost
        self._drawn = drawn

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        count = flop_registry.get(func._overloadpacket)
        if count is not None:
            self._cost.flops += count(*args, **(kwargs or {}), out_val=result)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._drawn()
        if func._overloadpacket in DEAR:
            leaves = pytree.tree_leaves(result)
            self._cost.dear_bytes += sum(form_of(leaf).size_bytes for leaf in leaves if isinstance(leaf, Tensor))
        return result


@dataclass(slots=True)
class _Between(TorchFunctionMode):
    """Notes what the model's code calls."""

    rehearsal: _Rehearsal
    _busy: bool = field(default=False)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        writes = getattr(func, "__name__", "") == "__setitem__"
        if writes or any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(result)):
            self.rehearsal.between((args, kwargs), result)
        return result
