"""The sample of text at the end of a run: the same for the same model, and soon over where the model is slow."""

import time

import pytest
import torch
from torch import Tensor

from unisono.tasks import lm


class Slow(lm.GPT):
    """Takes 0.02 s a byte."""

    def forward(self, tokens: Tensor) -> Tensor:
        time.sleep(0.02)
        return super().forward(tokens)


def test_a_sample_is_reproducible_and_leaves_the_model_as_it_was() -> None:
    torch.manual_seed(0)
    model = lm.GPT(layers=1, width=8, heads=1, context=8, dropout=0.5, tied=False)
    assert lm.generate(model, b"def ", 20) == lm.generate(model, b"def ", 20)
    assert model.training and all(parameter.grad is None for parameter in model.parameters())


def test_a_slow_models_sample_is_shorter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lm, "GENERATION_S", 0.1)
    model = Slow(layers=1, width=8, heads=1, context=8, dropout=0.0, tied=False)
    text = lm.generate(model, b"def ", 10_000)
    assert text.startswith("def ") and len(text) < 100
