"""Tensors between stages: values, strides and alignment as they were, memory used again, waits with deadlines."""

import pytest
import torch
from torch import Tensor

from tests.comm.test_host import PARTIALS
from unisono.comm.arena import Arena
from unisono.comm.forms import LINE_BYTES
from unisono.comm.host import HostGroup
from unisono.comm.host_layout import host_layout
from unisono.comm.passage import Passages
from unisono.comm.passage_layout import PassageLayout, Way
from unisono.errors import GroupError, WaitTimeout

LAYOUT = PassageLayout((3, 2), (20_000, 4_000))


def passages(replica: int = 0, deadline_s: float = 5.0) -> list[Passages]:
    """Both ends, over one arena."""
    layout = host_layout(2, 2, 4, PARTIALS.size_bytes, 64, 1, 64, passages=LAYOUT)
    arena = Arena(None, layout.size_bytes)
    members = [HostGroup(arena, layout, PARTIALS, slot, range(2), 1, deadline_s) for slot in range(2)]
    return [Passages(member, LAYOUT, replica) for member in members]


BASE = torch.arange(240.0)
TENSORS = {
    "dense": BASE.view(6, 40),
    "transposed": BASE.view(6, 40).t(),
    "channels last": BASE.view(2, 3, 5, 8).contiguous(memory_format=torch.channels_last),
    "a slice": BASE.view(6, 40)[:, 3:9],
    "a slice that spans more than a slot": torch.arange(40_000.0).view(4, 10_000)[:, 5:9],
    "an expanded one": BASE[:6].view(6, 1).expand(6, 5),
    "off a line": BASE[3:100],
    "a scalar": torch.tensor(3.5),
    "empty": torch.empty(0, 5),
    "whole numbers": torch.arange(7),
    "bf16": BASE.to(torch.bfloat16),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_as_it_was(name: str) -> None:
    """A kernel's last bits can depend on strides, and on where a tensor starts."""
    tensor = TENSORS[name]
    sender, receiver = passages()
    sender.send(0, Way.ACTIVATIONS, 1, 0, [tensor], [True])
    arrived = receiver.receive(0, Way.ACTIVATIONS, 1, 0)
    found = arrived.tensors[0]
    assert found is not None and found.dtype == tensor.dtype and arrived.needed == [True]
    assert torch.equal(found, tensor) and found.stride() == tensor.stride()
    if tensor.numel():
        assert found.data_ptr() % LINE_BYTES == tensor.data_ptr() % LINE_BYTES
    assert not found._is_view()


def test_what_is_not_there_arrives_as_nothing() -> None:
    sender, receiver = passages()
    sender.send(1, Way.GRADIENTS, 1, 0, [None, torch.ones(2)], [False, False])
    arrived = receiver.receive(1, Way.GRADIENTS, 1, 0)
    assert arrived.tensors[0] is None and torch.equal(arrived.tensors[1], torch.ones(2))  # type: ignore[arg-type]


def test_messages_do_not_mix_and_memory_is_used_again() -> None:
    """Both ways, both stages, out of order; a slot is free once what it held is released."""
    for replica, count in enumerate(LAYOUT.counts):
        sender, receiver = passages(replica)
        for step in range(1, 6):
            sent: dict[tuple[int, Way, int], Tensor] = {}
            for m in range(count):
                for stage in (0, 1):
                    for way in Way:
                        value = torch.full((9,), float(step * 1000 + m * 10 + stage * 2 + way))
                        sent[stage, way, m] = value
                        sender.send(stage, way, step, m, [value], [False])
            for (stage, way, m), value in reversed(sent.items()):
                arrived = receiver.receive(stage, way, step, m)
                assert torch.equal(arrived.tensors[0], value)  # type: ignore[arg-type]
                arrived.release()


def test_writing_to_one_leaves_the_others_alone() -> None:
    """What arrives has a version counter of its own: autograd compares it."""
    sender, receiver = passages()
    for m in range(2):
        sender.send(0, Way.ACTIVATIONS, 1, m, [torch.ones(4)], [False])
    first, second = (receiver.receive(0, Way.ACTIVATIONS, 1, m).tensors[0] for m in range(2))
    assert first is not None and second is not None
    before = second._version
    first.add_(1)
    assert second._version == before and torch.equal(second, torch.ones(4))


def test_a_message_that_is_larger_than_the_first_is_refused() -> None:
    sender, _ = passages()
    with pytest.raises(GroupError, match=r"stage 1 passes on .* in micro-batch 0 of step 1.*all have the same"):
        sender.send(1, Way.ACTIVATIONS, 1, 0, [torch.ones(5000)], [False])


def test_too_many_tensors_are_refused() -> None:
    sender, _ = passages()
    with pytest.raises(GroupError, match="stage 1 passes on 200 tensors"):
        sender.send(1, Way.ACTIVATIONS, 1, 0, [torch.ones(1, 1, 1)[:0]] * 200, [False] * 200)


def test_waiting_ends_with_the_stage_the_micro_batch_and_the_step() -> None:
    _, receiver = passages(deadline_s=0.2)
    with pytest.raises(WaitTimeout, match=r"activations of stage 0, micro-batch 2 of step 7, waited .*rank 0: "):
        receiver.receive(0, Way.ACTIVATIONS, 7, 2)
