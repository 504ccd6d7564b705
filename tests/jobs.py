"""What the pool's workers run in tests: called by name, arguments and results are JSON."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager

from tests import toys
from unisono import Trainer, assembly
from unisono.agreeing import Parts
from unisono.check.strike import armed
from unisono.comm import bulk
from unisono.comm.algorithms import drive, ring
from unisono.comm.arena import Arena
from unisono.comm.background import Background
from unisono.comm.bulk import Bulk
from unisono.comm.crossing import Crossing, Terms
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.comm.host import HostGroup
from unisono.comm.host_layout import host_layout
from unisono.comm.network import Link, NetworkWire
from unisono.comm.partial import add_entry, partial_layout
from unisono.comm.reductions import power_sgd
from unisono.comm.way import Way
from unisono.comm.wire import Addressed
from unisono.engine import Engine
from unisono.engines.meeting import Done
from unisono.engines.pipedream import PipeDreamEngine
from unisono.errors import GroupError
from unisono.events import Event, MicroBatchesCopied, Notice, PhaseEntered, StepFinished, ValidationFinished
from unisono.launch.world import this_process
from unisono.plan.assignment import micro_batches, one_team
from unisono.plan.blocks import ParameterSpec, TensorSpec, flat_layout
from unisono.plan.exchange import Bucket
from unisono.plan.hosts import Place
from unisono.run.rng import Isolation
from unisono.run.sampling import Sampler
from unisono.run.summation import Node, accumulation
from unisono.state.shared import SharedState
from unisono.tasks.lm import GPT


def trainer(
    model: str = "mlp",
    optimizer: str = "adamw",
    loss: str = "mse",
    augment: bool = False,
    fail_at: int | None = None,
    skewed: bool = False,
    **settings: Any,
) -> Trainer:
    """A trainer over toys; micro-batches are not a multiple of most numbers of workers."""
    defaults: dict[str, Any] = {
        "global_batch_size": 28,
        "micro_batch_size": 4,
        "observe": {"progress": False, "tensorboard": False, "report": False},
        "deadline_s": 30.0,
    }
    return Trainer(
        model=toys.MODELS[model],
        loss=toys.LOSSES[loss],
        data=(toys.SkewedSamples if skewed else toys.Samples)(augment, fail_at),
        optimizer=toys.OPTIMIZERS[optimizer],
        **{**defaults, **settings},
    )


def small_trainer(**options: Any) -> Trainer:
    """A linear model, whose parts can be replaced one by one."""
    parts: dict[str, Any] = {
        "model": lambda: nn.Linear(6, 4),
        "loss": nn.functional.mse_loss,
        "data": toys.Samples(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "global_batch_size": 8,
        "micro_batch_size": 4,
        "observe": {"progress": False},
    }
    return Trainer(**{**parts, **options})


def train(steps: int = 6, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Train toys; the result, with every step's loss."""
    losses: list[float] = []
    validations: list[dict[str, float]] = []
    saved: list[int] = []
    norms: list[float | None] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            losses.append(event.loss)
            norms.append(event.gradient_norm)
            saved.append(event.wire.saved_bytes if event.wire else 0)
        elif isinstance(event, ValidationFinished):
            validations.append(dict(event.metrics))

    if options.pop("validated", False):
        options["validation"] = toys.Samples()
    result = trainer(callbacks=[note], **options).fit(steps, resume=resume)
    return {**asdict(result), "losses": losses, "validations": validations, "saved": saved, "norms": norms}


