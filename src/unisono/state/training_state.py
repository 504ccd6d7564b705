"""A training state in memory: named views of values, optimizer state and buffers over one region of bytes."""

import copy
from collections.abc import Collection, Iterable, Iterator

import torch
from torch import Tensor

from unisono.comm.partial import torch_dtype
from unisono.errors import CheckpointError
from unisono.optim.state_spec import ElementState
from unisono.plan.assignment import UpdateClass
from unisono.plan.blocks import ALIGNMENT_ELEMENTS
from unisono.run.digest import digest
from unisono.state.layout import CELL, PYTHON_STATE_BYTES, StateLayout

PARAMETER, OPTIMIZER, BUFFER = "parameter", "optimizer", "buffer"


def _aligned_zeros(like: Tensor) -> Tensor:
    """Memory that begins on a line's boundary, as the arena does."""
    memory = torch.zeros(like.numel() + ALIGNMENT_ELEMENTS, dtype=like.dtype)
    skipped = -memory.data_ptr() % (ALIGNMENT_ELEMENTS * like.itemsize) // like.itemsize
    return memory[skipped : skipped + like.numel()]


def holds_words(memory: Tensor) -> bool:
    """Whether single words of a memory can be read and written from Python: not on a device."""
    return memory.device.type == "cpu"


