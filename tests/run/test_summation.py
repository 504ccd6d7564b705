"""The canonical tree: however micro-batches are shared out, the same additions are made."""

from hypothesis import given
from hypothesis import strategies as st

from unisono.plan.assignment import micro_batches
from unisono.run.summation import Node, accumulation, covering, finish, fold, missing, root, subtrees


def joined(a: str, b: str) -> str:
    return f"({a}+{b})"


def accumulate(start: int, stop: int, count: int) -> dict[Node, str]:
    """Do what a worker does over [start, stop), with sums written out."""
    leaves, buffers = accumulation(start, stop, count)
    held: dict[int, str] = {}
    finished: dict[Node, str] = {}
    assert [leaf.micro_batch for leaf in leaves] == list(range(start, stop))
    for leaf in leaves:
        assert max(leaf.chain) < buffers
        assert leaf.opens == (leaf.chain[0] not in held)
        value = str(leaf.micro_batch)
        for buffer in leaf.chain:
            value = joined(held[buffer], value) if buffer in held else value
            held[buffer] = value
        for buffer in leaf.chain[:-1]:
            del held[buffer]
        if leaf.completes:
            node, buffer = leaf.completes
            finished[node] = held[buffer]
            assert buffer == len(finished) - 1
    return finished


@given(st.integers(1, 70), st.integers(1, 9))
def test_any_number_of_workers_adds_the_same(count: int, workers: int) -> None:
    workers = min(workers, count)
    values: dict[Node, str] = {}
    for share in micro_batches(count, workers):
        values.update(accumulate(share.start, share.stop, count))
    assert finish(values, count, joined) == fold([str(i) for i in range(count)], joined)


@given(st.integers(1, 300), st.data())
def test_subtrees_cover_a_range_once_and_are_few(count: int, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    nodes = subtrees(start, stop, count)
    assert [m for n in nodes for m in range(n.start, min(n.stop, count))] == list(range(start, stop))
    assert len(nodes) <= 2 * max(1, count.bit_length())


@given(st.integers(1, 300), st.integers(1, 12))
def test_buffers_are_few(count: int, workers: int) -> None:
    for share in micro_batches(count, min(workers, count)):
        _, buffers = accumulation(share.start, share.stop, count)
        assert buffers <= 2 * max(1, (count - 1).bit_length()) + 2


@given(st.integers(0, 30), st.integers(0, 1000))
def test_a_node_is_one_number(level: int, index: int) -> None:
    assert Node.from_code(Node(level, index).code) == Node(level, index)


def test_an_aligned_share_is_one_subtree() -> None:
    assert subtrees(4, 8, 8) == (Node(2, 1),)
    assert accumulation(0, 8, 8)[1] == 3  # the last leaf adds straight into what is pending


def test_covering_prefers_what_is_whole_and_names_what_is_missing() -> None:
    published = [Node(0, 0), Node(0, 1), Node(1, 0), Node(0, 3)]
    assert covering(published, 4) is None
    assert missing(published, 4) == [2]
    assert covering([*published, Node(0, 2)], 4) == (Node(1, 0), Node(0, 2), Node(0, 3))


def test_the_root_of_one_is_a_leaf() -> None:
    assert root(1) == Node(0, 0)
