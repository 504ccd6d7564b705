"""Where workers cannot share memory, one runs in the process itself, and more are refused with the reason."""

import os

import pytest

from unisono.errors import ConfigurationError, LaunchError
from unisono.launch.launcher import SoloLauncher, launcher
from unisono.launch.local import LocalLauncher
from unisono.launch.runs import default_workers


def test_one_worker_runs_where_several_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "memfd_create")
    with launcher() as started:
        assert isinstance(started, SoloLauncher) and default_workers() == 1
        trained = started.run({"call": "tests.jobs:train", "arguments": {"steps": 2}}, 1)
        assert trained.results[0]["step"] == 2
        with pytest.raises(LaunchError, match=r"2 workers share memory through memfd .* use one worker \(-n 1\)"):
            started.run({"call": "tests.jobs:train", "arguments": {}}, 2)
        started.preload(["json"])
        with pytest.raises(ConfigurationError, match="cannot import no_such_module"):
            started.preload(["no_such_module"])


def test_workers_come_from_a_fork_server_on_linux() -> None:
    with launcher() as started:
        assert isinstance(started, LocalLauncher)
