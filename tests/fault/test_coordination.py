"""Which hosts train: simulated launchers, lines that are cut and healed, and a clock of their own."""

from collections.abc import Iterable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from unisono.fault.coordination import VOTE_S, Coordination, Report
from unisono.fault.generation import WITNESS, Acceptor, Electorate, Generation, Proposal

LIMIT_S = 1.5
TURN_S = 0.05


def generation(number: int, hosts: Sequence[int], coordinator: int) -> Generation:
    return Generation(number, tuple(hosts), ((0,),) * len(hosts), coordinator)


class Net:
    """Launchers, and the lines between them: messages take one turn; a cut line says so or stays silent."""

    def __init__(self, hosts: int, witness: bool = False) -> None:
        self.now = 0.0
        first = generation(1, tuple(range(hosts)), 0)
        self.disks: dict[int, object] = {}
        self.decided: dict[int, set[Generation]] = {1: {first}}
        numbers = [*range(hosts), *([WITNESS] if witness else [])]
        self.nodes = {n: self._node(n, first, witness) for n in numbers}
        self.lines = {frozenset((0, n)) for n in range(1, hosts)}
        self.cut: set[tuple[int, int]] = set()
        self.dead: set[int] = set()
        self.stopped: set[int] = set()
        self.flying: list[tuple[int, int, dict[str, object]]] = []
        for n in range(hosts):
            self.nodes[n].begin([m for m in range(hosts) if frozenset((n, m)) in self.lines], 0.0)

    def _node(self, number: int, first: Generation, witness: bool) -> Coordination:
        def keep(record: dict[str, object], number: int = number) -> None:
            self.disks[number] = record

        node = Coordination(number, Acceptor(first, keep), LIMIT_S, witness=witness)
        if number == WITNESS:
            node.follows = None
        return node

    def passes(self, a: int, b: int) -> bool:
        return (a, b) not in self.cut and not {a, b} & self.dead

    def separate(self, a: Iterable[int], b: Iterable[int], *, one_way: bool = False) -> None:
        for x in a:
            for y in b:
                self.cut.add((x, y))
                if not one_way:
                    self.cut.add((y, x))

    def heal(self) -> None:
        self.cut.clear()

    def kill(self, number: int) -> None:
        self.dead.add(number)
        for line in [line for line in self.lines if number in line]:
            self.lines.remove(line)
            (other,) = line - {number}
            self.nodes[other].line_is_down(number, self.now)

    def turn(self) -> None:
        self.now += TURN_S
        arrived, self.flying = self.flying, []
        for sender, receiver, message in arrived:
            if self.passes(sender, receiver) and frozenset((sender, receiver)) in self.lines:
                if receiver in self.stopped:
                    self.flying.append((sender, receiver, message))
                else:
                    self.nodes[receiver].heard(sender, message, self.now)
        for number, node in self.nodes.items():
            if number in self.dead | self.stopped:
                continue
            if number != WITNESS:
                node.tick(self.now)
                self._connect(number, node)
            self.flying += [(number, receiver, message) for receivers, message in node.outbox for receiver in receivers]
            node.outbox.clear()
            for found in node.decided:
                self.decided.setdefault(found.number, set()).add(found)
            node.decided.clear()
            for other in node.silent_lines(self.now):
                self.lines.discard(frozenset((number, other)))
                node.line_is_down(other, self.now)
                self.nodes[other].line_is_down(number, self.now)

    def _connect(self, number: int, node: Coordination) -> None:
        for other in node.wanted_lines(self.now):
            both = self.passes(number, other) and self.passes(other, number)
            if other in self.nodes and both and other not in self.stopped:
                self.lines.add(frozenset((number, other)))
                node.line_is_up(other, self.now)
                self.nodes[other].line_is_up(number, self.now)
            elif other in self.dead:
                node.line_is_down(other, self.now)

    def run(self, seconds: float) -> None:
        until = self.now + seconds
        while self.now < until:
            self.turn()

    def current(self, number: int) -> Generation:
        return self.nodes[number].current

    def safe(self) -> bool:
        """One generation for each number."""
        return all(len(found) == 1 for found in self.decided.values())


