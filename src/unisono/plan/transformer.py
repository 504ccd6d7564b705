"""A transformer by its few numbers: its parameters, and the operations that it takes to train it.

Parameters are counted as a checkpoint has them; operations are those of matrix products, a multiplication and an
addition each, as Narayanan et al. (SC 2021) count them.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from unisono.errors import ConfigurationError

BACKWARD = 2
"""Operations of a backward, in those of its forward."""


@dataclass(frozen=True, slots=True)
class Transformer:
    """A decoder of equal layers.

    Attributes:
        name: for a reader.
        layers, hidden, heads: see the papers.
        kv_heads: heads of keys and values, of which several queries share one.
        ffn: width inside an MLP.
        vocab: tokens that there are.
        gated: MLPs have three matrices (SwiGLU), not two.
        tied: the output shares the embedding's weights.
        biased: matrices have biases, and norms have two vectors (LayerNorm, not RMSNorm).
        positions: learned ones; 0 where positions are computed.
        head_width: of a head; default: what the heads share out of ``hidden``.
        dropout: after attention, inside it, and after the MLP.
        experts: MLPs of a layer, of which each token passes ``chosen``; 0 where there is one MLP.
        expert_ffn: width inside an expert.
        shared_ffn: of the MLP that all tokens pass beside their experts.
        dense_layers: how many of the layers have one MLP, of ``ffn``, all the same.
    """

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    gated: bool = True
    tied: bool = False
    biased: bool = False
    positions: int = 0
    head_width: int = 0
    dropout: bool = False
    experts: int = 0
    chosen: int = 0
    expert_ffn: int = 0
    shared_ffn: int = 0
    dense_layers: int = 0

    @property
    def query_width(self) -> int:
        """Of all queries together."""
        return self.heads * (self.head_width or self.hidden // self.heads)

    @property
    def kv_width(self) -> int:
        """Of all keys, or all values, together."""
        return self.query_width // self.heads * self.kv_heads

    @property
    def attention_elements(self) -> int:
        """Elements of a layer's matrices for queries, keys, values and output."""
        return self.hidden * (2 * self.query_width + 2 * self.kv_width)

    @property
    def mlp_matrices(self) -> int:
        """Of one MLP."""
        return 3 if self.gated else 2

    @property
    def passed_widths(self) -> int:
        """Of all MLPs that a token passes, layer after layer."""
        sparse = self.layers - self.dense_layers if self.experts else 0
        return (self.layers - sparse) * self.ffn + sparse * (self.chosen * self.expert_ffn + self.shared_ffn)

    @property
    def held_widths(self) -> int:
        """Of all MLPs."""
        sparse = self.layers - self.dense_layers if self.experts else 0
        return (self.layers - sparse) * self.ffn + sparse * (self.experts * self.expert_ffn + self.shared_ffn)

    @property
    def layer_parameters(self) -> int:
        """All of a layer, on average where layers have unequal MLPs.

        >>> named("llama3:8b").layer_parameters
        218112000
        """
        norms = 2 * self.hidden * (2 if self.biased else 1)
        wide = self.query_width + 2 * self.kv_width + self.hidden + (2 if self.gated else 1) * self.ffn + self.hidden
        mlps = self.mlp_matrices * self.hidden * self.held_widths // self.layers
        routers = self.experts * self.hidden * (self.layers - self.dense_layers) // self.layers
        return self.attention_elements + mlps + routers + norms + (wide if self.biased else 0)

    @property
    def parameters(self) -> int:
        """All of the model.

        >>> named("llama3:8b").parameters, named("llama3:405b").parameters
        (8030261248, 405853388800)
        >>> round(named("mixtral:8x7b").parameters / 1e9, 2)
        46.7
        """
        embeddings = self.vocab * self.hidden * (1 if self.tied else 2) + self.positions * self.hidden
        return self.layers * self.layer_parameters + embeddings + self.hidden * (2 if self.biased else 1)

    def forward_flops(self, tokens: int) -> int:
        """Operations of the forward of one sequence; attention is counted whole, though half of it is masked.

        >>> round(named("gpt:175b").forward_flops(2048) / 2048 / 1e9, 1)  # about twice its parameters
        358.8
        """
        passed = self.layers * self.attention_elements + self.mlp_matrices * self.hidden * self.passed_widths
        return 2 * tokens * (passed + self.hidden * self.vocab) + self.attention_flops(tokens)

    def attention_flops(self, tokens: int) -> int:
        """Of that, attention's."""
        return self.layers * 4 * tokens**2 * self.query_width

    def least_forward_flops(self, tokens: int) -> int:
        """Of a forward that leaves out what causal attention masks: about half of it."""
        return self.forward_flops(tokens) - self.attention_flops(tokens) // 2


def _gpt(name: str, layers: int, hidden: int, heads: int) -> Transformer:
    """As Megatron trains it: learned positions, a vocabulary of a round number."""
    return Transformer(
        f"gpt:{name}",
        layers,
        hidden,
        heads,
        heads,
        4 * hidden,
        51_200,
        gated=False,
        tied=True,
        biased=True,
        positions=2_048,
        dropout=True,
    )


