"""The channel between launchers: nobody enters without the secret, nothing is parsed before, nothing grows."""

import os
import random
import tracemalloc

import pytest

from unisono.launch.channel import CODE_BYTES, LONGEST_FRAME_BYTES, MAGIC, NONCE_BYTES, Channel, Refused, Role


def connected(secret: bytes = b"the job's secret") -> tuple[Channel, Channel]:
    client, server = Channel(secret, Role.CLIENT), Channel(secret, Role.SERVER)
    for _ in range(3):
        client.feed(server.take())
        server.feed(client.take())
    assert client.established and server.established
    return client, server


def test_messages_arrive_whole_and_in_order_however_they_are_cut() -> None:
    client, server = connected()
    for i in range(50):
        client.send({"number": i, "text": "x" * i * 10})
    data, received = client.take(), []
    random.seed(0)
    while data:
        size = random.randint(1, 700)
        received += server.feed(data[:size])
        data = data[size:]
    assert [m["number"] for m in received] == list(range(50))


@pytest.mark.parametrize("role", list(Role))
def test_a_wrong_secret_is_refused_on_both_sides(role: Role) -> None:
    client = Channel(b"right" if role is Role.SERVER else b"wrong", Role.CLIENT)
    server = Channel(b"wrong" if role is Role.SERVER else b"right", Role.SERVER)
    client.feed(server.take())
    with pytest.raises(Refused, match="does not know the job's secret"):
        server.feed(client.take())
    assert not server.established and not client.established
    assert server.take() == b"", "nothing is proved to a stranger"
    with pytest.raises(Refused, match="does not know"):  # and a server that does not know it cannot pretend
        client.feed(os.urandom(CODE_BYTES))


def test_a_recorded_conversation_is_refused() -> None:
    client, server = Channel(b"secret", Role.CLIENT), Channel(b"secret", Role.SERVER)
    hello = client.take()
    client.feed(server.take())
    proof = client.take()
    server.feed(hello + proof)
    client.feed(server.take())
    client.send({"op": "join"})
    again = Channel(b"secret", Role.SERVER)
    with pytest.raises(Refused, match="does not know"):
        again.feed(hello + proof + client.take())


def test_a_nonce_sent_back_and_a_proof_sent_back_are_refused() -> None:
    server = Channel(b"secret", Role.SERVER)
    with pytest.raises(Refused, match="own nonce"):
        server.feed(server.take())
    client, other = Channel(b"secret", Role.CLIENT), Channel(b"secret", Role.SERVER)
    client.feed(other.take())
    with pytest.raises(Refused, match="does not know"):
        client.feed(client.take()[len(MAGIC) + NONCE_BYTES :])


def test_frames_that_are_repeated_reordered_changed_or_turned_back_are_refused() -> None:
    for attack in ("repeat", "swap", "change", "reflect"):
        client, server = connected()
        client.send({"op": "first"})
        first = client.take()
        client.send({"op": "second"})
        second = client.take()
        changed = bytearray(first)
        changed[-3] ^= 1
        data = {"repeat": first + first, "swap": second + first, "change": bytes(changed), "reflect": first}[attack]
        with pytest.raises(Refused):
            (client if attack == "reflect" else server).feed(data)


def test_a_frame_that_is_too_long_is_refused_before_it_is_read() -> None:
    client, server = connected()
    with pytest.raises(Refused, match="at most"):
        server.feed((LONGEST_FRAME_BYTES + 1).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="cannot send"):
        client.send({"text": "x" * LONGEST_FRAME_BYTES})


def test_a_hundred_thousand_hostile_inputs_bring_no_entry_no_crash_and_no_growth() -> None:
    """Random bytes, true beginnings followed by noise, wrong proofs, old proofs, before and after entry."""
    random.seed(1)
    client, server = Channel(b"secret", Role.CLIENT), Channel(b"secret", Role.SERVER)
    hello = client.take()
    client.feed(server.take())
    old_proof = client.take()
    entered = crashed = 0

    def attack(number: int) -> None:
        nonlocal entered, crashed
        kind = number % 5
        if kind == 4:
            _, target = connected(b"secret") if number % 100 == 4 else (None, Channel(b"secret", Role.SERVER))
        else:
            target = Channel(b"secret", Role.SERVER if number % 2 else Role.CLIENT)
        before = target.established
        data = {
            0: os.urandom(random.randint(0, 200)),
            1: MAGIC[: random.randint(0, 8)] + os.urandom(random.randint(0, 100)),
            2: MAGIC + os.urandom(NONCE_BYTES) + os.urandom(random.randint(0, 64)),
            3: hello + old_proof + os.urandom(random.randint(0, 64)),
            4: random.randint(0, 1 << 32).to_bytes(5, "big")[1:] + os.urandom(random.randint(0, 200)),
        }[kind]
        try:
            messages = target.feed(data)
        except Refused:
            messages = []
        except Exception:
            crashed += 1
            messages = []
        entered += bool(messages) or target.established != before

    for number in range(1000):
        attack(number)
    tracemalloc.start()
    before, _ = tracemalloc.get_traced_memory()
    for number in range(100_000):
        attack(number)
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (entered, crashed) == (0, 0)
    assert after - before < 100_000