def stall(net: Net, numbers: Sequence[int]) -> None:
    """What workers say whose wires are broken."""
    for n in numbers:
        net.nodes[n].report = Report(stalled=net.current(n).number)


def test_nothing_is_decided_while_all_are_well() -> None:
    net = Net(4)
    net.run(20)
    assert {net.current(n).number for n in range(4)} == {1}


@pytest.mark.parametrize("victim", range(3))
def test_of_three_hosts_one_is_killed(victim: int) -> None:
    net = Net(3)
    net.run(1)
    net.kill(victim)
    net.run(2)
    left = tuple(sorted({0, 1, 2} - {victim}))
    assert {net.current(n) for n in left} == {generation(2, left, left[0])}
    assert all(net.disks[n] for n in left) and net.safe()


def test_of_two_one_is_killed_and_the_other_waits_until_it_is_fenced() -> None:
    net = Net(2)
    net.run(1)
    net.kill(0)
    net.run(10)
    assert net.current(1).number == 1 and net.nodes[1].waits_for(net.now) == [0]
    net.nodes[1].fence(0)
    net.run(1)
    assert net.current(1) == generation(2, (1,), 1) and net.nodes[1].waits_for(net.now) == []


@pytest.mark.parametrize("victim", range(2))
def test_of_two_with_a_witness_the_other_goes_on(victim: int) -> None:
    net = Net(2, witness=True)
    net.run(1)
    net.kill(victim)
    net.run(2)
    assert net.current(1 - victim) == generation(2, (1 - victim,), 1 - victim) and net.safe()


@pytest.mark.parametrize("alone", range(4))
def test_three_of_four_go_on_and_the_fourth_comes_back(alone: int) -> None:
    net = Net(4)
    net.run(1)
    others = [n for n in range(4) if n != alone]
    net.separate([alone], others)
    net.run(3)
    assert {net.current(n).hosts for n in others} == {tuple(others)}
    assert net.current(alone).number == 1
    net.run(2)
    assert net.nodes[alone].waits_for(net.now) == others and net.current(alone).number == 1
    net.heal()
    net.run(6)
    assert {net.current(n).hosts for n in range(4)} == {(0, 1, 2, 3)} and net.safe()


@pytest.mark.parametrize(("lost", "soon_s"), [((0, 1), 0.9), ((0, 2), 0.9), ((2, 3), 1.8)])
def test_the_half_without_the_witness_knows_soon_that_it_is_undecided(lost: tuple[int, int], soon_s: float) -> None:
    """Its line to the witness is silent, not closed; who keeps the run's records there must let go of them.

    Without the coordinator it looks for another one first.
    """
    net = Net(4, witness=True)
    net.run(1)
    others = [n for n in range(4) if n not in lost]
    net.separate(lost, [*others, WITNESS])
    net.run(LIMIT_S + soon_s)
    assert all(net.nodes[n].is_undecided(net.now) for n in lost)
    net.run(LIMIT_S + 0.3 - soon_s)
    assert {net.current(n) for n in others} == {generation(2, others, others[0])}
    assert not any(net.nodes[n].is_undecided(net.now) for n in others)
    net.run(LIMIT_S)
    assert net.nodes[lost[0]].waits_for(net.now) == others
    net.heal()
    net.run(6)
    assert {net.current(n).hosts for n in range(4)} == {(0, 1, 2, 3)} and net.safe()
    assert not any(net.nodes[n].is_undecided(net.now) for n in range(4))


