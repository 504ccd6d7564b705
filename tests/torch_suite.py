"""PyTorch's own tests of torch.distributed, which ship in its wheel, on a backend of choice.

python -m tests.torch_suite --ranks 2 compares the arena with gloo: every test that gloo passes must pass. The arena
answers to gloo's name there, since many tests are only for backends whose names they know. Tests run in processes
forked from one that has imported torch: the whole suite takes minutes a backend, not hours.
"""

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Sequence
from typing import Any

SECONDS_A_TEST = 100


def run(backend: str, ranks: int, names: Sequence[str]) -> dict[str, str]:
    """Outcome by test name: "passed", "skipped: reason", or the first line of what failed."""
    os.environ.update(BACKEND="gloo", WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    os.environ.setdefault("TEMP_DIR", tempfile.mkdtemp(prefix="torch-suite-"))
    import torch

    torch.set_num_threads(1)
    from torch.testing._internal import common_distributed
    from torch.testing._internal.distributed import distributed_test as suite

    if backend == "arena":  # under gloo's name: many tests are only for backends that they know
        from unisono.comm.registration import replace_gloo

        replace_gloo()
    common_distributed.TIMEOUT_DEFAULT = SECONDS_A_TEST

    class Tests(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
        def setUp(self) -> None:
            super().setUp()  # type: ignore[no-untyped-call]
            self._start_processes(multiprocessing.get_context("fork").Process)

    known = [name for name in dir(Tests) if name.startswith("test_")]
    outcomes: dict[str, str] = {}
    for name in names or known:
        result = unittest.TestResult()
        started = time.monotonic()
        Tests(name).run(result)  # type: ignore[no-untyped-call]
        outcomes[name] = _outcome(result)
        print(f"{time.monotonic() - started:6.1f} s  {name}: {outcomes[name][:150]}", file=sys.stderr, flush=True)
    return outcomes


def _outcome(result: unittest.TestResult) -> str:
    if result.skipped:
        return f"skipped: {result.skipped[0][1]}"
    problems = result.errors + result.failures
    if problems:
        lines = [line for line in problems[0][1].strip().splitlines() if line.strip()]
        telling = [line for line in lines if "Error" in line or "exit" in line.lower()]
        return (telling or lines)[-1].strip()
    return "passed"


def compare(ranks: int, names: Sequence[str]) -> dict[str, Any]:
    """Run gloo and the arena, each in a process of its own; what gloo passes and the arena does not."""
    found = {}
    for backend in ("gloo", "arena"):
        with tempfile.NamedTemporaryFile() as file:  # tests print what they like
            words = ["--ranks", str(ranks), "--backend", backend, "--output", file.name, *names]
            subprocess.run([sys.executable, "-m", "tests.torch_suite", *words], check=True, stdout=subprocess.DEVNULL)
            found[backend] = json.loads(file.read())
    passed = [name for name, outcome in found["gloo"].items() if outcome == "passed"]
    return {
        "ranks": ranks,
        "gloo_passes": len(passed),
        "arena_passes": sum(found["arena"][name] == "passed" for name in passed),
        "differences": {name: found["arena"][name] for name in passed if found["arena"][name] != "passed"},
    }


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--backend", help="run this one alone, and print outcomes")
    parser.add_argument("--output", help="write outcomes into this file")
    parser.add_argument("names", nargs="*", help="tests; default: all")
    wanted = parser.parse_args()
    if wanted.backend:
        outcomes = run(wanted.backend, wanted.ranks, wanted.names)
        with open(wanted.output or "/dev/stdout", "w") as file:
            json.dump(outcomes, file, indent=1)
    else:
        print(json.dumps(compare(wanted.ranks, wanted.names), indent=1))


if __name__ == "__main__":
    main()
