"""``unisono bench recovery``: a worker of four is killed; how long until training goes on, what is computed again, what
is left out, and whether the result is that of an undisturbed run, beside torchrun and torchft.
"""

import importlib.util
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from unisono.bench import recovering
from unisono.bench.recovering import GROUP, LIGHTHOUSE, MICRO_BATCH, WAYS, WORKERS
from unisono.errors import ConfigurationError, WorkerFailed
from unisono.launch.nodes import free_port

STEPS, KILLED_AFTER = 40, 24
"""The worker is killed 4 steps after torchrun's newest checkpoint."""
VICTIM, SURVIVOR = 1, 0
HUB = -1
"""The number of torchft's lighthouse among what is started."""
DEADLINE_S = 180.0
LOOK_S = 0.002
END_S = 10.0
"""For what is still running to end when it is asked to."""


def available() -> list[str]:
    """The ways whose libraries are installed."""
    return [way for way in WAYS if way != "torchft" or importlib.util.find_spec(way)]


def bench(against: Sequence[str] | None, repeat: int, say: Callable[[str], None] | None) -> list[dict[str, Any]]:
    """Measure, interleaved; one row for each way.

    Raises:
        ConfigurationError: for a way that is not known or not installed.
    """
    names = available()
    if unknown := [name for name in against or () if name not in names]:
        raise ConfigurationError(f"--against {unknown[0]!r} is not known, or not installed; use {', '.join(names[1:])}")
    chosen = [name for name in names if against is None or name in (*against, "unisono")]
    chance = random.Random(0)
    undisturbed = {way: _run(way, None) for way in chosen}
    seen: dict[str, list[_Course]] = {way: [] for way in chosen}
    for _ in range(repeat):
        when = chance.random()  # within a step
        for way in chosen:
            seen[way].append(_run(way, when * undisturbed[way].step_s))
    rows = [_row(way, undisturbed[way], seen[way]) for way in chosen]
    for row in rows:
        if say is not None:
            say(as_text(row))
    return rows


@dataclass(frozen=True, slots=True)
class _Course:
    """What was noted in one run.

    Attributes:
        steps: what the survivor has noted: step, workers that contributed, and when it ended.
        killed_at: when the other was killed; None where nobody was.
        digest: of the parameters that the survivor ended with.
    """

    steps: list[tuple[int, int, float]]
    killed_at: float | None
    digest: str

    @property
    def step_s(self) -> float:
        """The median step."""
        times = [at for _, _, at in self.steps][5:]
        return median(b - a for a, b in itertools.pairwise(times))

    def pause_s(self, *, new: bool) -> float:
        """The longest time after the kill in which no step ended, or no ``new`` one."""
        assert self.killed_at is not None
        last, furthest, longest = self.killed_at, 0, 0.0
        for step, _, at in self.steps:
            counts = not new or step > furthest
            furthest = max(furthest, step)
            if at > self.killed_at and counts:
                last, longest = at, max(longest, at - last)
        return longest

    @property
    def steps_again(self) -> int:
        """That were trained more than once."""
        return len(self.steps) - len({step for step, _, _ in self.steps})

    @property
    def samples_left_out(self) -> int:
        """That no worker has trained on, in steps that ended without one, after the kill."""
        killed_at = self.killed_at or 0.0
        return sum((WORKERS - workers) * MICRO_BATCH for _, workers, at in self.steps if at > killed_at)


def _row(way: str, undisturbed: _Course, seen: Sequence[_Course]) -> dict[str, Any]:
    return {
        "way": way,
        "kills": len(seen),
        "step_s": round(undisturbed.step_s, 4),
        "next_step_s": round(median(course.pause_s(new=False) for course in seen), 3),
        "next_new_step_s": round(median(course.pause_s(new=True) for course in seen), 3),
        "longest_s": round(max(course.pause_s(new=True) for course in seen), 3),
        "steps_again": max(course.steps_again for course in seen),
        "samples_left_out": max(course.samples_left_out for course in seen),
        "same_bits": all(course.digest == undisturbed.digest for course in seen),
    }


