"""The arena's words: what workers, and their launcher, tell each other in single aligned stores.

One header for the host, one row of words for each slot (written by its worker alone, but for what the launcher asks),
one flight recorder for each slot. It lies at the arena's start, so that the launcher, which knows nothing of what is
trained, can read it. No torch here.
"""

import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

from unisono.comm.words import WORD_BYTES, store_fence
from unisono.events import PHASES
from unisono.run.summation import Node

MAGIC = 0x554E49534F4E4F03  # "UNISONO", format 3

GENERATION_BITS, STEP_BITS, NODE_BITS = 13, 30, 20
MOST_MICRO_BATCHES = 1 << (NODE_BITS - 1)
MOST_SLOTS = 256
LOSSES_KEPT = 1024
OPERATIONS_KEPT = 1000
"""Of each worker, in its flight recorder."""

_MASK_WORDS = MOST_SLOTS // 64
_RECORD_WORDS = 4 + _MASK_WORDS
# Words of the header.
_MAGIC, _GENERATION, _REVOKED, _CLOSED, _COMMITTED, _COURSE, _LOSSES, _WANTED, _RECORDS = 0, 1, 2, 3, 4, 5, 6, 7, 8
_UNDECIDED = _RECORDS + 2 * _RECORD_WORDS
_HOSTS = _UNDECIDED + 1
_HOST_WORDS = 4096
_LOST = _HOSTS + 1 + 2 * _HOST_WORDS
_HEADER_WORDS = _LOST + LOSSES_KEPT
# Words of a slot.
_DONE, _SEQUENCE, _FLAGS, _ACTIVITY, _LAYOUT, _MICRO_BATCH, _OPERATIONS, _HELLO = 0, 1, 2, 3, 4, 5, 6, 7
UNDO_VERSION, UNDO_RUN, UNDO_PLACE = 8, 9, 10
_SEEN, _HALTED, _READY, _ASKED, _BEATS, _ADMIT, _PACE, _LEFT, _CLAIM, _SINCE, _PUBLISHED = (
    11,
    12,
    13,
    14,
    15,
    16,
    20,
    21,
    22,
    23,
    32,
)
ENTRIES = 256  # published subtrees: two a level of the largest tree, and one a round (see `comm.rounds`)
SLOT_WORDS = _PUBLISHED + ENTRIES

_OPERATION_WORDS = 10  # when, the length of its text or 0, and the text, or an activity as it is in a slot's words
_OPERATION_BYTES = WORD_BYTES * _OPERATION_WORDS
_TEXT_BYTES = _OPERATION_BYTES - 2 * WORD_BYTES

ACTIVITIES = ("start", *PHASES, "validation", "checkpoint", "finish")
_NUMBERS = {activity: number for number, activity in enumerate(ACTIVITIES)}


_CAUSES = 1 << 16
_SIGNALS = set(map(int, signal.Signals))


class Cause(IntEnum):
    """Why a worker is lost."""

    SIGNAL = 1
    EXIT = 2
    HUNG = 3

    @property
    def words(self) -> str:
        """A sentence's part, with a place for the signal or exit code."""
        return {1: "was killed by {}", 2: "ended with exit code {}", 3: "made no progress, and was ended"}[self]


class Course(IntEnum):
    """How far a training is: only what happens in the middle can be survived in the same processes."""

    STARTING = 0
    TRAINING = 1
    OVER = 2


def header_bytes(slots: int) -> int:
    """Size of the words' region."""
    return WORD_BYTES * (_HEADER_WORDS + slots * SLOT_WORDS) + slots * OPERATIONS_KEPT * _OPERATION_BYTES


@dataclass(frozen=True, slots=True)
class Publication:
    """A finished subtree: who holds it, in which of their buffers; ``whole``: of the whole model, not of a stage."""

    node: Node
    slot: int
    entry: int
    whole: bool = False


@dataclass(frozen=True, slots=True)
class Agreement:
    """Who trains from a step on, as all members of the step before have agreed; what a worker that joins goes by.

    Attributes:
        step: the first for which it holds.
        seen: how many losses it takes account of.
        chief: the slot of the worker that keeps the records.
        members: their slots.
    """

    step: int
    seen: int
    chief: int
    members: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Operation:
    """One entry of a flight recorder; ``at_s`` is monotonic."""

    at_s: float
    text: str