@pytest.mark.parametrize("halves", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((0, 2), (1, 3))])
def test_half_and_half_wait_for_each_other_and_go_on_when_the_link_returns(
    halves: tuple[tuple[int, int], tuple[int, int]],
) -> None:
    net = Net(4)
    net.run(1)
    net.separate(*halves)
    net.run(10)
    stall(net, range(4))
    net.run(5)
    assert {net.current(n).number for n in range(4)} == {1}
    waiting = {number: net.nodes[number].waits_for(net.now) for number in (halves[0][0], halves[1][0])}
    assert waiting[halves[0][0]] == list(halves[1])
    net.heal()
    net.run(8)
    stall(net, [])
    assert {net.current(n).hosts for n in range(4)} == {(0, 1, 2, 3)} and net.safe()
    assert {net.current(n).number for n in range(4)} != {1}  # all had stopped: their wires need a new one


def test_half_with_the_witness_goes_on_whichever_it_is() -> None:
    net = Net(4, witness=True)
    net.run(1)
    net.separate([0, 1], [2, 3])
    net.separate([0, 1], [WITNESS])
    net.run(4)
    assert {net.current(n).hosts for n in (2, 3)} == {(2, 3)} and {net.current(n).number for n in (0, 1)} == {1}
    net.heal()
    net.run(6)
    assert {net.current(n).hosts for n in range(4)} == {(0, 1, 2, 3)} and net.safe()


def test_both_halves_reach_the_witness_and_one_goes_on() -> None:
    net = Net(4, witness=True)
    net.run(1)
    net.separate([0, 1], [2, 3])
    net.run(6)
    sides = {net.current(0).hosts, net.current(2).hosts}
    assert net.safe() and ((0, 1) in sides) != ((2, 3) in sides)


def test_a_link_that_carries_one_way_is_cut() -> None:
    net = Net(3)
    net.run(1)
    net.separate([0], [2], one_way=True)
    net.run(5)
    assert net.current(0).hosts == net.current(1).hosts == (0, 1) and net.safe()


def test_a_stopped_coordinator_finds_itself_deposed() -> None:
    net = Net(3)
    net.run(1)
    net.stopped.add(0)
    net.run(2.6)
    assert net.current(1) == generation(2, (1, 2), 1) == net.current(2)
    net.stopped.clear()
    net.run(6)
    assert {net.current(n).hosts for n in range(3)} == {(0, 1, 2)} and net.safe()
    assert net.current(0).coordinator == 1


def test_changes_are_batched_into_at_most_ten_generations_a_second() -> None:
    net = Net(3)
    net.run(1)
    for turn in range(200):  # workers come and go at every turn, twenty a second
        net.nodes[1].report = Report(slots=(0, 1) if turn % 2 else (0,))
        net.nodes[1].hurry()
        net.turn()
    net.run(1)
    assert 10 < net.current(0).number <= 1 + 10 * (200 * TURN_S + 1) and net.safe()
    assert net.current(0).of(1) == (0, 1) and net.current(2) == net.current(0)


def test_hosts_that_have_yet_to_join_do_not_go_on_alone_when_the_others_have_ended() -> None:
    """Host 1 has lost its workers, and new ones are ready, as host 0 ends: nobody is left who has the state."""
    net = Net(2)
    net.nodes[0].report = Report(step=8, done=True)
    net.nodes[1].report = Report(step=0, joins=True)
    net.run(2.0)
    assert net.nodes[0].over and net.nodes[1].over
    assert list(net.decided) == [1]


def test_a_host_that_is_let_in_is_let_in_once() -> None:
    net = Net(3)
    net.nodes[2].report = Report(slots=(), joins=True)
    net.run(1.0)
    assert net.current(0).hosts == (0, 1)
    net.nodes[2].report = Report(joins=True)
    net.run(2.0)
    assert net.current(0).hosts == (0, 1, 2) and net.current(0).number == 3


def test_what_a_host_said_before_its_launcher_was_lost_does_not_let_it_in() -> None:
    net = Net(3)
    net.run(1)
    net.kill(2)
    net.run(2)
    assert net.current(0).hosts == (0, 1) and net.current(0).number == 2
    net.dead.clear()
    node = net.nodes[2] = net._node(2, net.current(0), witness=False)
    node.report = Report(slots=(), joins=True)
    net.lines.add(frozenset((0, 2)))
    net.nodes[0].line_is_up(2, net.now)
    node.begin([0], net.now)
    net.run(2)
    assert net.current(0).number == 2, "its workers are not ready"
    node.report = Report(joins=True)
    net.run(1)
    assert net.current(0).hosts == (0, 1, 2) and net.current(0).number == 3