def train_gpt(optimizer: str, layout: dict[str, Any], steps: int = 20, resume: bool = False, **settings: Any) -> Any:
    """Train a narrow GPT with all that a layout must not change: dropout, clipping, accumulation, tied embeddings."""
    losses: list[float] = []
    notices: list[str] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            losses.append(event.loss)
        elif isinstance(event, Notice):
            notices.append(event.text)

    tokens = torch.randint(0, 64, (40, 17), generator=torch.Generator().manual_seed(3))
    rates = {"sgd": 0.3, "adamw": 3e-3}
    subject = Trainer(
        model=lambda: GPT(layers=4, width=32, heads=4, context=16, dropout=0.1, tied=True),
        loss=lambda output, target: nn.functional.cross_entropy(output.view(-1, 256), target.flatten()),
        data=[(row[:-1], row[1:]) for row in tokens],
        optimizer=lambda parameters: OPTIMIZERS[optimizer](parameters, lr=rates[optimizer]),
        layout=layout,  # type: ignore[arg-type]
        global_batch_size=8,
        micro_batch_size=2,
        clip=1.0,
        observe={"progress": False, "tensorboard": False, "report": False},
        callbacks=[note],
        **settings,
    )
    return {"digest": subject.fit(steps, resume=resume).digest, "losses": losses, "notices": notices}


OPTIMIZERS: dict[str, Any] = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}


def stop() -> None:
    """This process stands still, until it is killed."""
    subprocess.Popen(["sh", "-c", f"sleep 5; kill -KILL {os.getpid()}"])
    os.kill(os.getpid(), signal.SIGSTOP)


def fail(rank: int, how: str, step: int = 2, phase: str = "compute", **options: Any) -> dict[str, Any]:
    """Train toys; the worker of a rank meets with a fault at (step, phase)."""

    struck = False

    def strike(event: Event) -> None:
        nonlocal struck
        here = isinstance(event, PhaseEntered) and (event.rank, event.step, event.phase) == (rank, step, phase)
        if here and not struck:
            struck = True
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif how == "raise":
                raise RuntimeError("struck on purpose")
            elif how == "sleep":
                time.sleep(60)
            elif how == "stop":
                stop()
            elif how == "interrupt":
                os.kill(os.getpid(), signal.SIGINT)

    subject = trainer(**options)
    subject.probe(strike)
    return asdict(subject.fit(10))


def struck(strikes: list[dict[str, Any]], steps: int = 12, **options: Any) -> dict[str, Any]:
    """Train toys, and be struck as `check.strike` says."""
    if options.pop("validated", False):
        options["validation"] = toys.Samples()
    subject = armed(trainer(**options), strikes)
    return {**asdict(subject.fit(steps)), "process": os.getpid()}


def train_with_little_patience(**options: Any) -> dict[str, Any]:
    """Train toys where a worker waits for no longer than the deadline, though its launcher sees to those who hang."""
    vars(assembly)["PATIENCE"], vars(assembly)["PATIENCE_S"] = 1, 0.0
    return train(**options)


def train_and_copy_late(seconds: float, **options: Any) -> dict[str, Any]:
    """Train toys where the first worker takes its time to copy the state for a checkpoint, if it has to."""
    keep = Parts.keep

    def late(self: Parts) -> None:
        time.sleep(seconds if this_process().rank == 0 else 0.0)
        keep(self)

    Parts.keep = late  # type: ignore[method-assign]
    return train(**options)


def train_in_little_memory(**options: Any) -> dict[str, Any]:
    """Train toys where the machine has ten bytes left."""
    vars(assembly)["refuse_what_cannot_fit"] = lambda *_: 10
    return train(**options)


class _SlowWire:
    """A wire that takes its time for every chunk."""

    def __init__(self, wire: NetworkWire, pause_s: float) -> None:
        self.rank, self.size, self._wire, self._pause_s = wire.rank, wire.size, wire, pause_s

    def post(self, *arguments: Any) -> Any:
        time.sleep(self._pause_s)
        return self._wire.post(*arguments)


def train_over_a_slow_link(pause_s: float, **options: Any) -> dict[str, Any]:
    """Train toys where large payloads travel in many small pieces, slowly."""
    vars(bulk)["CHUNK_BYTES"] = 1 << 12
    begin = Bulk.__init__

    def slow(self: Bulk, wire: Any, thread: Any) -> None:
        begin(self, _SlowWire(wire, pause_s), thread)  # type: ignore[arg-type]

    Bulk.__init__ = slow  # type: ignore[method-assign]
    return train(**options)


