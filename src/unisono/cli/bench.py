"""``unisono bench``: measurements beside what one would use instead."""

import json
from typing import Annotated

import typer

from unisono.cli.options import (
    HostsOption,
    JsonOption,
    NodeRankOption,
    NodesOption,
    RendezvousOption,
    SecretOption,
    launcher_here,
    whole_numbers,
)
from unisono.errors import ConfigurationError


def train(
    models: Annotated[str, typer.Option(help="small, large, or both.")] = "small,large",
    against: Annotated[
        str | None,
        typer.Option(help="independent, ddp, accelerate, fabric, deepspeed; default: all that are installed."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Compare a training step with DDP, with replicas that never communicate, and with what else is installed.

    Example: unisono bench train --models small --rounds 5
    """
    with launcher_here() as launcher:
        from unisono.bench.train import bench

        others = against.split(",") if against else None
        rows = bench(launcher, models.split(","), others, rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps({"rows": rows}))


def comm(
    ranks: Annotated[str, typer.Option(help="Numbers of ranks on this host, for example 2,4.")] = "2,4",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 9,
    tune: Annotated[
        bool, typer.Option("--tune", help="Measure algorithms between hosts, for wire.algorithm=auto to choose from.")
    ] = False,
    hosts: HostsOption = None,
    nnodes: NodesOption = 1,
    node_rank: NodeRankOption = 0,
    rendezvous: RendezvousOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare collectives: the arena, gloo, our algorithms over gloo, MPI where it is installed.

    Example: unisono bench comm --ranks 2
    """
    from unisono.bench.comm import as_text, bench
    from unisono.bench.comm import tune as measure

    if not tune and (hosts is not None or nnodes > 1):
        raise ConfigurationError("--hosts and --nnodes are for --tune; without it, all ranks are on this host")
    from unisono.launch.spanning import launchers

    with launchers(hosts, nnodes, node_rank, rendezvous, secret_file) as here:
        numbers = whole_numbers(ranks, "--ranks")
        if tune:
            workers = 1 if here.nodes > 1 else max(2, numbers[0])
            rows = measure(here.launcher, workers, rounds, writes=here.number == 0)
            if not as_json and rows:
                typer.echo(as_text(rows))
        else:
            rows = bench(here.launcher, numbers, rounds, None if as_json else typer.echo)
        if as_json and here.number == 0:
            typer.echo(json.dumps({"rows": rows}))


def pipeline(
    stages: Annotated[str, typer.Option(help="Workers of a pipeline, for example 2,4,8.")] = "2,4,8",
    micro_batches: Annotated[str, typer.Option(help="In a step.")] = "4,8,32",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds of the step with real layers.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Compare the bubbles of pipeline schedules with theory, and a step with torch.distributed.pipelining: 10 minutes.

    Example: unisono bench pipeline --stages 2,4 --micro-batches 8
    """
    with launcher_here() as launcher:
        from unisono.bench.pipeline import bench

        counts = whole_numbers(stages, "--stages"), whole_numbers(micro_batches, "--micro-batches")
        found = bench(launcher, *counts, rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps(found))


def sharding(
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare ZeRO-3 with fully_shard, and divided layers with parallelize_module, on two workers: 4 minutes.

    Example: unisono bench sharding --rounds 3
    """
    with launcher_here() as launcher:
        from unisono.bench.sharding import bench

        found = bench(launcher, rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps(found))


def memory(
    hosts: Annotated[str, typer.Option(help="Numbers of hosts, of one worker each, on this machine.")] = "2",
    as_json: JsonOption = False,
) -> None:
    """Compare what ZeRO 1, 2 and 3 keep of a model of 100 million parameters with the formula: 3 minutes, 4 GiB.

    Example: unisono bench memory --hosts 2,4
    """
    with launcher_here() as launcher:
        from unisono.bench.memory import bench

        found = bench(launcher, whole_numbers(hosts, "--hosts"), None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps(found))


def plan(
    models: Annotated[
        str, typer.Option(help="gpt, wide, three, digits, large; several, with commas.")
    ] = "gpt,wide,three,digits",
    workers: Annotated[int, typer.Option("-n", "--workers", min=1, help="Of the largest layouts.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Compare what is predicted of layouts on this machine with what they take: 8 minutes.

    Example: unisono bench plan --models gpt --rounds 1
    """
    with launcher_here() as launcher:
        from unisono.bench.prospects import CASES, bench

        names = models.split(",")
        if unknown := [name for name in names if name not in CASES]:
            raise ConfigurationError(f"--models names {unknown[0]!r}; there are {', '.join(CASES)}")
        found = bench(launcher, names, rounds, workers, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps(found))


def network(
    rate: Annotated[str, typer.Option(help="Of the link between two hosts, as tc writes it.")] = "100mbit",
    steps: Annotated[int, typer.Option(min=20, help="Steps of DDP, and of what loses nothing.")] = 60,
    methods: Annotated[
        str,
        typer.Option(
            help="Ways of moving gradients, besides ddp; diloco, diloco_bf16, diloco_int8, diloco_streaming: hosts "
            "agree every 50 steps; server, server_bounded: a parameter server; alone: they never do."
        ),
    ] = "exact,exact_unpacked,bf16,int8,powersgd,top_k,sign,torch_powersgd",
    samples: Annotated[int, typer.Option(min=1, help="Sequences of 128 tokens that a host computes in a step.")] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, about 6 minutes each at 100 Mbit/s.")] = 1,
    as_json: JsonOption = False,
) -> None:
    """Compare ways of training over a slow link between two hosts (network namespaces; needs root).

    Example: unisono bench network --rate 100mbit --methods exact,powersgd
    """
    from unisono.bench.network import as_text, bench

    rows = bench(rate, steps, samples, methods.split(","), rounds, None if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))
    elif rounds > 1:
        typer.echo("\n".join(["medians:", *(as_text(row, rows[0]) for row in rows)]))


def control(
    launchers: Annotated[int, typer.Option(min=1, help="Launchers that report to the coordinator.")] = 1250,
    workers: Annotated[int, typer.Option(min=1, help="Of each of them.")] = 8,
    events: Annotated[int, typer.Option(min=0, help="Workers that end or come, a second.")] = 100,
    seconds: Annotated[float, typer.Option(min=1, help="To measure for.")] = 10.0,
    as_json: JsonOption = False,
) -> None:
    """Measure the coordinator of many hosts, on one core.

    Example: unisono bench control --launchers 100
    """
    with launcher_here() as launcher:
        from unisono.bench.control import as_text, bench

        found = bench(launcher, launchers, workers, events, seconds)
        typer.echo(json.dumps(found) if as_json else as_text(found))


def recovery(
    against: Annotated[str | None, typer.Option(help="torchrun, torchft; default: all that are installed.")] = None,
    repeat: Annotated[int, typer.Option(min=1, help="Kills of a worker, each in a run of its own.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Kill a worker of four; compare what follows with torchrun's restart from a checkpoint, and with torchft.

    Example: unisono bench recovery --against torchrun --repeat 3
    """
    from unisono.bench.recovery import bench

    rows = bench(against.split(",") if against else None, repeat, None if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))


def device(
    models: Annotated[str, typer.Option(help="tiny, gpt2 (85 million parameters), medium (302); several.")] = "gpt2",
    on: Annotated[str, typer.Option("--device", help="cuda, cuda:1, cpu.")] = "cuda",
    precision: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    steps: Annotated[int, typer.Option(min=30, help="Steps of each run.")] = 40,
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 3,
    as_json: JsonOption = False,
) -> None:
    """Measure a step on one accelerator beside a plain loop, what snapshots cost there, and a recovery.

    Example: unisono bench device --models gpt2 --precision bf16
    """
    with launcher_here() as launcher:
        from unisono.bench.device import bench
        from unisono.launch.local import LocalLauncher

        if not isinstance(launcher, LocalLauncher):
            raise ConfigurationError("unisono bench device needs a host whose launcher keeps memory: Linux")
        say = None if as_json else typer.echo
        rows = bench(launcher, models.split(","), on, precision, steps, rounds, say)
        if as_json:
            typer.echo(json.dumps({"rows": rows}))


def sync(
    modes: Annotated[
        str | None, typer.Option(help="Ways of agreeing, by how their names begin; several, with commas; default: all.")
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="sleep (no worker is slow, one is, or one after another), digits, gpt, gpt-long (3,000 steps), sparse "
            "(logistic regression); several, with commas."
        ),
    ] = "sleep,digits,gpt,sparse",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds, each with a seed of its own.")] = 5,
    as_json: JsonOption = False,
) -> None:
    """Compare ways of agreeing on the same task, with equal samples: what they learn, and how fast. 15 minutes.

    Example: unisono bench sync --tasks digits --modes "every step,server" --rounds 1
    """
    with launcher_here() as launcher:
        from unisono.bench.sync import TASKS, bench, ways_of

        wanted = [start.strip() for start in modes.split(",")] if modes else [""]
        names = [name.strip() for name in tasks.split(",")]
        if unknown := [name for name in names if name not in TASKS]:
            raise ConfigurationError(f"--tasks names {unknown[0]!r}; there are {', '.join(TASKS)}")
        ways = {name: ways_of(name, wanted) for name in names}
        if not any(ways.values()):
            known = dict.fromkeys(way for name in names for way in ways_of(name, [""]))
            raise ConfigurationError(f"--modes is {modes!r}; there are {'; '.join(known)}")
        rows = []
        for name in names:
            rows += bench(launcher, name, ways[name], rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps({"rows": rows}))


def optimizers(
    seeds: Annotated[int, typer.Option(min=1, help="Of each method and rate, at the largest batch.")] = 5,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of runs at batch 32 and 256.")] = 20,
    as_json: JsonOption = False,
) -> None:
    """Compare SGD, LARS and LAMB where the whole training set of digits is one batch; linear scaling: 3 minutes.

    Example: unisono bench optimizers --seeds 3 --pairs 5
    """
    from unisono.bench.optimizers import bench

    rows = bench(seeds, pairs, None if as_json else typer.echo)
    if as_json:
        typer.echo(json.dumps({"rows": rows}))


def survival(
    models: Annotated[str, typer.Option(help="lm (that of configs/lm.yaml), small, large; several.")] = "lm,large",
    rounds: Annotated[int, typer.Option(min=1, help="Interleaved rounds.")] = 7,
    as_json: JsonOption = False,
) -> None:
    """Measure what it costs to survive the loss of workers, and to write checkpoints: 12 minutes.

    Example: unisono bench survival --models lm --rounds 5
    """
    with launcher_here() as launcher:
        from unisono.bench.survival import bench

        rows = bench(launcher, models.split(","), rounds, None if as_json else typer.echo)
        if as_json:
            typer.echo(json.dumps({"rows": rows}))
