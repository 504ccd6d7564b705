"""Compression: nothing is ever lost, sizes are as stated, and each method agrees with its publication."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests.comm.wires import in_threads, join
from unisono.comm.algorithms import Collective, drive
from unisono.comm.compression import CODECS, Cast, Compression, Quantized
from unisono.comm.network import NetworkWire
from unisono.comm.reductions import power_sgd, sharded, top_k
from unisono.launch.local import LocalLauncher

METHODS = (*CODECS, "top_k", "powersgd")
SHAPES = ((40, 50), (64, 33))
RANK = 3
SETTINGS = Compression("top_k", rank=RANK, density=0.05, momentum=0.0, seed=0)


@pytest.fixture(scope="module", params=[2, 3, 4])
def wires(request: pytest.FixtureRequest) -> Iterator[list[NetworkWire]]:
    members = join(request.param)
    yield members
    for wire in members:
        wire.close()


class Member:
    """One member's errors and bases, and how it sums a step by a method."""

    def __init__(self, wire: NetworkWire, method: str, shapes: tuple[tuple[int, int], ...] = SHAPES, rank: int = RANK):
        self.wire, self.method = wire, method
        self.errors = [torch.zeros(rows * columns) for rows, columns in shapes]
        generator = torch.Generator().manual_seed(9)
        self.bases = [torch.randn(columns, rank, generator=generator) for _, columns in shapes]
        self.velocities: list[Tensor] | None = None
        self.generator = torch.Generator().manual_seed(wire.rank)

    def sum(self, values: list[Tensor], settings: Compression = SETTINGS) -> list[Tensor]:
        values = [value.clone().view(-1) for value in values]
        drive(self._collective(values, settings), self.method)
        return values

    def _collective(self, values: list[Tensor], settings: Compression) -> Collective:
        if self.method == "top_k":
            return top_k(self.wire, values, self.errors, self.velocities, settings.density, settings.momentum, 0)
        if self.method == "powersgd":
            return power_sgd(self.wire, values, self.errors, self.bases, 0)
        return sharded(CODECS[self.method], self.wire, values, self.errors, 0, self.generator)


def gradients(members: int, step: int, scale: float = 1.0) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(step)
    return [[scale * torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(members)]


def together(members: list[Member], values: list[list[Tensor]]) -> list[list[Tensor]]:
    """Every member's sum of what all put in."""
    return in_threads(len(members), lambda rank: members[rank].sum(values[rank]))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_not_sent_is_kept(wires: list[NetworkWire], method: str) -> None:
    """The sums of all steps and the errors of all members are together what all members put in."""
    members = [Member(wire, method) for wire in wires]
    put_in, came_out = ([torch.zeros(shape).view(-1) for shape in SHAPES] for _ in range(2))
    for step in range(8):
        mine = gradients(len(wires), step)
        results = together(members, mine)
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True)), "members differ"
        for i in range(len(SHAPES)):
            put_in[i] += torch.stack([own[i].view(-1) for own in mine]).sum(0)
            came_out[i] += results[0][i]
    for i in range(len(SHAPES)):
        kept = torch.stack([member.errors[i] for member in members]).sum(0)
        torch.testing.assert_close(came_out[i] + kept, put_in[i], rtol=1e-4, atol=1e-4)
        assert method == "fp16" or float(kept.abs().max()) > 1e-4, "nothing was compressed"


@pytest.mark.parametrize("method", METHODS)
def test_bytes_are_as_stated(wires: list[NetworkWire], method: str) -> None:
    n = len(wires)
    members = [Member(wire, method) for wire in wires]
    before = [wire.sent_bytes for wire in wires]
    mine = gradients(n, 0)
    together(members, mine)
    sent = sum(wire.sent_bytes for wire in wires) - sum(before)
    elements = sum(rows * columns for rows, columns in SHAPES)
    each: float
    if method == "top_k":
        each = (n - 1) * 8 * sum(round(0.05 * rows * columns) for rows, columns in SHAPES)
    elif method == "powersgd":
        factors = 4 * RANK * sum(rows + columns for rows, columns in SHAPES)
        each = 2 * (n - 1) / n * factors
    else:
        per_element = {"bf16": 2, "fp16": 2, "int8": 1 + 4 / 512, "sign": 1 / 8 + 4 / 1024}[method]
        each = 2 * (n - 1) / n * elements * per_element
    assert sent == pytest.approx(n * each, rel=0.05)


@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=3000), st.sampled_from(sorted(CODECS)))
def test_codecs_take_any_values_and_any_length(values: list[float], name: str) -> None:
    codec, given_values = CODECS[name], torch.tensor(values, dtype=torch.float32)
    data = codec.encode(given_values, torch.Generator().manual_seed(0))
    assert data.dtype is torch.uint8 and data.numel() == codec.size_bytes(len(values))
    decoded = codec.decode(data, len(values))
    assert decoded.shape == given_values.shape and bool(torch.isfinite(decoded).all())


def test_casts_round_as_torch_does() -> None:
    values = torch.randn(5000, generator=torch.Generator().manual_seed(0))
    for codec in (Cast(torch.bfloat16), Cast(torch.float16)):
        data = codec.encode(values, torch.Generator())
        assert torch.equal(codec.decode(data, 5000), values.to(codec.dtype).float())


