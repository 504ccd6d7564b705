"""Stages one after another are the whole model, forward and backward, bit for bit."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.models import Aside, Deep, EncoderDecoder, Functional, Passing, Sharing, Skipping, Twice, albert
from unisono.parallel.entrance import Entrance
from unisono.parallel.split import first_part, second_part
from unisono.parallel.stages import Left, Stages
from unisono.plan.partition import divide
from unisono.plan.rehearsal import outline
from unisono.run.rng import ModuleRandom
from unisono.tasks.images import Images
from unisono.tasks.lm import GPT

INPUT = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
IMAGES = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(1))
TOKENS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(2))

MODELS: dict[str, tuple[Callable[[], nn.Module], Tensor]] = {
    "blocks": (Deep, INPUT),
    "encoder and decoder": (EncoderDecoder, INPUT),
    "skipping": (Skipping, INPUT),
    "something aside": (Aside, INPUT),
    "called twice": (Twice, INPUT),
    "passing parameters": (Passing, INPUT),
    "a shared activation, cached masks": (Sharing, INPUT),
    "functional dropout": (Functional, INPUT),
    "one module under two names": (albert, INPUT),
    "images": (lambda: Images().model(), IMAGES),
    "GPT": (lambda: GPT(3, 16, 2, 16, 0.1, tied=False), TOKENS),
}


def in_stages(model: nn.Module, given: Tensor, stages: int, *, split: bool) -> tuple[Tensor, list[Tensor | None]]:
    """The loss, and all gradients, of a model that is computed stage by stage."""

    def loss() -> Tensor:
        result: Tensor = model(given).pow(2).mean()
        return result

    cut = Stages(model, divide(outline(model, loss), stages))
    random = ModuleRandom(model, 0, torch.device("cpu"))
    weights = list(model.parameters())
    entrances, made, arrived = [], [], [(torch.empty(0), False)][:0]
    value = torch.empty(0)
    for stage in range(stages):
        random.enter(0, 0)
        entrance = Entrance([t for t, _ in arrived], [needed for _, needed in arrived])
        result = cut.run(stage, entrance, loss)
        entrances.append(entrance)
        if isinstance(result, Left):
            made.append(list(result.tensors))
            arrived = [(t.detach().clone(), t.requires_grad) for t in result.tensors]
        else:
            value = result
            made.append([result])
    gradients: list[Tensor | None] = [None] * len(weights)

    def take(i: int, gradient: Tensor) -> None:
        gradients[i] = gradient

    given_back: list[Tensor | None] = [None]
    for stage in reversed(range(stages)):
        pairs = zip(made[stage], given_back, strict=True)
        roots = [(m, g) for m, g in pairs if m.requires_grad and (g is not None or stage == stages - 1)]
        if split:
            found, rest = first_part(roots, entrances[stage].edges, weights)
            entrances[stage].receive(found)
            second_part(rest, weights, take)
        else:
            torch.autograd.backward([m for m, _ in roots], [g for _, g in roots])
        given_back = entrances[stage].gradients()
    random.close()
    cut.close()
    return value, gradients if split else [p.grad for p in weights]


@pytest.mark.parametrize("split", [False, True], ids=["joint", "in two parts"])
@pytest.mark.parametrize("stages", [1, 2, 3])
@pytest.mark.parametrize("name", MODELS)
def test_stages_are_the_whole(name: str, stages: int, split: bool) -> None:
    build, given = MODELS[name]
    if name in ("skipping", "functional dropout") and stages == 3:
        pytest.skip("it can be cut once")
    torch.manual_seed(0)
    model = build()
    random = ModuleRandom(model, 0, torch.device("cpu"))
    random.enter(0, 0)
    expected = model(given).pow(2).mean()
    expected.backward()
    random.close()
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    for buffer in model.buffers():
        buffer.zero_() if buffer.dtype is torch.long else None
    value, found = in_stages(model, given, stages, split=split)
    assert torch.equal(value, expected)
    for parameter, a, b in zip(model.named_parameters(), found, gradients, strict=True):
        assert (a is None) == (b is None) and (a is None or b is None or torch.equal(a, b)), parameter[0]


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(8, 8), (5, 8)),
    "convolution": (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Conv2d(3, 4, 3)), (2, 3, 8, 8)),
    "batch norm": (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.GELU()), (2, 3, 8, 8)),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 6)),
    "attention": (lambda: nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), (3, 5, 16)),
    "recurrent": (lambda: nn.GRUCell(8, 8), (5, 8)),
    "shared": (lambda: nn.Sequential(*[nn.Linear(8, 8)] * 2), (5, 8)),
}


@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_backward_in_two_parts_is_the_joint_one(kind: str, bf16: bool) -> None:
    build, shape = KINDS[kind]
    torch.manual_seed(0)
    module = build()
    x = torch.randn(shape)
    weights = list(module.parameters())

    def forward(given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            result: Tensor = module(given)
        return result

    given = x.clone().requires_grad_()
    y = forward(given * 1)
    gradient = torch.randn_like(y)
    expected = torch.autograd.grad([y], [given, *weights], [gradient])
    entrance = Entrance([x.clone()], [True])
    found, rest = first_part([(forward(entrance.tensors[0]), gradient)], entrance.edges, weights)
    taken: dict[int, Tensor] = {}
    second_part(rest, weights, taken.__setitem__)
    assert found[0] is not None and torch.equal(found[0], expected[0])
    assert len(taken) == len(weights) and all(torch.equal(taken[i], expected[i + 1]) for i in taken)