def pack(generation: int, step: int, node: Node, *, whole: bool = False) -> int:
    """One word that says: this subtree of this step is complete in this generation; ``step`` counts from 1."""
    prefix = (generation << (STEP_BITS + 1)) | (step << 1) | whole
    return (prefix << NODE_BITS) | node.code


def mask(slots: Sequence[int]) -> int:
    """A set of slots as bits."""
    return sum(1 << slot for slot in set(slots))


def unmask(bits: int) -> tuple[int, ...]:
    """The slots of a set.

    >>> unmask(mask([5, 0, 200]))
    (0, 5, 200)
    """
    return tuple(slot for slot in range(bits.bit_length()) if bits >> slot & 1)


class Header:
    """Typed access to the words of an arena.

    Arguments:
        memory: the region, or what the launcher has mapped of it, as bytes.
        slots: workers that it has room for.
        clock: seconds, monotonic, for the flight recorders.
    """

    def __init__(self, memory: memoryview, slots: int, clock: Callable[[], float] = time.monotonic) -> None:
        words = _HEADER_WORDS + slots * SLOT_WORDS
        self._words = memory[: WORD_BYTES * words].cast("Q")
        self._operations = memory[WORD_BYTES * words : header_bytes(slots)]
        self._entries, self._times = self._operations.cast("Q"), self._operations.cast("d")
        self._clock = clock
        self.slots = slots
        if self._words[_MAGIC] not in (0, MAGIC):
            raise ValueError("not an arena of this version")
        self._words[_MAGIC] = MAGIC

    def release(self) -> None:
        """Let go of the memory; nothing is read or written after."""
        for view in (self._times, self._entries, self._operations, self._words):
            view.release()

    def slot(self, slot: int) -> memoryview:
        """The words of one slot."""
        start = _HEADER_WORDS + slot * SLOT_WORDS
        return self._words[start : start + SLOT_WORDS]

    def _word(self, slot: int, word: int) -> int:
        return self._words[_HEADER_WORDS + slot * SLOT_WORDS + word]

    def _set_word(self, slot: int, word: int, value: int) -> None:
        self._words[_HEADER_WORDS + slot * SLOT_WORDS + word] = value

    @property
    def generation(self) -> int:
        """The group's number; grows at each change of membership."""
        return self._words[_GENERATION]

    @generation.setter
    def generation(self, value: int) -> None:
        self._words[_GENERATION] = value

    @property
    def revoked(self) -> int:
        """Generations below this number have ended."""
        return self._words[_REVOKED]

    @revoked.setter
    def revoked(self, value: int) -> None:
        self._words[_REVOKED] = value

    @property
    def closed(self) -> int:
        """The last step of which every micro-batch is published: its update may have begun."""
        return self._words[_CLOSED]

    @closed.setter
    def closed(self, step: int) -> None:
        self._words[_CLOSED] = step

    @property
    def committed(self) -> int:
        """The last step whose new state is whole."""
        return self._words[_COMMITTED]

    @committed.setter
    def committed(self, step: int) -> None:
        self._words[_COMMITTED] = step

    @property
    def course(self) -> Course:
        """How far the training is."""
        return Course(self._words[_COURSE])

    @course.setter
    def course(self, value: Course) -> None:
        store_fence()
        self._words[_COURSE] = value

    def train(self) -> None:
        """Training has begun, if it had not."""
        if self._words[_COURSE] == Course.STARTING:
            self.course = Course.TRAINING

    @property
    def wanted(self) -> int:
        """How many workers are to train; others wait as spares. 0 for all."""
        return self._words[_WANTED]

    @wanted.setter
    def wanted(self, value: int) -> None:
        self._words[_WANTED] = value

    @property
    def undecided(self) -> bool:
        """Whether hosts are missing without which it cannot be decided who goes on. The launcher's word alone."""
        return bool(self._words[_UNDECIDED])

    @undecided.setter
    def undecided(self, value: bool) -> None:
        self._words[_UNDECIDED] = value

    @property
    def hosts_generation(self) -> int:
        """The number of the last decision on which hosts train; 0 where there was none."""
        return self._words[_HOSTS]

    def hosts(self) -> tuple[int, dict[int, tuple[int, ...]]]:
        """That number, and the slots of each host's workers that take part; host by host in order."""
        while True:
            number = self._words[_HOSTS]
            at = _HOSTS + 1 + number % 2 * _HOST_WORDS
            length = min(self._words[at], WORD_BYTES * (_HOST_WORDS - 1))
            text = bytes(self._words[at + 1 : at + _HOST_WORDS].cast("B")[:length])
            if self._words[_HOSTS] == number:
                said = json.loads(text) if text else {}
                return number, {int(host): tuple(slots) for host, slots in said.items()}

    def set_hosts(self, number: int, slots: Mapping[int, Sequence[int]]) -> None:
        """It is decided who trains. The launcher's word alone.

        Arguments:
            slots: of each host's workers that take part, in order of host.
        """
        at, text = _HOSTS + 1 + number % 2 * _HOST_WORDS, json.dumps(slots).encode()
        self._words[at] = len(text)
        self._words[at + 1 : at + _HOST_WORDS].cast("B")[: len(text)] = text
        store_fence()
        self._words[_HOSTS] = number

    def left(self, slot: int) -> int:
        """The last generation of hosts in which a slot's worker has given up: it sums nothing in it any more."""
        return self._word(slot, _LEFT)

    def leave(self, slot: int, generation: int) -> None:
        """This worker gives up in a generation of hosts, and waits for the next."""
        store_fence()
        self._set_word(slot, _LEFT, generation)

    @property
    def losses(self) -> int:
        """How many workers have been lost so far."""
        return self._words[_LOSSES]

    def lost(self, number: int) -> int:
        """The slot of a loss, counted from 0."""
        return self._words[_LOST + number % LOSSES_KEPT] % MOST_SLOTS

    def how(self, number: int) -> str:
        """How a lost worker ended, for a reader."""
        cause, what = divmod(self._words[_LOST + number % LOSSES_KEPT] // MOST_SLOTS, _CAUSES)
        name = signal.Signals(what).name if cause in (Cause.SIGNAL, Cause.HUNG) and what in _SIGNALS else str(what)
        return Cause(cause).words.format(name)

    def lose(self, slot: int, cause: "Cause", what: int) -> None:
        """The slot's worker is dead: whatever it has written is final. The launcher's word alone.

        Arguments:
            what: the signal or exit code.
        """
        number = self.losses
        self._words[_LOST + number % LOSSES_KEPT] = (cause * _CAUSES + what) * MOST_SLOTS + slot
        store_fence()
        self._words[_LOSSES] = number + 1

    def agree(self, agreement: Agreement) -> None:
        """Leave an agreement for those who join; all members write the same."""
        at = _RECORDS + agreement.step % 2 * _RECORD_WORDS
        members = mask(agreement.members)
        self._words[at] = agreement.step
        store_fence()
        self._words[at + 1], self._words[at + 2] = agreement.seen, agreement.chief
        for i in range(_MASK_WORDS):
            self._words[at + 3 + i] = members >> 64 * i & (1 << 64) - 1
        store_fence()
        self._words[at + 3 + _MASK_WORDS] = agreement.step

    def agreements(self) -> list[Agreement]:
        """The last ones that are whole, the latest first."""
        found = []
        for at in (_RECORDS, _RECORDS + _RECORD_WORDS):
            end = self._words[at + 3 + _MASK_WORDS]
            members = sum(self._words[at + 3 + i] << 64 * i for i in range(_MASK_WORDS))
            agreement = Agreement(end, self._words[at + 1], self._words[at + 2], unmask(members))
            if end and self._words[at] == end:
                found.append(agreement)
        return sorted(found, key=lambda a: a.step, reverse=True)

    def done(self, slot: int) -> int:
        """The last step that a slot's worker has finished."""
        return self._word(slot, _DONE)

    def set_done(self, slot: int, step: int) -> None:
        """Everything that this slot owns is at the state after ``step``."""
        store_fence()
        self._set_word(slot, _DONE, step)

    def since(self, slot: int) -> int:
        """The step in which a slot's worker began to train; 0 for one that was there from the start."""
        return self._word(slot, _SINCE)

    def set_since(self, slot: int, step: int) -> None:
        """This slot's worker is to begin with ``step``."""
        self._set_word(slot, _SINCE, step)

    def sequence(self, slot: int) -> int:
        """The number of the last message in a slot's mailbox."""
        return self._word(slot, _SEQUENCE)

    def set_sequence(self, slot: int, number: int) -> None:
        """Message ``number`` is complete in the slot's mailbox."""
        store_fence()
        self._set_word(slot, _SEQUENCE, number)

    def hello(self, slot: int) -> int:
        """The last step that a slot's worker has begun: flags, losses seen and admissions are those of this step."""
        return self._word(slot, _HELLO)

    def say_hello(self, slot: int, step: int, seen: int, admitted: Sequence[int], pace_s: float) -> None:
        """A worker begins a step.

        Arguments:
            seen: the losses that it knows of.
            admitted: slots whose workers are ready to join, and may do so after this step.
            pace_s: seconds that a micro-batch takes it; 0 where it does not know.
        """
        self._set_word(slot, _PACE, round(pace_s * 1e9))
        bits = mask(admitted)
        self._set_word(slot, _SEEN, seen)
        for i in range(_MASK_WORDS):
            self._set_word(slot, _ADMIT + i, bits >> 64 * i & (1 << 64) - 1)
        store_fence()
        self._set_word(slot, _HELLO, step)

    def pace_s(self, slot: int) -> float:
        """Seconds that a micro-batch took a slot's worker, as it said when it began its step."""
        return self._word(slot, _PACE) / 1e9

    def seen(self, slot: int) -> int:
        """The losses that a slot's worker knew of when it began its step."""
        return self._word(slot, _SEEN)

    def admitted(self, slot: int) -> tuple[int, ...]:
        """The slots that a slot's worker found ready when it began its step."""
        return unmask(sum(self._word(slot, _ADMIT + i) << 64 * i for i in range(_MASK_WORDS)))

    def flags(self, slot: int) -> int:
        """Requests that travel with a slot's partials."""
        return self._word(slot, _FLAGS)

    def set_flags(self, slot: int, flags: int) -> None:
        """Set before the slot begins the step, so that all read the same."""
        self._set_word(slot, _FLAGS, flags)

    def halted(self, slot: int) -> int:
        """The losses that a slot's worker knew of when it gave up computing with the others of its replica."""
        return self._word(slot, _HALTED)

    def halt(self, slot: int, seen: int) -> None:
        """This worker publishes nothing more of what it computed together with others."""
        store_fence()
        self._set_word(slot, _HALTED, seen)

    def ready(self, slot: int) -> bool:
        """Whether a slot's worker waits to be let in."""
        return bool(self._word(slot, _READY))

    def set_ready(self, slot: int, value: bool) -> None:
        """Ask to be let in, or no longer."""
        store_fence()
        self._set_word(slot, _READY, value)

    def asked_to_leave(self, slot: int) -> bool:
        """Whether the launcher has asked a slot's worker to leave."""
        return bool(self._word(slot, _ASKED))

    def ask_to_leave(self, slot: int, value: bool) -> None:
        """Ask a slot's worker to leave after a step, or no longer. The launcher's word alone."""
        self._set_word(slot, _ASKED, value)

    def set_activity(self, slot: int, activity: str, step: int, micro_batch: int | None = None) -> None:
        """What the slot's worker does now, for the error of whoever waits for it, and for its flight recorder."""
        what, which = (step << 8) | _NUMBERS[activity], 0 if micro_batch is None else micro_batch + 1
        row = _HEADER_WORDS + slot * SLOT_WORDS
        self._words[row + _ACTIVITY], self._words[row + _MICRO_BATCH] = what, which
        number = self._words[row + _OPERATIONS]
        at = (slot * OPERATIONS_KEPT + number % OPERATIONS_KEPT) * _OPERATION_WORDS
        self._times[at] = self._clock()
        self._entries[at + 1], self._entries[at + 2], self._entries[at + 3] = 0, what, which
        self._words[row + _OPERATIONS] = number + 1

    def activity(self, slot: int) -> str:
        """What the slot's worker did last."""
        activity, step, _ = self.doing(slot)
        return f"{activity} of step {step}"

    def doing(self, slot: int) -> tuple[str, int, int | None]:
        """(activity, step, micro-batch) of the slot's worker."""
        return _decoded(self._word(slot, _ACTIVITY), self._word(slot, _MICRO_BATCH))

    def beat(self, slot: int) -> None:
        """The slot's worker is alive, and waits for others."""
        self._set_word(slot, _BEATS, self._word(slot, _BEATS) + 1)

    def progress(self, slot: int) -> int:
        """A number that changes as long as the slot's worker gets on, or waits for others."""
        return self._word(slot, _OPERATIONS) + self._word(slot, _BEATS)

    def note(self, slot: int, text: str) -> None:
        """One more operation, in the slot's flight recorder, that is no activity."""
        number = self._word(slot, _OPERATIONS)
        at = (slot * OPERATIONS_KEPT + number % OPERATIONS_KEPT) * _OPERATION_WORDS
        data = text.encode()[:_TEXT_BYTES]
        self._times[at] = self._clock()
        self._entries[at + 1] = len(data)
        first = (at + 2) * WORD_BYTES
        self._operations[first : first + len(data)] = data
        self._set_word(slot, _OPERATIONS, number + 1)

    def flight(self, slot: int) -> list[Operation]:
        """The slot's last operations, the oldest first."""
        count, found = self._word(slot, _OPERATIONS), []
        for number in range(max(0, count - OPERATIONS_KEPT), count):
            at = (slot * OPERATIONS_KEPT + number % OPERATIONS_KEPT) * _OPERATION_WORDS
            length, first = self._entries[at + 1], (at + 2) * WORD_BYTES
            if length:
                text = bytes(self._operations[first : first + min(length, _TEXT_BYTES)]).decode(errors="replace")
            else:
                activity, step, micro_batch = _decoded(self._entries[at + 2], self._entries[at + 3])
                text = f"{activity} of step {step}" + ("" if micro_batch is None else f", micro-batch {micro_batch}")
            found.append(Operation(self._times[at], text))
        return found

    def claim(self, slot: int) -> tuple[int, int]:
        """(step, micro-batch) of which the slot's worker computes a copy; step 0 for none."""
        step, micro_batch = divmod(self._word(slot, _CLAIM), MOST_MICRO_BATCHES)
        return step, micro_batch

    def set_claim(self, slot: int, step: int, micro_batch: int) -> None:
        """This worker computes a copy, or with step 0 does no more."""
        store_fence()
        self._set_word(slot, _CLAIM, step * MOST_MICRO_BATCHES + micro_batch)

    def layout(self, slot: int) -> int:
        """A hash of the layout that the slot's worker computed, 0 before it has."""
        return self._word(slot, _LAYOUT)

    def set_layout(self, slot: int, value: int) -> None:
        """This worker has mapped the arena and expects this layout in it."""
        self._set_word(slot, _LAYOUT, value)

    def publish(self, slot: int, entry: int, generation: int, step: int, node: Node, *, whole: bool = False) -> None:
        """The subtree in the slot's buffer ``entry`` is complete, and immutable from now on."""
        store_fence()
        self._set_word(slot, _PUBLISHED + entry, pack(generation, step, node, whole=whole))

    def publications(self, generation: int, step: int, slots: Sequence[int]) -> list[Publication]:
        """What has been published for a step of a generation; words of other steps do not count."""
        prefix = (generation << STEP_BITS) | step
        found = []
        for slot in slots:
            row = self.slot(slot)
            for entry in range(ENTRIES):
                word = row[_PUBLISHED + entry]
                if word >> (NODE_BITS + 1) != prefix:
                    break  # entries fill from the first
                whole = bool(word >> NODE_BITS & 1)
                found.append(Publication(Node.from_code(word & ((1 << NODE_BITS) - 1)), slot, entry, whole))
        return found


def _decoded(what: int, which: int) -> tuple[str, int, int | None]:
    """(activity, step, micro-batch) of two words."""
    return ACTIVITIES[what & 0xFF], what >> 8, which - 1 if which else None