def test_quantization_is_unbiased() -> None:
    """The mean of many independent encodings is the value, within five standard errors of each element."""
    values = torch.randn(1500, generator=torch.Generator().manual_seed(0))
    values[100:110] = 0
    codec, generator, count = Quantized(), torch.Generator().manual_seed(1), 3000
    total = torch.zeros(1500, dtype=torch.float64)
    for _ in range(count):
        total += codec.decode(codec.encode(values, generator), 1500)
    step = torch.cat([chunk.abs().max().expand(chunk.numel()) for chunk in torch.split(values, 512)]) / 127
    standard_error = 0.5 * step / count**0.5  # a step's two neighbours, each with some probability
    assert bool(((total / count - values).abs() <= 5 * standard_error).all())


def published_power_sgd(
    matrices: list[Tensor], errors: list[Tensor], basis: Tensor
) -> tuple[Tensor, list[Tensor], Tensor]:
    """Algorithm 1 and 2 of Vogels et al., 2019, in one process: the mean, the new errors, the new basis."""
    inputs = [m + e for m, e in zip(matrices, errors, strict=True)]
    p = torch.stack([m @ basis for m in inputs]).mean(0)
    p, _ = torch.linalg.qr(p)
    each = [m.T @ p for m in inputs]
    q = torch.stack(each).mean(0)
    return p @ q.T, [m - p @ own.T for m, own in zip(inputs, each, strict=True)], q


def test_power_sgd_is_the_published_algorithm(wires: list[NetworkWire]) -> None:
    """Step by step, each in double precision from the state before it: the update, every member's error, the basis; and
    gradient = average + error."""
    n, shapes = len(wires), ((30, 20),)
    members = [Member(wire, "powersgd", shapes) for wire in wires]
    generator = torch.Generator().manual_seed(3)
    for _ in range(5):
        mine = [torch.randn(30, 20, generator=generator) for _ in range(n)]
        before = [member.errors[0].double().view(30, 20) for member in members]
        exactly = [matrix.double() for matrix in mine]
        expected, errors, basis = published_power_sgd(exactly, before, members[0].bases[0].double())
        found = together(members, [[own] for own in mine])[0][0].double().view(30, 20) / n
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
        for member, error in zip(members, errors, strict=True):
            torch.testing.assert_close(member.errors[0].double().view(30, 20), error, rtol=0, atol=2e-6)
            torch.testing.assert_close(member.bases[0].double() / n, basis, rtol=0, atol=2e-6)
        kept = torch.stack([member.errors[0].double().view(30, 20) for member in members]).mean(0)
        average = torch.stack([m + e for m, e in zip(exactly, before, strict=True)]).mean(0)
        torch.testing.assert_close(found + kept, average, rtol=0, atol=1e-6)


def test_power_sgd_at_full_rank_is_torchs_hook(pool: LocalLauncher) -> None:
    """Both give the mean itself."""
    results = pool.run({"call": "tests.jobs:full_rank_power_sgd", "arguments": {}}, 2, hosts=2).results
    for result in results:
        ours, torchs, mean = (torch.tensor(result[name]) for name in ("ours", "torch", "mean"))
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(ours, mean, rtol=1e-5, atol=1e-6)


def test_the_error_of_unlike_workers_stays_bounded() -> None:
    """800 steps of gradients whose directions differ from member to member, where a wrong rule grows without bound."""
    wires = join(2)
    generator = torch.Generator().manual_seed(0)
    own = [torch.randn(24, 16, generator=generator) for _ in wires]
    members = [Member(wire, "powersgd", ((24, 16),), rank=1) for wire in wires]
    norms: list[float] = []
    weights = [torch.zeros(24, 16) for _ in wires]

    def train(rank: int) -> None:
        for step in range(800):
            noise = 0.1 * torch.randn(24, 16, generator=torch.Generator().manual_seed(step * 2 + rank))
            total = members[rank].sum([weights[rank] - own[rank] + noise])[0].view(24, 16)
            weights[rank] -= 0.05 * total / 2
            if rank == 0:
                norms.append(float(members[0].errors[0].norm()))

    in_threads(2, train)
    for wire in wires:
        wire.close()
    assert max(norms[400:]) < 1.5 * max(norms[:400])
    assert torch.equal(weights[0], weights[1])


def test_a_sent_value_loses_its_velocity() -> None:
    """Deep gradient compression, one member's view: velocity and error go to zero where a value was sent, else grow."""
    wires = join(2)
    members = [Member(wire, "top_k", ((1, 4),)) for wire in wires]
    for member in members:
        member.velocities = [torch.zeros(4)]
    settings = Compression("top_k", rank=1, density=0.25, momentum=0.5, seed=0)
    value = torch.tensor([[4.0, 1.0, 0.0, 2.0]])
    first = in_threads(2, lambda rank: members[rank].sum([value], settings))
    assert first[0][0].tolist() == [8.0, 0.0, 0.0, 0.0]
    velocities: Any = members[0].velocities
    assert velocities[0].tolist() == [0.0, 1.0, 0.0, 2.0] and members[0].errors[0].tolist() == [0.0, 1.0, 0.0, 2.0]
    second = in_threads(2, lambda rank: members[rank].sum([value * 0], settings))
    assert second[0][0].tolist() == [0.0, 0.0, 0.0, 6.0]  # 2 + 0.5 * 2, from each
    assert velocities[0].tolist() == [0.0, 0.5, 0.0, 0.0]
    for wire in wires:
        wire.close()
