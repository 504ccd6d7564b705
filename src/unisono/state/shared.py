"""A training state that hosts share: each keeps some blocks; tensor by tensor it can be made whole, on the first host.

All hosts run the same calls in the same order. Memory that is not kept is given back, page by page.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from unisono.comm.arena import Region
from unisono.comm.group import Group
from unisono.comm.hierarchical import HierarchicalGroup
from unisono.plan.assignment import Run, UpdateClass
from unisono.plan.blocks import Block
from unisono.plan.shards import StateShards
from unisono.state.portions import merged, overlap
from unisono.state.training_state import BUFFER, OPTIMIZER, PARAMETER, TrainingState

CHUNK_BYTES = 4 << 20


class SharedState:
    """This host's view of it; for the first worker of every host.

    Arguments:
        state: where the whole would lie.
        shards: who keeps what.
        group: the workers of all hosts.
        release: gives back the memory of a region of the state, as far as it is whole pages.
        values_everywhere: every host has all parameters, and shares the optimizer's state alone.
    """

    def __init__(
        self,
        state: TrainingState,
        shards: StateShards,
        group: HierarchicalGroup,
        release: Callable[[Region], None],
        *,
        values_everywhere: bool,
    ) -> None:
        self._state = state
        self._shards = shards
        self._leaders = group.leaders
        self._host = group.place.host
        self._release = release
        self._everywhere = values_everywhere
        named = state.layout.regions.named
        regions = [] if values_everywhere else [named[name] for name in named if name.startswith("values ")]
        self._divided_values = [(region, self._kept(region)) for region in regions]
        self._handed_on = [named[name] for name in named if name.startswith(("values ", "state "))]
        self._kept_here: list[Region] = []  # everything, values that all have included
        for name, region in named.items():
            divided = name.startswith("state ") or region in regions
            self._kept_here += self._kept(region) if divided else [region]

    def keep(self) -> None:
        """Give back the memory of all values that other hosts keep."""
        for region, kept in self._divided_values:
            self._release_all_but(region, kept)

    def load(self, names: Collection[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """On the first worker of the first host: as `TrainingState.load`; each tensor goes on to who keeps its parts.

        The others call `receive`; `loaded` tells them that nothing more comes.
        """
        targets = self._state.targets(names)
        self._tell(json.dumps(list(names)).encode())

        def handed_on() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in tensors:
                yield name, tensor  # which the state takes before it asks for the next
                self._tell(name.encode())
                self._hand_on(targets.get(name, ()))

        self._state.load(names, handed_on())

    def loaded(self) -> None:
        """On the first worker of the first host: no tensor follows."""
        self._tell(b"")

    def receive(self) -> None:
        """On the first workers of the other hosts: take what `load` hands on."""
        names = self._tell(b"")
        if not names:
            return
        targets = self._state.targets(json.loads(names))
        while name := self._tell(b""):
            self._hand_on(targets.get(name.decode(), ()))

    def _tell(self, word: bytes) -> bytes:
        """The first host's word to all."""
        return self._leaders.gather(word, "state of a checkpoint")[0]

    def _hand_on(self, parts: Sequence[Tensor]) -> None:
        for part in parts:
            place = self._place(part)
            if part.numel() and not any(overlap(place, own) for own in self._handed_on):  # it follows in `spread`
                continue
            kept = [inside for own in self._kept_here if (inside := overlap(place, own)) is not None]
            self._spread_region(place, kept)
            if self._host == 0:
                self._release_all_but(place, kept)

    def spread(self, *, with_values: bool) -> None:
        """What the first host has, but for the optimizer's state, to all: each takes what it keeps.

        Arguments:
            with_values: parameters too, which else everyone has that keeps them.
        """
        for name, region in self._state.layout.regions.named.items():
            kind = name.split()[0]
            if kind == "state" or (kind == "values" and not with_values):
                continue
            divided = kind == "values" and not self._everywhere
            kept = self._kept(region) if divided else [region]
            self._spread_region(region, kept)
            if divided and self._host == 0:
                self._release_all_but(region, kept)

    def _spread_region(self, region: Region, kept: Sequence[Region]) -> None:
        for start in range(0, region.size_bytes, CHUNK_BYTES):
            self._spread(region.part(start, min(CHUNK_BYTES, region.size_bytes - start)), kept)

    def _spread(self, chunk: Region, kept: Sequence[Region]) -> None:
        inside = [part for part in (overlap(chunk, own) for own in kept) if part is not None]
        if self._host == 0 or inside == [chunk]:
            self._leaders.broadcast(self._bytes(chunk), "initial state")
            return
        received = torch.empty(chunk.size_bytes, dtype=torch.uint8)
        self._leaders.broadcast(received, "initial state")
        for part in inside:
            start = part.offset - chunk.offset
            self._bytes(part).copy_(received[start : start + part.size_bytes])

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state, in order of name; whole on the first host, until the next one is asked for."""
        self._share_rows()
        pieces = self._pieces()
        for name, tensor in sorted(self._state.named_tensors(), key=lambda item: item[0]):
            several = pieces.get(name, {})
            self._leaders.gather_to_first(several, f"state: {name}")
            yield name, tensor
            if self._host == 0:
                for host, parts in several.items():
                    for part in parts if host else ():
                        self._release(self._place(part))

    def _share_rows(self) -> None:
        """Everyone's scalars of the blocks that it keeps."""
        layout, row = self._state.layout, self._state.layout.row_bytes
        region = layout.regions.named["scalars"]
        own = self._bytes(region)
        payloads = self._leaders.gather(own.numpy().tobytes(), "scalars of the state")
        for host, payload in enumerate(payloads):
            theirs = torch.frombuffer(bytearray(payload), dtype=torch.uint8)
            for i in self._shards.blocks(host) if host != self._host else ():
                own[i * row : (i + 1) * row] = theirs[i * row : (i + 1) * row]

    def _pieces(self) -> Mapping[str, Mapping[int, list[Tensor]]]:
        """By name of a tensor and host: the parts of it that other hosts than the first keep, flat."""
        state, layout, flat = self._state, self._state.layout, self._state.layout.flat
        elementwise = layout.optimizer.update is UpdateClass.ELEMENT
        result: dict[str, dict[int, list[Tensor]]] = {}
        for name, tensor in state.named_tensors():
            kind, rest = name.split("/", 1)
            if kind == BUFFER or (kind == PARAMETER and self._everywhere) or self._is_scalar(tensor):
                continue
            parameter = self._parameter(rest if kind == PARAMETER else rest.rpartition("/")[0])
            if parameter is None or flat.parameters[parameter].group is None:
                continue
            blocks = flat.blocks_of(parameter)
            if kind == OPTIMIZER and not elementwise:
                host = self._shards.first(blocks[0]) if blocks else 0
                result[name] = {host: [tensor.reshape(-1)]} if host else {}
                continue
            several: dict[int, list[Tensor]] = {}
            whole = tensor.view(-1)
            for start, stop, host in _joined((flat.blocks[i], self._shards.first(i)) for i in blocks):
                if host:
                    several.setdefault(host, []).append(whole[start:stop])
            result[name] = several
        return result

    def _parameter(self, name: str) -> int | None:
        return next((p for p, spec in enumerate(self._state.layout.flat.parameters) if spec.tensor.name == name), None)

    def _is_scalar(self, tensor: Tensor) -> bool:
        """Whether it is a number that a block has, and not one that is learned."""
        return overlap(self._place(tensor), self._state.layout.regions.named["scalars"]) is not None

    def _kept(self, region: Region) -> list[Region]:
        """The parts of a region that this host keeps."""
        layout = self._state.layout
        found: list[Region | None] = []
        for i in self._shards.blocks(self._host):
            found += [overlap(region, own) for own in layout.image(Run(i, i + 1))]
        found += [overlap(region, self._place(value)) for value in self._frozen() if value.numel()]
        return merged([part for part in found if part is not None])

    def _frozen(self) -> list[Tensor]:
        """Parameters that nobody trains: everyone has them."""
        parameters = zip(self._state.layout.flat.parameters, self._state.values, strict=True)
        return [value for spec, value in parameters if spec.group is None]

    def _release_all_but(self, region: Region, kept: Sequence[Region]) -> None:
        at = region.offset
        for part in kept:
            self._release(Region(at, part.offset - at))
            at = part.offset + part.size_bytes
        self._release(Region(at, region.offset + region.size_bytes - at))

    def _bytes(self, region: Region) -> Tensor:
        return self._state.memory[region.offset : region.offset + region.size_bytes]

    def _place(self, part: Tensor) -> Region:
        """Where a part of the state lies in it."""
        return Region(part.data_ptr() - self._state.memory.data_ptr(), part.nbytes)


def streamed(shared: SharedState | None, mates: Group, operation: str) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a shared state on the first worker of each host, as `SharedState.tensors`; none on the others.

    Those wait for as long as it takes, and hear of every tensor, so that the deadline is one tensor's.

    Arguments:
        shared: None on the others.
        mates: the workers of this host.
    """
    if shared is None:
        while mates.all_gather(b"", operation)[0]:
            pass
        return
    for item in shared.tensors():
        mates.all_gather(b"more", operation)
        yield item
    mates.all_gather(b"", operation)


def _joined(blocks: Iterator[tuple[Block, int]]) -> list[tuple[int, int, int]]:
    """(first element, end, host) of blocks of one parameter, neighbours of one host as one."""
    result: list[tuple[int, int, int]] = []
    for block, host in blocks:
        if result and result[-1][2] == host:
            result[-1] = (result[-1][0], block.stop, host)
        else:
            result.append((block.start, block.stop, host))
    return result
