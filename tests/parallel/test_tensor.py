"""Layers in parts are whole layers: plans and their trials, exchanges and divided logits, without processes."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unisono.comm.tensor_group import ThreadTensorGroup
from unisono.errors import ConfigurationError
from unisono.parallel.initial import without_values
from unisono.parallel.recompute import refuse_inside
from unisono.parallel.tensor import Crossings, TensorParallel, _Draws
from unisono.parallel.tensor_trial import ProvenPlan, proven_plan
from unisono.parallel.vocabulary import Logits
from unisono.plan.flow import flow
from unisono.plan.sharding import Style, as_text
from unisono.tasks.lm import GPT

TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(0))


class FewerHeads(nn.Module):
    """Attention in which several queries share a key, with a norm for each head, as newer models have it."""

    def __init__(self, width: int = 16, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.head = width // heads
        self.groups = heads // shared
        self.queries, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.keys, self.values = nn.Linear(width, width // self.groups), nn.Linear(width, width // self.groups)
        self.norm = nn.LayerNorm(self.head)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        q, k, v = (f(x).view(batch, time, -1, self.head) for f in (self.queries, self.keys, self.values))
        q, k = self.norm(q), self.norm(k)
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        result: Tensor = x + self.out(y.transpose(1, 2).reshape(batch, time, -1))
        return result


class Chunked(nn.Module):
    """Queries, keys, values one behind the other: a part of their outputs has the form of whole heads, and is none."""

    def __init__(self, width: int = 16, heads: int = 4) -> None:
        super().__init__()
        self.head = width // heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, _ = x.shape
        parts = [t.view(batch, time, -1, self.head).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1)]
        y = F.scaled_dot_product_attention(*parts)
        result: Tensor = x + self.out(y.transpose(1, 2).reshape(batch, time, -1))
        return result


class Noisy(nn.Module):
    """Draws random numbers by a function of its own between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = self.b(y * torch.rand_like(y))
        return result