def struck_in_the_second_of_two(strikes: list[dict[str, Any]], **options: Any) -> str:
    """Train toys, and others in the same process, which is struck meanwhile."""
    trainer(model="norm", **options).fit(5)
    return armed(trainer(model="norm", **options), strikes).fit(10).digest


def struck_in_the_first_of_two(strikes: list[dict[str, Any]], **options: Any) -> list[str]:
    """Train toys, be struck, and train others in the same processes; both digests."""
    first = armed(trainer(**options), strikes).fit(60)
    return [first.digest, trainer(model="norm").fit(5).digest]


def train_late(
    late: int,
    late_steps: Sequence[int],
    seconds: float,
    beside_s: float = 0.0,
    corrupt: int = -1,
    strikes: Sequence[Mapping[str, Any]] = (),
    **options: Any,
) -> dict[str, Any]:
    """Train toys; in some steps each micro-batch takes one worker, or two, longer, and idle ones make copies.

    Arguments:
        late: the rank whose micro-batches take so many seconds more.
        beside_s: seconds that a copy takes more before it is computed.
        corrupt: the rank whose copies come out wrong.
    """
    copied: list[dict[str, Any]] = []
    rank = this_process().rank
    rescue, publish = Engine._rescue, HostGroup.publish
    copying = False

    def slow(event: Event) -> None:
        if (
            isinstance(event, PhaseEntered)
            and event.phase == "compute"
            and event.rank == late
            and event.step in late_steps
        ):
            time.sleep(seconds / 2)  # forward and backward

    def rescue_late(engine: Engine, step: int, micro_batches: Sequence[int]) -> None:
        nonlocal copying
        time.sleep(beside_s if rank != late else 0.0)
        copying = True
        rescue(engine, step, micro_batches)
        copying = False

    def publish_wrong(group: HostGroup, step: int, entry: int, node: Node, *, whole: bool = False) -> None:
        if copying and rank == corrupt:
            group.partial(entry).entries[0].view(-1)[:1].mul_(1.5)
        publish(group, step, entry, node, whole=whole)

    Engine._rescue = rescue_late  # type: ignore[method-assign, assignment]
    HostGroup.publish = publish_wrong  # type: ignore[method-assign, assignment]

    def note(event: Event) -> None:
        if isinstance(event, MicroBatchesCopied):
            copied.append(asdict(event))

    subject = armed(trainer(callbacks=[note], fault={"copies": "always"}, **options), strikes)
    subject.probe(slow)
    return {**asdict(subject.fit(12)), "copied": copied}


def look(directory: str, dies: Sequence[Any] = ("", -1), **options: Any) -> dict[str, Any]:
    """Train toys a little, evaluate them, and write their outputs; one worker is killed meanwhile, once.

    Arguments:
        dies: in which call, and its rank.
    """
    done = HostGroup.enter
    calls: list[str] = []

    def enter(group: HostGroup, activity: str, step: int, micro_batch: int | None = None) -> None:
        done(group, activity, step, micro_batch)
        if activity == "validation" and [*calls[-1:], group.rank] == list(dies) and not this_process().joins:
            os.kill(os.getpid(), signal.SIGKILL)

    HostGroup.enter = enter  # type: ignore[method-assign, assignment]
    subject = trainer(model="norm", **options)
    subject.fit(3)
    calls.append("evaluate")
    metrics = subject.evaluate(toys.Samples())
    calls.append("predict")
    return {"metrics": metrics, "written": asdict(subject.predict(toys.Samples(), directory))}


def leave_the_program(rank: int, **options: Any) -> dict[str, Any]:
    """Train toys; the program of one worker ends in the middle, without an error."""

    def leave(event: Event) -> None:
        if isinstance(event, PhaseEntered) and (event.rank, event.step) == (rank, 4) and not this_process().joins:
            sys.exit(0)

    subject = trainer(**options)
    subject.probe(leave)
    return asdict(subject.fit(12))


