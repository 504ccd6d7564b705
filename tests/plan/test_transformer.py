"""Transformers by their numbers, beside published checkpoints, what torch counts, and Megatron's formulas."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from unisono.errors import ConfigurationError
from unisono.plan.transformer import NAMED, Transformer, transformer
from unisono.tasks.lm import GPT

PUBLISHED = {
    "llama2:7b": 6_738_415_616,
    "llama2:13b": 13_015_864_320,
    "llama2:70b": 68_976_648_192,
    "llama3:8b": 8_030_261_248,
    "llama3:70b": 70_553_706_496,
    "llama3:405b": 405_853_388_800,
    "mixtral:8x7b": 46_702_792_704,
    "mixtral:8x22b": 140_630_071_296,
}
"""Elements of the checkpoints, as their model cards and safetensors indices say."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_named_model_has_the_parameters_of_its_checkpoint(name: str) -> None:
    assert NAMED[name].parameters == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("gpt:1.7b", 1.7), ("gpt:18b", 18.4), ("gpt:76b", 76.1), ("gpt:530b", 529.6), ("gpt:1t", 1008.0)],
)
def test_a_named_gpt_is_as_large_as_its_paper_says(name: str, billions: float) -> None:
    """Narayanan et al., 2021, table 1."""
    assert NAMED[name].parameters / 1e9 == pytest.approx(
        billions, rel=0.03 if billions < 2 else 3e-3
    )  # as it prints them


def test_models_with_experts_are_as_large_as_their_checkpoints_but_for_norms_of_heads() -> None:
    """Qwen3 has two vectors of a head's width in each layer, which are not counted."""
    for name, published in (("qwen3:30b-a3b", 30_532_122_624), ("qwen3:235b-a22b", 235_093_634_560)):
        model = NAMED[name]
        assert model.parameters + 2 * model.head_width * model.layers == published


@given(st.integers(1, 128), st.integers(1, 64), st.integers(1, 16), st.integers(1, 100), st.integers(1, 2048))
def test_operations_are_those_of_megatrons_formula(
    layers: int, width: int, sequences: int, vocab: int, tokens: int
) -> None:
    """96 B s l h^2 (1 + s / 6h + V / 16lh) where layers are computed again, of matrices of 12 h^2 a layer."""
    hidden = 4 * width
    model = Transformer("gpt", layers, hidden, 4, 4, 4 * hidden, vocab, gated=False)
    again = 96.0 * sequences * tokens * layers * hidden**2
    again *= 1 + tokens / (6 * hidden) + vocab / (16 * layers * hidden)
    forward, output = model.forward_flops(tokens), 2 * tokens * hidden * vocab
    assert sequences * (4 * forward - output) == pytest.approx(again, rel=1e-12)
    once = 72.0 * sequences * tokens * layers * hidden**2
    once *= 1 + tokens / (6 * hidden) + vocab / (12 * layers * hidden)
    assert sequences * 3 * forward == pytest.approx(once, rel=1e-12)


def test_a_model_has_the_parameters_and_operations_that_torch_counts() -> None:
    """The task's GPT: without biases in its matrices."""
    subject = GPT(layers=3, width=64, heads=4, context=32, dropout=0.0, tied=False)
    described = Transformer("gpt", 3, 64, 4, 4, 256, 256, gated=False)
    matrices = sum(p.numel() for name, p in subject.named_parameters() if p.dim() == 2 and "embed" not in name.lower())
    assert described.layers * (described.attention_elements + 2 * 64 * 256) <= matrices
    plain = nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH)
    with FlopCounterMode(display=False) as counter, torch.no_grad(), plain:
        subject(torch.zeros(1, 32, dtype=torch.long))
    assert counter.get_total_flops() == described.forward_flops(32)


def test_numbers_make_a_model() -> None:
    model = transformer("layers=2, hidden=64,heads=4,kv_heads=2,ffn=100,vocab=50,gated=true,tied=true,head_width=32")
    assert (model.query_width, model.kv_width, model.gated, model.tied) == (128, 64, True, True)
    assert model.attention_elements == 64 * (2 * 128 + 2 * 64) and model.passed_widths == 2 * 100
    assert not transformer("layers=2,hidden=64,heads=4,vocab=50").gated


def test_a_configuration_of_transformers_makes_a_model(tmp_path: Path) -> None:
    directory = tmp_path / "Llama-3.1-8B"
    directory.mkdir()
    llama = {
        "hidden_size": 4096,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14336,
        "vocab_size": 128256,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "model_type": "llama",
    }
    (directory / "config.json").write_text(json.dumps(llama))
    found = transformer(str(directory / "config.json"))
    assert found.parameters == PUBLISHED["llama3:8b"] and found.name == "Llama-3.1-8B"
    assert transformer(str(directory)).parameters == PUBLISHED["llama3:8b"]
    gemma = {
        **llama,
        "model_type": "gemma",
        "hidden_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "intermediate_size": 16384,
        "vocab_size": 256000,
        "hidden_act": "gelu_pytorch_tanh",
    }
    del gemma["tie_word_embeddings"]
    (directory / "config.json").write_text(json.dumps(gemma))
    assert transformer(str(directory / "config.json")).parameters == 2_506_172_416  # as its model card says
    gpt2 = {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257, "n_positions": 1024}
    (directory / "config.json").write_text(json.dumps(gpt2))
    assert transformer(str(directory / "config.json")).parameters == 124_439_808  # as its model card says


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("llama3:7b", r"no model is known as 'llama3:7b'; did you mean llama3:70b\?"),
        ("layers=2,hiden=64", r"'hiden' is no number of a model; did you mean hidden\?"),
        ("layers=2,hidden=64", "lacks heads, vocab; give at least layers, hidden, heads, vocab"),
        ("layers=two,hidden=64,heads=4,vocab=9", "layers is 'two'; give a whole number"),
        ("layers=2,hidden=64,heads=4,vocab=9,tied=1", "tied is '1'; give true or false"),
        ("layers=0,hidden=64,heads=4,vocab=9", "has a number below 1"),
        ("layers=2,hidden=64,heads=5,vocab=9", "5 heads cannot share 64 evenly"),
        ("layers=2,hidden=64,heads=4,kv_heads=3,vocab=9", "4 heads cannot share 3 of keys and values evenly"),
        ("layers=2,layers=3,hidden=64,heads=4,vocab=9", "layers is given twice"),
        ("layers=\u00b2,hidden=64,heads=4,vocab=9", "give a whole number"),
        (f"layers={'9' * 400},hidden=64,heads=4,vocab=9", "give a whole number"),
        ("nowhere.json", "cannot read the model's configuration in nowhere.json"),
    ],
)
def test_what_is_no_model_is_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        transformer(text)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("[]", "holds no configuration"),
        ("{}", "is of model_type 'None'; decoders that are known: llama, "),
        ('{"model_type": "bert"}', "is of model_type 'bert'"),
        ('{"model_type": "llama"}', "has no hidden_size that is a whole number"),
        ('{"model_type": "llama", "hidden_size": true}', "has no hidden_size that is a whole number"),
        ('{"model_type": "llama", "kv_lora_rank": 512}', "has kv_lora_rank 512, and such attention is not counted"),
        ("{", "cannot"),
        ("[" * 100_000, "cannot"),
    ],
    ids=range(8),
)
def test_a_file_that_holds_no_model_is_refused(content: str, said: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigurationError, match=said):
        transformer(str(tmp_path / "config.json"))
