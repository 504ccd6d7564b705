"""When replicas that train apart agree again: a pure function of the step.

Local SGD: Stich, 2018; post-local: Lin et al., 2018; DiLoCo: Douillard et al., 2023; streaming DiLoCo: Douillard et
al., 2025.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Agreements:
    """The steps after which replicas agree, fragment by fragment of the model.

    Attributes:
        period: steps of a fragment from one agreement to the next.
        after: steps that are trained together first.
        fragments: parts of the model that agree in turn.
        delay: steps from what is sent to what is made of it.

    >>> together = Agreements(period=4, after=2)
    >>> [step for step in range(1, 12) if together.sends(step, 0)]
    [6, 10]
    >>> streaming = Agreements(period=4, fragments=2, delay=1)
    >>> print(streaming.draw(8))
    fragment 0: ...sa..s
    fragment 1: .sa..sa.
    """

    period: int
    after: int = 0
    fragments: int = 1
    delay: int = 0

    def apart(self, step: int) -> bool:
        """Whether replicas compute a step each with values of their own."""
        return step > self.after

    def parts(self, step: int) -> bool:
        """Whether they begin to do so after a step: all of them have the common values then."""
        return step == self.after

    def sends(self, step: int, fragment: int) -> bool:
        """Whether what replicas have after a step goes into an agreement."""
        offset = fragment * self.period // self.fragments
        taken = step - self.after
        return taken > 0 and taken % self.period == offset % self.period

    def applies(self, step: int, fragment: int) -> bool:
        """Whether an agreement counts from the end of a step on."""
        return step > self.delay and self.sends(step - self.delay, fragment)

    def last(self, steps: int, fragment: int) -> int:
        """The last of so many steps from which on the model has all that replicas have learned of a fragment.

        >>> Agreements(period=4, after=2).last(9, 0), Agreements(period=4, after=2).last(5, 0)
        (6, 2)
        """
        offset = fragment * self.period // self.fragments % self.period
        taken = steps - self.after - self.delay
        sent = taken - (taken - offset) % self.period
        return self.after + sent + self.delay if sent > 0 else min(self.after, steps)

    def due(self, step: int) -> bool:
        """Whether anything is to be done after a step."""
        return self.parts(step) or any(
            self.sends(step, fragment) or self.applies(step, fragment) for fragment in range(self.fragments)
        )

    def draw(self, steps: int) -> str:
        """A line for each fragment, a letter a step: s sends, a applies, b both."""

        def letter(step: int, fragment: int) -> str:
            sends, applies = self.sends(step, fragment), self.applies(step, fragment)
            return "b" if sends and applies else "s" if sends else "a" if applies else "."

        lines = ("".join(letter(step, f) for step in range(1, steps + 1)) for f in range(self.fragments))
        return "\n".join(f"fragment {f}: {line}" for f, line in enumerate(lines))


def fragments(sizes: Sequence[int], count: int) -> list[int]:
    """The fragment of each parameter: contiguous parts of the model, about equal in elements.

    >>> fragments([4, 1, 1, 2, 4], 3)
    [0, 1, 1, 1, 2]
    """
    return list(_cut(sizes, count))


def _cut(sizes: Sequence[int], count: int) -> Iterator[int]:
    total, before = sum(sizes), 0
    for size in sizes:
        yield min(count - 1, (2 * before + size) * count // (2 * total))
        before += size
