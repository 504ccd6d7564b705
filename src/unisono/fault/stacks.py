"""Where a process is: its state, and the stacks of its threads, which its own fault handler writes when signalled.

The handler runs in the signal itself: neither an endless loop nor a blocked system call can hold it up.
"""

import contextlib
import os
import signal
import time
from pathlib import Path

STACKS_SIGNAL = signal.SIGUSR2
PATIENCE_S = 0.5
QUIET_S = 0.02


def state_of(process: int) -> str:
    """One letter, as /proc has it: R running, S asleep, D in the kernel, T stopped; empty where there is none."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def ask(handle: int) -> None:
    """Let a process write its stacks, to where its fault handler has been told."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(handle, STACKS_SIGNAL)


def answer(descriptor: int, start: int) -> str:
    """What has been written since ``start``, once nothing more comes."""
    until = time.monotonic() + PATIENCE_S
    size = os.fstat(descriptor).st_size
    while time.monotonic() < until:
        time.sleep(QUIET_S)
        before, size = size, os.fstat(descriptor).st_size
        if size > start and size == before:
            break
    return os.pread(descriptor, size - start, start).decode(errors="replace") if size > start else ""


def source_line(stacks: str) -> str:
    """The innermost line of the user's code on the main thread, which is written last; of any code where there is none.

    >>> source_line('Current thread 0x1 (most recent call first):\\n  File "/home/me/train.py", line 7 in collate')
    '/home/me/train.py:7 in collate'
    """
    lines = []
    for line in stacks.rpartition("hread 0x")[2].splitlines():
        path, separator, rest = line.strip().removeprefix('File "').partition('", line ')
        if separator:
            number, _, function = rest.partition(" in ")
            lines.append((path, f"{path}:{number} in {function}"))
    theirs = [text for path, text in lines if "/site-packages/" not in path and "/unisono/" not in path]
    return next(iter(theirs or [text for _, text in lines]), "")
