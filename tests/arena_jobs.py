"""What workers run to try the arena as a backend of torch.distributed: each checks, or returns what it found."""

import copy
import gc
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

import unisono

assert unisono.__version__  # imported for its backend

DTYPES = ("float32", "float64", "float16", "bfloat16", "int8", "uint8", "int32", "int64", "bool", "complex64")
SIZES = (0, 1, 1000, 70_001, 700_001)
REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "SUM": torch.add,
    "PRODUCT": torch.mul,
    "MIN": torch.minimum,
    "MAX": torch.maximum,
    "BAND": torch.bitwise_and,
    "BOR": torch.bitwise_or,
    "BXOR": torch.bitwise_xor,
}


@contextmanager
def group(backend: str = "arena", timeout_s: float = 20.0) -> Iterator[tuple[int, int]]:
    """A default group: this rank, and how many there are."""
    torch.set_num_threads(1)
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout_s))
    yield dist.get_rank(), dist.get_world_size()
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


def values(rank: int, size: int, dtype: str) -> Tensor:
    """A rank's input; small whole numbers, so that few types lose anything."""
    generator = torch.Generator().manual_seed(1000 * rank + size)
    kind: torch.dtype = getattr(torch, dtype)
    return torch.randint(0, 2 if dtype == "bool" else 4, (size,), generator=generator).to(kind)


def reductions() -> int:
    """all_reduce, reduce and reduce_scatter: every operation, type and size, against one process's result."""
    checked = 0
    with group() as (rank, world):
        for name, combine in REDUCTIONS.items():
            for dtype in DTYPES:
                floating = getattr(torch, dtype).is_floating_point or dtype == "complex64"
                if (floating and name.startswith("B")) or (dtype == "complex64" and name != "SUM"):
                    continue
                for size in SIZES:
                    expected = values(0, size, dtype)
                    for other in range(1, world):
                        expected = combine(expected, values(other, size, dtype))
                    operation = getattr(dist.ReduceOp, name)
                    mine = values(rank, size, dtype)
                    dist.all_reduce(mine, operation)
                    assert torch.equal(mine, expected), ("all_reduce", name, dtype, size)
                    mine, root = values(rank, size, dtype), size % world
                    dist.reduce(mine, root, operation)
                    assert rank != root or torch.equal(mine, expected), ("reduce", name, dtype, size)
                    out = torch.empty_like(mine)
                    inputs = [values((rank + r) % world, size, dtype) for r in range(world)]
                    dist.reduce_scatter(out, inputs, operation)
                    expected = values(rank, size, dtype)
                    for other in range(1, world):
                        expected = combine(expected, values((rank + other) % world, size, dtype))
                    assert torch.equal(out, expected), ("reduce_scatter", name, dtype, size)
                    checked += 3
        average = torch.full((5,), float(rank))
        dist.all_reduce(average, dist.ReduceOp.AVG)
        assert average.tolist() == [(world - 1) / 2] * 5
    return checked


def movements() -> int:
    """Whatever moves tensors without changing them."""
    checked = 0
    with group() as (rank, world):
        for dtype in DTYPES:
            for size in SIZES:
                everyone = [values(r, size, dtype) for r in range(world)]
                mine, root = everyone[rank].clone(), size % world
                dist.broadcast(mine, root)
                assert torch.equal(mine, everyone[root]), ("broadcast", dtype, size)
                outputs = [torch.empty_like(mine) for _ in range(world)]
                dist.all_gather(outputs, everyone[rank])
                assert all(torch.equal(a, b) for a, b in zip(outputs, everyone, strict=True)), ("all_gather", dtype)
                joined = torch.empty(world * size, dtype=mine.dtype)
                dist.all_gather_into_tensor(joined, everyone[rank])
                assert torch.equal(joined, torch.cat(everyone)), ("all_gather_into_tensor", dtype, size)
                outputs = [torch.empty_like(mine) for _ in range(world)]
                dist.gather(everyone[rank], outputs if rank == root else None, dst=root)
                if rank == root:
                    assert all(torch.equal(a, b) for a, b in zip(outputs, everyone, strict=True)), ("gather", dtype)
                mine = torch.empty_like(mine)
                dist.scatter(mine, everyone if rank == root else None, src=root)
                assert torch.equal(mine, everyone[rank]), ("scatter", dtype, size)
                sends = [values(rank * world + r, size + r, dtype) for r in range(world)]
                receives = [torch.empty(size + rank, dtype=mine.dtype) for _ in range(world)]
                dist.all_to_all(receives, sends)
                for r in range(world):
                    assert torch.equal(receives[r], values(r * world + rank, size + rank, dtype)), ("all_to_all", dtype)
                checked += 6
        rows = [r + 1 for r in range(world)]
        given = torch.cat([torch.full((n, 3), float(rank * 10 + r)) for r, n in enumerate(rows)])
        output = torch.empty((rank + 1) * world, 3)
        dist.all_to_all_single(output, given, [rank + 1] * world, rows)
        assert output[:, 0].tolist() == [float(r * 10 + rank) for r in range(world) for _ in range(rank + 1)]
    return checked


