"""Whether a configuration can run on given hosts: decided from numbers alone, before any process starts."""

from unisono.config import TrainingConfig, more_replicas_than_micro_batches
from unisono.errors import ConfigurationError
from unisono.launch.task import Elastic
from unisono.plan.exchange import turns
from unisono.plan.homes import Homes
from unisono.plan.hosts import Hosts
from unisono.plan.shards import apart_shares

MOST_ROUNDS = 200
"""Micro-batches of a host in a step, where each one's gradient is summed at once: as many as can be published."""


def refuse_impossible(config: TrainingConfig, hosts: Hosts) -> None:
    """Check a configuration against the hosts' workers.

    Raises:
        ConfigurationError: with the numbers, and what can be instead.
    """
    layout = config.layout
    replicas = layout.replicas(hosts.size)
    if replicas > config.micro_batches:
        each = layout.model_workers
        raise ConfigurationError(more_replicas_than_micro_batches(replicas, config.micro_batches, each))
    if config.sync.pushes:
        _refuse_to_push(config, hosts)
    if config.sync.stashes and hosts.sizes != (layout.pipeline,):
        raise ConfigurationError(
            f"sync.mode {config.sync.mode} trains one pipeline on one host so far, and there are {hosts.size} workers "
            f"for one of {layout.pipeline}; start {layout.pipeline} (-n {layout.pipeline}), or set layout.pipeline"
        )
    if config.device != "cpu":
        _refuse_on_devices(config)
    for host, workers in enumerate(hosts.sizes):
        layout.refuse_broken_replicas(workers, f"host {host}")
    if config.sync.replay is not None and hosts.size > 1:
        raise ConfigurationError(f"sync.replay is done by one worker, and there are {hosts.size}; start one (-n 1)")
    if config.sync.apart and len(hosts.sizes) > 1:
        _refuse_idle_workers(config, hosts)
    divided = (config.sync.apart or config.sync.pushes) and len(hosts.sizes) > 1
    if divided and config.checkpoint.every == "auto":
        raise ConfigurationError(
            f"checkpoint.every is auto, which the chief decides alone, and with sync.mode {config.sync.mode} all "
            "hosts take part in a checkpoint; give a number of steps"
        )
    if layout.zero and len(hosts.sizes) > 1:
        _refuse_shared_state(config, layout.zero, hosts.sizes)


def with_replicas(config: TrainingConfig, hosts: Hosts) -> TrainingConfig:
    """The configuration with what follows from the number of workers where it is not given: how many replicas train
    apart, how many pushes count in a round, or how many stages are updated apart.

    Raises:
        ConfigurationError: where micro-batches cannot be shared evenly by them.
    """
    if config.sync.in_rounds and config.sync.accepted is None:
        computing = max(1, hosts.size - config.sync.serving * len(hosts.sizes))  # too few are refused in a sentence
        if config.sync.backup >= computing:
            raise ConfigurationError(
                f"sync.backup is {config.sync.backup}, and there are {computing} workers that compute: nothing would "
                "count; use fewer, or give sync.accepted"
            )
        accepted = computing - config.sync.backup
        return config.model_copy(update={"sync": config.sync.model_copy(update={"accepted": accepted})})
    if config.sync.mode == "pipedream" and config.sync.stages is None:
        return config.model_copy(update={"sync": config.sync.model_copy(update={"stages": config.layout.pipeline})})
    if not config.sync.apart or config.sync.replicas is not None:
        return config
    if config.micro_batches % hosts.size:
        raise ConfigurationError(
            f"{config.micro_batches} micro-batches cannot be shared evenly by {hosts.size} replicas, one a worker; "
            "give sync.replicas, a number that divides them"
        )
    if config.sync.clients is not None and hosts.size > config.sync.clients:
        raise ConfigurationError(
            f"sync.clients is {config.sync.clients}, and there are {hosts.size} workers, each of which would train "
            "one; give sync.replicas, or start fewer workers"
        )
    return config.model_copy(update={"sync": config.sync.model_copy(update={"replicas": hosts.size})})


