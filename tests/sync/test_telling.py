"""What replicas tell each other, between hosts that are threads here."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from unisono.comm.compression import Cast, Codec, Quantized
from unisono.comm.foretold import Foretold, foretold_bytes
from unisono.run.summation import Node
from unisono.sync.telling import Column, Telling, packed, unpacked

Words = list[list[Tensor | None]]


@given(st.dictionaries(st.tuples(st.integers(0, 2**40), st.integers(0, 99)), st.binary(max_size=40), max_size=5))
def test_words_survive_a_message(told: dict[tuple[int, int], bytes]) -> None:
    tensors = {key: torch.tensor(list(data), dtype=torch.uint8) for key, data in told.items()}
    found = dict(unpacked(b"".join(packed(tensors)), range(2**40 + 1)))
    assert {key: data.numpy().tobytes() for key, data in found.items()} == told


def columns(replicas: int) -> list[Column]:
    """Two units, with values that differ from replica to replica."""
    generator = torch.Generator().manual_seed(3)

    def unit() -> Any:
        return SimpleNamespace(values=torch.randn(6, generator=generator), state={"sent": torch.zeros(6)})

    return [Column(block, unit(), [unit() for _ in range(replicas)]) for block in (4, 9)]


class Board:
    """Brings together what hosts say, each its own number of times."""

    def __init__(self, hosts: int) -> None:
        self._hosts = hosts
        self._said: dict[int, dict[int, bytes]] = {}
        self._changed = threading.Condition()

    def gather_of(self, host: int) -> Callable[[bytes, str], Callable[[], Sequence[bytes]]]:
        numbers = iter(range(100))

        def gather(payload: bytes, operation: str) -> Callable[[], Sequence[bytes]]:
            number = next(numbers)
            with self._changed:
                said = self._said.setdefault(number, {})
                said[host] = payload
                self._changed.notify_all()

            def end() -> Sequence[bytes]:
                with self._changed:
                    assert self._changed.wait_for(lambda: len(said) == self._hosts, 10)
                return [said[number] for number in range(self._hosts)]

            return end

        return gather


def tellings(hosts: int, codec: Codec | None, *, values: bool = False) -> tuple[Telling, list[Telling]]:
    """Where all replicas are in one place, and where each is on a host of its own."""
    board = Board(hosts)
    here = [[r == host for r in range(hosts)] for host in range(hosts)]
    apart = [Telling(codec, 7, values, here[host], board.gather_of(host)) for host in range(hosts)]
    return Telling(codec, 7, values, [True] * hosts), apart


@pytest.mark.parametrize("codec", [None, Cast(torch.bfloat16), Quantized()], ids=["as it is", "bf16", "int8"])
@pytest.mark.parametrize("values", [False, True])
def test_hosts_hear_what_one_host_would(codec: Codec | None, values: bool) -> None:
    together, apart = tellings(3, codec, values=values)
    everything = columns(3)
    expected: Words = [together.words(5, column) for column in everything]

    def heard(host: Telling) -> Words:
        host.begin(5, everything)
        host.end(5)
        return [host.words(5, column) for column in everything]

    with ThreadPoolExecutor(3) as threads:
        for found in threads.map(heard, apart):
            for mine, theirs in zip(chain(*found), chain(*expected), strict=True):
                assert mine is not None and theirs is not None and torch.equal(mine, theirs)


@pytest.mark.parametrize("resumed", [False, True])
def test_with_a_delay_words_are_kept_and_asked_for_again(resumed: bool) -> None:
    """Whoever was not there as they were told has the same from who was."""
    together, apart = tellings(2, Quantized())
    expected: Words = [together.words(5, column) for column in columns(2)]

    def kept(number: int) -> list[Tensor]:
        host, mine = apart[number], columns(2)
        if not resumed:
            host.begin(5, mine)
            for column in mine:
                assert [words is None for words in host.words(5, column)] == [not here for here in host.here]
        for column, words in zip(mine, expected, strict=True):  # what a commit keeps: a host's own words
            own = words[number]
            assert own is not None
            column.replicas[number].state["sent"].copy_(own)
        host.end_into(5, mine, "sent")
        return [replica.state["sent"] for column in mine for replica in column.replicas]

    with ThreadPoolExecutor(2) as threads:
        for found in threads.map(kept, range(2)):
            for mine, theirs in zip(found, chain(*expected), strict=True):
                assert theirs is not None and torch.equal(mine, theirs)


def test_losses_are_foretold_by_subtree() -> None:
    """In the order of the tree, with the bits that partials come to."""
    foretold = Foretold(memoryview(bytearray(foretold_bytes(5, 2))), 5, 2)
    losses = [0.1, 0.7, 0.2, 1e9, 0.3]
    for m, loss in enumerate(losses[:4]):
        foretold.put(3, m, [loss, 1.0])
    assert foretold.has(3, range(4)) and not foretold.has(3, range(5)) and not foretold.has(4, [0])
    assert foretold.summed(Node(2, 0)) == ((0.1 + 0.7) + (0.2 + 1e9), 4.0)
    foretold.put(3, 4, [0.3, 1.0])
    assert foretold.summed(Node(3, 0)) == (((0.1 + 0.7) + (0.2 + 1e9)) + 0.3, 5.0)