class TrainingState:
    """Typed views of a state.

    Arguments:
        layout: where everything lies.
        memory: the region as bytes (uint8).
        frozen: the state that holds the parameters that are not trained, where this one is a snapshot.

    Attributes:
        holds_words: whether its plain numbers lie in its memory too; else in this process alone.
    """

    def __init__(self, layout: StateLayout, memory: Tensor, frozen: "TrainingState | None" = None) -> None:
        self.layout = layout
        self.memory = memory
        self._frozen = frozen
        dtypes = enumerate(layout.flat.segment_dtypes)
        self._segments = [self._region(f"values {segment}").view(torch_dtype(dtype)) for segment, dtype in dtypes]
        self.values = [self._value(p) for p in range(len(layout.flat.parameters))]
        self.buffers = [
            self._region(f"buffer {b}").view(torch_dtype(spec.dtype)).view(spec.shape)
            for b, spec in enumerate(layout.buffers)
        ]
        self._first_block = {b.parameter: i for i, b in reversed(list(enumerate(layout.flat.blocks)))}
        self._rows = self._region("scalars")
        self.holds_words = holds_words(memory)
        if self.holds_words:
            self._present = self._rows.numpy().data.cast("B").cast("Q")
            self._present_stride = layout.row_bytes // CELL
        else:  # a device's memory has no host view: the words are this process's own
            self._present = frozen._present if frozen else memoryview(bytearray(CELL * layout.blocks)).cast("Q")
            self._present_stride = 1
        self._numbers: Tensor | None = None
        if layout.optimizer.update is UpdateClass.COUPLED:
            elsewhere = frozen._numbers if frozen else torch.zeros(PYTHON_STATE_BYTES, dtype=torch.uint8)
            self._numbers = self._region("python") if self.holds_words else elsewhere

    def _region(self, name: str) -> Tensor:
        region = self.layout.regions.named[name]
        return self.memory[region.offset : region.offset + region.size_bytes]

    def _value(self, parameter: int) -> Tensor:
        spec, place = self.layout.flat.parameters[parameter], self.layout.flat.places[parameter]
        if self._frozen is not None and spec.group is None:
            return self._frozen.values[parameter]
        return self._segments[place.segment][place.offset : place.offset + place.numel].view(spec.tensor.shape)

    def apart(self) -> "TrainingState":
        """This state with values, all 0, in memory of this process; what nobody touches takes none."""
        other = copy.copy(self)
        other._segments = [_aligned_zeros(segment) for segment in self._segments]
        other.values = [other._value(p) for p in range(len(self.values))]
        return other

    def element_state(self, key: str, dtype: str, parameter: int) -> Tensor:
        """A parameter's element-wise optimizer state, in the parameter's shape."""
        spec, place = self.layout.flat.parameters[parameter], self.layout.flat.places[parameter]
        segment = self._region(f"state {key} {place.segment}").view(torch_dtype(dtype))
        return segment[place.offset : place.offset + place.numel].view(spec.tensor.shape)

    def scalar(self, key: str, dtype: str, block: int) -> Tensor:
        """A block's scalar of optimizer state, a tensor of no dimensions."""
        start = block * self.layout.row_bytes + CELL * (1 + self.layout.scalar_keys.index(key))
        return self._rows[start : start + CELL].view(torch_dtype(dtype))[0]

    def _state_of(self, parameter: int) -> ElementState:
        spec = self.layout.flat.parameters[parameter]
        assert spec.group is not None
        return self.layout.optimizer.state_of(spec.group, spec.tensor.dtype)

    def present(self, block: int) -> memoryview:
        """One word: whether the block has optimizer state yet."""
        at = block * self._present_stride
        return self._present[at : at + 1]

    def parts(self) -> list[Tensor]:
        """All bytes of the state, for a copy elsewhere: the region, and words that a device's memory cannot hold."""
        if self.holds_words:
            return [self.memory]
        words = torch.frombuffer(self._present, dtype=torch.int64)
        return [self.memory, words, *([] if self._numbers is None else [self._numbers])]

    def python_state(self) -> memoryview | None:
        """The bytes in which a coupled optimizer's plain numbers are kept."""
        return None if self._numbers is None else self._numbers.numpy().data

    def parameter_state(self, parameter: int) -> dict[str, Tensor]:
        """The optimizer state of a whole parameter, for classes that are not element-wise."""
        return {
            t.name: self._region(f"state of {parameter} {t.name}").view(torch_dtype(t.dtype)).view(t.shape)
            for t in self.layout.optimizer.tensors[parameter]
        }

    def span(self, segment: int, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of a segment's values."""
        return self._segments[segment][start:stop]

    def span_state(self, segment: int, start: int, stop: int, block: int) -> dict[str, Tensor]:
        """The element-wise optimizer state of a span of one group, with the scalars of ``block``, one of its blocks."""
        kept = self._state_of(self.layout.flat.blocks[block].parameter)
        state = {
            key: self._region(f"state {key} {segment}").view(torch_dtype(dtype))[start:stop]
            for key, dtype in kept.elements
        }
        return state | {key: self.scalar(key, dtype, block) for key, dtype in kept.scalars}

    def rows(self, first: int, stop: int) -> Tensor:
        """The scalars of blocks [first, stop), (blocks, cells), as int64."""
        row = self.layout.row_bytes
        return self._rows[first * row : stop * row].view(torch.int64).view(stop - first, row // CELL)

    def named_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Every tensor of the state by name; state that an optimizer has not made yet is absent."""
        flat, spec = self.layout.flat, self.layout.optimizer
        for p, parameter in enumerate(flat.parameters):
            name = parameter.tensor.name
            yield f"{PARAMETER}/{name}", self.values[p]
            first = self._first_block.get(p)
            if parameter.group is None or first is None or not self.present(first)[0]:
                continue
            if spec.update is UpdateClass.ELEMENT:
                for key, dtype in self._state_of(p).elements:
                    yield f"{OPTIMIZER}/{name}/{key}", self.element_state(key, dtype, p)
                for key, dtype in self._state_of(p).scalars:
                    yield f"{OPTIMIZER}/{name}/{key}", self.scalar(key, dtype, first)
            else:
                for key, tensor in self.parameter_state(p).items():
                    yield f"{OPTIMIZER}/{name}/{key}", tensor
        for buffer, tensor in zip(self.layout.buffers, self.buffers, strict=True):
            yield f"{BUFFER}/{buffer.name}", tensor
        if self._numbers is not None:
            yield f"{OPTIMIZER}/numbers", self._numbers

    def load(self, names: Collection[str], tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Take every value from named tensors, those that `named_tensors` gave; they may come one by one.

        Arguments:
            names: of all that will come.

        Raises:
            CheckpointError: for what is missing, or has another form.
        """
        targets = self.targets(names)
        missing = next((name for name in targets if name not in names), None)
        if missing is not None:
            raise CheckpointError(f"the checkpoint has no {missing}; it belongs to another model or optimizer")
        for name, source in tensors:
            for target in targets.get(name, ()):
                if source.shape != target.shape or source.dtype != target.dtype:
                    raise CheckpointError(
                        f"{name} is {source.dtype} {tuple(source.shape)} in the checkpoint and {target.dtype} "
                        f"{tuple(target.shape)} in this run; resume with the model and optimizer it was made with"
                    )
                target.copy_(source)

    def targets(self, names: Collection[str]) -> dict[str, list[Tensor]]:
        """Where each tensor of a checkpoint goes; of a parameter without optimizer state, only its values."""
        flat, spec = self.layout.flat, self.layout.optimizer
        result: dict[str, list[Tensor]] = {}
        with_state = {name.split("/", 1)[1].rpartition("/")[0] for name in names if name.startswith(f"{OPTIMIZER}/")}
        blocks: dict[int, list[int]] = {}
        for i, block in enumerate(flat.blocks):
            blocks.setdefault(block.parameter, []).append(i)
        for p, parameter in enumerate(flat.parameters):
            name = parameter.tensor.name
            result[f"{PARAMETER}/{name}"] = [self.values[p]]
            for index in blocks.get(p, ()):
                self.present(index)[0] = int(name in with_state)
            if name not in with_state or parameter.group is None:
                continue
            if spec.update is UpdateClass.ELEMENT:
                for key, dtype in self._state_of(p).elements:
                    result[f"{OPTIMIZER}/{name}/{key}"] = [self.element_state(key, dtype, p)]
                for key, dtype in self._state_of(p).scalars:
                    result[f"{OPTIMIZER}/{name}/{key}"] = [self.scalar(key, dtype, i) for i in blocks.get(p, ())]
            else:
                for key, tensor in self.parameter_state(p).items():
                    result[f"{OPTIMIZER}/{name}/{key}"] = [tensor]
        for buffer, tensor in zip(self.layout.buffers, self.buffers, strict=True):
            result[f"{BUFFER}/{buffer.name}"] = [tensor]
        if self._numbers is not None:
            result[f"{OPTIMIZER}/numbers"] = [self._numbers]
        return result

    def digest(self, step: int) -> str:
        """The digest of this state as the one after ``step``."""
        return digest(step, self.named_tensors())
