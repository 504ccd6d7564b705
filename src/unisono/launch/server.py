"""The fork server: one process that has imported torch and started no threads, from which workers are forked.

A worker forked from it begins in milliseconds and shares its memory. It reports every worker's end to the launcher, and
ends all of them, with their children, when the launcher is gone.
"""

import contextlib
import faulthandler
import gc
import importlib
import os
import select
import signal
import socket
import sys
from collections.abc import Sequence

from unisono.fault.stacks import STACKS_SIGNAL
from unisono.launch.control import Message, receive, send
from unisono.launch.process import die_with_parent, kill_group, tasks

IMPORTS = ("torch", "numpy", "unisono.tasks.job", "unisono.launch.worker")


class ForkServer:
    """Forks a worker for every request on a socket."""

    def __init__(self, launcher: socket.socket) -> None:
        self._launcher = launcher
        self._workers: dict[int, int] = {}  # process id -> rank
        self._wake_read, self._wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)

    def run(self) -> None:
        """Serve until the launcher closes its end."""
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)
        while True:
            ready, _, _ = select.select([self._launcher.fileno(), self._wake_read], [], [])
            if self._wake_read in ready:
                os.read(self._wake_read, 4096)
                self._reap()
            if self._launcher.fileno() in ready:
                message, descriptors = receive(self._launcher, 4)
                if message is None:
                    break
                if message["op"] == "preload":
                    self._preload(message["module"])
                    continue
                self._fork(message, descriptors)
        for process in self._workers:
            kill_group(process)

    def _tell(self, message: Message, descriptors: Sequence[int] = ()) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the launcher is gone; that is found next
            send(self._launcher, message, descriptors)

    def _preload(self, module: str) -> None:
        reply: Message = {"op": "preload", "module": module}
        try:
            importlib.import_module(module)
        except Exception as error:
            reply["error"] = f"{type(error).__name__}: {error}"
        self._tell(reply)

    def _fork(self, message: Message, descriptors: list[int]) -> None:
        count = tasks()
        if count != 1:
            self._tell({"op": "refused", "tasks": count})
            return
        server = os.getpid()
        process = os.fork()
        if process == 0:
            self._become_worker(server, message, descriptors)
        with contextlib.suppress(PermissionError, ProcessLookupError):  # the child did it first, or has ended
            os.setpgid(process, process)
        for descriptor in descriptors:
            os.close(descriptor)
        self._workers[process] = message["rank"]
        handle = os.pidfd_open(process)
        self._tell({"op": "forked", "rank": message["rank"], "pid": process}, [handle])
        os.close(handle)

    def _become_worker(self, server: int, message: Message, descriptors: list[int]) -> None:
        code = 1
        try:
            die_with_parent(server)
            os.setpgid(0, 0)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._launcher.close()
            os.close(self._wake_read)
            os.close(self._wake_write)
            control, output, errors, stacks = descriptors
            faulthandler.register(STACKS_SIGNAL, os.fdopen(stacks, "w", closefd=False), all_threads=True)
            os.dup2(output, 1)
            os.dup2(errors, 2)
            os.close(output)
            os.close(errors)
            from unisono.launch.worker import run

            code = run(control, message)
        finally:
            os._exit(code)

    def _reap(self) -> None:
        while self._workers:
            try:
                process, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            rank = self._workers.pop(process, None)
            if rank is not None:
                kill_group(process)
                self._tell({"op": "exited", "rank": rank, "pid": process, "status": status})


def main() -> None:
    """``python -m unisono.launch.server DESCRIPTOR PARENT``."""
    descriptor, parent = sys.argv[1:]
    die_with_parent(int(parent))
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    launcher = socket.socket(fileno=int(descriptor))
    launcher.set_inheritable(False)
    sys.path.insert(0, os.getcwd())
    for name in IMPORTS:
        importlib.import_module(name)
    gc.freeze()  # what is imported stays: workers need not look at it again, nor copy its pages
    send(launcher, {"op": "ready"})
    die_with_parent(int(parent), 0)  # from here on the closed socket tells, and workers are ended in order
    ForkServer(launcher).run()


if __name__ == "__main__":
    main()
