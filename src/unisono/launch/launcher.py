"""The contract of whatever starts workers on this host, and the one that fits the system."""

import importlib
import os
import platform
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

from unisono.errors import ConfigurationError, LaunchError
from unisono.launch.control import Message
from unisono.launch.local import LocalLauncher
from unisono.launch.nodes import Nodes
from unisono.launch.task import STANDARD_OUTPUT, Elastic, Ending


class Launcher(Protocol):
    """Runs the same target in a number of workers; a context manager."""

    def __enter__(self) -> Self:
        """Ready to run."""

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End whatever was started."""

    def preload(self, modules: Sequence[str]) -> None:
        """Import modules of the user's before workers start."""

    def run(
        self,
        target: Message,
        workers: int,
        *,
        hosts: int = 1,
        together: int = 1,
        elastic: Elastic | None = None,
        show_all: bool = False,
        output: int = STANDARD_OUTPUT,
    ) -> Ending:
        """Run a target (see `LocalLauncher.run`) until all workers have ended."""


class SoloLauncher:
    """Runs one worker in this process, where several cannot share memory."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None

    def preload(self, modules: Sequence[str]) -> None:
        """Import the modules.

        Raises:
            ConfigurationError: where one cannot be imported.
        """
        for module in modules:
            try:
                importlib.import_module(module)
            except Exception as error:
                raise ConfigurationError(f"preload: cannot import {module}: {type(error).__name__}: {error}") from error

    def run(
        self,
        target: Message,
        workers: int,
        *,
        hosts: int = 1,
        together: int = 1,
        elastic: Elastic | None = None,
        show_all: bool = False,
        output: int = STANDARD_OUTPUT,
    ) -> Ending:
        """Run the target here.

        Raises:
            LaunchError: for more than one worker.
        """
        if workers != 1:
            raise LaunchError(
                f"{workers} workers share memory through memfd and pidfd, which {platform.system()} lacks; "
                "use one worker (-n 1)"
            )
        from unisono.launch.worker import perform

        return Ending([perform(target)])


def launcher(nodes: Nodes | None = None) -> Launcher:
    """Workers from a fork server where the system can share memory between them, else one in this process.

    Arguments:
        nodes: the launchers of other hosts, where the run spans several.

    Raises:
        LaunchError: for several hosts where the system has no fork server for workers.
    """
    if shares_memory():
        return LocalLauncher(nodes=nodes)
    if nodes is not None:
        raise LaunchError(f"several hosts need memfd and pidfd, which {platform.system()} lacks; use one worker (-n 1)")
    return SoloLauncher()


def shares_memory() -> bool:
    """Whether several workers can run on this system."""
    return hasattr(os, "memfd_create") and hasattr(os, "pidfd_open")
