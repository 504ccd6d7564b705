"""What others go on with in a step: every micro-batch counts once, and nobody's buffer is used twice."""

from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.assignment import micro_batches
from unisono.plan.continuation import continuation
from unisono.run.summation import Node, accumulation, subtrees


@given(st.integers(1, 40), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_every_micro_batch_counts_once_and_only_what_is_missing_is_computed(
    count: int, sizes: list[int], data: st.DataObject
) -> None:
    shares = iter(micro_batches(count, sum(sizes)))
    kept: list[dict[int, list[Node]]] = []
    for size in sizes:  # each worker has published some of its subtrees, in order
        mine = [subtrees(share.start, share.stop, count) for share in (next(shares) for _ in range(size))]
        done = [list(nodes[: data.draw(st.integers(0, len(nodes)))]) for nodes in mine]
        kept.append({slot: nodes for slot, nodes in enumerate(done) if nodes})
    slots = [sorted(data.draw(st.sets(st.integers(0, size - 1), min_size=1))) for size in sizes]
    rest = continuation(kept, slots, count, 64)
    there = {m for host in kept for nodes in host.values() for node in nodes for m in range(node.start, node.stop)}
    if not there:
        assert rest is None
        return
    assert rest is not None
    computed = [m for own in rest.left for m in own]
    assert sorted(computed) == [m for m in range(count) if m not in there]
    assert rest.taken_over == len(computed)
    assert max(map(len, rest.left)) - min(map(len, rest.left)) <= 1
    covered = [m for share in rest.shares for node in share.nodes for m in range(node.start, min(node.stop, count))]
    assert sorted(covered) == list(range(count))
    for share in rest.shares:
        places = [(part.replica, part.entry) for part in share.parts]
        assert len(set(places)) == len(places) and share.nodes == tuple(part.node for part in share.parts)
    workers = [(host, slot) for host, some in enumerate(slots) for slot in some]
    for (host, slot), own, first in zip(workers, rest.left, rest.first, strict=True):
        assert first == len(kept[host].get(slot, []))
        new = [p for p in rest.shares[host].parts if p.replica == slot and p.entry >= first]
        assert [m for p in new for m in range(p.node.start, min(p.node.stop, count))] == list(own)


def test_what_two_hosts_have_published_counts_once() -> None:
    rest = continuation([{0: [Node(1, 0)]}, {0: [Node(2, 0)], 1: [Node(2, 1)]}], [[0], [0, 1]], 8, 10)
    assert rest is not None  # the second host was away, and others had begun its part
    assert [share.nodes for share in rest.shares] == [(Node(1, 0),), (Node(2, 1), Node(0, 2), Node(0, 3))]
    assert rest.left == ((), (2,), (3,)) and rest.first == (1, 1, 1)


def test_who_would_hold_too_much_lets_all_begin_again() -> None:
    kept = [{0: [leaf.completes[0] for leaf in accumulation(1, 7, 8)[0] if leaf.completes is not None]}]
    assert continuation(kept, [[0]], 8, 4) is None
    assert continuation(kept, [[0]], 8, 6) is not None