class DeadlySample(toys.Samples):
    """Whoever loads one of the samples ends."""

    def __init__(self, deadly: int) -> None:
        super().__init__()
        self._deadly = deadly

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if index == self._deadly and this_process().size > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def train_on_a_deadly_sample(deadly: int, **options: Any) -> None:
    """Train toys on samples one of which ends its worker."""
    small_trainer(data=DeadlySample(deadly), global_batch_size=60, **options).fit(3)


def train_after_an_early_death(mark: str, **options: Any) -> dict[str, Any]:
    """Train toys; the worker of rank 1 ends before training begins, once."""
    if this_process().rank == 1 and not os.path.exists(mark):
        os.close(os.open(mark, os.O_CREAT))
        take = HostGroup.barrier

        def end(group: HostGroup, operation: str) -> None:
            os.kill(os.getpid(), signal.SIGKILL)
            take(group, operation)

        HostGroup.barrier = end  # type: ignore[method-assign, assignment]
    return train(**options)


def survive(**options: Any) -> dict[str, Any]:
    """`fail`, where those that are left return the error that they meet with, and when, instead of failing too."""
    try:
        return fail(**options)
    except GroupError as error:
        return {"error": str(error), "kind": type(error).__name__, "at": time.monotonic()}


def survive_silence(rank: int, step: int, **options: Any) -> dict[str, Any]:
    """Train toys; the worker of a rank stops when the other hosts have a bucket's sum from it, and its mates do not."""
    mark = Crossing._is_summed

    def mark_or_stop(crossing: Crossing, bucket: Bucket) -> None:
        last = max(other.index for other in crossing.buckets if other.lane == bucket.lane)
        if (crossing.place.rank, crossing._step, bucket.index) == (rank, step, last):
            stop()
        mark(crossing, bucket)

    Crossing._is_summed = mark_or_stop  # type: ignore[method-assign, assignment]
    return survive(rank=-1, how="", **options)


