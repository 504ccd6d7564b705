"""Commands that use a trained model: ``evaluate`` and ``predict``."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from unisono.cli.options import INTERRUPTED, ConfigFile, JsonOption, Overrides, WorkersOption, launcher_here
from unisono.errors import ConfigurationError

WeightsOption = Annotated[
    Path | None,
    typer.Option(
        "--checkpoint", help="Of which model; default: the newest intact one of run_dir, or of the task's last run."
    ),
]
SplitOption = Annotated[str, typer.Option(help="Which of the task's datasets.")]


def evaluate(
    config: ConfigFile,
    overrides: Overrides = None,
    workers: WorkersOption = None,
    checkpoint: WeightsOption = None,
    split: SplitOption = "validation",
    as_json: JsonOption = False,
) -> None:
    """Say how good a trained model is: the mean loss and metrics of a dataset, the same bits on any number of workers.

    All samples count, or the first validation.samples of them, where the configuration says so.

    Example: unisono evaluate configs/images.yaml -n 2

    Of one checkpoint: unisono evaluate configs/images.yaml --checkpoint runs/images-001/checkpoints/step-00000100
    """
    metrics, weights = _run("evaluate", config, overrides, workers, checkpoint, split, {})
    if as_json:
        typer.echo(json.dumps({"checkpoint": weights, "split": split, "metrics": metrics}))
        return
    for name, value in metrics.items():
        typer.echo(f"{name:<12} {value:.6g}")
    typer.echo(f"of {weights}, on {split}")


def predict(
    config: ConfigFile,
    overrides: Overrides = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="A new or empty directory.", show_default=False)
    ] = Path("predictions"),
    workers: WorkersOption = None,
    checkpoint: WeightsOption = None,
    split: SplitOption = "validation",
    as_json: JsonOption = False,
) -> None:
    """Write a trained model's outputs for every sample of a dataset, as safetensors with an index.

    Example: unisono predict configs/images.yaml --output predictions -n 2
    and, in Python: unisono.read_predictions("predictions")["output"]
    """
    further = {"directory": str(output)}
    written, weights = _run("predict", config, overrides, workers, checkpoint, split, further)
    if as_json:
        typer.echo(json.dumps({**written, "checkpoint": weights, "split": split}))
    else:
        typer.echo(f"{written['samples']} samples of {split} in {output}: {', '.join(written['names'])}")


def _run(
    what: str,
    config: Path,
    overrides: list[str] | None,
    workers: int | None,
    checkpoint: Path | None,
    split: str,
    further: dict[str, str],
) -> tuple[Any, str]:
    """Let workers do it; what they say, and the checkpoint."""
    with launcher_here() as launcher:
        from unisono.config import load
        from unisono.launch.runs import ROOT, choose_workers, next_run_dir, preloads
        from unisono.launch.task import STANDARD_ERROR
        from unisono.state.checkpoint import DIRECTORY, newest_intact

        settings = load(config, overrides or [])
        if checkpoint is None:
            try:
                run_dir = next_run_dir(settings.run_dir, settings.task, resume=True)
            except ConfigurationError as error:
                raise ConfigurationError(
                    f"there is no model in {settings.run_dir or ROOT} to {what}; train one before, give "
                    "run_dir=DIRECTORY of a run that has a checkpoint, or --checkpoint"
                ) from error
            checkpoint = newest_intact(run_dir / DIRECTORY)[0]
        count = choose_workers(settings, workers)
        launcher.preload(preloads(settings, [settings.layout]))
        arguments = {"config": settings.model_dump(mode="json"), "split": split, "weights": str(checkpoint), **further}
        ending = launcher.run(
            {"call": f"unisono.tasks.job:{what}", "arguments": arguments}, count, output=STANDARD_ERROR
        )
        if ending.interrupted or ending.preempted:
            raise typer.Exit(INTERRUPTED)
        return ending.result, str(checkpoint)
