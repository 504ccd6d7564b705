"""Random state as a function of names: (seed, step, micro-batch, module, call) -> the state of torch's generator.

A module that may draw random numbers re-seeds the generator when it is entered, so what it draws does not depend on
what ran before it, on which worker runs it, or on how the model is cut.
"""

import hashlib
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.random import mtrand
from torch import nn
from torch.utils.hooks import RemovableHandle

_MASK = (1 << 64) - 1


def derive(*keys: int | str) -> int:
    """A 64-bit seed from a path of names and numbers; equal paths give equal seeds, and no others are related.

    >>> derive(0, "init") == derive(0, "init"), derive(0, "init") == derive(1, "init")
    (True, False)
    """
    text = "\x1f".join(f"{type(key).__name__}:{key}" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def mix(a: int, b: int) -> int:
    """One 64-bit number from two: splitmix64's finaliser, about 0.5 us where `derive` takes 3."""
    z = (a + 0x9E3779B97F4A7C15 * (b + 1)) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


_MARK = derive("a mark")


class Isolation:
    """Random state that may be seeded at will; at the end python, numpy and torch have their former state back.

    Datasets read their samples and factories build their models inside it: an augmentation is the same whoever loads
    it, and nothing that follows can see that it was loaded. May be entered again and again.

    >>> before = random.getstate()
    >>> with Isolation() as isolation:
    ...     isolation.seed(7)
    ...     drawn = random.random(), float(np.random.rand()), float(torch.rand(()))
    >>> random.getstate() == before
    True
    """

    def __init__(self) -> None:
        self._generator = np.random.MT19937(0)  # swapped in and out for 1 us; saving numpy's state takes 70
        self._first: tuple[float, int, int, int] | None = None
        self._saved: tuple[Any, Any, Any] | None = None

    def __enter__(self) -> Self:
        self._saved = random.getstate(), mtrand.get_bit_generator(), torch.get_rng_state()
        mtrand.set_bit_generator(self._generator)
        return self

    def __exit__(self, *exception: object) -> None:
        assert self._saved is not None
        python_state, numpy_generator, torch_state = self._saved
        random.setstate(python_state)
        mtrand.set_bit_generator(numpy_generator)
        torch.set_rng_state(torch_state)

    def seed(self, number: int) -> None:
        """From here on python, numpy and torch draw what belongs to ``number``."""
        random.seed(number)
        np.random.seed(number & 0xFFFFFFFF)
        torch.default_generator.manual_seed(number)

    def mark(self) -> None:
        """Begin to notice whether anything is drawn."""
        if not self._first:
            self.seed(_MARK)
            self._first = self._drawn()
        self.seed(_MARK)

    def is_untouched(self) -> bool:
        """Whether nothing has been drawn, and nothing seeded, since `mark`; asked once."""
        return self._drawn() == self._first

    def _drawn(self) -> tuple[float, int, int, int]:
        """What is drawn next, of each kind."""
        raw = self._generator.random_raw
        return random.random(), int(raw()), int(raw()), int(torch.empty((), dtype=torch.int64).random_())


# Modules of torch.nn that never draw: entering them does not change the state, which saves about 2.5 us a call.
_NEVER_DRAW = (
    nn.Linear, nn.Bilinear, nn.Identity, nn.Embedding, nn.EmbeddingBag, nn.Flatten, nn.Unflatten,
    nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
    nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d,
    nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d, nn.LocalResponseNorm,
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh,
    nn.Sigmoid, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Softplus, nn.Softmax, nn.LogSoftmax, nn.GLU,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d,
    nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool2d,
    nn.ZeroPad2d, nn.Upsample, nn.PixelShuffle, nn.ModuleList, nn.ModuleDict, nn.ParameterList,
)  # fmt: skip


@dataclass(slots=True)
class Draws:
    """What a micro-batch's modules have been given to draw from.

    Attributes:
        key: of (seed, step, micro-batch).
        calls: of each module, so far.
        given: (module, seed found on entry) -> seed.
    """

    key: int
    calls: dict[int, int] = field(default_factory=dict)
    given: dict[tuple[int, int], int] = field(default_factory=dict)


_LEFT = derive("a module was left")


def may_draw(module: nn.Module) -> bool:
    """Whether a module's random state is keyed when it is entered and left."""
    return type(module) not in _NEVER_DRAW


class ModuleRandom:
    """Keys the random state of a model's modules by (seed, step, micro-batch, module name, call number).

    It is keyed again where a module is left, so what the code around it draws does not depend on what the module drew,
    or on whether it was computed here at all.

    A module entered again during the backward (activation checkpointing) must draw what it drew in the forward.
    Checkpointing restores the generator as it was at the start of the region, and a generator remembers the seed
    it was last given; (module, seed found on entry) therefore names one call, and the same pair is given the same seed.

    Arguments:
        name_of: a module's name -> the name that its random state is keyed by.
    """

    def __init__(
        self, model: nn.Module, seed: int, device: torch.device, name_of: Callable[[str], str] = lambda name: name
    ) -> None:
        self._seed = seed
        self._generator = torch.default_generator
        self._device_generator: torch.Generator | None = None
        if device.type == "cuda":
            torch.cuda.init()  # type: ignore[no-untyped-call]
            self._device_generator = torch.cuda.default_generators[device.index or 0]
        self._draws = Draws(0)
        self._inside: list[int] = []  # seeds of the modules that are under way
        self._handles: list[RemovableHandle] = []
        for path, module in model.named_modules():
            name = name_of(path)
            if may_draw(module):
                self._handles.append(module.register_forward_pre_hook(self._hook(derive("module", name))))
                if name:
                    self._handles.append(module.register_forward_hook(self._leave))

    def enter(self, step: int, micro_batch: int) -> Draws:
        """From here on, draws belong to this micro-batch; ``step`` counts from 0."""
        draws = Draws(mix(mix(self._seed, step), micro_batch))
        self._set(draws.key)
        self.resume(draws)
        return draws

    def resume(self, draws: Draws) -> None:
        """From here on, modules that are entered again belong to the micro-batch of these draws."""
        self._draws = draws
        self._inside.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _set(self, seed: int) -> None:
        self._generator.manual_seed(seed)
        if self._device_generator is not None:
            self._device_generator.manual_seed(seed)

    def _hook(self, name: int) -> Any:
        def reseed(module: nn.Module, args: object) -> None:
            draws = self._draws
            found = (name, self._generator.initial_seed())
            seed = draws.given.get(found)
            if seed is None:
                call = draws.calls.get(name, 0)
                draws.calls[name] = call + 1
                seed = draws.given[found] = mix(mix(draws.key, name), call)
            self._inside.append(seed)
            self._set(seed)

        return reseed

    def _leave(self, module: nn.Module, args: object, result: object) -> None:
        self._set(mix(self._inside.pop(), _LEFT))