class Between(nn.Module):
    """Something else needs all that lies between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.b(F.layer_norm(self.a(x), (32,)))
        return result


class Layers(nn.Module):
    """Layers of one kind on a stream of activations."""

    def __init__(self, build: Callable[[], nn.Module], count: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, 16)
        self.layers = nn.ModuleList(build() for _ in range(count))

    def forward(self, tokens: Tensor) -> Tensor:
        x: Tensor = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def proven(model: nn.Module, degree: int = 2, given: dict[str, str] | None = None, **options: Any) -> ProvenPlan:
    return proven_plan(model, flow(model, lambda: model(TOKENS).float().pow(2).mean()), given or {}, degree, **options)


def gpt(**options: Any) -> GPT:
    return GPT(**{"layers": 2, "width": 32, "heads": 4, "context": 16, "dropout": 0.1, "tied": True, **options})


def test_a_plan_follows_from_the_flow_of_values() -> None:
    found = proven(gpt())
    assert as_text(found.plan) == (
        "tensor plan: derived\n"
        "  blocks.*.attention.qkv  colwise  (x 2)\n"
        "  blocks.*.attention.out  rowwise  (x 2)\n"
        "  blocks.*.mlp.0  colwise  (x 2)\n"
        "  blocks.*.mlp.2  rowwise  (x 2)"
    )
    assert found.plan.entrances["blocks.1.attention.qkv"] == ("blocks.1.attention", 0)
    assert found.findings["blocks.0"].draws == (1, None, None)  # heads of the attention; dropout on whole activations
    assert not found.findings["blocks.0"].summed


def test_sequence_parallel_regions_lead_to_each_other() -> None:
    found = proven(gpt(), sequence=True)
    assert [(r.path, r.begins, r.ends) for r in found.plan.regions] == [
        ("blocks.0", True, False),
        ("blocks.1", False, True),
    ]
    assert found.findings["blocks.0"].draws == (1, 1, 1)
    assert "blocks.0.norm1.weight" in found.findings["blocks.0"].summed


def test_what_every_head_shares_has_a_gradient_to_be_summed() -> None:
    found = proven(Layers(FewerHeads))
    assert found.findings["layers.0"].summed == ("layers.0.norm.bias", "layers.0.norm.weight")


def test_a_model_without_values_gives_the_same_plan() -> None:
    with torch.device("meta"):
        bare = gpt()
    assert proven(bare) == proven(gpt())


@pytest.mark.parametrize(
    ("model", "degree", "given", "options", "expected"),
    [
        (gpt, 3, {}, {}, "32 columns, which tensor=3 does not divide); use tensor=2 or tensor=4"),
        (
            gpt,
            8,
            {},
            {},
            "cannot be divided by tensor=8, which would cut what is computed together, a head for example (Runt",
        ),
        (
            lambda: gpt(heads=8, width=24),
            4,
            {"blocks.*.mlp.0": "colwise"},
            {},
            "its output reaches blocks.0.mlp.2, not",
        ),
        (
            gpt,
            2,
            {"blocks.*.mpl.0": "colwise"},
            {},
            "names 'blocks.*.mpl.0', and the model has no such module; did you",
        ),
        (gpt, 2, {"blocks.*.mlp.0": "columns"}, {}, "the style 'columns'; known styles are colwise, rowwise"),
        (gpt, 2, {"tokens": "colwise"}, {}, "divides tokens, which cannot be: it is a Embedding, and colwise is for"),
        (gpt, 2, {"head": "embedding_rowwise"}, {}, "it is a Linear, and embedding_rowwise is for nn.Embedding"),
        (gpt, 2, {"blocks.*.mlp.2": "rowwise"}, {}, "no colwise layer leads to it"),
        (gpt, 2, {"tokens": "embedding_rowwise"}, {"head": True}, "has no colwise_gather_output layer"),
        (
            lambda: Layers(Chunked),
            2,
            {},
            {},
            "no part of the model can be divided: layers.0.out: its results are others",
        ),
        (lambda: Layers(Noisy), 2, {}, {}, "layers.0 draws random numbers by rand_like, which cannot be divided"),
        (lambda: Layers(Between), 2, {}, {}, "no part of the model can be divided: layers.0.a: RuntimeError"),
        (lambda: Layers(nn.Identity), 2, {}, {}, "no part of the model can be divided; tensor parallelism needs"),
        (
            lambda: Layers(Chunked),
            2,
            {"layers.*.qkv": "colwise", "layers.*.out": "rowwise"},
            {},
            "layout.tensor_plan divides layers.0, which cannot be: its results are others",
        ),
    ],
)
def test_a_plan_that_cannot_be_is_one_sentence(
    model: Callable[[], nn.Module], degree: int, given: dict[str, str], options: dict[str, bool], expected: str
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        proven(model(), degree, given, **options)
    assert expected in str(caught.value), caught.value


def test_what_does_not_go_is_left_whole() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = Chunked(), nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = self.attention(x)
            result: Tensor = x + self.mlp(x)
            return result

    plan = proven(Layers(Both)).plan
    assert set(plan.styles.values()) == {Style.COLWISE, Style.ROWWISE} and all(".mlp." in path for path in plan.styles)
    assert "layers.*.attention.qkv  whole: its results are others when it is divided  (x 2)" in as_text(plan)


def on_threads(size: int, run: Callable[[ThreadTensorGroup], Any]) -> list[Any]:
    results: list[Any] = [None] * size

    def perform(group: ThreadTensorGroup) -> None:
        try:
            results[group.rank] = run(group)
        except BaseException as error:
            group.close()
            results[group.rank] = error

    threads = [threading.Thread(target=perform, args=(group,)) for group in ThreadTensorGroup.several(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("dim", [1, -1])
def test_exchanges_are_each_others_transpose(size: int, dim: int) -> None:
    """<A x, y> = <x, A' y>, where A' is what the gradients go through."""
    whole, part = [2, 12, 12], [2, 12, 12]
    part[dim] //= size
    shapes = {"split": (whole, part), "join": (part, whole), "gather": (part, whole), "scatter": (whole, part)}
    for name, (given, made) in shapes.items():
        xs = [torch.randn(given, dtype=torch.float64) for _ in range(size)]
        ys = [torch.randn(made, dtype=torch.float64) for _ in range(size)]
        if name == "split":
            xs = [xs[0]] * size
        if name == "join":
            ys = [ys[0]] * size

        def run(
            group: ThreadTensorGroup, name: str = name, xs: list[Tensor] = xs, ys: list[Tensor] = ys
        ) -> tuple[Tensor, Tensor]:
            x = xs[group.rank].clone().requires_grad_()
            y = getattr(Crossings(group, "here"), name)(x, dim)
            (gradient,) = torch.autograd.grad(y, x, ys[group.rank])
            return y.detach(), gradient

        results = on_threads(size, run)
        forward = sum(float((y * given).sum()) for (y, _), given in zip(results, ys, strict=True))
        backward = sum(float((g * x).sum()) for (_, g), x in zip(results, xs, strict=True))
        if name in ("split", "join"):  # a whole is one tensor, though everyone has it
            forward, backward = (forward / size, backward) if name == "join" else (forward, backward / size)
        assert forward == pytest.approx(backward), name


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda logits, target: F.cross_entropy(logits.view(-1, 12), target.flatten()),
    "sum": lambda logits, target: F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="sum"),
    "none": lambda logits, target: (
        F.cross_entropy(logits.reshape(-1, 12), target.flatten(), reduction="none").pow(2).sum()
    ),
    "ignored": lambda logits, target: F.cross_entropy(logits.view(-1, 12), target.flatten(), ignore_index=3),
    "shifted": lambda logits, target: F.cross_entropy(
        logits.float()[..., :-1, :].contiguous().view(-1, 12), target[..., 1:].flatten()
    ),
    "smoothed": lambda logits, target: F.cross_entropy(logits.view(-1, 12), target.flatten(), label_smoothing=0.1),
    "something else": lambda logits, target: (
        (logits * 2).log_softmax(-1).mean() + logits[..., 3].sum() + logits.pow(2).mean()
    ),
}


@pytest.mark.parametrize("kind", LOSSES)
@pytest.mark.parametrize("size", [2, 3])
def test_the_loss_of_divided_logits_is_that_of_whole_ones(size: int, kind: str) -> None:
    torch.manual_seed(0)
    logits, target = torch.randn(3, 5, 12), torch.randint(0, 12, (3, 5))
    whole = logits.clone().requires_grad_()
    expected = LOSSES[kind](whole, target)
    torch.autograd.backward(expected)
    assert whole.grad is not None

    def run(group: ThreadTensorGroup) -> tuple[Tensor, Tensor]:
        part = logits.chunk(size, -1)[group.rank].clone().requires_grad_()
        divided = Logits(part, group, lambda t: Crossings(group, "here").join(t, -1))
        assert divided.shape == logits.shape and divided.dim() == 3
        loss = LOSSES[kind](divided, target)
        torch.autograd.backward(loss)
        assert part.grad is not None and type(loss) is Tensor
        return loss.detach(), part.grad

    results = on_threads(size, run)
    for (loss, gradient), own in zip(results, whole.grad.chunk(size, -1), strict=True):
        assert torch.allclose(loss, expected, rtol=1e-6) and torch.allclose(gradient, own, atol=1e-6)


def test_a_loss_that_changes_divided_logits_is_refused() -> None:
    group = ThreadTensorGroup.several(1)[0]
    with pytest.raises(ConfigurationError, match=r"changes the model's output in place \(div_\)"):
        Logits(torch.randn(2, 4), group, lambda t: t).div_(2.0)


def test_a_sequence_that_cannot_be_divided_is_one_sentence() -> None:
    group = ThreadTensorGroup.several(2)[0]
    with pytest.raises(
        ConfigurationError, match=r"blocks\.0 has activations of 5 positions, which tensor=2 does not divide"
    ):
        Crossings(group, "blocks.0").split(torch.randn(2, 5, 4), 1)


class BetweenByKind(nn.Module):
    """Two kinds of one class: what lies between its layers hangs on an attribute."""

    def __init__(self, softmax: bool) -> None:
        super().__init__()
        self.a, self.b, self.softmax = nn.Linear(16, 32), nn.Linear(32, 16), softmax

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        result: Tensor = x + self.b(y.softmax(-1) if self.softmax else y.tanh())
        return result


class OnlyInTraining(nn.Module):
    """Random functions that are called in training alone."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.a, self.b, self.p = nn.Linear(16, 32), nn.Linear(32, 16), p

    def forward(self, x: Tensor) -> Tensor:
        y = self.a(x)
        if self.training:
            y = F.dropout(y, self.p)
        result: Tensor = x + self.b(y)
        return result


