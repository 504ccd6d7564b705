"""The contract that every way of communicating meets: who trains together, and how partials become sums.

A step is: fill partials (`partial`), `publish` them, `collect` a set that covers the step, update, `finish`, and,
before the new state is read, `settle`. Every wait has a deadline; `revoke` frees all who wait; `reform` makes the
group of the next generation.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor

from unisono.comm.canonical import Cover
from unisono.comm.partial import Partial
from unisono.events import Event, WireUse
from unisono.plan.roster import Loss
from unisono.run.summation import Node

STOP = 1
"""Flag: this worker was asked to stop after the step."""

SNAPSHOT = 2
"""Flag: the state before this step's update is to be kept, for a checkpoint."""

PACKED = 4
"""Flag: the next step's gradients travel packed, as `comm.packing` does."""

KEEP = 16
"""Flag: a snapshot of the state after this step is taken, in memory that outlives workers."""

LEAVE = 8
"""Flag: this worker leaves after the step; the others go on."""


@runtime_checkable
class Group(Protocol):
    """Workers that train together, numbered 0 to ``size - 1`` within a generation."""

    @property
    def rank(self) -> int:
        """This worker's number."""

    @property
    def size(self) -> int:
        """Number of workers."""

    @property
    def generation(self) -> int:
        """The group's number; grows at each change of membership."""

    unlike: str
    """Why equal work gives unequal bits on different members; empty where it does not."""

    @property
    def members(self) -> Sequence[int]:
        """The slots of those of this host who train in this step."""

    @property
    def deadline_s(self) -> float:
        """Seconds that any wait may take."""

    @property
    def owners(self) -> "Group":
        """Those among them who share one state, each block of it with one owner: the workers of this host."""

    @property
    def on_gradient(self) -> Callable[[int], None] | None:
        """To be called with a use as soon as its gradient is final in this worker's partials; None if nobody waits."""

    @property
    def chief(self) -> bool:
        """Whether this worker keeps the run's records and writes its checkpoints."""

    def begin(self, step: int, count: int) -> None:
        """What is published from here on belongs to ``step``, which has ``count`` micro-batches."""

    def foretell(self, step: int, micro_batch: int, scalars: Callable[[int], Sequence[float]]) -> None:
        """A micro-batch has been forwarded.

        Arguments:
            scalars: what those of its partial will be, by how many there are.
        """

    def check(self) -> None:
        """Called between micro-batches.

        Raises:
            ReplicaBroken: where what this worker computes has become useless.
        """

    def enter(self, activity: str, step: int, micro_batch: int | None = None) -> None:
        """Say what this worker does now: one of `ACTIVITIES`; shown to whoever waits for it."""

    def partial(self, entry: int) -> Partial:
        """This worker's buffer number ``entry``."""

    def publish(self, step: int, entry: int, node: Node, *, whole: bool = False) -> None:
        """The buffer holds the finished sum of ``node``; it is immutable until the step is committed.

        Arguments:
            whole: of the whole model, in a group whose workers compute a part of it each.
        """

    def published(self, step: int) -> int:
        """How many subtrees of a step this worker has published: the number of its first buffer that is free."""

    def collect(self, step: int, count: int, rescue: Callable[[Sequence[int]], None]) -> list[Cover]:
        """Wait until all ``count`` micro-batches are published.

        A cover for each team (those who compute the same part of the model): subtrees that hold every micro-batch once,
        from left to right.

        Arguments:
            rescue: computes and publishes micro-batches of workers that were lost.
        """

    def distribute(self, step: int, values: Callable[[int, int, int], Tensor]) -> None:
        """What each host has updated, to all of them, where they share one state.

        Arguments:
            values: (segment, start, stop) -> the parameters that lie there.
        """

    def finish(self, step: int) -> None:
        """All that this worker owns is at the state after ``step``."""

    def settle(self, step: int) -> Sequence[Loss]:
        """Wait until everyone has finished ``step``: its state is committed and may be read.

        Where workers were lost before they had finished, it returns them: once what they left is done by their heirs,
        it is to be called again.
        """

    @property
    def asked_to_leave(self) -> bool:
        """Whether the launcher wants this worker to leave."""

    @property
    def leaves(self) -> bool:
        """Whether this worker is to leave now, and the others go on."""

    def set_flags(self, flags: int) -> None:
        """Requests (`STOP`) to go with the next step that is published."""

    def all_flags(self) -> int:
        """Everyone's requests joined; the same for all between `collect` and `settle`."""

    def all_gather(self, payload: bytes, operation: str) -> list[bytes]:
        """Everyone's payload, in order of rank; for small messages. That of a worker that was lost is empty."""

    def barrier(self, operation: str) -> None:
        """Wait until everyone has come here."""

    def broadcast(self, tensor: Tensor, operation: str) -> None:
        """On the first worker of every host: what the first host has there, for all of them."""

    @property
    def wire_use(self) -> WireUse | None:
        """What the last step's exchange between hosts took; None where there is none."""

    def news(self) -> list[Event]:
        """What has happened to the group since it was last asked."""

    def report(self, step: int, seconds: Sequence[float]) -> None:
        """Leave this worker's seconds in each phase of a step for others to read."""

    def reports(self, step: int) -> list[list[float]]:
        """What everyone left for a step that is settled, in order of rank."""

    def work(self) -> Mapping[int, int]:
        """How many micro-batches each of this host's workers had in the last step, by slot."""

    def gather_compression(self) -> dict[str, Tensor]:
        """On the first worker of every host, between two steps: the memory of compression of all hosts, by name.

        Only the first host receives it; empty where nothing is compressed.
        """

    def restore_compression(self, tensors: Mapping[str, Tensor]) -> None:
        """On the first worker of every host: take up what the first host was given; what is missing begins anew."""

    def leave_known(self, data: bytes) -> None:
        """Leave what a worker that joins must know besides the state; all members leave the same."""

    def known(self) -> bytes:
        """What was left for those who join."""

    def conclude(self) -> None:
        """No step follows: agree on who is the chief from now on."""

    def begin_work(self) -> None:
        """From here on the others go on where a worker is lost, though no step begins."""

    def end(self) -> None:
        """Training is over: nobody joins any more, and nobody is replaced."""

    def close(self, cause: BaseException | None = None) -> None:
        """Let go of connections; no call follows.

        Arguments:
            cause: why this worker ends, where it does so before the others do.
        """

    def revoke(self, cause: str = "") -> None:
        """End this generation: everyone who waits, or will, raises `Revoked`, with the cause."""

    def reform(self, generation: int, members: Sequence[int]) -> "Group":
        """The group of a later generation: ``members`` are slots, in order of rank, this worker's among them."""
