"""A model's tensors as data: parameters, the uses of tied ones, and the blocks that are reduced and updated.

A block is at most 65,536 elements of one parameter. Blocks never span two parameters, so norms and optimizer groups do
not depend on how a model is cut.

Parameters of one dtype (and of one replica, where several train apart) lie behind each other in one *segment*; every
one starts on a multiple of 64 elements, so its address is a multiple of 64 bytes in every layout (a kernel's last bits
can depend on it).
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

BLOCK_ELEMENTS = 65_536
ALIGNMENT_ELEMENTS = 64
REPLICA = "replica@"
"""Begins the names of what a virtual replica has of its own."""
CURVATURE = "curvature@"
"""Begins the names of what an optimizer learns of the curvature of a layer."""


def aligned(size: int, multiple: int = ALIGNMENT_ELEMENTS) -> int:
    """``size`` rounded up to a multiple.

    >>> aligned(65), aligned(64)
    (128, 64)
    """
    return -(-size // multiple) * multiple


def split_name(name: str) -> tuple[int, str]:
    """The replica that a name belongs to, 0 for the model itself, and its name there.

    >>> split_name("replica@2.layer.weight"), split_name("layer.weight"), split_name("replica@1")
    ((2, 'layer.weight'), (0, 'layer.weight'), (1, ''))
    """
    if not name.startswith(REPLICA):
        return 0, name
    first, _, rest = name.partition(".")
    return int(first.removeprefix(REPLICA)), rest


def home_of(name: str) -> str:
    """The parameter with which a tensor is used: itself, or the weight of the layer whose curvature it is.

    >>> home_of("curvature@body.0.inputs"), home_of("body.0.bias")
    ('body.0.weight', 'body.0.bias')
    """
    if not name.startswith(CURVATURE):
        return name
    return f"{name.removeprefix(CURVATURE).rpartition('.')[0]}.weight".lstrip(".")


def is_plain(name: str) -> bool:
    """Whether a name is one of the model's own, as its user made it."""
    return not name.startswith((REPLICA, CURVATURE))


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A named tensor without its values; ``dtype`` is torch's name, "float32" for example."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        size = 1
        for extent in self.shape:
            size *= extent
        return size


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One parameter: its storage, and the names under which the model uses it.

    Attributes:
        tensor: name (the first of its uses), dtype and shape.
        uses: every name in ``named_parameters(remove_duplicate=False)``; two or more where weights are tied.
        group: the optimizer's parameter group, or None where it is not trained.
        replica: 0 for the model itself; from 1, where several train apart, whose own copy it is.
        joined: it is updated together with the parameter before it.
    """

    tensor: TensorSpec
    uses: tuple[str, ...]
    group: int | None
    replica: int = 0
    joined: bool = False

    @property
    def is_factor(self) -> bool:
        """Whether it is a matrix that tells of the curvature of a layer."""
        return self.tensor.name.startswith(CURVATURE)


@dataclass(frozen=True, slots=True)
class Block:
    """Elements [start, stop) of one parameter, ``parameter`` being its place in the flat order."""

    parameter: int
    index: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: ``numel`` elements of a segment from ``offset``."""

    segment: int
    offset: int
    numel: int