def _llama(name: str, layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int) -> Transformer:
    return Transformer(name, layers, hidden, heads, kv_heads, ffn, vocab)


def _mixtral(name: str, layers: int, hidden: int, heads: int, ffn: int, vocab: int) -> Transformer:
    dense = Transformer(name, layers, hidden, heads, 8, ffn, vocab)
    return replace(dense, experts=8, chosen=2, expert_ffn=ffn)


def _sparse(
    name: str, layers: int, hidden: int, heads: tuple[int, int, int], experts: tuple[int, int, int], vocab: int
) -> Transformer:
    """With experts in all layers.

    Arguments:
        heads: of queries, of keys and values, and their width.
        experts: how many, how many of them a token passes, and their width.
    """
    (queries, keys, width), (count, chosen, ffn) = heads, experts
    dense = Transformer(name, layers, hidden, queries, keys, chosen * ffn, vocab, head_width=width)
    return replace(dense, experts=count, chosen=chosen, expert_ffn=ffn)


NAMED: Mapping[str, Transformer] = {
    model.name: model
    for model in (
        # Narayanan et al., "Efficient large-scale language model training on GPU clusters", SC 2021, table 1
        _gpt("1.7b", 24, 2304, 24),
        _gpt("3.6b", 30, 3072, 32),
        _gpt("7.5b", 36, 4096, 32),
        _gpt("18b", 40, 6144, 48),
        _gpt("39b", 48, 8192, 64),
        _gpt("76b", 60, 10240, 80),
        _gpt("145b", 80, 12288, 96),
        _gpt("310b", 96, 16384, 128),
        # Korthikanti et al., "Reducing activation recomputation in large transformer models", 2022, table 3
        _gpt("22b", 48, 6144, 64),
        _gpt("175b", 96, 12288, 96),
        _gpt("530b", 105, 20480, 128),
        _gpt("1t", 128, 25600, 160),
        # Touvron et al., "Llama 2", 2023; Grattafiori et al., "The Llama 3 herd of models", 2024, table 3
        _llama("llama2:7b", 32, 4096, 32, 32, 11008, 32_000),
        _llama("llama2:13b", 40, 5120, 40, 40, 13824, 32_000),
        _llama("llama2:70b", 80, 8192, 64, 8, 28672, 32_000),
        _llama("llama3:8b", 32, 4096, 32, 8, 14336, 128_256),
        _llama("llama3:70b", 80, 8192, 64, 8, 28672, 128_256),
        _llama("llama3:405b", 126, 16384, 128, 8, 53248, 128_256),
        # Jiang et al., "Mixtral of experts", 2024, table 1, and the configuration of 8x22B
        _mixtral("mixtral:8x7b", 32, 4096, 32, 14336, 32_000),
        _mixtral("mixtral:8x22b", 56, 6144, 48, 16384, 32_768),
        # Yang et al., "Qwen3 technical report", 2025, table 2, and the configurations; OpenAI, gpt-oss model card, 2025
        _sparse("qwen3:30b-a3b", 48, 2048, (32, 4, 128), (128, 8, 768), 151_936),
        _sparse("qwen3:235b-a22b", 94, 4096, (64, 4, 128), (128, 8, 1536), 151_936),
        _sparse("gpt-oss:120b", 36, 2880, (64, 8, 64), (128, 4, 2880), 201_088),
    )
}
"""By name."""


def named(text: str) -> Transformer:
    """One of `NAMED`.

    Raises:
        ConfigurationError: where there is none.
    """
    if text not in NAMED:
        near = get_close_matches(text, NAMED, 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"no model is known as {text!r}{hint}; use one of {', '.join(NAMED)}")
    return NAMED[text]


def transformer(text: str) -> Transformer:
    """A model in words: a name of `NAMED`, its numbers, or a configuration file of Hugging Face Transformers.

    >>> transformer("layers=2,hidden=64,heads=4,vocab=100").ffn
    256

    Raises:
        ConfigurationError: for what is none of these, or contradicts itself.
    """
    path = Path(text)
    if text.lower().endswith(".json"):
        return _of_file(path)
    if "=" not in text and len(text) < 256 and (path / "config.json").is_file():
        return _of_file(path / "config.json")
    return _of_numbers(text) if "=" in text else named(text)


MOST_DIGITS = 12
"""Of a number that somebody may mean."""


def is_number(text: str) -> bool:
    """Whether a text is a whole number as people write them.

    >>> is_number("12"), is_number("-1"), is_number("\u00b2")
    (True, False, False)
    """
    return text.isascii() and text.isdigit() and len(text) <= MOST_DIGITS


_FLAGS = ("gated", "tied", "biased", "dropout")
_NEEDED = ("layers", "hidden", "heads", "vocab")


