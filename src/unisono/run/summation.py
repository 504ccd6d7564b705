"""The canonical binary tree over the micro-batches [0, M): the one order in which an exact run adds.

Node (level, index) covers the micro-batches [index * 2^level, (index + 1) * 2^level) that are below M. Its value is
its left child plus its right child; where the right child lies at or beyond M, its left child. The tree does not
mention workers, so neither does the sum.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True, order=True)
class Node:
    """A subtree of the canonical tree: ``2**level`` leaves from leaf ``index * 2**level``."""

    level: int
    index: int

    @property
    def start(self) -> int:
        """The first micro-batch it covers."""
        return self.index << self.level

    @property
    def stop(self) -> int:
        """One past the last micro-batch it would cover in an endless tree."""
        return (self.index + 1) << self.level

    def children(self) -> tuple["Node", "Node"]:
        """Left and right; only for levels above 0."""
        return Node(self.level - 1, self.index * 2), Node(self.level - 1, self.index * 2 + 1)

    @property
    def code(self) -> int:
        """One positive integer per node: the leaf 0 is 1, its parent 2, and so on, level by level interleaved.

        >>> all(Node.from_code(Node(a, b).code) == Node(a, b) for a in range(5) for b in range(9))
        True
        """
        return ((self.index << 1) | 1) << self.level

    @classmethod
    def from_code(cls, code: int) -> "Node":
        """The node whose ``code`` this is."""
        level = (code & -code).bit_length() - 1
        return cls(level, code >> (level + 1))


def root(count: int) -> Node:
    """The whole tree over ``count`` micro-batches.

    >>> root(5)
    Node(level=3, index=0)
    """
    return Node((count - 1).bit_length(), 0)


def subtrees(start: int, stop: int, count: int) -> tuple[Node, ...]:
    """The maximal aligned subtrees of [start, stop), from left to right; a subtree may reach past ``count``.

    >>> subtrees(3, 8, 8)
    (Node(level=0, index=3), Node(level=2, index=1))
    >>> subtrees(4, 6, 6)
    (Node(level=2, index=1),)
    """
    result = []
    while start < stop:
        level = 0
        while True:
            parent = Node(level + 1, start >> (level + 1))
            fits = parent.start == start and (parent.stop <= stop or stop == count)
            if not fits or (1 << level) >= count:
                break
            level += 1
        node = Node(level, start >> level)
        result.append(node)
        start = min(node.stop, stop)
    return tuple(result)


@dataclass(frozen=True, slots=True)
class Leaf:
    """How one micro-batch enters a worker's sums.

    Attributes:
        micro_batch: its number in the step.
        chain: buffers, innermost first: the gradient is added to the first, that one to the second, and so on; one
            with no value yet takes it as it is.
        opens: the first buffer of the chain starts with no value.
        completes: the subtree that is finished with it, and the buffer that then holds it; else None.
    """

    micro_batch: int
    chain: tuple[int, ...]
    opens: bool
    completes: tuple[Node, int] | None

    def moved(self, buffers: int) -> "Leaf":
        """The same, with later buffers: for a worker whose first ones hold subtrees already."""
        completes = None if self.completes is None else (self.completes[0], self.completes[1] + buffers)
        return Leaf(self.micro_batch, tuple(buffer + buffers for buffer in self.chain), self.opens, completes)


def accumulation(start: int, stop: int, count: int) -> tuple[tuple[Leaf, ...], int]:
    """The order of sums of one worker over [start, stop), and how many buffers it needs at once.

    Every finished subtree keeps its buffer until the step is committed.

    >>> leaves, buffers = accumulation(0, 4, 4)
    >>> [leaf.chain for leaf in leaves], buffers
    ([(0,), (0,), (1,), (1, 0)], 2)
    """
    leaves: list[Leaf] = []
    most = 0
    for kept, node in enumerate(subtrees(start, stop, count)):
        stack: list[int] = []  # buffers of pending sums, largest first
        free = list(range(kept, kept + node.level + 1))
        last = min(node.stop, count)
        for leaf in range(node.start, last):
            merges = ((leaf + 1) & -(leaf + 1)).bit_length() - 1  # trailing ones of leaf
            final = leaf == last - 1
            if final:  # everything pending is summed, a ragged end's missing right children included
                merges = len(stack)
            opens = merges == 0
            if opens:
                stack.append(free.pop(0))
                merges = 1
            chain = tuple(reversed(stack[-merges:]))
            free = sorted(free + stack[len(stack) - merges + 1 :])
            del stack[len(stack) - merges + 1 :]
            most = max(most, max(chain) + 1)
            leaves.append(Leaf(leaf, chain, opens, (node, stack[0]) if final else None))
    return tuple(leaves), most


def covering(published: Iterable[Node], count: int) -> tuple[Node, ...] | None:
    """A choice of published subtrees that covers [0, count) once, or None while some micro-batch is missing."""
    largest: dict[int, Node] = {}
    for node in published:
        best = largest.get(node.start)
        if best is None or node.level > best.level:
            largest[node.start] = node
    chosen, at = [], 0
    while at < count:
        if at not in largest:
            return None
        chosen.append(largest[at])
        at = largest[at].stop
    return tuple(chosen)


def missing(published: Iterable[Node], count: int) -> list[int]:
    """The micro-batches of [0, count) that no published subtree covers."""
    seen: set[int] = set()
    for node in published:
        seen.update(range(node.start, min(node.stop, count)))
    return [m for m in range(count) if m not in seen]


def finish(values: Mapping[Node, T], count: int, add: Callable[[T, T], T], top: Node | None = None) -> T:
    """The value of the whole tree, or of the subtree ``top``, from the values of subtrees that cover it.

    >>> finish({Node(1, 0): "ab", Node(0, 2): "c"}, 3, lambda left, right: f"({left}+{right})")
    '(ab+c)'
    """

    def value(node: Node) -> T:
        if node in values:
            return values[node]
        left, right = node.children()
        return value(left) if right.start >= count else add(value(left), value(right))

    return value(top or root(count))


def fold(leaves: Iterator[T] | Iterable[T], add: Callable[[T, T], T]) -> T:
    """The canonical sum of a sequence of at least one leaf.

    >>> fold("abcde", lambda left, right: f"({left}{right})")
    '(((ab)(cd))e)'
    """
    values = list(leaves)
    return finish({Node(0, i): v for i, v in enumerate(values)}, len(values), add)
