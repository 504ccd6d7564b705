"""Clusters that a YAML file describes, uneven ones too, and the machine that was measured here."""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from unisono.errors import ConfigurationError
from unisono.plan.hardware import GB, GIB, LINKS, TERA, Cluster, Device, Link, cluster, device, link

HERE = "here"
"""The device that ``unisono doctor --measure`` has stored."""
KEYS = ("device", "nodes", "within", "between")
DEVICE_KEYS = ("name", "memory_gib", "memory_gb_per_s", "tflops", "tflops_8bit", "link", "node")
LINK_KEYS = ("gb_per_s",)


def profile_path() -> Path:
    """Where a measured machine lies: in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(cache) / "unisono" / "machine.json"


def read_cluster(text: str) -> Cluster:
    """A cluster in words, in a YAML file, or ``2xhere``.

    Raises:
        ConfigurationError: for what is none of these.
    """
    if text.endswith((".yaml", ".yml")):
        return _of_file(Path(text))
    if f"x{HERE}" in text.replace(" ", ""):
        own, within = measured()
        found = cluster(text, {HERE: own})
        return replace(found, within=within or found.within)
    return cluster(text)


def measured() -> tuple[Device, Link | None]:
    """This machine, as it was measured, and the way between two of its workers.

    Raises:
        ConfigurationError: where it has not been.
    """
    path = profile_path()
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        passed = found.get("between_bytes_per_s")
        way = Link("shared memory", float(passed), str(path)) if passed else None
        return _own_device(found["device"], str(path)), way
    except OSError as error:
        raise ConfigurationError(
            f"there is no measured machine at {path}; make one with unisono doctor --measure"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(
            f"{path} holds no measured machine; make it anew with unisono doctor --measure"
        ) from error


def _of_file(path: Path) -> Cluster:
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"cannot read the cluster in {path}: {' '.join(str(error).split())}") from error
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{path} describes no cluster; give {', '.join(KEYS)}")
    if unknown := [key for key in found if key not in KEYS]:
        raise ConfigurationError(f"{path}: {unknown[0]!r} is no part of a cluster; use {', '.join(KEYS)}")
    nodes = found.get("nodes")
    sizes: list[int] = [nodes] if isinstance(nodes, int) else nodes if isinstance(nodes, list) else []
    if not sizes or not all(type(size) is int and size > 0 for size in sizes):
        raise ConfigurationError(f"{path}: nodes is {nodes!r}; give the devices of each node, for example [8, 8, 4]")
    if (given := found.get("device")) is None:
        raise ConfigurationError(f"{path}: device is missing; give a name such as H100, or {', '.join(DEVICE_KEYS)}")
    own = _own_device(given, str(path)) if isinstance(given, Mapping) else device(str(given))
    within = _link(found["within"], path) if "within" in found else LINKS[own.link]
    between = _link(found.get("between", "ib400"), path)
    node = max(sizes, key=lambda size: (size * sum(other >= size for other in sizes), size))
    used = node * sum(other >= node for other in sizes)
    return Cluster(own, used, node, within, between, idle=sum(sizes) - used)


def _own_device(found: Mapping[str, Any], where: str) -> Device:
    """A device by its figures."""
    if unknown := [key for key in found if key not in DEVICE_KEYS]:
        raise ConfigurationError(f"{where}: {unknown[0]!r} is no figure of a device; use {', '.join(DEVICE_KEYS)}")
    memory, rate, tflops = (_positive(found, key, where) for key in ("memory_gib", "memory_gb_per_s", "tflops"))
    eighth = _positive(found, "tflops_8bit", where) if found.get("tflops_8bit") else 0.0
    name, near = str(found.get("name", "own")), link(str(found.get("link", "pcie4"))).name
    node = round(_positive(found, "node", where)) if "node" in found else 8
    return Device(name, round(memory * GIB), rate * GB, tflops * TERA, eighth * TERA, near, where, node)


def _link(found: object, path: Path) -> Link:
    if isinstance(found, Mapping):
        if unknown := [key for key in found if key not in LINK_KEYS]:
            raise ConfigurationError(f"{path}: {unknown[0]!r} is no figure of a link; use {', '.join(LINK_KEYS)}")
        return Link("described", _positive(found, "gb_per_s", str(path)) * GB, str(path))
    return link(str(found))


def _positive(found: Mapping[str, Any], key: str, where: str) -> float:
    value = found.get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise ConfigurationError(f"{where}: {key} is {value!r}; give a number above 0")
    return float(value)