def _of_numbers(text: str) -> Transformer:
    known = [field.name for field in fields(Transformer) if field.name != "name"]
    given: dict[str, Any] = {}
    for part in text.split(","):
        key, _, value = part.strip().partition("=")
        if key in given:
            raise ConfigurationError(f"{key} is given twice in {text!r}; give it once")
        if key not in known:
            near = get_close_matches(key, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ConfigurationError(f"{key!r} is no number of a model{hint}; use {', '.join(known)}")
        if key in _FLAGS and value in ("true", "false"):
            given[key] = value == "true"
        elif key not in _FLAGS and is_number(value):
            given[key] = int(value)
        else:
            wanted = "true or false" if key in _FLAGS else "a whole number"
            raise ConfigurationError(f"{key} is {value!r}; give {wanted}")
    if missing := [key for key in _NEEDED if key not in given]:
        raise ConfigurationError(f"{text!r} lacks {', '.join(missing)}; give at least {', '.join(_NEEDED)}")
    made = Transformer(
        text, given["layers"], given["hidden"], given["heads"], given["heads"], 4 * given["hidden"], given["vocab"]
    )
    return _checked(replace(made, gated=False, **given) if "gated" not in given else replace(made, **given))


@dataclass(frozen=True, slots=True)
class _Kind:
    """What all models of a type have, where their files do not say it.

    Attributes:
        learned: positions are.
        further: rows of them that are for nothing else.
    """

    gated: bool = True
    tied: bool = False
    biased: bool = False
    learned: bool = False
    further: int = 0


_KINDS: Mapping[str, _Kind] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "phi3", "mixtral", "qwen2_moe", "qwen3_moe"), _Kind()),
    "gemma": _Kind(tied=True),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), _Kind(gated=False, tied=True, biased=True, learned=True)),
    "opt": _Kind(gated=False, tied=True, biased=True, learned=True, further=2),
    "gpt_neox": _Kind(gated=False, biased=True),
}
"""By model_type."""
_LATENT = "kv_lora_rank"  # keys and values through a narrow layer, whose widths are not described here


def _of_file(path: Path) -> Transformer:
    """Of a file as Transformers writes it, for decoders."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigurationError(f"cannot read the model's configuration in {path}: {error}") from error
    if not isinstance(found, dict):
        raise ConfigurationError(f"{path} holds no configuration of a model")
    kind = str(found.get("model_type"))
    if kind not in _KINDS:
        raise ConfigurationError(
            f"{path} is of model_type {kind!r}; decoders that are known: {', '.join(_KINDS)}; give numbers"
        )
    if found.get(_LATENT):
        raise ConfigurationError(f"{path} has {_LATENT} {found[_LATENT]}, and such attention is not counted yet")
    known = _KINDS[kind]

    def number(*names: str, default: int | None = None) -> int:
        value = next((found[name] for name in names if found.get(name) is not None), default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise ConfigurationError(f"{path} has no {names[0]} that is a whole number, which a decoder has")
        return value

    hidden, heads = number("hidden_size", "n_embd"), number("num_attention_heads", "n_head")
    shared = 1 if found.get("multi_query") else heads
    return _checked(
        Transformer(
            path.parent.name or path.stem,
            number("num_hidden_layers", "n_layer"),
            hidden,
            heads,
            number("num_key_value_heads", default=shared),
            number("intermediate_size", "n_inner", "ffn_dim", default=4 * hidden),
            number("vocab_size"),
            gated=known.gated,
            tied=bool(found.get("tie_word_embeddings", known.tied)),
            biased=known.biased,
            positions=number("n_positions", "max_position_embeddings") + known.further if known.learned else 0,
            head_width=number("head_dim", default=0),
            dropout=any(bool(found.get(key)) for key in ("resid_pdrop", "attn_pdrop", "hidden_dropout", "dropout")),
            experts=(experts := number("num_local_experts", "num_experts", default=0)),
            chosen=number("num_experts_per_tok", default=0) if experts else 0,
            expert_ffn=number("moe_intermediate_size", "intermediate_size", default=0) if experts else 0,
            shared_ffn=number("shared_expert_intermediate_size", default=0) if experts else 0,
        )
    )


def _checked(model: Transformer) -> Transformer:
    """A model whose numbers go together.

    Raises:
        ConfigurationError: where they do not.
    """
    least = min(model.layers, model.hidden, model.heads, model.kv_heads, model.ffn, model.vocab)
    if least < 1:
        raise ConfigurationError(
            f"{model.name} has a number below 1; layers, hidden, heads, ffn and vocab are at least 1"
        )
    if not model.head_width and model.hidden % model.heads:
        raise ConfigurationError(f"{model.heads} heads cannot share {model.hidden} evenly; give head_width, or others")
    if model.experts and not (1 <= model.chosen <= model.experts and model.expert_ffn):
        raise ConfigurationError(
            f"{model.name} has {model.experts} experts; give chosen, from 1 to {model.experts}, and expert_ffn"
        )
    if model.dense_layers > model.layers or (not model.experts and (model.chosen or model.shared_ffn)):
        raise ConfigurationError(f"{model.name}: chosen, shared_ffn and dense_layers are for layers with experts")
    if model.heads % model.kv_heads:
        raise ConfigurationError(f"{model.heads} heads cannot share {model.kv_heads} of keys and values evenly")
    return model
