"""A worker's life: its environment, the function or script it runs, and how its end is told."""

import atexit
import faulthandler
import importlib
import os
import runpy
import signal
import socket
import sys
import threading
import traceback
from collections.abc import Callable
from types import TracebackType
from typing import Any

from unisono.errors import GroupError, HostLeaves, RunOver, UnisonoError
from unisono.launch.control import CONTROL, LONGEST_MESSAGE_BYTES, Message, send


def resolve(path: str) -> Callable[..., Any]:
    """The function that ``package.module:name`` names."""
    module, _, name = path.partition(":")
    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    return function


def run(control: int, message: Message) -> int:
    """Do what a message of the launcher says; the exit code."""
    os.environ.update(message["environment"])
    os.environ[CONTROL] = str(control)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    faulthandler.enable()
    line = socket.socket(fileno=os.dup(control))
    try:
        value = perform(message["target"])
        send(line, {"op": "result", "value": value})
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 130
    except RunOver:  # it was to replace another, and was not needed any more
        code = 0
    except BaseException as error:
        code = _tell(line, error)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as the interpreter's own end does
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


def perform(target: Message) -> object:
    """Call the function, or run the script, that a target names; what it returns."""
    if "call" in target:
        return resolve(target["call"])(**target["arguments"])
    if target.get("backend") == "arena":
        from unisono.comm.registration import replace_gloo

        replace_gloo()
    sys.argv = [target["script"], *target["argv"]]
    sys.path[0] = os.path.dirname(os.path.abspath(target["script"]))
    runpy.run_path(target["script"], run_name="__main__")
    return None


def _users_part(error: BaseException) -> TracebackType | None:
    """The traceback from where the user's code begins: not how it was started."""
    trace = error.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename in (__file__, "<frozen runpy>", runpy.__file__):
        trace = trace.tb_next
    return trace or error.__traceback__


def _tell(line: socket.socket, error: BaseException) -> int:
    """Send an exception to the launcher: a sentence where it is ours, a traceback where it is the user's."""
    ours = isinstance(error, UnisonoError)
    text = str(error) if ours else "".join(traceback.format_exception(type(error), error, _users_part(error)))
    code = error.exit_code if isinstance(error, UnisonoError) else 1
    message = {
        "op": "error",
        "ours": ours,
        "consequence": isinstance(error, GroupError),
        "leaves": isinstance(error, HostLeaves),
        "kind": type(error).__name__,
        "text": text[-LONGEST_MESSAGE_BYTES // 4 :],
        "exit_code": code,
    }
    try:
        send(line, message)
    except OSError:
        print(text, file=sys.stderr)
    return code