class Masked(nn.Module):
    """A mask in a buffer, which has values also where the model is built without."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)
        self.register_buffer("mask", torch.ones(1, device="cpu"))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = x + self.b(self.a(x) / self.mask)
        return result


def test_modules_of_one_class_that_compute_something_else_are_tried_apart() -> None:
    kinds = iter((False, True))
    plan = proven(Layers(lambda: BetweenByKind(next(kinds)))).plan
    assert set(plan.styles) == {"layers.0.a", "layers.0.b"} and "layers.1.a" in plan.left


def test_random_functions_of_training_are_found() -> None:
    assert proven(Layers(OnlyInTraining)).findings["layers.0"].draws == (2,)


def test_buffers_keep_their_values_in_a_trial() -> None:
    with without_values():
        bare = Layers(Masked)
    assert "layers.1.a" in proven(bare).plan.styles


def test_a_region_that_calls_other_random_functions_than_in_its_trial_is_refused() -> None:
    model = Layers(OnlyInTraining, 1)
    found = proven(model)

    def run(group: ThreadTensorGroup) -> Any:
        own = copy.deepcopy(model)
        TensorParallel(own, found.plan, found.findings, group)
        own.layers[0].training = True
        own.layers[0].forward = lambda x: x
        with _Draws((2,), Crossings(group, "layers.0")) as drawing:
            own.layers[0](torch.zeros(2, 3, 16))
        drawing.check_end()

    with pytest.raises(ConfigurationError, match=r"layers\.0 calls fewer random functions \(dropout\) than in"):
        on_threads(2, run)


class Own(torch.autograd.Function):
    """A function of the user's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return gradients[0]


