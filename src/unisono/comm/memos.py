"""The last messages of each worker of a host, in the arena: they outlive it, for whoever comes after it to read."""

import zlib

from unisono.comm.words import store_fence

MEMOS_KEPT = 64
"""Of each worker."""
MEMO_BYTES = 4096
_NUMBER_BYTES, _LENGTH_BYTES, _CHECK_BYTES = 8, 4, 4
_HEAD_BYTES = _NUMBER_BYTES + _LENGTH_BYTES + _CHECK_BYTES


def memos_bytes(slots: int) -> int:
    """Size of their region; pages that nobody touches cost nothing."""
    return slots * MEMOS_KEPT * MEMO_BYTES


class Memos:
    """Those of all slots, of which one writes its own.

    Arguments:
        memory: their region.
        slot: whose worker this is; one that comes into a lost one's place goes on where that has ended.

    >>> memory = memoryview(bytearray(memos_bytes(2)))
    >>> first, second = Memos(memory, 0), Memos(memory, 1)
    >>> first.keep(b"one"), second.keep(b"two"), Memos(memory, 0).keep(b"three"), first.keep(bytes(5000))
    (True, True, True, False)
    >>> second.all()
    [b'one', b'three', b'two']
    """

    def __init__(self, memory: memoryview, slot: int) -> None:
        self._memory = memory
        self._slot = slot
        self._number = max((number for number, _ in self._of(slot)), default=0)

    def keep(self, data: bytes) -> bool:
        """Leave a message, in place of the oldest; whether it was short enough."""
        if len(data) > MEMO_BYTES - _HEAD_BYTES:
            return False
        self._number += 1
        entry = self._entry(self._slot, self._number % MEMOS_KEPT)
        entry[:_NUMBER_BYTES] = bytes(_NUMBER_BYTES)  # none, until it is whole
        store_fence()
        entry[_HEAD_BYTES : _HEAD_BYTES + len(data)] = data
        check = len(data).to_bytes(_LENGTH_BYTES, "little") + zlib.crc32(data).to_bytes(_CHECK_BYTES, "little")
        entry[_NUMBER_BYTES:_HEAD_BYTES] = check
        store_fence()
        entry[:_NUMBER_BYTES] = self._number.to_bytes(_NUMBER_BYTES, "little")
        return True

    def all(self) -> list[bytes]:
        """Those of every slot, each slot's in order; what a worker was killed in the middle of is not among them."""
        slots = len(self._memory) // memos_bytes(1)
        return [data for slot in range(slots) for _, data in sorted(self._of(slot))]

    def _entry(self, slot: int, index: int) -> memoryview:
        start = (slot * MEMOS_KEPT + index) * MEMO_BYTES
        return self._memory[start : start + MEMO_BYTES]

    def _of(self, slot: int) -> list[tuple[int, bytes]]:
        found = []
        for index in range(MEMOS_KEPT):
            entry = self._entry(slot, index)
            number = int.from_bytes(entry[:_NUMBER_BYTES], "little")
            length = int.from_bytes(entry[_NUMBER_BYTES : _NUMBER_BYTES + _LENGTH_BYTES], "little")
            check = int.from_bytes(entry[_NUMBER_BYTES + _LENGTH_BYTES : _HEAD_BYTES], "little")
            data = bytes(entry[_HEAD_BYTES : _HEAD_BYTES + min(length, MEMO_BYTES)])
            if number and zlib.crc32(data) == check:
                found.append((number, data))
        return found
