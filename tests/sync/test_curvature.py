"""K-FAC in a run: the plain loop's steps on any workers, work shared out by its cost, and faults."""

import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests import toys
from tests.fault.test_recovery import struck
from tests.test_parity import train
from unisono.errors import ConfigurationError, UnisonoError
from unisono.launch.local import LocalLauncher
from unisono.optim import KFAC
from unisono.plan.assignment import UpdateClass, one_team, owners
from unisono.plan.blocks import CURVATURE, FlatLayout, ParameterSpec, TensorSpec, flat_layout
from unisono.plan.curvature import CurvedLayer, curved_layers, joined
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler
from unisono.trainer import Trainer

BATCH, STEPS = 12, 12


def images() -> nn.Module:
    """With a layer that is called twice, a bias of its own rate, and parameters that no curvature is learned of."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolution, self.norm = nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2)
            self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = torch.tanh(self.norm(self.convolution(x.view(-1, 1, 2, 3)))).flatten(1)
            output: torch.Tensor = self.head(torch.tanh(self.mix(torch.tanh(self.mix(y)))))
            return output

    return Twice().double()


SAMPLES = [(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))]
SWITCHES: dict[str, dict[str, Any]] = {
    "every step": {"inverse_every": 1},
    "in turns": {"factor_every": 2, "inverse_every": 4, "momentum": 0.0},
    "not limited": {"kl_clip": None, "lr": 0.02, "weight_decay": 0.1},
}


@pytest.mark.parametrize("name", SWITCHES)
@pytest.mark.parametrize("micro_batch", [12, 4])
def test_a_run_takes_the_steps_of_a_plain_loop(name: str, micro_batch: int) -> None:
    given: dict[str, Any] = {"lr": 0.1, "damping": 0.01, **SWITCHES[name]}

    def make(parameters: Any) -> KFAC:
        weights = list(parameters)
        return KFAC([{"params": weights[:1]}, {"params": weights[1:], "lr": given["lr"] / 2}], **given)

    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        model = images()
    optimizer = make(model.parameters()).watch(model)
    for step in range(STEPS):
        optimizer.zero_grad()
        for m in range(BATCH // micro_batch):
            rows = [SAMPLES[i] for i in Sampler(toys.SAMPLES, 0, BATCH, micro_batch).indices(step, m).tolist()]
            inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
            F.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad *= micro_batch / BATCH  # and not the loss, of which the curvature is
        optimizer.step()
    trainer = Trainer(
        model=images,
        loss=F.mse_loss,
        data=SAMPLES,
        optimizer=make,
        global_batch_size=BATCH,
        micro_batch_size=micro_batch,
        observe={"progress": False},
    )
    trainer.fit(STEPS)
    assert trainer.model is not None
    for (key, ours), theirs in zip(trainer.model.named_parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12, msg=key)


def test_a_layer_that_some_micro_batches_pass_by_is_learned_as_in_a_plain_loop() -> None:
    """Its curvature is the mean over those that came by."""

    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.sometimes = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.always(x)
            return y + self.sometimes(x) if float(x[0, 0]) > 0 else y

    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        model = Sometimes().double()
    optimizer = KFAC(model.parameters(), lr=0.1, kl_clip=None, damping=0.1, inverse_every=1).watch(model)
    came = 0
    for step in range(4):
        optimizer.zero_grad()
        for m in range(4):
            rows = [SAMPLES[i] for i in Sampler(toys.SAMPLES, 0, 8, 2).indices(step, m).tolist()]
            inputs, targets = (torch.stack(part) for part in zip(*rows, strict=True))
            came += float(inputs[0, 0]) > 0
            F.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad /= 4
        optimizer.step()
    assert 0 < came < 16
    trainer = Trainer(
        model=lambda: Sometimes().double(),
        loss=F.mse_loss,
        data=SAMPLES,
        optimizer=lambda p: KFAC(p, lr=0.1, kl_clip=None, damping=0.1, inverse_every=1),
        global_batch_size=8,
        micro_batch_size=2,
        observe={"progress": False},
    )
    trainer.fit(4)
    assert trainer.model is not None
    for ours, theirs in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_gradients_that_are_not_finite_are_told_of(pool: LocalLauncher) -> None:
    with pytest.raises(UnisonoError, match=r"the curvature of .* is not finite, since gradients of"):
        train(pool, 2, model="mlp", optimizer="kfac", loss="not_smooth")


def test_what_it_learned_is_kept_out_of_the_model(tmp_path: Any) -> None:
    trainer = Trainer(
        model=lambda: nn.Linear(6, 4),
        loss=F.mse_loss,
        data=toys.Samples(),
        optimizer=lambda p: KFAC(p),
        global_batch_size=8,
        micro_batch_size=4,
        observe={"progress": False},
        run_dir=str(tmp_path),
    )
    trainer.fit(3)
    assert isinstance(trainer.model, nn.Linear) and list(trainer.model.state_dict()) == ["weight", "bias"]
    again = Trainer(
        model=lambda: nn.Linear(6, 4),
        loss=F.mse_loss,
        data=toys.Samples(),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.0),
        global_batch_size=8,
        micro_batch_size=4,
        observe={"progress": False},
        start_from=str(tmp_path / "checkpoints" / "step-00000003"),
    )
    again.fit(1)
    assert again.model is not None
    assert all(torch.equal(a, b) for a, b in zip(again.model.parameters(), trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("moment", ["backward", "reduce", "mid-reduce", "mid-numbers", "mid-update", "mid-commit"])
@pytest.mark.parametrize(("rank", "layout"), [(0, {}), (2, {}), (1, {"data": 2, "pipeline": 2})])
def test_a_worker_is_killed(pool: LocalLauncher, rank: int, layout: dict[str, Any], moment: str) -> None:
    """(rank, step 5, where its curvature is decomposed): SIGKILL; the bits of an undisturbed run."""
    workers = 4 if layout else 3
    struck(pool, workers, (rank, 5, moment), layout=layout, model="mlp", optimizer="kfac", clip=0.5)


def test_a_worker_that_hangs_is_ended(pool: LocalLauncher, capfd: pytest.CaptureFixture[str]) -> None:
    """(rank 1 of 3, step 5, between its directions): SIGSTOP; the others go on, with the same bits."""
    struck(pool, 3, (1, 5, "mid-numbers"), model="mlp", optimizer="kfac", how="stop", deadline_s=1.0)
    assert "worker 1" in (said := capfd.readouterr().err) and "has made no progress" in said


def test_two_are_killed_at_once(pool: LocalLauncher) -> None:
    """(ranks 0 and 2 of 4, step 5): between what they learn and what they turn, and in the middle of a commit."""
    for moments in (("mid-numbers", "mid-numbers"), ("mid-update", "mid-numbers"), ("mid-commit", "mid-reduce")):
        faults = ((0, 5, moments[0]), (2, 5, moments[1]))
        struck(pool, 4, *faults, model="mlp", optimizer="kfac")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"layout": {"tensor": 2}},
            "KFAC and layout.tensor 2 do not go together: it needs a layer's inputs and outputs",
        ),
        ({"sync": {"mode": "local", "period": 2, "replicas": 7}}, "KFAC and sync.mode local do not go together"),
        ({"layout": {"pipeline": 2}, "loss": "weighted"}, "the loss has the weight .*; return a mean, or leave layout"),
        (
            {"model": "normed", "layout": {"pipeline": 2, "cuts": ["2"]}, "loss": "weighted"},
            "the loss has the weight .*; return a mean, or leave layout",
        ),
        ({"wire": {"compression": "bf16"}}, "KFAC and wire.compression bf16 do not go together"),
    ],
    ids=["tensor", "local", "weighted", "weighted, nothing learned in the last stage", "compressed"],
)
def test_what_it_does_not_go_with_is_refused(pool: LocalLauncher, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnisonoError, match=message) as raised:
        train(pool, 2, **{"model": "mlp", "optimizer": "kfac", **options})
    assert raised.value.exit_code == 2


def test_hosts_that_share_a_state_are_refused(pool: LocalLauncher) -> None:
    with pytest.raises(UnisonoError, match=r"KFAC and layout\.zero 1 do not go together: hosts do not share"):
        train(pool, 2, 2, model="mlp", optimizer="kfac", layout={"zero": 1})


def test_initial_values_by_name(pool: LocalLauncher) -> None:
    expected = train(pool, 1, model="mlp", optimizer="kfac", init="by_name")["digest"]
    assert train(pool, 3, model="mlp", optimizer="kfac", init="by_name")["digest"] == expected


def layout_of(sides: list[tuple[int, int]]) -> FlatLayout:
    """Linear layers (inputs, outputs) with a bias, and their curvature."""
    specs = []
    for i, (n, m) in enumerate(sides):
        specs += [
            ParameterSpec(TensorSpec(f"{i}.{key}", "float32", shape), (f"{i}.{key}",), 0)
            for key, shape in (("weight", (m, n)), ("bias", (m,)))
        ]
    for i, (n, m) in enumerate(sides):
        for key, side in (("inputs", n + 1), ("outputs", m)):
            name = f"{CURVATURE}{i}.{key}"
            specs.append(ParameterSpec(TensorSpec(name, "float32", (side, side)), (name,), 1))
    return flat_layout(joined(specs))


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_second_order_work_is_shared_out(workers: int) -> None:
    """The digits model: at most 1.1 times what cannot be less, as counted from what each worker owns."""
    flat = layout_of([(64, 128), (128, 10)])
    shares = owners(flat, UpdateClass.PARAMETER, [range(workers)], one_team(flat, 0))
    assert sorted(i for share in shares for i in share) == list(range(len(flat.blocks)))
    cubes = {p: spec.tensor.shape[0] ** 3 for p, spec in enumerate(flat.parameters) if spec.is_factor}
    of_worker = [sum(cubes.get(p, 0) for p in {flat.blocks[i].parameter for i in share}) for share in shares]
    total = sum(cubes.values())
    assert sum(of_worker) == total
    assert max(of_worker) / total <= 1.1 * max(1 / workers, max(cubes.values()) / total)


def test_a_layer_has_one_owner() -> None:
    flat = layout_of([(300, 300), (5, 2)])
    for workers in (2, 3, 4):
        shares = owners(flat, UpdateClass.PARAMETER, [range(workers)], one_team(flat, 0))
        for layer in curved_layers(flat):
            blocks = {*flat.blocks_of(layer.weight), *flat.blocks_of(layer.bias or 0)}
            assert sum(bool(blocks & set(share)) for share in shares) == 1
    assert curved_layers(flat)[1] == CurvedLayer(2, 3, 6, 7)


def test_a_bias_apart_from_its_weight_is_refused() -> None:
    def spec(name: str, shape: tuple[int, ...]) -> ParameterSpec:
        return ParameterSpec(TensorSpec(name, "float32", shape), (name,), 0)

    names = [("a.weight", (2, 2)), ("b", (1,)), ("a.bias", (2,)), (f"{CURVATURE}a.inputs", (3, 3))]
    with pytest.raises(ConfigurationError, match="the bias of a does not follow its weight"):
        joined([spec(name, shape) for name, shape in names])


def test_the_definition_of_a_run_has_its_settings(pool: LocalLauncher, tmp_path: Any) -> None:
    """A resume with another damping is said."""
    train(pool, 1, steps=2, model="mlp", optimizer="kfac", run_dir=str(tmp_path))
    manifest = json.loads(next((tmp_path / "checkpoints").glob("*/manifest.json")).read_text())
    assert '"damping": 0.01' in json.dumps(manifest)
