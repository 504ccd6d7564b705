"""Messages between the launchers of several hosts: authenticated both ways before anything is parsed.

No I/O here: bytes come in by `feed` and go out from `outgoing`, so that every hostile input can be tried in a test.

Both ends prove that they know the job's secret, each over a nonce that the other has just made. Every later frame
carries a code over its direction, its number and its content, under a key of this connection alone: what was recorded
elsewhere, or earlier, is refused. Frames are not encrypted.
"""

import hmac
import json
import secrets
from dataclasses import dataclass, field
from enum import Enum

from unisono.errors import UnisonoError
from unisono.launch.control import Message

MAGIC = b"unisono\x01"
NONCE_BYTES = 32
CODE_BYTES = 32
LENGTH_BYTES = 4
LONGEST_FRAME_BYTES = 1 << 20


class Refused(UnisonoError):
    """The other end does not know the job's secret, or sent what no end that knows it would send."""


class Role(Enum):
    """Who began the connection: the client."""

    CLIENT = b"client"
    SERVER = b"server"

    @property
    def other(self) -> "Role":
        """The other end's."""
        return Role.SERVER if self is Role.CLIENT else Role.CLIENT


def encode(message: Message) -> bytes:
    """What `Channel.send` sends."""
    return json.dumps(message, separators=(",", ":")).encode()


@dataclass(slots=True)
class Channel:
    """One end of a connection.

    Arguments:
        secret: the job's.
        role: whether this end connected or accepted.

    Attributes:
        outgoing: bytes to be sent; whoever sends them takes them away.
        established: the other end has proved that it knows the secret.

    >>> a, b = Channel(b"secret", Role.CLIENT), Channel(b"secret", Role.SERVER)
    >>> for _ in range(3):
    ...     _ = a.feed(b.take()), b.feed(a.take())
    >>> a.send({"op": "join"})
    >>> b.feed(a.take())
    [{'op': 'join'}]
    """

    secret: bytes
    role: Role
    outgoing: bytearray = field(default_factory=bytearray)
    established: bool = False
    _incoming: bytearray = field(default_factory=bytearray)
    _nonce: bytes = field(default_factory=lambda: secrets.token_bytes(NONCE_BYTES))
    _key: bytes = b""
    _theirs: bytes = b""
    _sent: int = 0
    _received: int = 0

    def __post_init__(self) -> None:
        self.outgoing += MAGIC + self._nonce

    @property
    def greeted(self) -> bool:
        """Whether the other end has said that it is a launcher."""
        return bool(self._theirs)

    def take(self) -> bytes:
        """All bytes that are to be sent."""
        data = bytes(self.outgoing)
        self.outgoing.clear()
        return data

    def send(self, message: Message | bytes) -> None:
        """Put a message into what is to be sent; one for many is encoded once, before.

        Raises:
            ValueError: before the channel is established, or for a message that is too long.
        """
        data = message if isinstance(message, bytes) else encode(message)
        if not self.established or len(data) > LONGEST_FRAME_BYTES:
            raise ValueError(f"cannot send {len(data)} bytes (established: {self.established})")
        self.outgoing += len(data).to_bytes(LENGTH_BYTES, "big") + self._frame_code(self.role, self._sent, data) + data
        self._sent += 1

    def feed(self, data: bytes) -> list[Message]:
        """Take received bytes; the messages that they complete.

        Raises:
            Refused: for anything that the other end of this connection would not send; the connection is to be closed.
        """
        self._incoming += data
        if not self._theirs and not self._hello():
            return []
        if not self.established and not self._proof():
            return []
        messages: list[Message] = []
        while (message := self._frame()) is not None:
            messages.append(message)
        return messages

    def _cut(self, size_bytes: int) -> bytes | None:
        """The first bytes that came in, once they are there."""
        if len(self._incoming) < size_bytes:
            return None
        data = bytes(self._incoming[:size_bytes])
        del self._incoming[:size_bytes]
        return data

    def _hello(self) -> bool:
        if not MAGIC.startswith(bytes(self._incoming[: len(MAGIC)])):
            raise Refused("the other end is no launcher of this version")
        hello = self._cut(len(MAGIC) + NONCE_BYTES)
        if hello is None:
            return False
        self._theirs = hello[len(MAGIC) :]
        if hmac.compare_digest(self._theirs, self._nonce):
            raise Refused("the other end sent this end's own nonce back")
        self._key = self._code(self.secret, b"key", *self._nonces(self.role))
        if self.role is Role.CLIENT:  # who asks for entry proves first: nothing is signed for a stranger
            self.outgoing += self._code(self._key, b"proof", self.role.value)
        return True

    def _proof(self) -> bool:
        proof = self._cut(CODE_BYTES)
        if proof is None:
            return False
        if not hmac.compare_digest(proof, self._code(self._key, b"proof", self.role.other.value)):
            raise Refused("the other end does not know the job's secret")
        if self.role is Role.SERVER:
            self.outgoing += self._code(self._key, b"proof", self.role.value)
        self.established = True
        return True

    def _frame(self) -> Message | None:
        if len(self._incoming) < LENGTH_BYTES:
            return None
        length = int.from_bytes(self._incoming[:LENGTH_BYTES], "big")
        if length > LONGEST_FRAME_BYTES:
            raise Refused(f"a frame of {length} bytes; at most {LONGEST_FRAME_BYTES} are allowed")
        frame = self._cut(LENGTH_BYTES + CODE_BYTES + length)
        if frame is None:
            return None
        code, data = frame[LENGTH_BYTES : LENGTH_BYTES + CODE_BYTES], frame[LENGTH_BYTES + CODE_BYTES :]
        if not hmac.compare_digest(code, self._frame_code(self.role.other, self._received, data)):
            raise Refused("a frame was changed on its way, or comes from elsewhere")
        self._received += 1
        message: Message = json.loads(data.decode())
        return message

    def _nonces(self, role: Role) -> tuple[bytes, bytes]:
        """The client's, then the server's."""
        return (self._nonce, self._theirs) if role is Role.CLIENT else (self._theirs, self._nonce)

    def _frame_code(self, sender: Role, number: int, data: bytes) -> bytes:
        return self._code(self._key, b"frame", sender.value, number.to_bytes(8, "big"), data)

    @staticmethod
    def _code(key: bytes, *parts: bytes) -> bytes:
        told = b"".join([piece for part in parts for piece in (len(part).to_bytes(8, "big"), part)])
        return hmac.digest(key, told, "sha256")
