"""Devices, clusters in words, and what no layout gets below."""

import json
import subprocess
import sys

import pytest

from unisono.errors import ConfigurationError
from unisono.plan.bounds import Bounds
from unisono.plan.hardware import DEVICES, GB, LINKS, cluster
from unisono.plan.transformer import NAMED


@pytest.mark.parametrize("name", DEVICES)
def test_every_device_has_figures_with_a_source(name: str) -> None:
    device = DEVICES[name]
    assert device.source and device.link in LINKS and LINKS[device.link].source
    assert device.memory_bytes >= 16 << 30 and device.memory_bytes_per_s >= 300 * GB
    assert device.quarter_flops == 0 or device.quarter_flops == pytest.approx(2 * device.half_flops, rel=2e-3)


def test_a_cluster_in_words() -> None:
    found = cluster(" 16 x v100-32 : 4 , ethernet25 ")
    assert (found.device.name, found.devices, found.node, found.nodes, found.between.name) == (
        "V100-32",
        16,
        4,
        4,
        "ethernet25",
    )
    assert found.between.bytes_per_s == 25e9 / 8
    assert cluster("4xL4").nodes == 1 and cluster("64xH100").node == 8


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("H100", "the cluster is 'H100'; write COUNTxDEVICE"),
        ("8xH101", r"no device is known as 'H101'; did you mean H100\?"),
        ("8xA100", r"no device is known as 'A100'; did you mean A100-40 or A100-80\?"),
        ("8xH100,ib4000", "no link is known as 'ib4000'"),
        ("0xH100", "0 devices make no whole nodes"),
        ("12xH100:8", "12 devices make no whole nodes of 8"),
    ],
)
def test_a_cluster_that_cannot_be_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        cluster(text)


def test_a_state_needs_as_many_devices_as_hold_it() -> None:
    """Sixteen bytes a parameter; 175 billion: 2.8 TB, as Rajbhandari et al. say of a trillion: 16 TB."""
    model = NAMED["gpt:1t"]
    assert Bounds(model, 2048).state_bytes == 16 * model.parameters == pytest.approx(16e12, rel=0.01)
    enough, few = (Bounds(model, 2048, cluster(f"{count}xA100-80:1")) for count in (188, 187))
    assert enough.devices == few.devices == 188
    assert enough.fits and not few.fits and "187 cannot train it, however they divide it" in few.as_text()


def test_operations_at_peak_bound_the_throughput() -> None:
    """Narayanan et al., 2021: 3,072 A100 at 163 of 312 TFLOP/s train the trillion; at peak it is 312/163 as fast."""
    bounds = Bounds(NAMED["gpt:1t"], 2048, cluster("3072xA100-80"))
    assert bounds.tokens_per_s == pytest.approx(3072 * 312e12 / bounds.flops_per_token)
    assert Bounds(NAMED["gpt:1t"], 2048).tokens_per_s is None
    assert cluster("144xGB200").node == 72 and cluster("64xTPUv4").nodes == 1


def test_the_command_says_so() -> None:
    words = [sys.executable, "-m", "unisono", "plan", "llama3:8b", "--cluster", "8xH100", "--tokens", "8192"]
    said = subprocess.run([*words, "--json"], capture_output=True, text=True, check=True, timeout=60).stdout
    assert json.loads(said)["parameters"] == 8_030_261_248 and json.loads(said)["devices_at_least"] == 2
    text = subprocess.run(words, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "8.03 billion parameters" in text and "the state alone takes 2 of them" in text
    divided = [*words[:4], "gpt:22b", "tensor=8", "micro_batch=4", "recompute=selective", "sequence=true"]
    text = subprocess.run(divided, capture_output=True, text=True, check=True, timeout=60).stdout
    assert "each of 8 devices needs, in sequences of 2048:" in text and "activations 9.6 GiB" in text
    long = subprocess.run([*words[:4], "gpt:22b", "--tokens", "4096"], capture_output=True, text=True, timeout=60)
    assert long.returncode == 2 and "--tokens is 4096, and gpt:22b has 2048 positions" in long.stderr
    wrong = subprocess.run([*words[:5], "layout.zero=1"], capture_output=True, text=True, timeout=60)
    assert wrong.returncode == 2 and "'layout.zero' is no part of a division" in wrong.stderr
