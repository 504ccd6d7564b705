"""Clusters in files, uneven ones, and the machine that was measured."""

import json
from pathlib import Path

import pytest

from unisono.errors import ConfigurationError
from unisono.plan.described import measured, profile_path, read_cluster
from unisono.plan.hardware import GB, GIB, TERA

ROOT = Path(__file__).parents[2]


def test_the_example_of_an_uneven_cluster() -> None:
    """Of 8, 8 and 4: two nodes of 8, and 4 devices idle; three nodes of 4 would be fewer."""
    found = read_cluster(str(ROOT / "configs" / "cluster.yaml"))
    assert (found.devices, found.node, found.idle) == (16, 8, 4)
    assert (found.device.memory_bytes, found.device.half_flops) == (96 * GIB, 990 * TERA)
    assert found.between.bytes_per_s == 25 * GB and found.within.name == "nvlink4"
    assert str(found).endswith("between them, 4 idle)")


@pytest.mark.parametrize(
    ("nodes", "used", "node", "idle"),
    [("[8, 8, 8]", 24, 8, 0), ("[8, 4, 4, 4]", 16, 4, 4), ("4", 4, 4, 0), ("[8, 1]", 8, 8, 1)],
)
def test_as_many_devices_as_make_equal_nodes(nodes: str, used: int, node: int, idle: int, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(f"device: H100\nbetween: ib200\nnodes: {nodes}\n")
    found = read_cluster(str(path))
    assert (found.devices, found.node, found.idle, found.between.name) == (used, node, idle, "ib200")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1]", "describes no cluster; give device, nodes, within, between"),
        ("device: H100\nnode: 8", "'node' is no part of a cluster"),
        ("device: H100", "nodes is None; give the devices of each node"),
        ("device: H100\nnodes: [8, 0]", "give the devices of each node"),
        ("device: H101\nnodes: [8]", "no device is known as 'H101'"),
        ("device: {memory_gib: 80}\nnodes: [8]", "memory_gb_per_s is None; give a number above 0"),
        ("device: {memory: 80}\nnodes: [8]", "'memory' is no figure of a device"),
        ("device: H100\nnodes: [8]\nbetween: {gb_per_s: 0}", "gb_per_s is 0; give a number above 0"),
        ("device: H100\nnodes: [8]\nbetween: string", "no link is known as 'string'"),
        ("nodes: [8]", "device is missing; give a name such as H100, or name, memory_gib"),
        ("device: {memory_gib: .nan, memory_gb_per_s: 1, tflops: 1}\nnodes: [8]", "memory_gib is nan; give a number"),
        ("device: H100\nnodes: [8]\nbetween: {gbps: 5}", "'gbps' is no figure of a link; use gb_per_s"),
        ("a: [", "cannot read the cluster in"),
    ],
)
def test_what_is_no_cluster_is_refused(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text(text)
    with pytest.raises(ConfigurationError, match=said):
        read_cluster(str(path))


def test_a_measured_machine_is_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ConfigurationError, match=r"there is no measured machine .* unisono doctor --measure"):
        measured()
    device = {"name": "here", "memory_gib": 12.0, "memory_gb_per_s": 10.0, "tflops": 0.1, "link": "pcie4"}
    profile_path().parent.mkdir()
    profile_path().write_text(json.dumps({"device": device | {"node": 2}, "between_bytes_per_s": 4e9}))
    found = read_cluster("2xhere")
    assert (found.devices, found.node, found.within.bytes_per_s) == (2, 2, 4e9)
    assert found.device.half_flops == pytest.approx(0.1 * TERA)
    profile_path().write_text("{}")
    with pytest.raises(ConfigurationError, match="holds no measured machine"):
        read_cluster("2xhere")
