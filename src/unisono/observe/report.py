"""The report of a run: one HTML file, made from the recorded events, that needs no network to be read."""

import io
import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unisono.errors import ConfigurationError, RecordError
from unisono.events import PHASES, Event, RunFinished, readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

POINTS = 500
NAME = "report.html"

Record = dict[str, Any]


class ReportWriter:
    """Writes the report when the run ends in good order."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self._finished = False

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        self._finished = self._finished or isinstance(event, RunFinished)

    def close(self) -> None:
        """Make the report from what has been recorded; the event log is closed before."""
        if self._finished:
            write_report(self._run_dir)


def write_report(run_dir: Path) -> Path:
    """Make ``report.html`` from ``events.jsonl`` and ``config.yaml``.

    Raises:
        ConfigurationError: where the directory holds no run.
    """
    import jinja2  # here, as matplotlib: a run's first step does not wait for what its end needs

    events = _read(run_dir)
    steps = _steps(events)
    template = jinja2.Environment(
        loader=jinja2.PackageLoader("unisono.observe", "."), autoescape=True, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")
    config = run_dir / "config.yaml"
    html = template.render(
        name=run_dir.name,
        curves=[_plot(steps, events, "loss"), _plot(steps, events, "throughput"), _plot(steps, events, "phases")],
        finished=_last(events, "RunFinished"),
        started=_last(events, "RunStarted"),
        validations=[e for e in events if e["event"] == "ValidationFinished"],
        checkpoints=[e for e in events if e["event"] == "CheckpointSaved"],
        notices=[e["text"] for e in events if e["event"] == "Notice"],
        summary=(_last(events, "Summary") or {}).get("items", {}),
        phases=PHASES,
        workers=_workers(steps),
        membership=_membership(events),
        wire=_wire(steps),
        staleness=_staleness(steps),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
        versions=_versions(),
    )
    temporary = run_dir / f"{NAME}.tmp"
    try:
        temporary.write_text(html, encoding="utf-8")
        return temporary.rename(run_dir / NAME)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RecordError(f"cannot write {run_dir / NAME}: {error.strerror}") from error


def _read(run_dir: Path) -> list[Record]:
    path = run_dir / "events.jsonl"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise ConfigurationError(f"cannot read {path}: {error.strerror}; give the directory of a run") from error
    events = []
    for line in lines:
        try:
            events.append(json.loads(line))
        except ValueError:  # a run that was killed may end in half a line
            continue
    return events


def _steps(events: Sequence[Record]) -> list[Record]:
    """Finished steps in order; of a step that a resumed run took again, the last."""
    by_step = {e["step"]: e for e in events if e["event"] == "StepFinished"}
    return [by_step[step] for step in sorted(by_step)]


def _last(events: Sequence[Record], kind: str) -> Record | None:
    found = [e for e in events if e["event"] == kind]
    return found[-1] if found else None


def _workers(steps: Sequence[Record]) -> list[Mapping[str, Any]]:
    """Mean milliseconds of a step in each phase, for each worker; the first step, which warms up, left out."""
    measured = [s["phases"] for s in steps[1:]] or [s["phases"] for s in steps]
    rows: list[Mapping[str, Any]] = []
    for rank in range(len(measured[-1]) if measured else 0):
        own = [phases[rank] for phases in measured if rank < len(phases)]
        rows.append({"rank": rank, **{p: 1e3 * sum(o[p] for o in own) / len(own) for p in PHASES}})
    return rows


def _membership(events: Sequence[Record]) -> list[tuple[int, str]]:
    """What happened to workers, in order, for a reader."""
    told: list[tuple[int, str]] = []
    known: set[int] = set()
    for event in events:
        match event["event"]:
            case "RolledBack":
                lost = f"{event['lost_steps']} steps done again" if event["lost_steps"] else "no step lost"
                told.append((event["step"], f"all workers started again from the snapshot of this step; {lost}"))
            case "WorkerLost":
                again = [f"worker {rank}: {_listed(part)}" for rank, part in event["taken_over"].items()]
                said = [] if event["number"] in known else [f"worker {event['rank']} {event['how']}"]
                said += (
                    [f"micro-batches of worker {event['rank']} computed by others ({'; '.join(again)})"]
                    if again
                    else []
                )
                known.add(event["number"])
                told += [(event["step"], "; ".join(said))] if said else []
            case "MicroBatchesCopied":
                made = [f"worker {rank}: {_listed(part)}" for rank, part in event["by"].items()]
                told.append((event["step"], f"micro-batches of late workers computed by others ({'; '.join(made)})"))
            case "ChiefChanged":
                told.append((event["step"], f"worker {event['rank']} keeps the records from here on"))
            case "MembersChanged":
                changes = [f"worker {rank} has joined" for rank in event["joined"]]
                changes += [f"worker {rank} has left" for rank in event["left"]]
                told.append((event["step"], "; ".join([*changes, f"{len(event['members'])} train"])))
    return sorted(told, key=lambda item: item[0])


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _wire(steps: Sequence[Record]) -> Record | None:
    """What the exchange between hosts took, the mean over steps but the first; None for one host."""
    used = [s["wire"] for s in steps[1:] or steps if s.get("wire")]
    if not used:
        return None

    def mean(key: str) -> float:
        return sum(float(row[key]) for row in used) / len(used)

    return {
        "sent": readable(round(mean("sent_bytes"))),
        "saved": readable(round(mean("saved_bytes"))),
        "exchange_ms": 1e3 * mean("seconds"),
        "exposed_ms": 1e3 * mean("exposed_s"),
        "error_norm": used[-1]["error_norm"],
    }


def _plot(steps: Sequence[Record], events: Sequence[Record], what: str) -> str:
    """One curve as SVG."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    thinned = steps[:: max(1, len(steps) // POINTS)]
    at = [s["step"] for s in thinned]
    if what == "loss":
        axes.plot(at, [s["loss"] for s in thinned], label="training", linewidth=1)
        validations = [e for e in events if e["event"] == "ValidationFinished"]
        if validations:
            points = [e["metrics"].get("loss") for e in validations]
            axes.plot([e["step"] for e in validations], points, "o", label="validation", markersize=4)
        axes.legend()
    elif what == "throughput":
        axes.plot(at, [s["samples"] / s["seconds"] for s in thinned], linewidth=1)
        axes.set_ylim(bottom=0)
    else:
        _stack(axes, thinned, at)
    for number, step in enumerate(sorted({e["step"] for e in events if e["event"] == "WorkerLost"})):
        axes.axvline(step, color="tab:red", linewidth=0.6, alpha=0.6, label="a worker was lost" if not number else None)
    axes.set_xlabel("step")
    axes.set_ylabel({"loss": "loss", "throughput": "samples/s", "phases": "ms a step"}[what])
    return _svg(figure)


