"""The arena as a backend of torch.distributed: everything c10d offers, against one process, and against gloo."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from unisono.launch.local import LocalLauncher
from unisono.launch.worker_set import WorkerSet


def run(pool: LocalLauncher, call: str, workers: int, **arguments: Any) -> list[Any]:
    return pool.run({"call": f"tests.arena_jobs:{call}", "arguments": arguments}, workers).results


@pytest.mark.parametrize("workers", [1, 2, 3, 4])
@pytest.mark.parametrize("call", ["reductions", "movements"])
def test_collectives_of_every_type_and_size(pool: LocalLauncher, call: str, workers: int) -> None:
    assert all(checked > 100 for checked in run(pool, call, workers))


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("call", ["forms", "messages", "subgroups"])
def test_forms_messages_and_groups(pool: LocalLauncher, call: str, workers: int) -> None:
    run(pool, call, workers)


def test_ranks_that_call_different_operations_are_told(pool: LocalLauncher) -> None:
    for rank, error in enumerate(run(pool, "mismatch", 2)):
        assert f"rank {rank} is in" in error and "all_reduce" in error and "broadcast" in error


@pytest.mark.parametrize("operation", ["all_reduce", "async", "recv"])
@pytest.mark.parametrize("how", ["kill", "stop", "skip"])
def test_a_peer_that_is_dead_or_stopped_or_elsewhere_is_named(
    pool: LocalLauncher, monkeypatch: pytest.MonkeyPatch, how: str, operation: str
) -> None:
    """(rank 2 of 3, before an operation): SIGKILL is noticed at once, what else keeps it away at the deadline."""
    monkeypatch.setattr(WorkerSet, "_failures", lambda self: (False, False))
    monkeypatch.setattr(WorkerSet, "_raise_failure", lambda self: None)
    results = run(pool, "fault", 3, how=how, operation=operation, timeout_s=1.0)
    for result in results[:2]:
        assert "rank 2" in result["error"] and ("recv" if operation == "recv" else "all_reduce") in result["error"]
        assert result["seconds"] < (0.5 if how == "kill" else 1.0 + 2.0)


@pytest.mark.parametrize("workers", [2, 4])
@pytest.mark.parametrize("call", ["ddp", "tensor_parallel", "pipeline"])
def test_what_torch_builds_on_it_gives_what_gloo_gives(pool: LocalLauncher, call: str, workers: int) -> None:
    arena, gloo = (run(pool, call, workers, backend=backend) for backend in ("arena", "gloo"))
    for a, b in zip(arena, gloo, strict=True):
        assert a == pytest.approx(b, rel=1e-5)
    assert any(arena)


def test_fully_shard_and_its_checkpoints(pool: LocalLauncher, tmp_path: Path) -> None:
    arena, gloo = (run(pool, "sharded", 2, backend=b, directory=str(tmp_path)) for b in ("arena", "gloo"))
    for a, b in zip(arena, gloo, strict=True):
        assert a == pytest.approx(b, rel=1e-5)


SCRIPT = """
import torch, torch.distributed as dist
dist.init_process_group("gloo")
tensor = torch.ones(3)
dist.all_reduce(tensor, group=dist.new_group(backend="gloo"))
if dist.get_rank() == 0:
    print("backend", dist.get_backend(), tensor.tolist())
dist.barrier()
dist.destroy_process_group()
"""


def test_an_unmodified_gloo_script_gets_the_arena(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "unisono", "run", "-n", "2", "--backend", "arena", str(script)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.stdout == "backend arena [2.0, 2.0, 2.0]\n", done.stderr


@pytest.mark.parametrize("order", ["import unisono, torch", "import torch, unisono"])
def test_importing_unisono_is_enough_in_any_order(order: str) -> None:
    program = (
        f"{order}\nimport torch.distributed as dist\n"
        "dist.init_process_group('arena', rank=0, world_size=1, store=dist.HashStore())\n"
        "tensor = torch.ones(2)\ndist.all_reduce(tensor)\nprint(dist.get_backend(), tensor.tolist())\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "arena [1.0, 1.0]\n", done.stderr


def test_importing_unisono_does_not_import_torch() -> None:
    program = "import sys, unisono; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n"


TORCHS_TESTS = """
DistributedDataParallelCPU DistributedDataParallelCPU_grad_is_view DistributedDataParallel_requires_grad
accumulate_gradients_no_sync accumulate_gradients_no_sync_allreduce_with_then_hook all_gather
all_gather_coalesced_simple
all_gather_coalesced_with_empty all_gather_complex all_gather_full_group all_gather_object_default_pg
all_reduce_coalesced_full_group_sum all_reduce_coalesced_max all_reduce_full_group_min all_reduce_product all_reduce_sum
all_reduce_sum_async all_reduce_sum_complex barrier_timeout_full_group batch_isend_irecv_gloo
batch_isend_irecv_gloo_tags
broadcast ddp_logging_data_cpu destroy_full_group gather gather_checks get_future grads_same_across_ranks_with_no_sync
irecv isend reduce_full_group_sum reduce_sum_twice scatter scatter_checks scatter_complex scatter_object_list send_recv
send_recv_any_source send_recv_with_tag sparse_all_reduce_sum static_graph_api_cpu
"""


def test_torchs_own_tests() -> None:
    """A part of the suite that ships in torch's wheel; tests/torch_suite.py runs all of it."""
    names = [f"test_{name}" for name in TORCHS_TESTS.split()]
    with tempfile.NamedTemporaryFile() as file:
        words = ["--ranks", "2", "--backend", "arena", "--output", file.name, *names]
        command = [sys.executable, "-m", "tests.torch_suite", *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        outcomes = json.loads(file.read())
    assert {name: outcome for name, outcome in outcomes.items() if outcome != "passed"} == {}