def test_hosts_that_have_ended_are_no_loss() -> None:
    net = Net(3)
    net.run(1)
    for n in (0, 1, 2):
        net.nodes[n].report = Report(done=True)
    net.run(2)
    assert all(net.nodes[n].over for n in range(3)) and net.current(0).number == 1


def test_all_start_again_where_one_has_lost_a_worker_and_only_once() -> None:
    net = Net(3)
    net.run(1)
    net.nodes[2].report = Report(step=7, again=1)
    net.run(2)
    assert {net.current(n).number for n in range(3)} == {2} and net.current(0).hosts == (0, 1, 2)
    assert net.current(0).step == 7
    net.nodes[2].report = Report(step=7, again=2)  # and once more, where those who have started lose one
    net.run(2)
    assert {net.current(n).number for n in range(3)} == {3} and net.safe()


@pytest.mark.parametrize("victim", [0, 1])
def test_who_has_ended_does_not_wait_for_the_other_of_two_that_is_lost_then(victim: int) -> None:
    net = Net(2)
    net.run(1)
    net.nodes[1 - victim].report = Report(done=True)
    net.run(1)
    assert not net.nodes[1 - victim].over  # the other may still be at work
    net.kill(victim)
    net.run(VOTE_S - 1)
    assert not net.nodes[1 - victim].over
    net.run(3)
    assert net.nodes[1 - victim].over and net.current(1 - victim).number == 1


def test_who_has_ended_votes_for_the_other_of_two_when_the_link_returns() -> None:
    net = Net(2)
    net.run(1)
    net.nodes[0].report = Report(done=True)
    net.separate([0], [1])
    net.run(3)
    assert not net.nodes[0].over
    net.nodes[1].report = Report(stalled=1)
    net.heal()
    net.run(3)
    assert net.current(1).hosts == (1,)  # it goes on alone


@settings(max_examples=150, deadline=None)
@given(
    st.integers(2, 5),
    st.booleans(),
    st.lists(
        st.tuples(
            st.sampled_from(["cut", "heal", "stop", "go", "one way", "change"]),
            st.sets(st.integers(0, 4), min_size=1),
            st.floats(0.05, 4.0),
        ),
        max_size=8,
    ),
)
def test_never_two_generations_of_one_number_and_all_together_again(
    hosts: int, witness: bool, faults: list[tuple[str, set[int], float]]
) -> None:
    net = Net(hosts, witness)
    for kind, some, seconds in faults:
        chosen = {n for n in some if n < hosts} or {0}
        others = set(net.nodes) - chosen
        if kind == "cut":
            net.separate(chosen, others)
        elif kind == "one way":
            net.separate(chosen, others, one_way=True)
        elif kind == "change":  # of workers, which makes generations without anybody being lost
            for n in chosen:
                net.nodes[n].report = Report(slots=(0, len(net.decided)))
        elif kind == "stop":
            net.stopped |= chosen
        elif kind == "go":
            net.stopped.clear()
        else:
            net.heal()
        net.run(seconds)
        assert net.safe()
    net.heal()
    net.stopped.clear()
    net.run(25)
    assert net.safe()
    assert {net.current(n).hosts for n in range(hosts)} == {tuple(range(hosts))}


def test_a_coordinator_asks_for_promises_once_and_sends_only_what_changes() -> None:
    """Five generations: one question more for the first, and nothing that grows with the number of hosts."""
    net = Net(40)
    net.run(1)
    asked: list[str] = []
    for turn in range(5):
        net.nodes[3].report = Report(slots=(0, turn + 1))
        net.nodes[3].hurry()
        for _ in range(20):
            net.turn()
            mine = [message for sender, receiver, message in net.flying if (sender, receiver) == (0, 7)]
            asked += [str(message["op"]) for message in mine if message["op"] != "beat"]
            assert all(len(str(message)) < 300 for message in mine)
    assert asked == ["prepare", *["accept", "decided"] * 5] and net.current(7) == net.current(0)
    assert net.current(0).number == 6 and net.current(7).of(3) == (0, 5)


