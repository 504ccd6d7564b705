"""The memory of runs: every byte of a run is copied aside and back, whatever its regions' sizes and distances."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from unisono.comm.arena import Region
from unisono.sync.ownership import _stripes

sizes = st.lists(st.sampled_from([8, 100, 512, 512, 512, 1024, 4096, 6144]), min_size=1, max_size=6)
gaps = st.lists(st.sampled_from([0, 64, 64, 512]), min_size=6, max_size=6)


@given(sizes, gaps)
def test_every_byte_is_copied_aside_and_back(sizes: list[int], gaps: list[int]) -> None:
    regions, at = [], 0
    for size, gap in zip(sizes, gaps, strict=False):
        regions.append(Region(at, size))
        at += -(-size // 64) * 64 + gap
    torch.manual_seed(0)
    memory = torch.randint(0, 256, (at,), dtype=torch.uint8)
    original, undo, used = memory.clone(), torch.zeros(2 * at, dtype=torch.uint8), 0
    pairs = []
    for stripes in _stripes(regions):
        packed = stripes.packed(undo[used : used + stripes.count * stripes.size_bytes])
        pairs.append((stripes.of(memory), packed))
        used += -(-stripes.count * stripes.size_bytes // 64) * 64
    assert sum(live.numel() * live.element_size() for live, _ in pairs) == sum(sizes)
    for live, packed in pairs:
        packed.copy_(live)
    for region in regions:
        memory[region.offset : region.offset + region.size_bytes] = 7
    for live, packed in pairs:
        live.copy_(packed)
    assert torch.equal(memory, original)


def test_values_and_state_of_a_run_are_one_copy() -> None:
    found = _stripes([Region(4096, 2048), Region(12288, 2048), Region(20480, 2048), Region(40000, 24)])
    assert [(s.count, s.distance) for s in found] == [(3, 8192), (1, 0)]
