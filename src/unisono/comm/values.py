"""Parameters of which every host keeps a part: a group is brought together where it is used, then given back."""

from collections.abc import Callable, Sequence

from torch import Tensor

from unisono.comm.wire import Addressed, Pending, Wire
from unisono.plan.shards import Piece


class Values:
    """One host's part in bringing parameters together; all hosts bring the same groups in the same order.

    Arguments:
        wire: of its own.
        groups: what belongs together.
        view: (segment, start, stop) -> the memory of values.
        release: gives that memory back.
    """

    def __init__(
        self,
        wire: Wire,
        groups: Sequence[Sequence[Piece]],
        view: Callable[[int, int, int], Tensor],
        release: Callable[[int, int, int], None],
    ) -> None:
        self._wire = wire
        self._groups = groups
        self._view = view
        self._release = release

    def bring(self, number: int) -> Pending:
        """Start to bring a group together."""
        me = self._wire.rank
        others = [host for host in range(self._wire.size) if host != me]
        sends: list[Addressed] = []
        receives: list[Addressed] = []
        for piece in self._groups[number]:
            values = self._view(piece.segment, piece.start, piece.stop)
            if piece.host == me:
                sends += [(values, host) for host in others]
            else:
                receives.append((values, piece.host))
        return self._wire.post(sends, receives, number)

    def give_back(self, number: int) -> None:
        """What other hosts keep of a group costs no memory here from now on."""
        for piece in self._groups[number]:
            if piece.host != self._wire.rank:
                self._release(piece.segment, piece.start, piece.stop)