def rank_and_world() -> list[str]:
    """What a worker sees of its place."""
    return [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")]


def leave_child() -> int:
    """Start a process that outlives the function; its id."""
    return subprocess.Popen(["sleep", "300"]).pid


def train_twice() -> list[str]:
    """Two trainers of different sizes in one process."""
    return [trainer(model=model).fit(3).digest for model in ("mlp", "norm")]


def descriptors_before_and_after() -> tuple[int, int]:
    """Open descriptors after one training, and after three more."""
    small_trainer().fit(1)
    gc.collect()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        small_trainer().fit(1)
        gc.collect()
    return before, len(os.listdir("/proc/self/fd"))


def reform_often(times: int) -> dict[str, Any]:
    """Make a wire, use it, be freed from a call that would wait for long, and let go of it, again and again."""
    world = this_process()
    link = Link("gloo", world.store(10.0), world.address, 30.0, torch.device("cpu"))
    made, freed, errors, descriptors = [], [], set(), []
    for generation in range(times):
        started = time.monotonic()
        wire = NetworkWire(link, f"generation {generation}", world.rank, world.size)
        made.append(time.monotonic() - started)
        total = torch.full((1000,), float(world.rank))
        drive(ring(wire, total, 0), "ring")
        assert total[0] == sum(range(world.size))
        revoked: list[float] = []

        def revoke(wire: NetworkWire = wire, revoked: list[float] = revoked) -> None:
            revoked.append(time.monotonic())
            wire.revoke()

        timer = threading.Timer(0.01, revoke)
        if world.rank == 0:
            timer.start()
        try:
            wire.post([], [(total, (world.rank + 1) % world.size)], 1).wait("a message that nobody sends")
        except GroupError as error:
            errors.add(type(error).__name__)
            freed.append(time.monotonic() - revoked[0] if revoked else 0.0)
        if world.rank == 0:
            timer.join()
        wire.close()
        descriptors.append(len(os.listdir("/proc/self/fd")))
    return {"made_s": made, "freed_s": freed, "errors": sorted(errors), "descriptors": descriptors}


def _send_and_receive(wire: NetworkWire, sends: Sequence[Addressed], receives: Sequence[Addressed]) -> None:
    wire.post(sends, receives, 1).wait("a large message")


def revoked_while_a_message_comes(times: int) -> list[float]:
    """Rank 0 receives on a thread of its own, and all let go of the wire meanwhile: the seconds that this took each."""
    world = this_process()
    link = Link("gloo", world.store(10.0), world.address, 20.0, torch.device("cpu"))
    took = []
    for generation in range(times):
        wire = NetworkWire(link, f"generation {generation}", world.rank, world.size)
        background = Background("test", lambda: None)
        message = [(torch.zeros(24 << 20), 1 - world.rank)]
        sends, receives = (message, []) if world.rank else ([], message)
        running = background.submit(partial(_send_and_receive, wire, sends, receives))
        time.sleep(0.005 * (1 + generation % 4))
        started = time.monotonic()
        wire.revoke()
        background.close(held_up=lambda wire=wire: wire.awaits)  # type: ignore[misc]
        took.append(time.monotonic() - started)
        wire.close()
        assert not running.done() or isinstance(running.exception(), GroupError)
    return took


def reform_without(lost: int) -> dict[str, Any]:
    """A group of several hosts loses a worker in a step; the others form the next generation and sum a step."""
    world = this_process()
    flat = flat_layout([ParameterSpec(TensorSpec("w", "float32", (500,)), ("w",), 0)])
    partials = partial_layout(flat, [])
    teams = one_team(flat, 0)
    buckets = len(Way(100).buckets(flat, teams))
    size = world.local_size
    layout = host_layout(size, 9, 8, partials.size_bytes, 64, 1, 64, buckets)
    arena = Arena(world.arena(layout.size_bytes), layout.size_bytes)
    local = HostGroup(arena, layout, partials, world.local_rank, range(size), 1, 2.0)
    link = Link("gloo", world.store(10.0), world.address, 2.0, torch.device("cpu"))
    count = 2 * world.size
    group = HierarchicalGroup(local, Place(world.hosts, world.rank), Terms(link, flat, Way(100), count, teams))

    def step(group: HierarchicalGroup, number: int) -> float:
        group.begin(number, count)
        share = micro_batches(count, group.size)[group.rank]
        leaves, _ = accumulation(share.start, share.stop, count)
        for leaf in leaves:
            partial = group.partial(leaf.chain[0])
            if leaf.opens:
                partial.clear()
            add_entry([group.partial(p) for p in leaf.chain], 0, torch.full((500,), float(leaf.micro_batch)))
            if leaf.completes is not None:
                group.publish(number, leaf.completes[1], leaf.completes[0])
        total = float(group.collect(number, count, lambda left: None)[0][0][1].segments[0][7])
        group.finish(number)
        group.settle(number)
        return total

    first = step(group, 1)
    if world.rank == lost:
        os.kill(os.getpid(), signal.SIGKILL)
    error = ""
    try:
        step(group, 2)
    except GroupError as caught:
        error = str(caught)
    left = [rank for rank in range(world.size) if rank != lost]
    link.store.set(f"agreed {world.rank}", "")  # what a coordinator does: nobody begins before all have been freed
    link.store.wait([f"agreed {rank}" for rank in left])
    started = time.monotonic()
    group = group.reform(2, left)
    seconds = time.monotonic() - started
    again = step(group, 2)
    group.close()
    return {"sums": [first, again], "error": error, "reformed_s": seconds, "place": [group.rank, group.size]}


def full_rank_power_sgd() -> dict[str, Any]:
    """A gradient summed by PowerSGD at full rank, by ours and by torch's hook."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(rank)
    inputs, targets = torch.randn(9, 20), torch.randn(9, 12)
    torch.manual_seed(5)
    plain = nn.Linear(20, 12, bias=False)
    nn.functional.mse_loss(plain(inputs), targets).backward()  # type: ignore[no-untyped-call]
    assert plain.weight.grad is not None
    own = plain.weight.grad.clone()
    mean = own.clone()
    dist.all_reduce(mean)

    model = nn.parallel.DistributedDataParallel(plain)
    state = PowerSGDState(None, matrix_approximation_rank=12, start_powerSGD_iter=2, min_compression_rate=0.01)
    model.register_comm_hook(state, powerSGD_hook)
    for _ in range(4):  # the first ones are not compressed
        model.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]

    world = this_process()
    wire = NetworkWire(Link("gloo", world.store(10.0), None, 10.0, torch.device("cpu")), "ours", rank, 2)
    value, basis = own.flatten().clone(), torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    drive(power_sgd(wire, [value], [torch.zeros_like(value)], [basis], 0), "power_sgd")
    wire.close()
    torchs = plain.weight.grad.clone()
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    return {"ours": (value / 2).tolist(), "torch": torchs.flatten().tolist(), "mean": (mean / 2).flatten().tolist()}


def train_with_a_slow_disk(seconds: float, **options: Any) -> dict[str, Any]:
    """Train toys; each tensor of a shared state takes its time."""
    tensors = SharedState.tensors

    def slowly(self: SharedState) -> Iterator[tuple[str, torch.Tensor]]:
        for item in tensors(self):
            time.sleep(seconds)
            yield item

    SharedState.tensors = slowly  # type: ignore[method-assign]
    return train(steps=2, checkpoint_every=1, **options)


def averaged_by_torch(period: int, after: int, steps: int) -> list[list[float]]:
    """Local SGD by torch's averager, with a replica on each worker; its parameters."""
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = local_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, fused=True)
    averager = PeriodicModelAverager(period, warmup_steps=after + period - 1)
    for step in range(steps):
        rows = [toys.Samples()[i] for i in Sampler(toys.SAMPLES, 0, 8, 8 // size).indices(step, rank).tolist()]
        inputs, targets = (torch.stack([row[part] for row in rows]).double() for part in (0, 1))
        optimizer.zero_grad()
        nn.functional.mse_loss(model(inputs), targets).backward()  # type: ignore[no-untyped-call]
        for parameter in model.parameters() if step < after else ():
            assert parameter.grad is not None
            dist.all_reduce(parameter.grad)
            parameter.grad /= size
        optimizer.step()
        averager.average_parameters(model.parameters())
    result = [parameter.flatten().tolist() for parameter in model.parameters()]
    dist.barrier()
    dist.destroy_process_group()
    return result


def averaged_by_ours(period: int, after: int, steps: int) -> list[list[float]]:
    """The same, by ours."""
    subject = Trainer(
        model=local_model,
        loss=nn.functional.mse_loss,
        data=[(x.double(), y.double()) for x, y in (toys.Samples()[i] for i in range(toys.SAMPLES))],
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        sync={"mode": "local", "period": period, "after": after},
        global_batch_size=8,
        micro_batch_size=1,
        observe={"progress": False},
    )
    subject.fit(steps)
    assert subject.model is not None
    return [parameter.flatten().tolist() for parameter in subject.model.parameters()]


def local_model() -> nn.Module:
    """The same values everywhere."""
    with Isolation() as isolation:
        isolation.seed(5)
        return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4)).double()


def touched_versions(sync: dict[str, Any], layout: dict[str, Any]) -> dict[str, int]:
    """Train four layers, and count the versions of this worker's stage, and their bytes that have been touched."""
    seen: list[PipeDreamEngine] = []
    done = PipeDreamEngine._do

    def noted(engine: PipeDreamEngine, step: int) -> Done:
        seen.append(engine)
        return done(engine, step)

    PipeDreamEngine._do = noted  # type: ignore[method-assign, assignment]
    small_trainer(
        model=lambda: nn.Sequential(*(nn.Linear(n, m) for n, m in ((6, 8), (8, 8), (8, 8), (8, 4)))),
        sync=sync,
        layout=layout,
        global_batch_size=48,
        micro_batch_size=2,
    ).fit(1)
    (kind,) = seen[0]._values._kinds
    touched = sum(t.nbytes for places in kind.places[1:] for t in places if t.any())
    return {
        "versions": len(kind.places),
        "touched_bytes": touched,
        "stage_bytes": sum(t.nbytes for t in kind.places[0]),
    }