def own_function(logits: Tensor) -> Tensor:
    result: Tensor = Own.apply(logits).sum()  # type: ignore[no-untyped-call]
    return result


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (own_function, (ConfigurationError, "which would lose its gradient")),
        (
            lambda logits: F.cross_entropy(logits.view(-1, 4), torch.tensor([1, 4])),
            (IndexError, "class is 4,"),
        ),
        (
            lambda logits: F.cross_entropy(logits.view(-1, 4), torch.tensor([-1, 0])),
            (IndexError, "class is -1,"),
        ),
    ],
)
def test_what_divided_logits_cannot_do_fails(
    loss: Callable[[Tensor], Tensor], expected: tuple[type[Exception], str]
) -> None:
    group = ThreadTensorGroup.several(1)[0]
    with pytest.raises(expected[0], match=expected[1]):
        torch.autograd.backward(loss(Logits(torch.randn(2, 4, requires_grad=True), group, lambda t: t)))


def test_divided_logits_turned_keep_their_gradient() -> None:
    part = torch.randn(2, 4, requires_grad=True)
    logits = Logits(part, ThreadTensorGroup.several(1)[0], lambda t: t)
    assert logits.requires_grad and F.cross_entropy(logits.mT, torch.tensor([0, 1, 0, 1])).requires_grad


def test_recomputation_of_a_part_of_a_region_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"would compute layers\.0\.mlp again, a part of layers\.0"):
        refuse_inside(["layers.0.mlp"], ["layers.0"])
    refuse_inside(["layers.0"], ["layers.0", "layers.1.attention"])
