"""The mesh: named axes of parallelism <-> ranks <-> coordinates."""

from dataclasses import dataclass

from unisono.errors import ConfigurationError

AXES = ("data", "pipeline", "tensor", "context", "expert")


@dataclass(frozen=True, slots=True)
class Mesh:
    """How many workers each axis of parallelism has; ranks run fastest along the last axis of `AXES`.

    >>> mesh = Mesh(data=2, pipeline=3)
    >>> mesh.size, mesh.coordinates(4), mesh.rank(data=1, pipeline=1)
    (6, {'data': 1, 'pipeline': 1, 'tensor': 0, 'context': 0, 'expert': 0}, 4)
    """

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    context: int = 1
    expert: int = 1

    def __post_init__(self) -> None:
        for axis in AXES:
            if getattr(self, axis) < 1:
                raise ConfigurationError(f"mesh axis {axis} is {getattr(self, axis)}; give a whole number from 1")

    @property
    def size(self) -> int:
        """Number of workers."""
        return self.data * self.pipeline * self.tensor * self.context * self.expert

    def coordinates(self, rank: int) -> dict[str, int]:
        """Where a rank stands on every axis."""
        result = {}
        for axis in reversed(AXES):
            rank, result[axis] = divmod(rank, getattr(self, axis))
        return {axis: result[axis] for axis in AXES}

    def rank(self, **coordinates: int) -> int:
        """The rank that stands at the given coordinates; an axis left out is 0."""
        rank = 0
        for axis in AXES:
            rank = rank * getattr(self, axis) + coordinates.get(axis, 0)
        return rank
