"""Workers start in milliseconds, fail once and clearly, and leave nothing behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import children
from unisono.errors import ConfigurationError, UnisonoError, WorkerFailed
from unisono.launch.local import LocalLauncher

ROOT = Path(__file__).parents[2]


def fail(pool: LocalLauncher, workers: int, **arguments: Any) -> Any:
    """A worker meets with a fault that the run is told not to survive."""
    arguments["fault"] = {"on_loss": "stop"}
    return pool.run({"call": "tests.jobs:fail", "arguments": arguments}, workers)


def alive(process: int) -> bool:
    try:
        return (Path(f"/proc/{process}/stat")).read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(process: int) -> list[int]:
    found = children(process)
    return [*found, *(d for child in found for d in descendants(child))]


def test_workers_know_their_place(pool: LocalLauncher) -> None:
    results = pool.run({"call": "tests.jobs:rank_and_world", "arguments": {}}, 3).results
    assert results == [[str(r), str(r), "3", "3"] for r in range(3)]


@pytest.mark.parametrize("phase", ["data", "compute", "reduce", "update", "wait"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_ends_the_others_clearly(pool: LocalLauncher, rank: int, phase: str) -> None:
    started = time.monotonic()
    with pytest.raises(WorkerFailed, match=rf"worker {rank} of 2 .* was killed by SIGKILL; the others have been ended"):
        fail(pool, 2, rank=rank, how="kill", phase=phase)
    assert time.monotonic() - started < 5
    until = time.monotonic() + 1
    while len(descendants(os.getpid())) > 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert len(descendants(os.getpid())) == 1  # the fork server


PIPELINE = {"pipeline": 2, "schedule": "zb_h1"}


@pytest.mark.parametrize("phase", ["compute", "wait", "update"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_worker_of_a_pipeline_ends_the_others_clearly(pool: LocalLauncher, rank: int, phase: str) -> None:
    with pytest.raises(WorkerFailed, match=rf"worker {rank} of 2 .* was killed by SIGKILL; the others have been ended"):
        fail(pool, 2, rank=rank, how="kill", phase=phase, layout=PIPELINE)


@pytest.mark.parametrize(
    ("rank", "expected"),
    [
        (0, r"worker 0 .* has made no progress for [12].\d s .*: compute of step 2, micro-batch 0, at .*jobs.py:\d+"),
        (1, r"worker 1 .* has made no progress for [12].\d s .*: compute of step 2, micro-batch 0, at .*jobs.py:\d+"),
    ],
)
def test_a_stage_that_hangs_is_named(pool: LocalLauncher, rank: int, expected: str) -> None:
    with pytest.raises(UnisonoError, match=expected):
        fail(pool, 2, rank=rank, how="sleep", deadline_s=1.0, layout=PIPELINE)


def test_an_exception_comes_once_with_rank_and_traceback(pool: LocalLauncher) -> None:
    with pytest.raises(WorkerFailed) as caught:
        fail(pool, 3, rank=1, how="raise")
    text = str(caught.value)
    assert text.startswith("worker 1 of 3 failed:\n") and text.count("RuntimeError: struck on purpose") == 1
    assert "tests/jobs.py" in text and "launch/worker.py" not in text and caught.value.exit_code == 1


def test_a_missing_worker_is_named_at_the_deadline(pool: LocalLauncher) -> None:
    named = r"worker 1 .* has made no progress for [12].\d s .*: compute of step 2, micro-batch \d, at .*jobs.py:\d+ in"
    with pytest.raises(UnisonoError, match=named):
        fail(pool, 2, rank=1, how="sleep", deadline_s=1.0)


def test_a_dataset_that_raises_names_worker_and_sample(pool: LocalLauncher) -> None:
    call = {"call": "tests.jobs:train", "arguments": {"fail_at": 17}}
    with pytest.raises(
        WorkerFailed, match=r"(?s)this sample is broken.*training dataset for sample 17 \(step \d+, micro"
    ):
        pool.run(call, 2)


@pytest.mark.parametrize("layout", [{}, PIPELINE], ids=["replicas", "a pipeline"])
def test_an_interrupted_run_stops_in_good_order(pool: LocalLauncher, tmp_path: Path, layout: dict[str, Any]) -> None:
    ending = fail(pool, 2, rank=1, how="interrupt", step=4, run_dir=str(tmp_path), layout=layout)
    assert [(r["step"], r["reason"]) for r in ending.results] in ([(4, "stopped")] * 2, [(5, "stopped")] * 2)
    assert (tmp_path / "checkpoints" / f"step-0000000{ending.results[0]['step']}").is_dir()


def test_a_workers_child_ends_with_it(pool: LocalLauncher) -> None:
    child = pool.run({"call": "tests.jobs:leave_child", "arguments": {}}, 1).results[0]
    until = time.monotonic() + 2
    while alive(child) and time.monotonic() < until:
        time.sleep(0.01)
    assert not alive(child)


def test_a_second_set_of_workers_starts_at_once(pool: LocalLauncher) -> None:
    started = time.monotonic()
    pool.run({"call": "tests.jobs:rank_and_world", "arguments": {}}, 4)
    assert time.monotonic() - started < 1.0


def test_what_cannot_be_preloaded_is_said(pool: LocalLauncher) -> None:
    with pytest.raises(ConfigurationError, match="preload: cannot import no_such_module"):
        pool.preload(["no_such_module"])


SCRIPT = """
import sys
sys.path.insert(0, {root!r})
from tests import jobs
result = jobs.trainer(model="norm", optimizer="momentum").fit(5)
sys.stdout.write(f"digest {{result.digest}}\\n")
"""


def digests(output: str) -> set[str]:
    return set(re.findall(r"digest ([0-9a-f]{64})", output))


def test_one_script_under_python_unisono_run_and_torchrun(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(root=str(ROOT)))
    commands = [
        [sys.executable, str(script)],
        [sys.executable, "-m", "unisono", "run", "-n", "2", str(script)],
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", str(script)],
    ]
    found = [subprocess.run(c, capture_output=True, text=True, timeout=120) for c in commands]
    assert all(done.returncode == 0 for done in found), [done.stderr for done in found]
    assert len(set().union(*(digests(done.stdout) for done in found))) == 1
    assert found[1].stdout.count("digest") == 1  # only rank 0 prints


def test_two_interrupts_end_at_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import os, pathlib, time\npathlib.Path(__file__).with_name(os.environ['RANK']).touch()\n"
        "while True:\n    try: time.sleep(60)\n    except BaseException: pass\n"
    )
    command = [sys.executable, "-m", "unisono", "run", "-n", "2", str(script)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    until = time.monotonic() + 20
    while not all((tmp_path / rank).exists() for rank in "01") and time.monotonic() < until:
        time.sleep(0.02)
    time.sleep(0.1)  # from the file to the loop
    below = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=5)
    assert process.returncode == 130 and "once more to stop at once" in errors
    assert not any(alive(p) for p in below)


@pytest.mark.parametrize("victim", ["launcher", "server", "worker"])
def test_nothing_is_left_when_a_process_is_killed(tmp_path: Path, victim: str) -> None:
    script = tmp_path / "script.py"
    script.write_text("import time\nprint('up', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "unisono", "run", "-n", "2", str(script)]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout is not None and process.stdout.readline() == "up\n"
    server = children(process.pid)[0]
    until = time.monotonic() + 10
    while len(workers := children(server)) < 2 and time.monotonic() < until:  # one may be up before the other begins
        time.sleep(0.02)
    assert len(workers) == 2
    below = descendants(process.pid)
    os.kill({"launcher": process.pid, "server": server, "worker": workers[1]}[victim], signal.SIGKILL)
    process.communicate(timeout=5)
    assert process.returncode != 0
    until = time.monotonic() + 2
    while any(alive(p) for p in below) and time.monotonic() < until:
        time.sleep(0.02)
    assert not any(alive(p) for p in below)
