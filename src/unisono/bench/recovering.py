"""What ``unisono bench recovery`` runs in each worker: the same GPT, data and optimizer in several ways, as a user
would write them; each notes its process, when steps end, and the digest of the parameters that it ends with.

    python -m unisono.bench.recovering WAY DIRECTORY STEPS
"""

import hashlib
import os
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import TCPStore

from unisono.bench.variants import Bytes, batch, build, end_group, loss, optimizer
from unisono.events import StepFinished
from unisono.trainer import Trainer

SHAPE, MICRO_BATCH, WORKERS = "small", 2, 4
CHECKPOINT_EVERY = 10
"""Of torchrun's program, in steps."""
HEARD_S = 0.5
"""Until torchft's lighthouse has heard of a worker."""
GROUP, LIGHTHOUSE = "REPLICA_GROUP_ID", "TORCHFT_LIGHTHOUSE"
"""Environment: which of torchft's replica groups this is, and where they meet."""


class Notes:
    """What one worker notes for whoever measures.

    Arguments:
        rank: this worker's place; one that comes anew into it goes on in the same file.
    """

    def __init__(self, directory: Path, rank: int) -> None:
        self._directory, self._rank = directory, rank
        (directory / f"process-{rank}").write_text(str(os.getpid()))
        self._file = (directory / f"steps-{rank}").open("a")

    def step(self, number: int, workers: int = WORKERS) -> None:
        """A step has ended, to which so many workers have contributed."""
        self._file.write(f"{number} {workers} {time.monotonic()}\n")
        self._file.flush()

    def end(self, model: nn.Module) -> None:
        """Training has ended."""
        digest = hashlib.sha256()
        for parameter in model.parameters():
            digest.update(parameter.detach().numpy().tobytes())
        (self._directory / f"digest-{self._rank}").write_text(digest.hexdigest())


def unisono(directory: Path, steps: int) -> None:
    """Under ``unisono run``."""
    notes = Notes(directory, int(os.environ["RANK"]))
    trainer = Trainer(
        model=lambda: build(SHAPE),
        loss=loss,
        data=Bytes(),
        optimizer=optimizer,
        global_batch_size=WORKERS * MICRO_BATCH,
        micro_batch_size=MICRO_BATCH,
        observe={"progress": False},
        callbacks=[lambda event: notes.step(event.step) if isinstance(event, StepFinished) else None],
    )
    trainer.fit(steps)
    assert trainer.model is not None
    notes.end(trainer.model)


def torchrun(directory: Path, steps: int) -> None:
    """DDP under torchrun, which starts all workers again; they go on from the newest checkpoint."""
    rank = int(os.environ["RANK"])
    notes = Notes(directory, rank)
    os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # else those started again do not find each other (torch 2.13)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    torch.manual_seed(0)
    model = build(SHAPE)
    optim = optimizer(model.parameters())
    saved, begun = directory / "checkpoint.pt", 0
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optim.load_state_dict(state["optimizer"])
        begun = state["step"]
    wrapped = nn.parallel.DistributedDataParallel(model)
    for step in range(begun + 1, steps + 1):
        _train(wrapped, optim, step, rank)
        notes.step(step)
        if step % CHECKPOINT_EVERY == 0 and rank == 0:
            torch.save({"model": model.state_dict(), "optimizer": optim.state_dict(), "step": step}, f"{saved}.new")
            os.replace(f"{saved}.new", saved)
    notes.end(model)
    end_group()


def torchft(directory: Path, steps: int) -> None:
    """Replica groups of one worker under torchft, which go on without one that is lost.

    Gradients are averaged in one piece: in torchft 0.2 its DistributedDataParallel fails where another worker is lost.
    """
    from torchft import Manager, Optimizer, ProcessGroupGloo

    rank = int(os.environ[GROUP])
    notes = Notes(directory, rank)
    torch.manual_seed(0)
    model = build(SHAPE)
    inner = optimizer(model.parameters())

    def load(state: dict[str, Any]) -> None:
        model.load_state_dict(state["model"])
        inner.load_state_dict(state["optimizer"])

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=timedelta(seconds=5)),
        load_state_dict=load,
        state_dict=lambda: {"model": model.state_dict(), "optimizer": inner.state_dict()},
        min_replica_size=1,
        rank=0,
        world_size=1,
        store_addr="127.0.0.1",
        store_port=store.port,
        lighthouse_addr=os.environ[LIGHTHOUSE],
        replica_id=f"group_{rank}_",
        hostname="127.0.0.1",
        timeout=timedelta(seconds=10),
    )
    optim = Optimizer(manager, inner)
    while len(list(directory.glob("process-*"))) < WORKERS:
        time.sleep(0.01)  # else the first one begins alone
    time.sleep(HEARD_S)

    def average() -> None:
        gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        manager.allreduce(flat).wait()
        parts = torch.split(flat, [gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, parts, strict=True):
            gradient.copy_(part.view_as(gradient))

    while manager.current_step() < steps:
        before = manager.current_step()
        _train(model, optim, before + 1, rank, average)
        if manager.current_step() > before:
            notes.step(manager.current_step(), manager.num_participants())
    notes.end(model)
    manager.shutdown()


def _train(
    model: nn.Module, optim: torch.optim.Optimizer, step: int, rank: int, average: Callable[[], None] = lambda: None
) -> None:
    """One step of a plain loop.

    Arguments:
        average: of gradients over workers, where the model does not see to it.
    """
    inputs, targets = batch(step - 1, WORKERS * MICRO_BATCH)
    mine = slice(rank * MICRO_BATCH, (rank + 1) * MICRO_BATCH)
    optim.zero_grad()
    loss(model(inputs[mine]), targets[mine]).backward()  # type: ignore[no-untyped-call]
    average()
    optim.step()


WAYS = {"unisono": unisono, "torchrun": torchrun, "torchft": torchft}

if __name__ == "__main__":
    torch.set_num_threads(1)
    WAYS[sys.argv[1]](Path(sys.argv[2]), int(sys.argv[3]))
