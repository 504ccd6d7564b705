"""LARS, LAMB and the clipping of units: timm's, and formulas in double precision written from the papers."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests import toys
from tests.others import timm
from unisono.config import ClipConfig, TrainingConfig, validate
from unisono.errors import ConfigurationError
from unisono.optim import LAMB, LARS
from unisono.optim.clipping import clip_units
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer

STEPS = 50
SHAPES = [(6, 4), (6,), (3, 2, 3, 3), (4, 5)]  # the last starts at zero
Lists = list[Tensor]


def start() -> list[nn.Parameter]:
    random = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES]
    values[-1].zero_()
    return [nn.Parameter(value) for value in values]


def gradients(step: int) -> Lists:
    """Of a step; one parameter has none but zeros now and then."""
    random = torch.Generator().manual_seed(1 + step)
    found = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in SHAPES]
    return [g * (step % 5 != 4 or i != 2) for i, g in enumerate(found)]


def trained(make: Callable[[list[nn.Parameter]], torch.optim.Optimizer], clip: float | None = None) -> Lists:
    parameters = start()
    optimizer = make(parameters)
    for step in range(STEPS):
        for parameter, gradient in zip(parameters, gradients(step), strict=True):
            parameter.grad = gradient.clone()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


def groups(parameters: list[nn.Parameter], excluded: bool) -> list[dict[str, Any]]:
    """As timm has it: what does not decay does not adapt."""
    if not excluded:
        return [{"params": parameters}]
    vectors = [p for p in parameters if p.dim() <= 1]
    return [{"params": [p for p in parameters if p.dim() > 1]}, {"params": vectors, "weight_decay": 0.0}]


LARS_SWITCHES: dict[str, dict[str, Any]] = {
    "momentum": {"momentum": 0.9, "weight_decay": 0.01},
    "no momentum": {"momentum": 0.0, "weight_decay": 0.01},
    "nesterov": {"momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
    "dampening": {"momentum": 0.8, "dampening": 0.3, "weight_decay": 0.01},
    "clamped (LARC)": {"momentum": 0.9, "weight_decay": 0.01, "clamp": True, "trust_coefficient": 0.5},
    "all adapt": {"momentum": 0.9, "weight_decay": 0.01, "exclude_vectors": False},
    "large eps": {"momentum": 0.9, "weight_decay": 0.01, "eps": 0.5},
}
LAMB_SWITCHES: dict[str, dict[str, Any]] = {
    "as it is": {"weight_decay": 0.01},
    "no bias correction": {"weight_decay": 0.01, "bias_correction": False},
    "sums, not averages": {"weight_decay": 0.01, "averaging": False},
    "clamped": {"weight_decay": 0.01, "clamp": True},
    "all adapt": {"weight_decay": 0.05, "exclude_vectors": False},
    "other betas": {"weight_decay": 0.01, "betas": (0.8, 0.95), "eps": 1e-3},
}


@pytest.mark.parametrize("name", LARS_SWITCHES)
def test_lars_is_that_of_timm(name: str) -> None:
    given = {"trust_coefficient": 0.02, **LARS_SWITCHES[name]}
    excluded = given.pop("exclude_vectors", True)
    theirs = dict(given)
    theirs |= {"trust_coeff": theirs.pop("trust_coefficient"), "trust_clip": theirs.pop("clamp", False)}
    expected = trained(lambda p: timm.optim.Lars(groups(p, excluded), lr=0.3, **theirs))
    close(trained(lambda p: LARS(p, lr=0.3, exclude_vectors=excluded, **given)), expected)


@pytest.mark.parametrize("name", LAMB_SWITCHES)
@pytest.mark.parametrize("clip", [None, 1.0])
def test_lamb_is_that_of_timm(name: str, clip: float | None) -> None:
    """Which clips by itself; here the gradients are, once, before."""
    given = dict(LAMB_SWITCHES[name])
    excluded = given.pop("exclude_vectors", True)
    theirs = dict(given)
    theirs |= {"trust_clip": theirs.pop("clamp", False), "grad_averaging": theirs.pop("averaging", True)}
    expected = trained(lambda p: timm.optim.Lamb(groups(p, excluded), lr=0.01, max_grad_norm=clip, **theirs))
    close(trained(lambda p: LAMB(p, lr=0.01, exclude_vectors=excluded, **given), clip), expected)


@pytest.mark.parametrize("name", LARS_SWITCHES)
def test_lars_is_its_formula(name: str) -> None:
    given: dict[str, Any] = {
        "trust_coefficient": 0.02,
        "eps": 1e-8,
        "dampening": 0.0,
        "nesterov": False,
        "clamp": False,
    }
    given |= {"exclude_vectors": True, **LARS_SWITCHES[name]}
    rate, decay, momentum = 0.3, given["weight_decay"], given["momentum"]
    values: Lists = [p.detach().clone() for p in start()]
    moving: list[Tensor | None] = [None] * len(values)
    for step in range(STEPS):
        for i, g in enumerate(gradients(step)):
            w = values[i]
            if w.dim() == 1 and given["exclude_vectors"]:
                d = g
            else:
                size, slope = length(w), length(g)
                ratio = given["trust_coefficient"] * size / (slope + decay * size + given["eps"])
                ratio = ratio if size and slope else 1.0
                d = (min(ratio / rate, 1.0) if given["clamp"] else ratio) * (g + decay * w)
            before = moving[i]
            u = d if before is None else momentum * before + (1 - given["dampening"]) * d
            moving[i] = u
            values[i] = w - rate * (d + momentum * u if given["nesterov"] else u if momentum else d)
    close(trained(lambda p: LARS(p, lr=rate, **given)), values)


@pytest.mark.parametrize("name", LAMB_SWITCHES)
def test_lamb_is_its_formula(name: str) -> None:
    given: dict[str, Any] = {
        "betas": (0.9, 0.999),
        "eps": 1e-6,
        "bias_correction": True,
        "averaging": True,
        "clamp": False,
    }
    given |= {"exclude_vectors": True, **LAMB_SWITCHES[name]}
    (b1, b2), rate = given["betas"], 0.01
    values: Lists = [p.detach().clone() for p in start()]
    m, v = ([torch.zeros_like(w) for w in values] for _ in range(2))
    for step in range(STEPS):
        for i, g in enumerate(gradients(step)):
            w, t = values[i], step + 1
            m[i] = b1 * m[i] + (1 - b1 if given["averaging"] else 1) * g
            v[i] = b2 * v[i] + (1 - b2) * g**2
            c1, c2 = (1 - b1**t, 1 - b2**t) if given["bias_correction"] else (1, 1)
            d = (m[i] / c1) / ((v[i] / c2).sqrt() + given["eps"])
            ratio = 1.0
            if w.dim() > 1 or not given["exclude_vectors"]:
                d = d + given["weight_decay"] * w
                ratio = length(w) / length(d) if length(w) and length(d) else 1.0
            values[i] = w - rate * (min(ratio, 1.0) if given["clamp"] else ratio) * d
    close(trained(lambda p: LAMB(p, lr=rate, **given)), values)


def length(tensor: Tensor) -> float:
    return math.sqrt(sum(x * x for x in tensor.flatten().tolist()))


def close(found: Lists, expected: Lists) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda p: LARS(p, lr=-1.0), "lr is -1.0; it must be at least 0"),
        (lambda p: LARS(p, momentum=1.0), "momentum is 1.0; it must be at least 0 and below 1"),
        (lambda p: LARS(p, momentum=0.0, nesterov=True), "nesterov is True; it must be off without momentum"),
        (lambda p: LARS(p, trust_coefficient=0.0), "trust_coefficient is 0.0; it must be above 0"),
        (lambda p: LAMB(p, betas=(0.9, 1.0)), r"betas is \(0.9, 1.0\)"),
        (lambda p: LAMB(p, weight_decay=-0.1), "weight_decay is -0.1"),
    ],
)
def test_arguments_outside_their_range_are_refused(make: Callable[[Any], Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        make(start())


def test_a_closure_gives_the_loss() -> None:
    parameters = start()
    optimizer = LAMB(parameters)

    def closure() -> float:
        for parameter, gradient in zip(parameters, gradients(0), strict=True):
            parameter.grad = gradient
        return 3.0

    assert optimizer.step(closure) == 3.0


@given(st.sampled_from([(7,), (5, 3), (4, 2, 3, 3)]), st.floats(1e-3, 10), st.floats(1e-3, 1), st.integers(0, 99))
def test_units_are_clipped_as_timm_does(shape: tuple[int, ...], factor: float, eps: float, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    parameter = nn.Parameter(torch.randn(shape, generator=random, dtype=torch.float64))
    gradient = torch.randn(shape, generator=random, dtype=torch.float64)
    gradient[0] = 0
    parameter.grad = gradient.clone()
    timm.utils.adaptive_clip_grad([parameter], clip_factor=factor, eps=eps)
    clip_units(parameter.detach(), gradient, factor, eps)
    torch.testing.assert_close(gradient, parameter.grad)


@pytest.mark.parametrize(
    ("clip", "said"),
    [
        ({"norm": 1.0, "value": 1.0}, "give one of norm, value and agc, not norm and value"),
        ({}, "give one of norm, value and agc, not none"),
        ({"value": 1.0, "agc_exclude": ["head.*"]}, "agc_exclude is for agc, which is not given"),
        (0.0, "clip.norm"),
        ({"agg": 0.1}, "unknown key clip.agg; did you mean agc?"),
    ],
)
def test_clipping_that_makes_no_sense_is_refused(clip: Any, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        validate(TrainingConfig, {"global_batch_size": 8, "micro_batch_size": 8, "clip": clip}, "test")


def test_a_number_is_the_limit_of_the_norm() -> None:
    settings = validate(TrainingConfig, {"global_batch_size": 8, "micro_batch_size": 8, "clip": 2}, "test")
    assert settings.clip == ClipConfig(norm=2.0)


@pytest.mark.parametrize(
    ("clip", "limit"),
    [
        ({"value": 1e-3}, lambda named: nn.utils.clip_grad_value_(named.values(), 1e-3)),
        ({"agc": 1e-2}, lambda named: timm.utils.adaptive_clip_grad(named.values(), 1e-2)),
        (
            {"agc": 1e-2, "agc_eps": 0.1, "agc_exclude": ["2.*"]},
            lambda named: timm.utils.adaptive_clip_grad([p for n, p in named.items() if n[0] != "2"], 1e-2, 0.1),
        ),
    ],
)
def test_a_run_clips_as_a_plain_loop(clip: dict[str, Any], limit: Callable[[dict[str, nn.Parameter]], None]) -> None:
    plain, optimizer = toys.MODELS["plain"](), toys.OPTIMIZERS["momentum"]
    trainer = Trainer(
        model=lambda: copy.deepcopy(plain),
        loss=toys.LOSSES["mse"],
        data=toys.Samples(),
        optimizer=optimizer,
        global_batch_size=8,
        micro_batch_size=8,
        clip=clip,
        observe={"progress": False},
    )
    trainer.fit(5)
    data, sampler, named = toys.Samples(), Sampler(toys.SAMPLES, 0, 8, 8), dict(plain.named_parameters())
    loop = optimizer(plain.parameters())
    for step in range(5):
        rows = [data[i] for i in sampler.indices(step, 0).tolist()]
        loop.zero_grad()
        toys.LOSSES["mse"](plain(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows])).backward()
        limit(named)
        loop.step()
    assert trainer.model is not None
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, named[name], rtol=1e-5, atol=1e-7)


def test_the_momentum_of_a_rate_that_changes_is_the_corrected_one() -> None:
    """Goyal et al., 2017, equations 9 and 10: where the rate lies inside the momentum, it has to be corrected by the
    ratio of rates; where it lies outside, as here and in torch's SGD, nothing has to be."""
    rates = [0.1 * (step + 1) for step in range(5)] + [0.05] * 5
    ours = nn.Parameter(torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    optimizer = LARS([ours], lr=1.0, momentum=0.9, trust_coefficient=0.01)
    w, v, before = ours.detach().clone(), torch.zeros(1, 2, dtype=torch.float64), rates[0]
    for step, rate in enumerate(rates):
        gradient = gradients(step)[0][:1, :2].contiguous()
        optimizer.param_groups[0]["lr"] = rate
        ours.grad = gradient
        optimizer.step()
        v = 0.9 * (rate / before) * v + rate * 0.01 * length(w) / (length(gradient) + 1e-8) * gradient
        w, before = w - v, rate
    torch.testing.assert_close(ours.detach(), w)