def forms() -> None:
    """Tensors that are not contiguous, empty, of no dimension, require gradients; lists; objects; handles."""
    with group() as (rank, world):
        turned = torch.full((30, 20), float(rank)).T
        dist.all_reduce(turned)
        assert turned.tolist() == torch.full((20, 30), float(sum(range(world)))).tolist()
        strided = torch.arange(40.0)[::2] + rank
        dist.broadcast(strided, 1)
        assert torch.equal(strided, torch.arange(40.0)[::2] + 1)
        scalar = torch.tensor(float(rank))
        dist.all_reduce(scalar, dist.ReduceOp.MAX)
        assert scalar.item() == world - 1
        wanting = torch.ones(3, requires_grad=True)
        with torch.no_grad():
            dist.all_reduce(wanting)
        assert wanting.tolist() == [float(world)] * 3
        handles = [dist.all_reduce(torch.full((200_000,), 1.0), async_op=True) for _ in range(5)]
        later = torch.full((4,), float(rank))
        dist.all_reduce(later)  # in the order of calls, behind what is under way
        assert later.tolist() == [float(sum(range(world)))] * 4
        for handle in handles:
            handle.wait()
            assert handle.is_completed()
        future = dist.all_reduce(torch.ones(3), async_op=True).get_future()
        assert future.wait()[0].tolist() == [float(world)] * 3
        objects: list[Any] = [None] * world
        dist.all_gather_object(objects, {"rank": rank, "text": "x" * rank * 1000})
        assert [o["rank"] for o in objects] == list(range(world))
        several = [torch.full((n,), float(rank)) for n in (3, 5)]
        with dist.distributed_c10d._coalescing_manager():
            for tensor in several:
                dist.all_reduce(tensor)
        assert all(t[0].item() == sum(range(world)) for t in several)


def messages() -> None:
    """Point to point: tags out of order, both ways at once, larger than a ring, from anyone, in batches."""
    with group() as (rank, world):
        right, left = (rank + 1) % world, (rank - 1) % world
        for size in (1, 100_000, 3_000_000):  # up to 12 MB through rings of 512 KiB
            out, into = torch.full((size,), float(rank)), torch.empty(size)
            works = dist.batch_isend_irecv([dist.P2POp(dist.isend, out, right), dist.P2POp(dist.irecv, into, left)])
            for work in works:
                work.wait()
            assert into[0].item() == into[-1].item() == left
        first, second = torch.empty(10), torch.empty(10)
        sent: list[Any] = [dist.isend(torch.full((10,), float(tag)), right, tag=tag) for tag in (7, 8)]
        dist.recv(second, left, tag=8)
        dist.recv(first, left, tag=7)
        assert (first[0].item(), second[0].item()) == (7.0, 8.0)
        for one in sent:
            one.wait()
        big = torch.full((2_000_000,), float(rank))
        way: Any = dist.isend(big, right)
        dist.barrier()  # while it is under way, and nobody has asked for it
        dist.recv(big_in := torch.empty(2_000_000), left)
        way.wait()
        assert big_in[5].item() == left
        if rank == 0:
            senders = sorted(dist.recv(torch.empty(3), None) for _ in range(1, world))
            assert senders == list(range(1, world))
        else:
            dist.send(torch.ones(3), 0)
        dist.barrier()
        requests: list[Any] = [dist.irecv(torch.empty(4), left) for _ in range(3)]
        for _ in range(3):
            dist.send(torch.ones(4), right)
        for request in requests:
            request.wait()


def subgroups() -> None:
    """Groups inside the group, several at once, each with operations of its own."""
    with group() as (rank, world):
        pairs = [dist.new_group([a, b]) for a in range(world) for b in range(a + 1, world)]
        names = [(a, b) for a in range(world) for b in range(a + 1, world)]
        for pair, members in zip(pairs, names, strict=True):
            if rank in members:
                tensor = torch.full((1000,), float(rank))
                dist.all_reduce(tensor, group=pair)
                assert tensor[0].item() == sum(members)
        dist.barrier()