@dataclass(frozen=True, slots=True)
class FlatLayout:
    """Where every parameter and every use's gradient lies, and the blocks in their flat order.

    Attributes:
        parameters: in flat order.
        places: of the parameters' values (and of the gradient of their first use).
        uses: name and parameter of every trained use, in flat order.
        use_places: of the uses' gradients.
        segment_dtypes: dtype of each segment.
        segment_replicas: of each segment, as of its parameters. Every replica has the segments of the model itself,
            with everything at the same places.
        segment_elements: elements of each segment that hold parameters.
        gradient_elements: elements of each segment of a gradient; further uses of tied weights come last.
        blocks: the blocks of trained parameters.
    """

    parameters: tuple[ParameterSpec, ...]
    places: tuple[Place, ...]
    uses: tuple[tuple[str, int], ...]
    use_places: tuple[Place, ...]
    segment_dtypes: tuple[str, ...]
    segment_replicas: tuple[int, ...]
    segment_elements: tuple[int, ...]
    gradient_elements: tuple[int, ...]
    blocks: tuple[Block, ...]

    @property
    def replicas(self) -> int:
        """How many train apart; 0 where there is the model alone."""
        return max(self.segment_replicas, default=0)

    @property
    def own(self) -> tuple[ParameterSpec, ...]:
        """The parameters of the model itself, which come first."""
        return self.parameters[: len(self.parameters) // (1 + self.replicas)]

    def column(self, first: int, stop: int) -> list[tuple[int, int]]:
        """Blocks [first, stop) of the model itself, and the same of every replica, in order."""
        each = len(self.blocks) // (1 + self.replicas)
        return [(first + each * replica, stop + each * replica) for replica in range(1 + self.replicas)]

    def segments(self, segment: int) -> list[int]:
        """A segment of the model itself, and the same of every replica, in order."""
        each = len(self.segment_dtypes) // (1 + self.replicas)
        return [segment + each * replica for replica in range(1 + self.replicas)]

    def block_place(self, block: Block) -> Place:
        """Where a block's values lie."""
        place = self.places[block.parameter]
        return Place(place.segment, place.offset + block.start, block.stop - block.start)

    def padded_place(self, block: Block) -> Place:
        """Where a block lies with the padding behind its parameter's last element: whole vectors of any kernel.

        A kernel computes what is left over from whole vectors by other instructions, whose last bit can differ. With
        its padding, every element is computed the same way, alone or in any stretch.
        """
        place = self.block_place(block)
        return Place(place.segment, place.offset, aligned(place.numel))

    def blocks_of(self, parameter: int) -> range:
        """The numbers of a parameter's blocks."""
        first = bisect_left(self.blocks, parameter, key=lambda block: block.parameter)
        stop = bisect_right(self.blocks, parameter, key=lambda block: block.parameter)
        return range(first, stop)

    def uses_of(self, parameter: int) -> list[int]:
        """The uses of a parameter in order of name: the order in which their gradients are added."""
        found = [u for u, (_, p) in enumerate(self.uses) if p == parameter]
        return sorted(found, key=lambda u: self.uses[u][0])


def flat_layout(parameters: Sequence[ParameterSpec], block_elements: int = BLOCK_ELEMENTS) -> FlatLayout:
    """Lay parameters out, segment by segment, keeping the model's order inside each dtype of each replica."""
    ordered = sorted(parameters, key=lambda p: (p.replica, p.tensor.dtype))
    places: list[Place] = []
    uses: list[tuple[str, int]] = []
    use_places: list[Place] = []
    blocks: list[Block] = []
    dtypes, replicas, elements, gradient_elements = [], [], [], []
    for segment, ((replica, dtype), members) in enumerate(groupby(ordered, key=lambda p: (p.replica, p.tensor.dtype))):
        offset = 0
        further: list[tuple[str, int]] = []
        for spec in members:
            index, numel = len(places), spec.tensor.numel
            place = Place(segment, offset, numel)
            places.append(place)
            if spec.group is not None:
                uses.append((spec.uses[0], index))
                use_places.append(place)
                further += [(name, index) for name in spec.uses[1:]]
                starts = range(0, numel, block_elements)
                blocks += [Block(index, i, s, min(s + block_elements, numel)) for i, s in enumerate(starts)]
            offset += aligned(numel)
        dtypes.append(dtype)
        replicas.append(replica)
        elements.append(offset)
        for name, index in further:
            uses.append((name, index))
            use_places.append(Place(segment, offset, ordered[index].tensor.numel))
            offset += aligned(ordered[index].tensor.numel)
        gradient_elements.append(offset)
    return FlatLayout(
        parameters=tuple(ordered),
        places=tuple(places),
        uses=tuple(uses),
        use_places=tuple(use_places),
        segment_dtypes=tuple(dtypes),
        segment_replicas=tuple(replicas),
        segment_elements=tuple(elements),
        gradient_elements=tuple(gradient_elements),
        blocks=tuple(blocks),
    )
