"""Progress for the person who watches: a live bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from unisono.events import (
    CheckpointSaved,
    ChiefChanged,
    Event,
    MembersChanged,
    Notice,
    Resumed,
    RolledBack,
    RunFinished,
    RunStarted,
    StepFinished,
    Summary,
    ValidationFinished,
    readable,
)

REFRESH_S = 0.2
LINE_EVERY_S = 10.0
SMOOTHING = 0.05


class Progress:
    """Shows a run. The bar is refreshed from the training loop, a few times a second: no thread competes with it."""

    def __init__(self, console: Console | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console or Console()
        self._clock = clock
        self._bar: Bar | None = None
        self._task = None
        self._steps = 0
        self._shown = -LINE_EVERY_S
        self._rate: float | None = None

    def __call__(self, event: Event) -> None:
        """Take note of an event."""
        match event:
            case RunStarted():
                self._start(event)
            case StepFinished():
                self._step(event)
            case ChiefChanged():
                self._print(f"step {event.step}: worker {event.rank} keeps the records from here on")
                self._open_bar(event.step, event.steps)
            case MembersChanged():
                changes = [f"{w} has joined" for w in event.joined] + [f"{w} has left" for w in event.left]
                if changes:
                    self._print(f"step {event.step}: worker {', '.join(changes)}; {len(event.members)} train")
            case ValidationFinished():
                best = " (best)" if event.best else ""
                self._print(f"step {event.step}: validation {_listed(event.metrics)}{best}")
            case CheckpointSaved():
                self._print(f"step {event.step}: checkpoint {event.path} ({readable(event.size_bytes)})")
            case Resumed():
                for reason in event.damaged:
                    self._print(f"[yellow]passed over:[/] {reason}")
                self._print(f"resumed from {event.path}, step {event.step}")
            case RolledBack():
                again = f"; {event.lost_steps} are done again" if event.lost_steps else ""
                self._print(f"back to the snapshot of step {event.step}{again}")
            case Notice():
                self._print(f"[yellow]note:[/] {event.text}")
            case Summary():
                for name, value in event.items.items():
                    text = str(value)
                    self._print(f"{name}: {text}" if "\n" not in text else f"{name}:", markup=False)
                    if "\n" in text:
                        self._print(text, markup=False)
            case RunFinished():
                self._close_bar()
                self._print(f"{event.reason} after step {event.step} in {event.seconds:.1f} s; digest {event.digest}")
            case _:
                pass

    def close(self) -> None:
        """Give the terminal back."""
        self._close_bar()

    def _start(self, event: RunStarted) -> None:
        workers = f"{event.workers} worker{'s' * (event.workers > 1)}"
        where = f", records in {event.run_dir}" if event.run_dir else ""
        self._print(f"training {event.parameters:,} parameters with {workers}{where}")
        self._open_bar(event.step, event.steps)

    def _open_bar(self, step: int, steps: int) -> None:
        self._steps = steps
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                auto_refresh=False,
            )
            self._task_id = self._bar.add_task("", total=steps, completed=step, figures="")
            self._bar.start()

    def _step(self, event: StepFinished) -> None:
        count, unit = (event.samples, "samples") if event.tokens is None else (event.tokens, "tokens")
        rate = count / event.seconds if event.seconds > 0 else 0.0
        self._rate = rate if self._rate is None else self._rate + SMOOTHING * (rate - self._rate)
        now = self._clock()
        last = event.step == self._steps
        figures = f"loss {event.loss:.4f} · {self._rate:,.0f} {unit}/s"
        if self._bar is not None:
            if now - self._shown >= REFRESH_S or last:
                self._bar.update(self._task_id, completed=event.step, figures=figures)
                self._bar.refresh()
                self._shown = now
        elif now - self._shown >= LINE_EVERY_S or last:
            self._print(f"step {event.step}/{self._steps}: {figures}")
            self._shown = now

    def _print(self, text: str, *, markup: bool = True) -> None:
        self._console.print(text, markup=markup, highlight=False, soft_wrap=True)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._bar.refresh()
            self._bar.stop()
            self._bar = None


def _listed(metrics: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4f}" for name, value in metrics.items())