def mismatch() -> str:
    """Ranks that call different operations: what they are told."""
    dist.init_process_group("arena", timeout=timedelta(seconds=5))
    try:
        if dist.get_rank() == 0:
            dist.all_reduce(torch.ones(3))
        else:
            dist.broadcast(torch.ones(4), 0)
    except RuntimeError as caught:
        return str(caught)
    return ""


def fault(how: str, operation: str, timeout_s: float) -> dict[str, Any]:
    """The last rank is killed or stopped before an operation, or skips it; what the others meet with, and when."""
    torch.set_num_threads(1)
    dist.init_process_group("arena", timeout=timedelta(seconds=timeout_s))
    rank, world = dist.get_rank(), dist.get_world_size()
    dist.barrier()
    if rank == world - 1:
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "skip":
            time.sleep(timeout_s + 3)
            return {"error": "", "seconds": 0.0}
        subprocess.Popen(["sh", "-c", f"sleep {timeout_s + 3}; kill -KILL {os.getpid()}"])
        os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    try:
        if operation == "recv":
            dist.recv(torch.empty(3), world - 1)
        elif operation == "async":
            dist.all_reduce(torch.ones(3), async_op=True).wait()
        else:
            dist.all_reduce(torch.ones(3_000_000))
    except RuntimeError as error:
        return {"error": str(error), "seconds": time.monotonic() - started}
    return {"error": "", "seconds": time.monotonic() - started}


def _model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def _train(model: nn.Module, steps: int, rank: int) -> list[float]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(rank)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 16, generator=generator)
        loss = nn.functional.mse_loss(model(inputs), inputs[:, :4])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def ddp(backend: str) -> list[float]:
    """DistributedDataParallel, with small buckets: losses."""
    with group(backend) as (rank, _):
        model = nn.parallel.DistributedDataParallel(_model(), bucket_cap_mb=0.01)
        losses = _train(model, 6, rank)
        del model
    return losses


def sharded(backend: str, directory: str) -> list[float]:
    """fully_shard, and a checkpoint by torch.distributed.checkpoint that is loaded into another model: losses."""
    from torch.distributed.checkpoint.state_dict_loader import load
    from torch.distributed.checkpoint.state_dict_saver import save
    from torch.distributed.fsdp import fully_shard

    with group(backend) as (rank, world):
        model: Any = _model()
        for layer in model:
            if isinstance(layer, nn.Linear):
                fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        losses = _train(model, 4, rank)
        path = Path(directory) / backend
        state: dict[str, Any] = model.state_dict()
        save(state, checkpoint_id=path)
        loaded = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
        load(loaded, checkpoint_id=path)
        for name, whole in state.items():
            again: Any = loaded[name]
            assert torch.equal(whole.full_tensor(), again.full_tensor()), name
        del model, state, loaded
    return losses


def tensor_parallel(backend: str) -> list[float]:
    """DTensor's column- and row-wise parallel layers: the output's first values."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with group(backend) as (_, world):
        model = _model()
        reference = copy.deepcopy(model)
        mesh = init_device_mesh("cpu", (world,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(3))
        output = model(inputs)
        torch.testing.assert_close(output, reference(inputs))
        output.sum().backward()
        result: list[float] = output.flatten()[:5].tolist()
        del model
    return result


def pipeline(backend: str) -> list[float]:
    """A stage of torch.distributed.pipelining on each rank, GPipe and 1F1B: the last rank's losses."""
    from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

    losses: list[Tensor] = []
    with group(backend) as (rank, world):
        layers = [nn.Linear(16, 16) for _ in range(world)]
        torch.manual_seed(rank)
        for schedule_class in (ScheduleGPipe, Schedule1F1B):
            stage = PipelineStage(copy.deepcopy(layers[rank]), rank, world, torch.device("cpu"))
            schedule = schedule_class(stage, n_microbatches=4, loss_fn=nn.functional.mse_loss)
            inputs = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
            own: list[Tensor] = []
            if rank == 0:
                schedule.step(inputs)
            elif rank == world - 1:
                schedule.step(target=inputs, losses=own)
            else:
                schedule.step()
            losses += own
            del stage, schedule
    return [float(loss.detach()) for loss in losses]


def unmatched_lengths() -> list[str]:
    """Rank 0 sends less than rank 1 expects: what both are told, then and afterwards."""
    errors = ["", ""]
    dist.init_process_group("arena", timeout=timedelta(seconds=2))
    rank = dist.get_rank()
    inputs = [torch.ones(2), torch.ones(2)]
    outputs = [torch.empty(2), torch.empty(2)] if rank == 0 else [torch.empty(6), torch.empty(2)]
    for i in range(2):
        try:
            dist.all_to_all(outputs, inputs)
        except RuntimeError as error:
            errors[i] = str(error)
    return errors
