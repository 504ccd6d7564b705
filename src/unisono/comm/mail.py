"""Messages between the workers of a host: each has a mailbox in the arena, which all read."""

from collections.abc import Callable, Sequence

from unisono.comm.header import Header
from unisono.comm.host_layout import MAILBOX_BYTES

_NUMBER_BITS = 24
"""Messages are numbered within a step: a worker that joins with it begins to count where the others do."""
_GENERATION_BITS = 44
_HEAD_BYTES = 8


class Mail:
    """One worker's.

    Arguments:
        header: the arena's words.
        box: the mailbox of a slot for a message's number; two in turn, since a slower reader may still read the last.
        slot: this worker's.
    """

    def __init__(self, header: Header, box: Callable[[int, int], memoryview], slot: int) -> None:
        self._header = header
        self._box = box
        self._slot = slot
        self._number = header.sequence(slot)

    def begin(self, step: int) -> None:
        """What follows belongs to a step."""
        self._number = step << _NUMBER_BITS

    def begin_generation(self, generation: int) -> None:
        """What follows belongs to a generation: what was under way before is over."""
        self._number = generation << _GENERATION_BITS

    def exchange(self, payload: bytes, members: Sequence[int], await_all: Callable[[int], None]) -> list[bytes]:
        """Everyone's payload, in order; larger ones than a mailbox go in several rounds.

        That of a member which was lost before it had sent it is empty.

        Arguments:
            await_all: waits for the message of a number, of all who live.
        """
        if list(members) == [self._slot]:  # nobody reads it
            self._number += 1
            self._header.set_sequence(self._slot, self._number)
            return [payload]
        room = MAILBOX_BYTES - _HEAD_BYTES
        received = [bytearray() for _ in members]
        totals = [0] * len(members)
        lost: set[int] = set()
        sent, first = 0, True
        while first or any(len(received[i]) < totals[i] for i in range(len(members)) if i not in lost):
            first = False
            self._put(payload, sent, room)
            sent += room
            await_all(self._number)
            for i, slot in enumerate(members):
                if self._header.sequence(slot) < self._number:
                    lost.add(i)
                    continue
                box = self._box(slot, self._number)
                totals[i] = int.from_bytes(box[:_HEAD_BYTES], "little")
                received[i] += box[_HEAD_BYTES : _HEAD_BYTES + min(room, totals[i] - len(received[i]))]
        return [b"" if i in lost else bytes(data) for i, data in enumerate(received)]

    def _put(self, payload: bytes, start: int, room: int) -> None:
        """The next message is a payload's part from ``start`` on."""
        self._number += 1
        box = self._box(self._slot, self._number)
        chunk = payload[start : start + room]
        box[:_HEAD_BYTES] = len(payload).to_bytes(_HEAD_BYTES, "little")
        box[_HEAD_BYTES : _HEAD_BYTES + len(chunk)] = chunk
        self._header.set_sequence(self._slot, self._number)
