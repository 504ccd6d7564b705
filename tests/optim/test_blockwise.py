"""Optimizers over blocks: torch's own, whole, in one process, is the reference, bit for bit."""

import pytest
import torch
from torch import nn

from tests import toys
from unisono.config import ScalingConfig, ScheduleConfig
from unisono.errors import ConfigurationError
from unisono.optim.classes import pin_variant, update_class
from unisono.optim.clipping import clip_factor, global_norm, squared_norms
from unisono.optim.fused import kernel
from unisono.optim.schedules import scale, schedule
from unisono.plan.assignment import UpdateClass
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer

ELEMENTWISE = [
    "sgd", "momentum", "adam", "adamw", "nadam", "radam", "adamax", "adadelta", "adagrad", "rmsprop", "rprop", "asgd",
]  # fmt: skip


def reference(model_name: str, optimizer_name: str, steps: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """The twenty lines that a user would write: one process, one micro-batch a step, the same samples."""
    with Isolation() as isolation:
        isolation.seed(derive(seed, "init"))
        model = toys.MODELS[model_name]()
    optimizer = toys.OPTIMIZERS[optimizer_name](model.parameters())
    pin_variant(optimizer, torch.device("cpu"))
    data, sampler = toys.Samples(), Sampler(toys.SAMPLES, seed, 8, 8)
    for step in range(steps):
        rows = [data[i] for i in sampler.indices(step, 0).tolist()]
        optimizer.zero_grad()
        toys.LOSSES["mse"](model(torch.stack([r[0] for r in rows])), torch.stack([r[1] for r in rows])).backward()
        optimizer.step()
    return dict(model.named_parameters())


def trainer_for(model_name: str, optimizer_name: str, seed: int = 0) -> Trainer:
    return Trainer(
        model=toys.MODELS[model_name],
        loss=toys.LOSSES["mse"],
        data=toys.Samples(),
        optimizer=toys.OPTIMIZERS[optimizer_name],
        global_batch_size=8,
        micro_batch_size=8,
        seed=seed,
        observe={"progress": False},
    )


@pytest.mark.parametrize("name", [*ELEMENTWISE, "adafactor", "muon", "lars", "lamb", "coupled"])
def test_blocks_do_what_the_whole_does(name: str) -> None:
    """A model with more than one block a parameter and no dropout, 5 steps: torch's optimizer on whole parameters.

    Not bit for bit: of a tensor whose size is no multiple of a vector, torch computes the rest by other instructions.
    """
    expected = reference("plain", name, 5)
    trainer = trainer_for("plain", name)
    trainer.fit(5)
    assert trainer.model is not None
    for key, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, expected[key], rtol=2e-5, atol=2e-7)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elements_do_not_depend_on_their_neighbours(name: str) -> None:
    """Four parameters updated apart or as one tensor, each padded to whole vectors: the same bits."""
    sizes = [64, 1024, 65_536, 320]
    torch.manual_seed(0)
    values, gradients = torch.randn(sum(sizes)), [torch.randn(sum(sizes)) for _ in range(4)]
    results = []
    for cut in ([sum(sizes)], sizes):
        parts = [nn.Parameter(part.clone()) for part in torch.split(values, cut)]
        optimizer = toys.OPTIMIZERS[name](parts)
        pin_variant(optimizer, torch.device("cpu"))
        for gradient in gradients:
            for part, g in zip(parts, torch.split(gradient, cut), strict=True):
                part.grad = g.clone()
            optimizer.step()
        results.append(torch.cat([part.detach() for part in parts]))
    assert torch.equal(*results)


@pytest.mark.parametrize("amsgrad", [False, True])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD])
def test_kernels_do_what_the_class_does(kind: type[torch.optim.Optimizer], amsgrad: bool) -> None:
    options = {"momentum": 0.9, "nesterov": True} if kind is torch.optim.SGD else {"amsgrad": amsgrad}
    a, b = nn.Parameter(torch.linspace(-1, 1, 1003)), nn.Parameter(torch.linspace(-1, 1, 1003))
    by_class = kind([a], lr=0.1, weight_decay=0.01, fused=True, **options)  # type: ignore[call-arg]
    directly = kind([b], lr=0.1, weight_decay=0.01, fused=True, **options)  # type: ignore[call-arg]
    for i in range(4):
        gradient = torch.sin(torch.arange(1003.0) * (i + 1))
        a.grad = gradient.clone()
        by_class.step()
        update = kernel(directly, directly.param_groups[0])
        assert update is not None
        if i == 0:  # the class makes its own state first
            b.grad = gradient.clone()
            directly.step()
        else:
            with torch.no_grad():
                update(directly.param_groups[0], b, gradient.clone(), directly.state[b])
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_known_optimizers_are_element_wise(name: str) -> None:
    assert update_class(toys.OPTIMIZERS[name]([nn.Parameter(torch.ones(2))])) is UpdateClass.ELEMENT


def test_unknown_and_subclassed_optimizers_are_coupled_unless_they_declare() -> None:
    class Mine(torch.optim.AdamW):
        pass

    parameters = [nn.Parameter(torch.ones(2))]
    assert update_class(Mine(parameters)) is UpdateClass.COUPLED
    Mine.update_class = "element-wise"  # type: ignore[attr-defined]
    assert update_class(Mine(parameters)) is UpdateClass.ELEMENT
    Mine.update_class = "elementary"  # type: ignore[attr-defined]
    with pytest.raises(ConfigurationError, match="'element-wise', 'per parameter', 'coupled'"):
        update_class(Mine(parameters))


@pytest.mark.parametrize(("name", "reason"), [("lbfgs", "closure"), ("sparse_adam", "sparse")])
def test_what_cannot_work_is_refused_with_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        trainer_for("mlp", name).fit(1)


def test_clipping_is_torchs() -> None:
    torch.manual_seed(0)
    gradients = [torch.randn(n) for n in (5, 1000, 70_000)]
    blocks = [b for g in gradients for b in torch.split(g, 65_536)]
    norm = global_norm(squared_norms(blocks))
    assert norm == pytest.approx(float(torch.nn.utils.get_total_norm(gradients)), rel=1e-6)
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for p, g in zip(parameters, gradients, strict=True):
        p.grad = g.clone()
    torch.nn.utils.clip_grad_norm_(parameters, 3.0)
    for p, g in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(p.grad, g * clip_factor(norm, 3.0))
    assert squared_norms([]) == []


def test_schedules_and_scaling() -> None:
    cosine = schedule(ScheduleConfig(name="cosine", warmup_steps=4, final=0.1), 104)
    assert [cosine(s) for s in (0, 1, 3)] == [0.25, 0.5, 1.0]
    assert cosine(54) == pytest.approx(0.55) and cosine(104) == pytest.approx(0.1) and cosine(999) == pytest.approx(0.1)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    torchs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=100, eta_min=0.1)
    for step in range(4, 104):
        assert cosine(step) == pytest.approx(torchs.get_last_lr()[0], abs=1e-9)
        optimizer.step()
        torchs.step()
    assert schedule(ScheduleConfig(), 10)(9) == 1.0
    assert scale(ScalingConfig(rule="linear", base_batch_size=32), 128) == 4.0
    assert scale(ScalingConfig(), 128) == 1.0
