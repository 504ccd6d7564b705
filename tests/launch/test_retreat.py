"""What hosts start again as, decided without processes."""

from dataclasses import dataclass, field

import pytest

from unisono.comm.header import Header, header_bytes
from unisono.errors import LaunchError, WorkerFailed
from unisono.fault.coordination import Report
from unisono.fault.generation import Generation
from unisono.launch.attempt import Attempt
from unisono.launch.quorum import Quorum
from unisono.launch.retreat import MOST_FRUITLESS, Retreat


@dataclass
class Nodes:
    """The launchers, as `Retreat` needs them: what is decided is given."""

    number: int = 0
    survives: bool = True
    coming: list[Generation] = field(default_factory=list)
    told: list[Report] = field(default_factory=list)
    undecided: bool = False

    def report(self, report: Report) -> None:
        self.told.append(report)

    def poll(self) -> None:
        pass

    def take_decided(self) -> list[Generation]:
        coming, self.coming = self.coming, []
        return coming

    def is_undecided(self) -> bool:
        return self.undecided

    def waits_for(self) -> list[int]:
        return []


def generation(number: int, hosts: tuple[int, ...], step: int = 0) -> Generation:
    return Generation(number, hosts, ((0, 1),) * len(hosts), hosts[0], step)


@pytest.fixture
def header() -> Header:
    return Header(memoryview(bytearray(header_bytes(2))), 2)


def retreat(nodes: Nodes, before: Attempt | None = None) -> Retreat:
    said: list[str] = []
    quorum = Quorum(nodes, None, said.append)  # type: ignore[arg-type]
    return Retreat(quorum, 2, generation(4, (0, 1, 2)), before or Attempt())


def test_a_lost_worker_is_reported_until_it_is_decided_who_starts_again(header: Header) -> None:
    nodes = Nodes()
    found = retreat(nodes)
    header.train()
    header.committed = 7
    found.tend(header)
    assert (nodes.told[-1], found.waiting) == (Report(7, (0, 1)), False)
    found.lose()
    found.tend(header)
    assert (nodes.told[-1], found.waiting, found.decided) == (Report(7, (0, 1), again=4), True, None)
    nodes.coming = [generation(5, (0, 1, 2), 6)]
    found.tend(header)
    assert found.decided == generation(5, (0, 1, 2), 6)


def test_they_start_from_the_farthest_step_that_any_has_committed(header: Header) -> None:
    found = retreat(Nodes())
    header.train()
    header.committed = 7
    found.tend(header)
    attempt = found.attempt(generation(5, (0, 2), 9))
    assert attempt.rolled_back == 9 and attempt.before == (0, 1, 2) and attempt.generation == generation(5, (0, 2), 9)
    assert found.attempt(generation(5, (0, 2), 3)).rolled_back == 7


def test_a_host_that_is_out_waits_to_be_let_in() -> None:
    nodes = Nodes(number=2, coming=[generation(5, (0, 1))])
    found = retreat(nodes)
    found.tend(None)
    assert (found.decided, found.waiting) == (None, True)
    found.tend(None)
    assert nodes.told[-1].stalled == 4  # its workers have let go
    nodes.coming = [generation(6, (0, 1, 2))]
    found.tend(None)
    assert found.decided == generation(6, (0, 1, 2))


def test_who_does_not_know_who_goes_on_lets_go_of_what_it_keeps(header: Header) -> None:
    found = retreat(Nodes(undecided=True))
    header.train()
    found.tend(header)
    assert found.waiting


def test_the_same_hosts_do_not_start_again_for_ever(header: Header) -> None:
    attempt = Attempt()
    for number in range(MOST_FRUITLESS):
        found = retreat(Nodes(), attempt)
        found.tend(header)
        attempt = found.attempt(generation(5, (0, 1, 2)))
        assert attempt.restarts == number + 1
    found = retreat(Nodes(), attempt)
    found.tend(header)
    with pytest.raises(WorkerFailed, match=r"started again 4 times, .*came to no step after 0"):
        found.attempt(generation(5, (0, 1, 2)))
    assert found.attempt(generation(5, (0, 1))).restarts == MOST_FRUITLESS  # fewer: that ends by itself


def test_a_step_counts_as_progress(header: Header) -> None:
    found = retreat(Nodes(), Attempt(restarts=MOST_FRUITLESS))
    header.train()
    found.tend(header)
    header.committed = 1
    found.tend(header)
    assert found.attempt(generation(5, (0, 1, 2))).restarts == 0


def test_what_could_not_start_where_others_are_lost_is_not_to_blame() -> None:
    mate = {"consequence": True, "kind": "GroupError"}
    start, own = ({"consequence": False, "kind": kind} for kind in (LaunchError.__name__, ValueError.__name__))
    assert [retreat(Nodes()).explains(error) for error in (mate, start, own)] == [True, True, False]
    assert not retreat(Nodes(survives=False)).explains(start)
