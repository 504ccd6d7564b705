"""Words of shared memory: an assignment is one aligned store, and the order of stores can be kept."""

import platform
import threading

WORD_BYTES = 8

_STRONG_ORDER = platform.machine().lower() in ("x86_64", "amd64", "i686", "i386")


def store_fence() -> None:
    """After this, stores made before are seen before stores made after. x86 keeps that order by itself."""
    if not _STRONG_ORDER:
        with threading.Lock():  # a lock's release and acquire are the portable barrier that Python has
            pass