def _run(way: str, kill_after_s: float | None) -> _Course:
    """Train once; a worker is killed so long after a step has ended."""
    killed_at = None
    with tempfile.TemporaryDirectory(prefix="unisono-bench-") as name, _started(way, Path(name)) as tend:
        directory, until = Path(name), time.monotonic() + DEADLINE_S
        while tend():
            if kill_after_s is not None and killed_at is None and _steps(directory) >= KILLED_AFTER:
                time.sleep(kill_after_s)
                killed_at = time.monotonic()
                os.kill(int((directory / f"process-{VICTIM}").read_text()), signal.SIGKILL)
            if time.monotonic() > until:
                raise WorkerFailed(f"{way} did not end within {DEADLINE_S:g} s")
            time.sleep(LOOK_S)
        lines = (directory / f"steps-{SURVIVOR}").read_text().splitlines()
        noted = [line.split() for line in lines]
        steps = [(int(step), int(workers), float(at)) for step, workers, at in noted]
        return _Course(steps, killed_at, (directory / f"digest-{SURVIVOR}").read_text())


def _steps(directory: Path) -> int:
    """The last step that the survivor has noted."""
    path = directory / f"steps-{SURVIVOR}"
    lines = path.read_text().splitlines() if path.exists() else []
    return int(lines[-1].split()[0]) if lines and lines[-1].count(" ") == 2 else 0


@contextmanager
def _started(way: str, directory: Path) -> Iterator[Callable[[], bool]]:
    """Start all of it; gives what is called again and again as long as it runs, and starts what has to be."""
    script = [recovering.__file__, way, str(directory), str(STEPS)]
    processes: dict[int, subprocess.Popen[bytes]] = {}
    log = (directory / "log").open("wb")

    def start(
        number: int, words: Sequence[str], environment: Mapping[str, str] | None = None, program: str = sys.executable
    ) -> None:
        given = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
        processes[number] = subprocess.Popen(
            [program, *words], stdout=log, stderr=subprocess.STDOUT, env=given, start_new_session=True
        )

    lighthouse = ""
    if way == "unisono":
        start(0, ["-m", "unisono", "run", "-n", str(WORKERS), *script])
    elif way == "torchrun":
        options = ["--standalone", "--nproc-per-node", str(WORKERS), "--max-restarts", "3"]
        start(0, ["-m", "torch.distributed.run", *options, *script])
    else:
        port = free_port("127.0.0.1")
        lighthouse = f"http://127.0.0.1:{port}"
        options = ["--bind", f"127.0.0.1:{port}", "--min_replicas", "1", "--join_timeout_ms", "10000"]
        start(HUB, options, program=str(Path(sys.executable).parent / "torchft_lighthouse"))

    def replica(number: int) -> None:
        start(number, script, {GROUP: str(number), LIGHTHOUSE: lighthouse})

    if lighthouse:
        for number in range(WORKERS):
            replica(number)

    def tend() -> bool:
        for number, process in list(processes.items()):
            code = process.poll()
            if code == -signal.SIGKILL and lighthouse:
                replica(number)  # what is left to whoever uses torchft
            elif code not in (None, 0):
                said = (directory / "log").read_text(errors="replace")[-2000:]
                raise WorkerFailed(f"{way} ended with exit code {code}:\n{said}")
        return any(process.poll() is None for number, process in processes.items() if number != HUB)

    try:
        yield tend
    finally:
        for process in processes.values():
            process.terminate()  # torchrun's workers are in sessions of their own, and ended by it alone
        for process in processes.values():
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        log.close()


def as_text(row: Mapping[str, Any]) -> str:
    """A row for a reader."""
    return (
        f"{row['way']:<9} {row['next_step_s']:.2f} s to the next step, {row['next_new_step_s']:.2f} s to the next new "
        f"one ({row['longest_s']:.2f} s at most of {row['kills']}), {row['steps_again']} steps again, "
        f"{row['samples_left_out']} samples left out, {'the same bits' if row['same_bits'] else 'OTHER BITS'}"
    )
