"""One result in every layout: all pairs of settings, through the command."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import all_pairs

ROOT = Path(__file__).parents[1]
GPT = ["options.layers=8", "options.width=32", "options.heads=2", "options.context=32", "options.tied=true"]
RUNS = {
    "a narrow GPT: dropout, clipping, accumulation, tied embeddings": ["configs/lm.yaml", *GPT],
    "a network with BatchNorm": ["configs/images.yaml", "options.width=4"],
}


def verify(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "unisono", "verify", *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)


def test_the_file_of_layouts_holds_all_pairs() -> None:
    assert all_pairs.FILE.read_text(encoding="utf-8") == all_pairs.text(), "run python -m tests.all_pairs"


@pytest.mark.parametrize("run", RUNS, ids=lambda name: name)
def test_one_result_in_every_layout(run: str) -> None:
    done = verify(*RUNS[run], "--layouts", str(all_pairs.FILE), "--steps", "3", "--json")
    assert done.returncode == 0, done.stderr + done.stdout
    report = json.loads(done.stdout)
    lines = [line for line in all_pairs.FILE.read_text().splitlines() if not line.startswith("#")]
    assert report["equal"] and list(report["digests"]) == lines


@pytest.mark.parametrize("hosts", [2, 3])
def test_one_result_of_layouts_on_several_hosts(hosts: int) -> None:
    done = verify("configs/lm.yaml", *GPT, "--layouts", "configs/hosts.txt", "--hosts", str(hosts), "--steps", "3")
    assert done.returncode == 0, done.stderr + done.stdout
    lines = done.stdout.splitlines()
    on = "on up to 2 hosts" if hosts == 2 else "on up to 3 hosts"
    assert on in lines[-1] and "one result for each of 3 ways of dividing layers" in lines[-1]
    assert sum(line.startswith("data=2 tensor=2 on one host:") for line in lines) == 1
    assert any(line.startswith(f"data=3 pipeline=2 schedule=zb_v on {hosts} hosts:") for line in lines)


def test_layouts_without_replicas_cannot_be_spread(tmp_path: Path) -> None:
    file = tmp_path / "layouts.txt"
    file.write_text("data=1\npipeline=2\n")
    done = verify("configs/lm.yaml", *GPT, "--layouts", str(file), "--hosts", "2")
    assert done.returncode == 2 and "has replicas for 2 hosts; give some of data=2 or more" in done.stderr


def test_layouts_that_are_stopped_and_resumed_in_another(tmp_path: Path) -> None:
    """Initial values by name; what one layout saved, the next one reads."""
    file = tmp_path / "layouts.txt"
    file.write_text(
        "data=2 pipeline=2\npipeline=3 schedule=zb_v  # a comment\n\ndata=3 zero=0 recompute=full\ndata=1\n"
        "pipeline=2 recompute=auto memory_gib=0.01\n"
    )
    words = [*GPT, "init=by_name", "--layouts", str(file), "--steps", "4", "--resume-at", "2", "--json"]
    report = json.loads(verify("configs/lm.yaml", *words).stdout)
    assert report["equal"] and list(report["digests"])[1] == "pipeline=3 schedule=zb_v"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("data=9", "9 workers but only 4 micro-batches in a step; use at most 4 workers"),
        ("data=2 pipelin=2", "unknown key pipelin; did you mean pipeline?"),
        ("zero=4", "zero = 4"),
        ("pipeline=2 schedule=2f2b", "schedule = '2f2b'"),
        ("pipeline=2 virtual_stages=3", "virtual_stages is 3 and schedule 1f1b has 1 stage a worker"),
        ("cuts=[a", "the value of 'cuts=[a' is not valid YAML"),
        ("cuts=[blocks.1]", "cuts are given and pipeline is 1"),
        ("data 2", "'data' is not of the form key=value"),
        ("pipeline=20", "the layout has 20 stages, but the model can be cut into"),
        ("pipeline=2 cuts=[blocks.99]", "the model cannot be cut in front of 'blocks.99'; it can in front of"),
    ],
)
def test_a_line_that_cannot_be_is_one_sentence(tmp_path: Path, line: str, expected: str) -> None:
    file = tmp_path / "layouts.txt"
    file.write_text(f"data=1\n{line}\n")
    done = verify("configs/lm.yaml", *GPT, "--layouts", str(file), "--steps", "1")
    assert done.returncode == 2 and expected in done.stderr and "Traceback" not in done.stderr, done.stderr
    assert "line 2" in done.stderr
