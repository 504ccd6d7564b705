"""Fixtures: one pool of workers for the whole suite, and a check that nothing is left behind."""

import os
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch

from unisono.launch.local import LocalLauncher

hypothesis.settings.register_profile("patient", deadline=None)  # other work on the machine is no defect
hypothesis.settings.load_profile("patient")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """References run with one thread, like a worker: threads change a result's last bits."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def pool() -> Iterator[LocalLauncher]:
    """A fork server that every test starts its workers from: torch is imported once."""
    with LocalLauncher() as launcher:
        launcher.preload(["torch._dynamo"])  # which pipelines and recomputation need: 0.8 s in every worker
        yield launcher
    assert children(os.getpid()) == [], "a test has left a process behind"


def children(parent: int) -> list[int]:
    """Processes whose parent is ``parent``."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == parent:
                found.append(int(entry.name))
    return found
