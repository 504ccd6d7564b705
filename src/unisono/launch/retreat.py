"""One host's part in a run whose hosts all start again, from snapshots, when one of them or of their workers is lost.

Each host has a part of the state that others lack, or its workers compute what nobody can take over in the middle of a
step. The launchers decide who goes on (`fault.coordination`); with each generation all workers of its hosts are new.
"""

from dataclasses import asdict, dataclass

from unisono.comm.header import Course, Header
from unisono.errors import LaunchError, WorkerFailed
from unisono.fault.coordination import Report
from unisono.fault.generation import Generation
from unisono.launch.attempt import Attempt
from unisono.launch.control import Message
from unisono.launch.quorum import Quorum, changed, named

MOST_FRUITLESS = 3
"""Times that all hosts start again, one after another, and come to no step."""


@dataclass(slots=True)
class Retreat:
    """Of one set of workers.

    Arguments:
        quorum: of all hosts.
        workers: that this host has in every generation.
        generation: whose workers these are.
        before: what came before them.

    Attributes:
        decided: what all start again as, once that is known; None until then.
    """

    quorum: Quorum
    workers: int
    generation: Generation
    before: Attempt
    decided: Generation | None = None
    _began_at: int | None = None  # the step from which they train
    _step: int = 0  # the last that was committed here
    _fruitless: bool = True
    _lost: bool = False
    _stopped: bool = False
    _members: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self._members = self.generation.hosts

    @property
    def waiting(self) -> bool:
        """Whether this host has no workers that could go on, and waits for a decision."""
        return self._lost or self._stopped

    def lose(self) -> None:
        """A worker of this host is lost."""
        self._lost = True

    def stop(self) -> None:
        """The workers of this host cannot go on; why should be known elsewhere."""
        self._stopped = True

    def tend(self, header: Header | None) -> None:
        """Tell the others how far this host is, and hear what is decided.

        Arguments:
            header: the words of what is trained; None before it is.
        """
        self._look(header)
        nodes = self.quorum.nodes
        if not nodes.survives:
            nodes.rules = asdict(self.quorum.rules)
            self.quorum.begin()
        number, slots = self.generation.number, tuple(range(self.workers))
        nodes.report(Report(self._step, slots, number if self._stopped else 0, again=number if self._lost else 0))
        nodes.poll()
        for generation in nodes.take_decided():
            self._decided(generation)
        if nodes.is_undecided():
            self.stop()  # others may go on without this host: its workers let go of what they keep
        self.quorum.look(self._members)

    def _look(self, header: Header | None) -> None:
        """How far this host is."""
        committed = header.committed if header is not None else 0
        if self._began_at is None and header is not None and header.course is Course.TRAINING:
            self._began_at = committed
        self._step = max(committed, self.before.rolled_back or 0)
        self._fruitless = header is None or header.course is Course.STARTING or committed == self._began_at

    def attempt(self, decided: Generation) -> Attempt:
        """What the workers of all hosts start again as.

        Raises:
            WorkerFailed: where they have done so again and again, and came to no step.
        """
        fewer = set(decided.hosts) < set(self.generation.hosts)  # one more is lost: that comes to an end by itself
        restarts = self.before.restarts + (not fewer) if self._fruitless else 0
        if restarts > MOST_FRUITLESS:
            raise WorkerFailed(
                f"all hosts have started again {restarts} times, one after another, and came to no step after "
                f"{self._step}; look at what the hosts have said, and resume from the newest checkpoint (--resume)"
            )
        return Attempt(
            restarts,
            rolled_back=max(self._step, decided.step),
            generation=decided,
            rules=self.quorum.rules,
            before=self.generation.hosts,
        )

    def explains(self, error: Message) -> bool:
        """Whether a worker of this host is not to blame for its error; of those who start again, others may be lost."""
        return is_consequence(error) or (self.quorum.nodes.survives and error["kind"] == LaunchError.__name__)

    def _decided(self, generation: Generation) -> None:
        here = self.quorum.nodes.number in generation.hosts
        go = f"start{'s' * (len(generation.hosts) == 1)} again, from the newest snapshot"
        told = [*changed(self._members, generation.hosts), f"{named(generation.hosts)} {go}"]
        self.quorum.say(f"{', '.join(told)} (generation {generation.number}; step {generation.step} had been trained)")
        self._members, self.decided = generation.hosts, generation if here else None
        if not here:
            self.stop()


def is_consequence(error: Message) -> bool:
    """Whether another worker is to blame for an error."""
    return bool(error["consequence"])
