"""The digest changes with every bit, and with nothing else."""

import torch

from unisono.run.digest import digest


def test_every_bit_counts() -> None:
    base = {"a": torch.zeros(3), "b": torch.arange(4)}
    same = digest(1, base.items())
    assert digest(1, reversed(base.items())) == same
    assert digest(2, base.items()) != same
    assert digest(1, {**base, "a": torch.tensor([0.0, -0.0, 0.0])}.items()) != same
    assert digest(1, {**base, "a": torch.zeros(3, 1)}.items()) != same
    assert digest(1, {**base, "a": torch.zeros(3, dtype=torch.int32)}.items()) != same
    assert digest(1, {"a": base["a"], "c": base["b"]}.items()) != same


def test_layout_in_memory_does_not_count() -> None:
    x = torch.randn(4, 6)
    assert digest(0, [("x", x.t().contiguous().t())]) == digest(0, [("x", x)])
    assert digest(0, [("x", x.bfloat16())]) == digest(0, [("x", x.bfloat16().clone())])
    digest(0, [("empty", torch.zeros(0)), ("scalar", torch.tensor(1.0)), ("flag", torch.tensor(True))])
