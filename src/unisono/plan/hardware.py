"""Devices and the links between them, by the figures that their makers publish, and clusters described in a few words.

Rates are peaks: dense matrix products, without sparsity; bytes one way. What training reaches is another matter.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TypeVar

from unisono.errors import ConfigurationError

T = TypeVar("T")

GIB, GB, TB, TERA = 2**30, 10**9, 10**12, 10**12


@dataclass(frozen=True, slots=True)
class Device:
    """An accelerator.

    Attributes:
        name: as users write it.
        memory_bytes: of its own.
        memory_bytes_per_s: to and from that.
        half_flops: operations a second in 16 bits (bfloat16 where it has that), summed in 32.
        quarter_flops: in 8 bits; 0 where it has none for training.
        link: to its neighbours in a node (see `LINKS`).
        source: of the figures.
        node: devices that such links join, as they are sold.
    """

    name: str
    memory_bytes: int
    memory_bytes_per_s: float
    half_flops: float
    quarter_flops: float
    link: str
    source: str
    node: int = 8


@dataclass(frozen=True, slots=True)
class Link:
    """A way between devices.

    Attributes:
        bytes_per_s: of one device, one way.
        source: of the figure.
    """

    name: str
    bytes_per_s: float
    source: str


LINKS: Mapping[str, Link] = {
    link.name: link
    for link in (
        *(Link(f"nvlink{n}", rate * GB, f"NVIDIA NVLink generation {n}") for n, rate in ((2, 150), (3, 300), (4, 450))),
        Link("nvlink5", 900 * GB, "NVIDIA NVLink generation 5"),
        Link("infinity3", 300 * GB, "AMD, MI250 microarchitecture: 6 links of 50 GB/s one way"),
        Link("infinity4", 448 * GB, "AMD Instinct MI300X data sheet: 7 links of 128 GB/s both ways"),
        Link("ici4", 300 * GB, "Jouppi et al., TPU v4, ISCA 2023: 6 links of 50 GB/s one way"),
        Link("ici5p", 600 * GB, "Google Cloud, TPU v5p: 1,200 GB/s a chip, both ways"),
        *(
            Link(f"pcie{n}", rate * GB, f"PCI-SIG, x16 of generation {n}")
            for n, rate in ((3, 15.75), (4, 31.5), (5, 63))
        ),
        *(Link(f"ib{rate}", rate * GB / 8, "InfiniBand, one port a device") for rate in (100, 200, 400, 800)),
        *(Link(f"roce{rate}", rate * GB / 8, "RoCE, one port a device") for rate in (100, 200, 400)),
        *(Link(f"ethernet{rate}", rate * GB / 8, "one port a device") for rate in (1, 10, 25, 100)),
        Link("efa-p4d", 400 * GB / 8 / 8, "AWS p4d: 400 Gb/s for a node of 8"),
        Link("efa-p5", 3200 * GB / 8 / 8, "AWS p5: 3,200 Gb/s for a node of 8"),
    )
}
"""By name."""

DEVICES: Mapping[str, Device] = {
    device.name: device
    for device in (
        Device("V100-16", 16 * GIB, 0.9 * TB, 125 * TERA, 0, "nvlink2", "NVIDIA V100 data sheet (SXM2)"),
        Device("V100-32", 32 * GIB, 0.9 * TB, 125 * TERA, 0, "nvlink2", "NVIDIA V100 data sheet (SXM2)"),
        Device("A100-40", 40 * GIB, 1.555 * TB, 312 * TERA, 0, "nvlink3", "NVIDIA A100 data sheet (SXM4)"),
        Device("A100-80", 80 * GIB, 2.039 * TB, 312 * TERA, 0, "nvlink3", "NVIDIA A100 data sheet (SXM4)"),
        Device("H100", 80 * GIB, 3.35 * TB, 989.4 * TERA, 1978.9 * TERA, "nvlink4", "NVIDIA H100 data sheet (SXM5)"),
        Device(
            "H100-96", 96 * GIB, 2.4 * TB, 989.4 * TERA, 1978.9 * TERA, "nvlink4", "as torchtitan's benchmarks have it"
        ),
        Device("H100-PCIe", 80 * GIB, 2.0 * TB, 756 * TERA, 1513 * TERA, "pcie5", "NVIDIA H100 data sheet (PCIe)"),
        Device("H200", 141 * GIB, 4.8 * TB, 989.4 * TERA, 1978.9 * TERA, "nvlink4", "NVIDIA H200 data sheet (SXM)"),
        Device("B200", 180 * GIB, 8.0 * TB, 2250 * TERA, 4500 * TERA, "nvlink5", "NVIDIA DGX B200 data sheet, of 8"),
        Device("GB200", 186 * GIB, 8.0 * TB, 2500 * TERA, 5000 * TERA, "nvlink5", "NVIDIA GB200 NVL72", 72),
        Device("B300", 288 * GIB, 8.0 * TB, 2250 * TERA, 4500 * TERA, "nvlink5", "NVIDIA DGX B300 data sheet, of 8"),
        Device("GB300", 288 * GIB, 8.0 * TB, 2500 * TERA, 5000 * TERA, "nvlink5", "NVIDIA GB300 NVL72", 72),
        Device("MI250", 128 * GIB, 3.2768 * TB, 362.1 * TERA, 0, "infinity3", "AMD Instinct MI250 data sheet"),
        Device(
            "MI300X", 192 * GIB, 5.3 * TB, 1307.4 * TERA, 2614.9 * TERA, "infinity4", "AMD Instinct MI300X data sheet"
        ),
        Device("TPUv4", 32 * GIB, 1.2 * TB, 275 * TERA, 0, "ici4", "Jouppi et al., TPU v4, ISCA 2023", 4096),
        Device("TPUv5p", 95 * GIB, 2.765 * TB, 459 * TERA, 0, "ici5p", "Google Cloud, TPU v5p", 8960),
        Device("L4", 24 * GIB, 0.3 * TB, 121 * TERA, 242 * TERA, "pcie4", "NVIDIA L4 data sheet"),
        Device("T4", 16 * GIB, 0.3 * TB, 65 * TERA, 0, "pcie3", "NVIDIA T4 data sheet"),
        Device("4090", 24 * GIB, 1.008 * TB, 165.2 * TERA, 330.3 * TERA, "pcie4", "NVIDIA Ada GPU architecture paper"),
    )
}
"""By name."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """Equal devices in equal nodes.

    Attributes:
        devices: how many there are.
        node: devices of a node.
        within, between: the ways inside a node and from node to node.
        idle: further devices, of nodes that are smaller or larger than the others.
    """

    device: Device
    devices: int
    node: int
    within: Link
    between: Link
    idle: int = 0

    @property
    def nodes(self) -> int:
        """How many there are."""
        return self.devices // self.node

    def __str__(self) -> str:
        nodes = f"{self.nodes} nodes of {self.node}" if self.nodes > 1 else "one node"
        over = f", {self.between.name} between them" if self.nodes > 1 else ""
        idle = f", {self.idle} idle" if self.idle else ""
        return f"{self.devices} x {self.device.name} in {nodes} ({self.within.name} inside{over}{idle})"


def alone(device: Device) -> Cluster:
    """One of them."""
    return Cluster(device, 1, 1, LINKS[device.link], LINKS[FABRIC])


FABRIC = "ib400"
"""Between nodes, where nothing else is said."""
_FORM = re.compile(r"\s*([0-9]{1,9})\s*x\s*([\w.-]+?)\s*(?::\s*([0-9]{1,9}))?\s*(?:,\s*([\w.-]+))?\s*")


def cluster(text: str, more: Mapping[str, Device] | None = None) -> Cluster:
    """A cluster in words: ``128xH100``, ``64xA100-80:4``, ``16xV100-32:8,ethernet25``.

    >>> str(cluster("128xH100:8, ib400"))
    '128 x H100 in 16 nodes of 8 (nvlink4 inside, ib400 between them)'
    >>> str(cluster("4xL4"))
    '4 x L4 in one node (pcie4 inside)'

    Arguments:
        more: further devices by name.

    Raises:
        ConfigurationError: for words of another form, what is not known, or devices that make no whole nodes.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise ConfigurationError(
            f"the cluster is {text!r}; write COUNTxDEVICE[:DEVICES OF A NODE][,LINK BETWEEN NODES], for example "
            "64xH100:8,ib400"
        )
    own = device(found[2], more)
    count = int(found[1])
    node = int(found[3]) if found[3] else min(own.node, count)
    between = link(found[4] or FABRIC)
    if count < 1 or node < 1 or count % node:
        raise ConfigurationError(
            f"{count} devices make no whole nodes of {node}; say how many a node has, as in 12xH100:4, or describe "
            "uneven nodes in a YAML file"
        )
    return Cluster(own, count, node, LINKS[own.link], between)


def device(name: str, more: Mapping[str, Device] | None = None) -> Device:
    """One of `DEVICES`, or of others.

    Raises:
        ConfigurationError: where there is none.
    """
    return _known(name, {**DEVICES, **(more or {})}, "device")


def link(name: str) -> Link:
    """One of `LINKS`.

    Raises:
        ConfigurationError: where there is none.
    """
    return _known(name, LINKS, "link")


def _known(name: str, known: Mapping[str, T], what: str) -> T:
    by_lower = {key.lower(): value for key, value in known.items()}
    if name.lower() not in by_lower:
        begins = [key for key in known if key.lower().startswith(name.lower())]
        near = begins or [key for key in known if key.lower() in get_close_matches(name.lower(), by_lower, 1)]
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ConfigurationError(f"no {what} is known as {name!r}{hint}; use one of {', '.join(known)}")
    return by_lower[name.lower()]
