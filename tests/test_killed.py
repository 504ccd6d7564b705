"""Runs killed at random moments leave no process, no shared memory, and nothing but intact checkpoints."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.launch.test_local import alive, descendants
from unisono.errors import CheckpointError
from unisono.state.checkpoint import DIRECTORY, path_of, remove_leftovers, steps_in, verify

CONFIG = """
task: images
options: {width: 8}
steps: 4000
global_batch_size: 28
micro_batch_size: 4
checkpoint: {every: 2, keep: 3}
observe: {tensorboard: false, report: false}
run_dir: run
fault: {on_loss: stop}
"""
RUNS = 20


def everything(root: Path) -> set[Path]:
    return {p.relative_to(root) for p in root.rglob("*")}


def test_twenty_runs_killed_at_random_moments(tmp_path: Path) -> None:
    """Launcher and workers in turn; half the runs go on from what the one before has left."""
    generator = random.Random(0)
    work, temporary = tmp_path / "work", tmp_path / "tmp"
    work.mkdir()
    temporary.mkdir()
    (work / "config.yaml").write_text(CONFIG)
    environment = {**os.environ, "TMPDIR": str(temporary), "HOME": str(temporary)}
    shared = set(os.listdir("/dev/shm"))
    saved, longest_s = 0, 60.0
    for number in range(RUNS):
        resume = bool(steps_in(work / "run" / DIRECTORY))
        command = [sys.executable, "-m", "unisono", "train", "config.yaml", "-n", "2", *["--resume"] * resume]
        process = subprocess.Popen(
            command, cwd=work, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        began = time.monotonic()
        if number == 0:  # how long it takes here until there is something to lose
            while not steps_in(work / "run" / DIRECTORY) and time.monotonic() - began < longest_s:
                time.sleep(0.02)
            longest_s = 1.2 * (time.monotonic() - began)
        else:
            time.sleep(generator.uniform(0.05, longest_s))
        below = descendants(process.pid)
        workers = [p for child in below for p in descendants(child)]
        victim = generator.choice(workers) if number % 2 and workers else process.pid
        os.kill(victim, signal.SIGKILL)
        if victim != process.pid:
            process.wait(timeout=10)
            assert process.returncode == 1
        until = time.monotonic() + 2
        while any(alive(p) for p in below) and time.monotonic() < until:
            time.sleep(0.02)
        process.wait()
        assert not any(alive(p) for p in below)
        assert set(os.listdir("/dev/shm")) == shared
        assert everything(temporary) == set()
        assert {p.name for p in work.iterdir()} <= {"config.yaml", "run"}
        assert len([p for p in everything(work / "run") if p.suffix == ".tmp"]) <= 1
        for step in steps_in(work / "run" / DIRECTORY):
            verify(path_of(work / "run" / DIRECTORY, step))
            saved += 1
    assert saved, "the runs were killed before they saved anything"
    remove_leftovers(work / "run" / DIRECTORY)
    assert not list((work / "run" / DIRECTORY).glob("*.tmp"))


def test_a_checkpoint_is_listed_only_when_it_is_whole(tmp_path: Path) -> None:
    path_of(tmp_path, 3).with_suffix(".tmp").mkdir()
    assert steps_in(tmp_path) == []
    path_of(tmp_path, 3).mkdir()
    try:
        verify(path_of(tmp_path, 3))
    except CheckpointError as error:
        assert "cannot read" in str(error)
