"""The memory model: activations beside what torch's profiler counts, and what a timetable keeps at once."""

import pytest
import torch
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from unisono.parallel.recompute import Recomputation, blocks
from unisono.plan.memory import Activations, ModelState, activations, most_activations, worker_memory
from unisono.plan.partition import divide
from unisono.plan.rehearsal import outline
from unisono.plan.schedule import SCHEDULES, timetable
from unisono.tasks.images import Images
from unisono.tasks.lm import GPT


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_activations_of_a_gpt_are_what_is_allocated(recompute: str) -> None:
    model = GPT(4, 128, 4, 64, 0.1, tied=True)
    tokens = torch.randint(0, 256, (4, 64))

    def forward() -> torch.Tensor:
        return F.cross_entropy(model(tokens).view(-1, 256), tokens.reshape(-1))

    found = outline(model, forward)
    again = blocks(model)
    predicted = activations(found, range(len(found.units)), recompute, again)
    wrapped = None if recompute == "none" else Recomputation(model, again, selective=recompute == "selective")
    forward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = forward()
    allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del loss
    if wrapped is not None:
        wrapped.close()
    assert predicted.kept_bytes == pytest.approx(allocated, rel=0.05)
    assert (predicted.again_bytes > 0) == (recompute != "none")


def test_a_convolutional_networks_activations_are_what_is_allocated() -> None:
    model, images = Images(width=32).model(), torch.randn(16, 1, 8, 8)
    found = outline(model, lambda: model(images).pow(2).mean())
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        loss = model(images).pow(2).mean()
    allocated = sum(event.self_cpu_memory_usage for event in profiled.key_averages())
    del loss
    predicted = activations(found, range(len(found.units)), "none", [])
    assert predicted.kept_bytes == pytest.approx(allocated, rel=0.1)


def test_stages_together_keep_what_the_whole_keeps() -> None:
    model = GPT(4, 32, 2, 16, 0.0, tied=False)
    tokens = torch.randint(0, 256, (2, 16))
    found = outline(model, lambda: model(tokens).mean())
    division = divide(found, 3)
    for recompute in ("none", "selective", "full"):
        again = blocks(model, division)
        parts = [activations(found, division.units(stage), recompute, again).kept_bytes for stage in range(3)]
        assert sum(parts) == activations(found, range(len(found.units)), recompute, again).kept_bytes


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_timetable_keeps_as_many_micro_batches_as_are_in_flight(schedule: str) -> None:
    p, m = 4, 12
    table = timetable(schedule, p, range(m), 2 if schedule == "interleaved" else 1)
    held = table.stages // p
    found = most_activations(table.workers[0], dict.fromkeys(range(table.stages), Activations(10)))
    assert found == 10 * {"gpipe": m, "1f1b": p, "zb_h1": p}.get(schedule, found // 10)
    assert found <= 10 * (2 * p if schedule == "zb_v" else 3 * p * held)


def test_a_block_that_is_computed_again_counts_once() -> None:
    actions = timetable("1f1b", 2, range(4)).workers[0]
    assert most_activations(actions, {0: Activations(10, 7)}) == 2 * 10 + 7


@pytest.mark.parametrize(("sharers", "partials"), [(1, 1), (2, 1), (4, 3)])
def test_model_state_of_adam_in_bytes_a_parameter(sharers: int, partials: int) -> None:
    """One copy for the workers of a host: (4 + 8) / n, and 4 for every live partial."""
    n = 1000
    found = worker_memory(
        ModelState(4 * n, 4 * n, 8 * n, 0, 0),
        sharers=sharers,
        partials=partials,
        activation_bytes=0,
        message_bytes=0,
    )
    assert found["parameters"] + found["optimizer"] + found["gradients"] == 12 * n // sharers + 4 * n * partials
