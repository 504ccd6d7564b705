"""Recomputation: which blocks, the same gradients, less memory."""

import pytest
import torch
from torch import Tensor, nn

from tests.parallel.models import Deep
from unisono.parallel.beside import with_replicas
from unisono.parallel.recompute import Recomputation, blocks
from unisono.plan.partition import divide
from unisono.plan.rehearsal import outline
from unisono.run.rng import ModuleRandom
from unisono.tasks.images import Images
from unisono.tasks.lm import GPT

TOKENS = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))


def test_blocks_are_the_layers_of_a_transformer() -> None:
    assert blocks(GPT(3, 16, 2, 16, 0.0, tied=True)) == ["blocks.0", "blocks.1", "blocks.2"]
    nested = nn.Sequential(nn.Sequential(Deep(), Deep()), nn.Sequential(Deep(), Deep()))
    assert blocks(nested)[:3] == ["0.0.blocks.0", "0.0.blocks.1", "0.0.blocks.2"]


def test_a_plain_sequence_is_taken_layer_by_layer() -> None:
    assert blocks(Images().model()) == sorted(map(str, range(11)))


def test_no_block_reaches_over_a_stages_end() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)) for _ in range(2)))
    assert blocks(model) == ["0", "1"]
    assert blocks(with_replicas(model, 1)) == ["0", "1", "replica@1.0", "replica@1.1"]
    found = outline(model, lambda: model(torch.randn(3, 6)).mean())
    cut = divide(found, 2, ["0.2"])
    assert blocks(model, cut) == ["0.0", "0.1", "0.2", "1"]


def gradients(model: nn.Module, *, selective: bool | None) -> tuple[list[Tensor], int]:
    """Gradients, and bytes that the graph keeps between forward and backward."""
    model.zero_grad()
    random = ModuleRandom(model, 0, torch.device("cpu"))
    again = None if selective is None else Recomputation(model, blocks(model), selective=selective)
    storages: dict[int, int] = {}
    draws = random.enter(0, 0)

    def keep(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    if selective is None:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = model(TOKENS).pow(2).mean()
    else:
        loss = model(TOKENS).pow(2).mean()
    random.enter(0, 1)  # another micro-batch in between
    random.resume(draws)
    loss.backward()
    if again is not None:
        again.close()
    random.close()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None], sum(storages.values())


@pytest.mark.parametrize("selective", [False, True], ids=["full", "selective"])
def test_gradients_are_the_same_bits(selective: bool) -> None:
    torch.manual_seed(0)
    model = GPT(3, 16, 2, 32, 0.2, tied=False)
    expected, _ = gradients(model, selective=None)
    found, _ = gradients(model, selective=selective)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert all("forward" not in module.__dict__ for module in model.modules())