def _svg(figure: "Figure") -> str:
    from matplotlib import pyplot

    out = io.StringIO()
    figure.savefig(out, format="svg")
    pyplot.close(figure)
    return out.getvalue()[out.getvalue().index("<svg") :]


def _staleness(steps: Sequence[Record]) -> Record | None:
    """How stale the values were that pushes were computed with; None where workers wait for each other."""
    counts: dict[int, int] = {}
    for step in steps:
        for late, pushes in (step.get("staleness") or {}).items():
            counts[int(late)] = counts.get(int(late), 0) + pushes
    if not counts:
        return None
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.6), layout="constrained")
    axes.bar(list(counts), list(counts.values()))
    axes.set_xlabel("updates of a server between reading it and updating it")
    axes.set_ylabel("pushes")
    pushes = sum(counts.values())
    mean = sum(late * count for late, count in counts.items()) / pushes
    return {"plot": _svg(figure), "pushes": pushes, "mean": mean, "most": max(counts)}


def _stack(axes: "Axes", steps: Sequence[Record], at: Sequence[int]) -> None:
    means = [[1e3 * sum(w[p] for w in s["phases"]) / max(1, len(s["phases"])) for s in steps] for p in PHASES]
    if at:
        axes.stackplot(at, means, labels=PHASES)
        axes.legend(loc="upper right", ncols=len(PHASES), fontsize="small")


def _versions() -> list[tuple[str, str]]:
    names = ("unisono", "torch", "numpy", "safetensors")
    return [("python", platform.python_version()), *((name, metadata.version(name)) for name in names)]
