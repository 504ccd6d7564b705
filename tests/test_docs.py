"""Docs that are made from the code are up to date, and the example runs."""

import runpy
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_configuration_reference_is_up_to_date() -> None:
    made = runpy.run_path(str(ROOT / "docs" / "make_reference.py"))["text"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == made, "run make docs"


def test_the_example_runs_on_two_workers() -> None:
    command = [
        sys.executable,
        "-m",
        "unisono",
        "run",
        "-n",
        "2",
        str(ROOT / "examples" / "train_mlp.py"),
        "--steps",
        "40",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "digest" in done.stdout and done.stdout.count("prediction for zeros") == 1


def test_the_example_of_the_backend_runs() -> None:
    script = str(ROOT / "examples" / "ddp_on_arena.py")
    words = [sys.executable, "-m", "unisono", "run", "-n", "2", script]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses = [float(line.split()[3]) for line in done.stdout.splitlines()]
    assert len(losses) == 5 and losses[-1] < losses[0] and "arena" in done.stdout


def test_the_example_with_validation_resumes(tmp_path: Path) -> None:
    example = [sys.executable, str(ROOT / "examples" / "train_digits.py"), "--run-dir", str(tmp_path / "run")]
    for steps, more in (("60", []), ("70", ["--resume"])):
        done = subprocess.run([*example, "--steps", steps, *more], capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
    assert "resumed from" in done.stdout and (tmp_path / "run" / "report.html").exists()
    assert "global_batch_size: 112" in (tmp_path / "run" / "config.yaml").read_text()


def test_links_of_the_docs_lead_somewhere() -> None:
    import re

    for page in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
