"""What is shown and recorded: honest where there is no terminal, readable without a network."""

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests import jobs, toys
from unisono.errors import ConfigurationError
from unisono.events import RunFinished, RunStarted, StepFinished, Summary
from unisono.observe.progress import Progress
from unisono.observe.report import write_report

STEP = StepFinished(1, 2.5, 4.0, 28, 280, 0.1, None, 0.5, [{"data": 0.1}])


def shown(terminal: bool) -> str:
    out = io.StringIO()
    progress = Progress(Console(file=out, force_terminal=terminal, width=100))
    progress(RunStarted(0, 2, 3, 1234, "runs/x"))
    progress(STEP)
    progress(Summary({"sample": "[bold]not markup[/]\nsecond line", "figure": 3}))
    progress(RunFinished(2, "finished", "abc", 1.0))
    progress.close()
    return out.getvalue()


def test_lines_where_there_is_no_terminal() -> None:
    text = shown(False)
    assert "training 1,234 parameters with 3 workers, records in runs/x" in text
    assert "step 1/2: loss 2.5000 · 560 tokens/s" in text and "\x1b" not in text
    assert "[bold]not markup[/]" in text and "finished after step 2" in text and "digest abc" in text


def test_a_bar_on_a_terminal() -> None:
    text = shown(True)
    assert "1/2" in text and "\x1b" in text


def test_a_run_leaves_records_and_a_report(tmp_path: Path) -> None:
    observe = {"progress": False, "log_every": 1}
    jobs.trainer(run_dir=str(tmp_path), observe=observe, validation=toys.Samples(), validate={"every": 2}).fit(4)
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    kinds = [e["event"] for e in events]
    assert kinds[0] == "RunStarted" and kinds[-1] == "RunFinished" and kinds.count("StepFinished") == 4
    assert list((tmp_path / "tensorboard").iterdir())
    html = (tmp_path / "report.html").read_text()
    assert html.count("<svg") == 3 and events[-1]["digest"] in html
    assert "http://" not in html.replace("http://www.w3.org", "").replace("http://purl.org", "").replace(
        "http://creativecommons.org", ""
    )
    assert "src=" not in html and "@import" not in html
    (tmp_path / "report.html").unlink()
    with (tmp_path / "events.jsonl").open("a") as log:
        log.write('{"event": "StepFin')  # a run that was killed
    assert write_report(tmp_path).exists()


def test_a_report_of_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="give the directory of a run"):
        write_report(tmp_path)
