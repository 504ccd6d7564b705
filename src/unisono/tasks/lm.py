"""A byte-level language model: a GPT on text files."""

import math
import time
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from unisono.data.text import Bytes, Windows, corpus
from unisono.errors import ConfigurationError
from unisono.run.rng import derive
from unisono.tasks.task import no_split

VOCABULARY = 256
GENERATION_S = 10.0
"""How long a sample of text may take at the end of a run; a step of a large model on one core takes as long."""


class Attention(nn.Module):
    """Causal self-attention; queries, keys and values of a head lie side by side, so that heads can be divided."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.head_width = width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        batch, time, _ = x.shape
        q, k, v = self.qkv(x).view(batch, time, -1, 3, self.head_width).permute(3, 0, 2, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        result: Tensor = self.out(y.transpose(1, 2).reshape(batch, time, -1))
        return result


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and beside a residual path."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, time, width) -> the same."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        result: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return result


class GPT(nn.Module):
    """A decoder-only transformer with learned positions (Radford et al., 2019)."""

    def __init__(self, layers: int, width: int, heads: int, context: int, dropout: float, *, tied: bool) -> None:
        super().__init__()
        self.context = context
        self.tokens = nn.Embedding(VOCABULARY, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        blocks = [Block(width, heads, dropout) for _ in range(layers)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self._deep = {module for block in blocks for module in (block.attention.out, block.mlp[-1])}
        self.apply(self._init_weights)
        if tied:
            self.head.weight = self.tokens.weight

    def _init_weights(self, module: nn.Module) -> None:
        """Initial values of one module; where the residual path is added to, they are smaller the deeper the model."""
        if isinstance(module, nn.Linear | nn.Embedding):
            deep = math.sqrt(2 * len(self.blocks)) if module in self._deep else 1.0
            nn.init.normal_(module.weight, std=0.02 / deep)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.LayerNorm):
            module.reset_parameters()

    def forward(self, tokens: Tensor) -> Tensor:
        """(batch, time) of bytes -> (batch, time, 256) of logits."""
        at = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.tokens(tokens) + self.positions(at))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.head(self.norm(x))
        return logits


class LanguageModel:
    """The task ``lm``.

    Arguments:
        path: a text file, a directory, or a glob; default: the sources of Python's standard library.
        layers, width, heads, context, dropout, tied: of the model; ``tied`` shares input and output embedding.
        lr, weight_decay: of AdamW, where the configuration names no optimizer.
    """

    def __init__(
        self,
        path: str | None = None,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        context: int = 128,
        dropout: float = 0.0,
        lr: float = 3e-3,
        weight_decay: float = 0.1,
        tied: bool = False,
    ) -> None:
        if width % heads:
            raise ConfigurationError(f"width {width} is not a multiple of heads {heads}; choose heads that divide it")
        self._shape = {"layers": layers, "width": width, "heads": heads, "context": context, "dropout": dropout}
        self._tied = tied
        self._context = self.tokens_per_sample = context
        self._lr, self._weight_decay = lr, weight_decay
        self._corpus = corpus(path)

    def model(self) -> nn.Module:
        """The GPT."""
        return GPT(**self._shape, tied=self._tied)  # type: ignore[arg-type]

    def dataset(self, split: str) -> Windows:
        """Windows over the files of a split."""
        if split not in ("train", "validation"):
            raise no_split(split)
        files = self._corpus.train if split == "train" else self._corpus.validation
        return Windows(files, self._context, split)

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy in nats a byte."""
        return F.cross_entropy(output.view(-1, VOCABULARY), target.reshape(-1))

    def prediction(self, output: Tensor) -> Tensor:
        """The likeliest byte at each place, (batch, time)."""
        return output.argmax(-1).to(torch.uint8)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """AdamW; weight decay for matrices only."""
        members = list(parameters)
        groups = [
            {"params": [p for p in members if p.dim() > 1], "weight_decay": self._weight_decay},
            {"params": [p for p in members if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return torch.optim.AdamW(groups, lr=self._lr, betas=(0.9, 0.95))

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, float]:
        """Bits per byte."""
        return {"bits_per_byte": float(self.loss(output, target)) / math.log(2)}

    def definition(self) -> Mapping[str, Any]:
        """The corpus, by digest."""
        return {"corpus": self._corpus.digest(), "train_files": len(self._corpus.train)}

    def summary(self, model: nn.Module) -> Mapping[str, Any]:
        """A bigram model's figure on the same split, for comparison, and a sample of text."""
        bigram = bigram_bits_per_byte(Bytes(self._corpus.train), Bytes(self._corpus.validation))
        return {"bigram_bits_per_byte": round(bigram, 4), "sample": generate(model, b"def ", 200)}


def bigram_counts(data: Bytes) -> "np.ndarray[tuple[int, int], np.dtype[np.float64]]":
    """How often each byte follows each other, (256, 256)."""
    counts = np.zeros(VOCABULARY * VOCABULARY)
    last = b""
    for chunk in data.chunks(1 << 20):
        values = np.frombuffer(last + chunk, dtype=np.uint8).astype(np.int64)
        counts += np.bincount(values[:-1] * VOCABULARY + values[1:], minlength=counts.size)
        last = chunk[-1:]
    return counts.reshape(VOCABULARY, VOCABULARY)


def bigram_bits_per_byte(train: Bytes, validation: Bytes) -> float:
    """What a bigram model with add-one smoothing, fitted on ``train``, needs for a byte of ``validation``."""
    counts = bigram_counts(train) + 1.0
    bits = -np.log2(counts / counts.sum(axis=1, keepdims=True))
    seen = bigram_counts(validation)
    return float((seen * bits).sum() / max(1.0, seen.sum()))


@torch.no_grad()
@torch.no_grad()
def generate(model: nn.Module, prompt: bytes, length: int, temperature: float = 0.8, seed: int = 0) -> str:
    """Continue a prompt byte by byte; the same text for the same model and seed, shorter where the model is slow."""
    until = time.monotonic() + GENERATION_S
    generator = torch.Generator().manual_seed(derive(seed, "generate"))
    context = int(getattr(model, "context", 128))
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    tokens = list(prompt)
    for _ in range(length):
        if time.monotonic() > until:
            break
        window = torch.tensor([tokens[-context:]], device=device)
        logits = model(window)[0, -1].float().cpu() / temperature
        tokens.append(int(torch.multinomial(logits.softmax(-1), 1, generator=generator)))
    model.train(was_training)
    return bytes(tokens).decode("utf-8", errors="replace")
