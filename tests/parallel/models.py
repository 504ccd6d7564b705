"""Models that pass values on in different ways, for stages."""

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    """A block beside a residual path, with dropout, and an in-place activation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.inner = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(inplace=True), nn.Linear(2 * width, width))
        self.dropout = nn.Dropout(0.2)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.dropout(self.inner(self.norm(x)))
        return x + (y if scale is None else y * scale)


class Deep(nn.Module):
    """Blocks in a list, a parameter of the model's own in front and behind, dropout between modules."""

    def __init__(self, blocks: int = 4, width: int = 12) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.token = nn.Parameter(torch.linspace(-1, 1, width))
        self.blocks = nn.ModuleList(Residual(width) for _ in range(blocks))
        self.last = nn.Linear(width, 4)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + 0.1 * x.mean(1, keepdim=True)  # of the input alone: every stage computes it
        x = nn.functional.dropout(self.first(x) + self.token, 0.1)
        for block in self.blocks:
            x = block(x, scale=scale)
            x = nn.functional.dropout(x, 0.1)
        result: Tensor = self.last(x) * self.temperature
        return result


class Cross(nn.Module):
    """Looks at what the encoder made, beside a residual path."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Bilinear(width, width, width)

    def forward(self, y: Tensor, memory: Tensor) -> Tensor:
        return y + torch.tanh(self.inner(y, memory))


class EncoderDecoder(nn.Module):
    """Every block of the decoder needs what the encoder made."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.encoder = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.decoder = nn.ModuleList(Cross(width) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.first(x))
        for layer in self.encoder:
            memory = torch.tanh(layer(memory))
        y = memory
        for layer in self.decoder:
            y = layer(y, memory)
        result: Tensor = self.last(y)
        return result


class Passing(nn.Module):
    """One parameter is given to every block; another is used by the head, which holds the embedding in a list."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.bias = nn.Parameter(torch.linspace(-1, 1, width))
        self.blocks = nn.ModuleList(Adding(width) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            x = block(x, self.bias)
        result: Tensor = self.last(x)
        return result


class Adding(nn.Module):
    """A layer with a bias that it is given."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return torch.tanh(self.inner(x) + bias)


class Sharing(nn.Module):
    """An activation is one module, called at the top and inside blocks; masks are kept when they are first needed."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.act = nn.GELU()
        self.first = nn.Linear(6, width)
        self.blocks = nn.ModuleList(Caching(width, self.act) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        for block in self.blocks:
            x = self.act(block(x))
        result: Tensor = self.last(self.act(x))
        return result


class Caching(nn.Module):
    """Two layers around a shared activation, and a mask that is made at the first call."""

    def __init__(self, width: int, act: nn.Module) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(width, width), act, nn.Linear(width, width))
        self.mask: Tensor | None = None
        self.register_buffer("scale", None)

    def forward(self, x: Tensor) -> Tensor:
        if self.mask is None:
            self.mask = torch.ones(x.shape[1])
            self.scale = torch.full((x.shape[1],), 0.5)
        y: Tensor = self.inner(x) * self.mask * self.scale
        return y


class Functional(nn.Module):
    """Random numbers are drawn between modules that draw none."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, width), nn.Linear(width, width), nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.dropout(torch.relu(self.a(x)), 0.3)
        x = nn.functional.dropout(torch.relu(self.b(x)), 0.3)
        result: Tensor = self.c(x)
        return result


def albert() -> nn.Module:
    """One layer under three names."""
    layer = nn.Linear(6, 6)
    return nn.Sequential(nn.Linear(6, 6), layer, nn.ReLU(), layer, nn.ReLU(), nn.Linear(6, 4))


class Skipping(nn.Module):
    """What an early layer made is used by code near the end."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        early = self.first(x)
        y = early
        for layer in self.layers:
            y = torch.relu(layer(y))
        result: Tensor = self.last(y + early)
        return result


class Twice(nn.Module):
    """One layer is called at the beginning and in the middle."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.shared = nn.Linear(width, width)
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(3))
        self.last = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.shared(self.first(x))
        x = self.shared(torch.relu(self.layers[0](x)))
        for layer in self.layers[1:]:
            x = torch.relu(layer(x))
        result: Tensor = self.last(x)
        return result


class Aside(nn.Module):
    """The first block's result does not lead to all that is passed on: a bias from elsewhere is, and is used too."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(6, width)
        self.bias = nn.Linear(6, width)
        self.mix = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Cross(width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        bias = torch.tanh(self.mix(self.bias(x)))
        for block in self.blocks:
            y = block(y, bias)
        result: Tensor = y
        return result