def refuse_to_compare(config: TrainingConfig) -> None:
    """Check that a run on one number of workers can be compared with the same on another.

    Raises:
        ConfigurationError: where they would not be the same.
    """
    sync = config.sync
    refuse_inexact(config)
    if sync.stashes:
        raise ConfigurationError(
            f"sync.mode {sync.mode} trains on one worker, or on one for each stage: compare the digests of unisono "
            "train -n 1 and of -n with layout.pipeline"
        )
    if sync.apart and sync.replicas is None:
        raise ConfigurationError(
            f"sync.mode is {sync.mode} with one replica a worker, another run on each number of workers; give "
            "sync.replicas"
        )
    if sync.in_rounds and sync.accepted is None:
        raise ConfigurationError(
            "in each round of sync.mode server one push a worker counts, another run on each number of workers; give "
            "sync.accepted"
        )


def refuse_inexact(config: TrainingConfig) -> None:
    """Check that two runs on the same workers are the same.

    Raises:
        ConfigurationError: where they are not.
    """
    sync = config.sync
    if sync.inexact is not None:
        way = (
            "record one and replay it (sync.record, sync.replay)" if sync.mode == "server" else "use another sync.mode"
        )
        raise ConfigurationError(f"sync.mode is {sync.mode}, and {sync.inexact}: no two runs are alike; {way}")


def refuse_inelastic(config: TrainingConfig, elastic: Elastic | None) -> None:
    """Check whether workers can join and leave.

    Raises:
        ConfigurationError: where they cannot.
    """
    layout = config.layout
    if elastic is None:
        return
    if layout.data is not None and elastic.most != elastic.least:
        raise ConfigurationError(
            f"layout.data is {layout.data}, and --workers is {elastic.least}:{elastic.most}; leave layout.data out"
        )
    if elastic.spares and layout.model_workers > 1:
        raise ConfigurationError(
            f"--spares is {elastic.spares}, and a worker computes a part of the model that another cannot wait for in "
            "advance; leave --spares out: a lost worker is replaced all the same"
        )
    if config.sync.stashes:
        raise ConfigurationError(
            f"--workers is {elastic.least}:{elastic.most}, and sync.mode {config.sync.mode} has a worker for each "
            "stage; give a number of workers (-n)"
        )
    if config.sync.serving:
        raise ConfigurationError(
            f"--workers is {elastic.least}:{elastic.most}, and sync.serving is {config.sync.serving}: a server's place "
            "must not change; give a number of workers (-n)"
        )
    if not survives(config, elastic.most):
        raise ConfigurationError(
            "workers can join and leave where they share one state in the CPU's memory and compute whole layers; use "
            "device cpu and layout.tensor=1, and leave out layout.offload, and layout.zero=0 with several workers a "
            "replica"
        )


def survives(config: TrainingConfig, workers: int) -> bool:
    """Whether the workers of a host can go on without one of them, in the same processes, so far.

    Those who divide a layer compute nothing alone, nor do stages that are updated apart; a device's state dies with
    its worker; that on a disk is made by all at their start; where every replica has a state of its own, the rest of
    one shares nothing with others that could take over; and nobody answers in the place of a lost server process.
    """
    layout = config.layout
    own_states = layout.zero == 0 and layout.model_workers > 1
    in_memory = config.device == "cpu" and layout.offload is None
    apart = config.sync.stashes or config.sync.serving > 0
    return in_memory and layout.tensor == 1 and not own_states and not apart and workers > 1


def rolls_back(config: TrainingConfig) -> bool:
    """Whether workers that cannot go on without one of them all start again, from a snapshot in memory.

    Not where the state is on a disk, since memory has no room for it; not where fewer are to go on; and what
    compression has not sent yet is in no snapshot.
    """
    wanted = config.fault.on_loss in ("replace", "wait")
    return wanted and config.layout.offload is None and config.wire.compression == "none"


def survives_hosts(config: TrainingConfig) -> bool:
    """Whether hosts can go on without one of them, so far.

    Each must have the whole state, in the CPU's memory, of which its workers compute whole layers; and what compression
    has not sent yet would be lost with a host.
    """
    layout = config.layout
    whole = layout.zero is None and layout.model_workers == 1 and not config.sync.apart and not config.sync.pushes
    in_memory = config.device == "cpu" and layout.offload is None
    return whole and in_memory and config.wire.compression == "none" and config.fault.on_loss != "stop"


