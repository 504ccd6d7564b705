"""Shared memory without a file, as a descriptor that can be handed on. No torch here: launchers import this."""

import os
import platform

from unisono.errors import LaunchError


def create_descriptor(size_bytes: int) -> int:
    """A descriptor of ``size_bytes`` of shared memory; pages cost memory once they are touched.

    Raises:
        LaunchError: where the system has no ``memfd_create``.
    """
    if not hasattr(os, "memfd_create"):
        raise LaunchError(
            f"several workers share memory through memfd_create, which {platform.system()} lacks; use one worker (-n 1)"
        )
    descriptor = os.memfd_create("unisono-arena", os.MFD_CLOEXEC)
    os.ftruncate(descriptor, size_bytes)
    return descriptor
