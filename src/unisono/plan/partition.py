"""Layers to stages: of all places where a model can be cut, those that make the slowest stage as fast as possible."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from unisono.errors import ConfigurationError
from unisono.plan.blocks import home_of
from unisono.plan.outline import Cut, Outline


@dataclass(frozen=True)
class Division:
    """A model in stages.

    Attributes:
        outline: of the model.
        cuts: in front of every stage but the first.
    """

    outline: Outline
    cuts: tuple[Cut, ...]

    @property
    def stages(self) -> int:
        """How many there are."""
        return len(self.cuts) + 1

    @cached_property
    def edges(self) -> tuple[int, ...]:
        """The first unit of each stage, and the end."""
        return (0, *(cut.unit for cut in self.cuts), len(self.outline.units))

    def units(self, stage: int) -> range:
        """The units of a stage."""
        return range(self.edges[stage], self.edges[stage + 1])

    def stage_of_unit(self, unit: int) -> int:
        """The stage of a unit."""
        return sum(cut.unit <= unit for cut in self.cuts)

    def stage_of(self, name: str) -> int:
        """The stage that computes with a parameter or buffer."""
        return self.stage_of_unit(self.outline.homes[home_of(name)])

    def costs(self) -> tuple[int, ...]:
        """What each stage's forward costs, in operations."""
        return tuple(sum(u.cost for u in self.outline.units[a:b]) for a, b in pairwise(self.edges))


def divide(outline: Outline, stages: int, at: Sequence[str] = ()) -> Division:
    """Cut a model into stages.

    Arguments:
        at: the modules in front of which it is cut; default: where the dearest stage is cheapest.

    Raises:
        ConfigurationError: where it cannot be cut so often, or there.
    """
    if at:
        return Division(outline, _named(outline, stages, at))
    cuts = outline.cuts
    if stages > len(cuts) + 1:
        raise ConfigurationError(
            f"the layout has {stages} stages, but the model can be cut into {len(cuts) + 1} at most "
            f"({_places(cuts)}); use fewer (layout.pipeline, layout.virtual_stages, sync.stages)"
        )
    edges = [0, *(cut.unit for cut in cuts), len(outline.units)]
    costs = [sum(unit.cost for unit in outline.units[a:b]) for a, b in pairwise(edges)]
    return Division(outline, tuple(cuts[i - 1] for i in balanced(costs, stages)))


def balanced(costs: Sequence[int], parts: int) -> list[int]:
    """Where to cut a sequence into ``parts`` that are not empty: the least maximum, and of those the most even.

    >>> balanced([1, 1, 1, 9, 1, 1], 3)
    [3, 4]
    """
    sums = [0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    n = len(costs)
    best: list[dict[int, tuple[int, int, list[int]]]] = [{0: (0, 0, [])}]
    for part in range(1, parts + 1):
        row: dict[int, tuple[int, int, list[int]]] = {}
        for end in range(part, n - (parts - part) + 1):
            options = []
            for start, (most, squares, cuts) in best[-1].items():
                if start < end:
                    cost = sums[end] - sums[start]
                    options.append((max(most, cost), squares + cost * cost, [*cuts, start]))
            row[end] = min(options)
        best.append(row)
    return best[-1][n][2][1:]


def _named(outline: Outline, stages: int, at: Sequence[str]) -> tuple[Cut, ...]:
    if len(at) != stages - 1:
        raise ConfigurationError(
            f"layout.cuts names {len(at)} modules, but {stages} stages need {stages - 1}: one in front of each but "
            "the first"
        )
    by_path = {cut.path: cut for cut in reversed(outline.cuts)}
    for path in at:
        if path not in by_path:
            raise ConfigurationError(
                f"the model cannot be cut in front of {path!r}; it can in front of {_places(outline.cuts)}"
            )
    cuts = tuple(by_path[path] for path in at)
    if list(cuts) != sorted(cuts, key=lambda cut: cut.unit) or len(set(at)) < len(at):
        raise ConfigurationError(
            f"layout.cuts are {', '.join(at)}; give them in the order in which the model calls them"
        )
    return cuts


def _places(cuts: Sequence[Cut]) -> str:
    if not cuts:
        return "its modules pass values on in other ways than as arguments, or there is only one"
    names = [cut.path for cut in cuts]
    return ", ".join(names) if len(names) < 9 else f"{', '.join(names[:4])} ... {', '.join(names[-3:])}"
