"""Packing without loss: the same bits, never much longer, shorter for gradients; and whether it is worth it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.comm.wires import in_threads, join
from unisono.comm.algorithms import ring, scattered
from unisono.comm.lossless import pack, packed_bytes, unpack
from unisono.comm.packing import LEAST_BYTES, Packed, Trial
from unisono.errors import GroupError

DTYPES = {torch.float32: 0.87, torch.bfloat16: 0.75, torch.float16: 0.95, torch.float64: 0.97}
"""With the part of its size that normal values are packed to, at most."""


@given(st.binary(min_size=8, max_size=4096), st.sampled_from(list(DTYPES)))
def test_any_bits_arrive(data: bytes, dtype: torch.dtype) -> None:
    """Also those of infinities, of every NaN and of -0.0; and no packed form needs more room than is given."""
    whole = data[: len(data) // dtype.itemsize * dtype.itemsize]
    values = torch.frombuffer(bytearray(whole), dtype=dtype)
    packed = pack(values)
    assert packed.numel() <= packed_bytes(values)
    room = torch.full((packed_bytes(values),), 255, dtype=torch.uint8)  # a message may be shorter than its room
    room[: packed.numel()] = packed
    result = torch.empty_like(values)
    unpack(room, result)
    assert torch.equal(result.view(torch.uint8), values.view(torch.uint8))


@pytest.mark.parametrize(("dtype", "part"), DTYPES.items())
def test_normal_values_get_shorter(dtype: torch.dtype, part: float) -> None:
    values = (1e-3 * torch.randn(100_000, generator=torch.Generator().manual_seed(0))).to(dtype)
    assert pack(values).numel() < part * values.nbytes


def test_zeros_get_much_shorter_and_noise_hardly_longer() -> None:
    assert pack(torch.zeros(80_000)).numel() < 0.79 * 4 * 80_000
    noise = torch.randint(0, 256, (80_000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert pack(noise.view(torch.float32)).numel() == packed_bytes(noise)


@pytest.mark.parametrize("damage", ["another plane", "a plane too short"])
def test_what_is_no_packed_tensor_is_refused(damage: str) -> None:
    packed = pack(torch.randn(5000, generator=torch.Generator().manual_seed(0)))
    if damage == "another plane":
        packed[8 + 3 * 5000 :] = 255
    with pytest.raises(GroupError, match="packed gradients"):
        unpack(packed, torch.empty(5000 if damage == "another plane" else 4000))


@pytest.mark.parametrize("on", [False, True])
def test_a_wire_that_packs(on: bool) -> None:
    """The same sums; large floating-point messages are shorter, all others as they were."""
    members = join(3)
    wires = [Packed(member) for member in members]

    def work(rank: int) -> list[torch.Tensor]:
        wires[rank].on = on
        generator = torch.Generator().manual_seed(rank)
        tensors = [torch.randn(60_000, generator=generator), torch.arange(9000), torch.full((10,), rank / 2)]
        plain = [tensor.clone() for tensor in tensors]
        for i, collective in enumerate((ring, scattered, scattered)):
            for wire, tensor in ((wires[rank], tensors[i]), (members[rank], plain[i])):
                for pending in collective(wire, tensor, 0):
                    pending.wait("a sum")
        assert all(torch.equal(a, b) for a, b in zip(tensors, plain, strict=True))
        return tensors

    results = in_threads(3, work)
    assert all(torch.equal(a, b) for result in results[1:] for a, b in zip(result, results[0], strict=True))
    saved = [wire.take_saved_bytes() for wire in wires]
    for wire in members:
        wire.close()
    assert all(0.1 < s / (4 / 3 * 240_000) < 0.2 for s in saved) if on else saved == [0, 0, 0]
    assert LEAST_BYTES < 240_000 / 3


def test_a_trial_takes_turns_and_keeps_to_the_quicker_way() -> None:
    for quicker in (False, True):
        trial, way, ways = Trial(), False, []
        for step in range(60):
            ways.append(way)
            slow_start = 50.0 if step < 2 else 0.0
            trial.note(way, 1.0 + slow_start + (0.1 if way != quicker else 0.0) + 0.01 * (step % 3))
            way = trial.wanted  # of the next step but none: it travels with a step
        assert set(ways[:12]) == {False, True}
        assert ways[14:] == [quicker] * 46


def test_a_trial_is_repeated_where_the_link_changes() -> None:
    trial, way = Trial(), False
    for step in range(int(2.5 * Trial.PERIOD)):
        better = step < 1.5 * Trial.PERIOD
        trial.note(way, 1.0 if way == better else 2.0)
        way = trial.wanted
    assert way is False