@pytest.mark.parametrize(("votes", "first"), [(True, "accept"), (False, "prepare")])
def test_a_quorum_of_the_new_hosts_must_have_voted_before_promises_are_left_out(votes: bool, first: str) -> None:
    """Hosts 3 to 6 join 0 to 2. Where they could not keep their votes, three of seven are no quorum of the next."""

    def full(record: dict[str, object]) -> None:
        raise OSError("no space")

    net = Net(3)
    net.run(1)
    joining = (3, 4, 5, 6)
    for n in joining:
        node = net.nodes[n] = net._node(n, net.current(0), witness=False)
        node.voting.acceptor.keep = node.voting.acceptor.keep if votes else full
        net.nodes[0].line_is_up(n, net.now)
        node.begin([0], net.now)
        net.lines.add(frozenset((0, n)))
    net.run(2)
    assert net.current(0).hosts == (0, 1, 2, *joining) and net.current(0).number == 2
    net.nodes[1].report = Report(slots=(0, 1))
    net.nodes[1].hurry()
    asked: list[str] = []
    while not asked:
        net.turn()
        asked += [str(m["op"]) for s, r, m in net.flying if (s, r) == (0, 2) and m["op"] in ("prepare", "accept")]
    assert asked == [first]


def test_a_launcher_that_does_not_know_its_votes_gives_none_until_it_is_no_member() -> None:
    """Host 2 is killed and comes back without what it had promised; the others have not seen that it was gone."""
    net = Net(3)
    net.run(1)
    node = net.nodes[2] = net._node(2, net.current(0), witness=False)
    node.voting.abstains, node.report = True, Report(slots=(), joins=True)
    node.begin([0], net.now)
    net.nodes[0].hurry()
    while net.current(0).number == 1:
        net.turn()
        asked = {str(m["op"]) for s, r, m in net.flying if (s, r) == (2, 0)}
        assert not asked & {"promise", "accepted"}
    assert net.current(0).hosts == (0, 1)
    net.run(1)
    assert not node.voting.abstains and net.current(2) == net.current(0)
    node.report = Report(joins=True)
    net.run(1)
    assert net.current(2).hosts == (0, 1, 2) and net.safe()


def test_what_may_have_been_decided_is_brought_to_its_end() -> None:
    electorate = Electorate((0, 1, 2))
    mine, theirs = generation(2, (1, 2), 1), generation(2, (0, 1), 0)
    proposal = Proposal(mine, (2, 1), electorate)
    assert not proposal.promised(1, ((1, 0), theirs)) and proposal.promised(2, None)
    assert proposal.sent == theirs
    assert not proposal.accepted(1) and proposal.accepted(2)


def test_a_vote_is_kept_before_it_is_given_and_read_again() -> None:
    kept: list[dict[str, object]] = []
    acceptor = Acceptor(generation(1, (0, 1, 2), 0), kept.append)
    assert acceptor.promise(2, (1, 1)) and not acceptor.promise(2, (1, 0)) and not acceptor.promise(3, (5, 0))
    assert acceptor.accept((1, 1), generation(2, (1, 2), 1)) and not acceptor.accept((0, 2), generation(2, (2,), 2))
    again = Acceptor.read(kept[-1], kept.append)
    assert again.written() == acceptor.written() and len(kept) == 2
    with pytest.raises(ValueError, match="not a voter's record"):
        Acceptor.read({"current": {}}, kept.append)
    with pytest.raises(ValueError, match="not a generation"):
        Generation.read({"number": 1, "hosts": [1, 0], "slots": [[0], [0]], "coordinator": 0, "step": 0})