def _refuse_to_push(config: TrainingConfig, hosts: Hosts) -> None:
    """Whether workers can wait for nobody."""
    sync, several = config.sync, len(hosts.sizes) > 1
    if (alone := next((host for host, workers in enumerate(hosts.sizes) if workers <= sync.serving), None)) is not None:
        raise ConfigurationError(
            f"sync.serving is {sync.serving}, and host {alone} has {hosts.sizes[alone]} workers, of which none would "
            "compute; start more, or leave sync.serving out"
        )
    computing = Homes(hosts, sync.servers, sync.serving).computing
    if len(computing) > (units := config.micro_batches // sync.push):
        raise ConfigurationError(
            f"{len(computing)} workers, and a step has {units} pushes of {sync.push} micro-batches; use at most "
            f"{units} workers, a smaller sync.push, or a larger global_batch_size"
        )
    if several and sync.mode == "hogwild":
        raise ConfigurationError(
            f"sync.mode hogwild is for workers that share memory, and there are {len(hosts.sizes)} hosts; start one, "
            "or use sync.mode=server"
        )
    if sync.servers < len(hosts.sizes):
        raise ConfigurationError(
            f"sync.servers is {sync.servers}, and there are {len(hosts.sizes)} hosts, each of which keeps one at "
            "least; use more"
        )


def _refuse_on_devices(config: TrainingConfig) -> None:
    """What needs the memory that a CPU's workers share."""
    layout, device = config.layout, config.device
    if layout.tensor > 1:
        raise ConfigurationError(
            f"layout.tensor is {layout.tensor} with device {device}; tensor-parallel workers share memory so far: use "
            "device cpu, or layout.tensor=1"
        )
    if layout.stages > 1:
        raise ConfigurationError(
            f"the layout has {layout.stages} stages and device {device}; a pipeline's workers share memory so far: use "
            "device cpu, or layout.pipeline=1 with layout.schedule=1f1b"
        )
    if layout.offload is not None:
        raise ConfigurationError(
            f"layout.offload is {layout.offload} with device {device}; the optimizer's state is put on a disk from the "
            "CPU's memory so far: leave it out"
        )


def _refuse_idle_workers(config: TrainingConfig, hosts: Hosts) -> None:
    """A replica that trains apart is computed on one host, and each of a host's workers has a part of one."""
    replicas, count = config.sync.replicas or hosts.size, config.micro_batches
    if replicas < len(hosts.sizes):
        raise ConfigurationError(
            f"sync.replicas is {replicas}, and there are {len(hosts.sizes)} hosts, each of which trains one at least; "
            "use more replicas, or fewer hosts"
        )
    shares = apart_shares(count, replicas, hosts.sizes)
    if idle := [rank for rank, share in enumerate(shares) if not share]:
        host = hosts.place(idle[0])[0]
        own = sum(len(share) for rank, share in enumerate(shares) if hosts.place(rank)[0] == host)
        raise ConfigurationError(
            f"host {host} has {hosts.sizes[host]} workers and {own} micro-batches for its part of {replicas} replicas; "
            "start fewer there, or use a larger global_batch_size"
        )


def _refuse_shared_state(config: TrainingConfig, zero: int, sizes: tuple[int, ...]) -> None:
    """Whether hosts can share one state, so far."""
    hosts, count = len(sizes), config.micro_batches
    if config.wire.inexact is not None:
        raise ConfigurationError(
            f"layout.zero is {zero} over {hosts} hosts, and {config.wire.inexact}; use wire.algorithm=canonical and "
            "wire.compression=none, or leave layout.zero out"
        )
    if config.device != "cpu":
        raise ConfigurationError(
            f"layout.zero is {zero} over {hosts} hosts with device {config.device}; hosts share a state in the CPU's "
            "memory so far: leave layout.zero out"
        )
    if zero == 1:
        return
    if max(sizes) > 1:
        alone = "" if config.layout.model_workers > 1 else ", or one worker on each (-n 1) with more threads"
        raise ConfigurationError(
            f"layout.zero is {zero} over {hosts} hosts of up to {max(sizes)} workers; between hosts of several workers "
            f"layout.zero=1 is possible{alone}"
        )
    if (rounds := turns(count, hosts)) > MOST_ROUNDS:
        raise ConfigurationError(
            f"layout.zero is {zero} and each of {hosts} hosts has {rounds} micro-batches in a step; at most "
            f"{MOST_ROUNDS} are possible: use a larger micro_batch_size, or layout.zero=1"
        )
