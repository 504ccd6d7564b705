"""Hogwild as torch's own example does it: processes that train one model in shared memory."""

import time
from typing import Any

import torch
from torch import multiprocessing, nn
from torch.utils.data import DataLoader, Subset

from unisono.bench.learned import Problem, problem

WAIT_S = 300.0
"""Seconds until a process that has not come is an error."""


def measure(task: str, workers: int, seed: int) -> dict[str, Any]:
    """One run's figures; speed is the slowest process's."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    given = problem(task)
    model = given.model().share_memory()
    context = multiprocessing.get_context("spawn")
    begin, ends = context.Barrier(workers), context.Queue()
    arguments = [(model, task, number, workers, seed, begin, ends) for number in range(workers)]
    processes = [context.Process(target=_train, args=args, daemon=True) for args in arguments]
    for process in processes:
        process.start()
    try:
        seconds = max(ends.get(timeout=WAIT_S) for _ in processes)
    except BaseException:
        for process in processes:
            process.terminate()  # the others wait for one that has ended
        raise
    finally:
        for process in processes:
            process.join(WAIT_S)
    return {**_judged(given, model), "wall_s": seconds, "samples_per_s": given.samples / seconds, "staleness_max": None}


def _train(model: nn.Module, task: str, number: int, workers: int, seed: int, begin: Any, ends: Any) -> None:
    """One process's part of the samples, an update for each of its batches."""
    torch.set_num_threads(1)
    given = problem(task)
    generator = torch.Generator().manual_seed(seed * workers + number)
    own: Subset[Any] = Subset(given.data, range(number, len(given.data), workers))  # type: ignore[arg-type]
    batches = DataLoader(own, batch_size=given.batch // workers, shuffle=True, drop_last=True, generator=generator)
    optimizer = given.optimizer(model.parameters(), given.rate / workers)
    begin.wait(WAIT_S)
    began, left = time.monotonic(), given.samples // given.batch
    while left:
        for inputs, targets in batches:
            optimizer.zero_grad()
            given.loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            left -= 1
            if not left:
                break
    ends.put(time.monotonic() - began)


@torch.no_grad()
def _judged(given: Problem, model: nn.Module) -> dict[str, float]:
    """What a model has learned, on samples that it was not trained with."""
    inputs, targets = next(iter(DataLoader(given.validation, batch_size=len(given.validation))))  # type: ignore[arg-type]
    output = model(inputs)
    return {"loss": float(given.loss(output, targets)), "accuracy": given.metrics(output, targets)["accuracy"]}
