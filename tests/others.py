"""Models that nobody here wrote, tiny and with random values; a plain loop that trains them; ours, in any layout."""

import contextlib
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unisono import Trainer
from unisono.events import Event, StepFinished
from unisono.run.rng import Isolation, derive
from unisono.run.sampling import Sampler

for operation in ("nms", "qnms"):  # a torchvision whose extension does not fit this torch cannot even be imported
    with contextlib.suppress(RuntimeError):
        torch.library.define(f"torchvision::{operation}", "(Tensor a, Tensor b, float c) -> Tensor")
warnings.filterwarnings("ignore")

import timm as _timm  # noqa: E402
import transformers as _transformers  # noqa: E402

timm: Any = _timm
importlib.import_module("timm.optim")
transformers: Any = _transformers  # typed more narrowly than it is used everywhere
transformers.logging.set_verbosity_error()

SAMPLES, TIME, WORDS, CLASSES, MICRO_BATCH, COUNT, STEPS = 40, 10, 64, 5, 2, 4, 10


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_layer=4, n_embd=32, n_head=2, n_positions=TIME, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
        bos_token_id=0, eos_token_id=0, vocab_size=WORDS, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.GPT2LMHeadModel(config)
    return model


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        num_hidden_layers=4,
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        use_cache=False,
    )
    model: nn.Module = transformers.LlamaForCausalLM(config)
    return model


def bert() -> nn.Module:
    config = transformers.BertConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, vocab_size=WORDS,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.BertForMaskedLM(config)
    return model


def t5() -> nn.Module:
    config = transformers.T5Config(
        num_layers=3, d_model=32, d_ff=64, num_heads=4, d_kv=8, dropout_rate=0.0, decoder_start_token_id=0,
        pad_token_id=0, vocab_size=WORDS, use_cache=False,
    )  # fmt: skip
    model: nn.Module = transformers.T5ForConditionalGeneration(config)
    return model


def vit() -> nn.Module:
    config = transformers.ViTConfig(
        num_hidden_layers=4, hidden_size=32, intermediate_size=64, num_attention_heads=4, image_size=16, patch_size=4,
        num_labels=CLASSES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    model: nn.Module = transformers.ViTForImageClassification(config)
    return model


def resnet() -> nn.Module:
    """In double precision: a rounding that turns a ReLU behind a batch norm on or off shows in the fifth digit."""
    made: nn.Module = timm.create_model("resnet10t", num_classes=CLASSES)
    return made.double()


def convnext() -> nn.Module:
    made: nn.Module = timm.create_model("convnext_atto", num_classes=CLASSES, depths=(1, 1, 2, 1), dims=(8, 8, 16, 16))
    return made


MODELS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "bert": bert,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
    "convnext": convnext,
}


class Samples:
    """What a model takes: a mapping with labels, or an image and its class."""

    def __init__(self, model: str) -> None:
        generator = torch.Generator().manual_seed(3)
        self._words = torch.randint(1, WORDS, (SAMPLES, TIME), generator=generator)
        extent = {"vit": 16, "resnet": 64}.get(model, 32)
        dtype = torch.float64 if model == "resnet" else torch.float32
        self._images = torch.randn(SAMPLES, 3, extent, extent, generator=generator, dtype=dtype)
        self._classes = torch.randint(0, CLASSES, (SAMPLES,), generator=generator)
        self._model = model

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, i: int) -> Any:
        if self._model == "vit":
            return {"pixel_values": self._images[i], "labels": self._classes[i]}
        if self._model in ("resnet", "convnext"):
            return self._images[i], self._classes[i]
        mask = {"attention_mask": torch.ones(TIME, dtype=torch.long)} if self._model == "bert" else {}
        return {"input_ids": self._words[i], "labels": self._words[i], **mask}


def loss_of(model: str) -> Callable[[Any, Any], Tensor]:
    """The model's own loss, where it computes one."""
    if model in ("resnet", "convnext"):
        return nn.functional.cross_entropy
    return lambda output, item: output.loss


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
}


def train(model: str, optimizer: str, layout: dict[str, Any], init: str = "stream") -> dict[str, Any]:
    """Train with Unisono, in a worker."""
    losses: list[float] = []

    def note(event: Event) -> None:
        if isinstance(event, StepFinished):
            losses.append(event.loss)

    trainer = Trainer(
        model=MODELS[model],
        loss=loss_of(model),
        data=Samples(model),
        optimizer=OPTIMIZERS[optimizer],
        callbacks=[note],
        global_batch_size=MICRO_BATCH * COUNT,
        micro_batch_size=MICRO_BATCH,
        layout=layout,  # type: ignore[arg-type]
        init=init,
        observe={"progress": False},
        deadline_s=60.0,
    )
    return {"digest": trainer.fit(STEPS).digest, "losses": losses}


def plain_loop(name: str, optimizer_name: str) -> list[float]:
    """The same run in plain PyTorch: one process, accumulation."""
    with Isolation() as isolation:
        isolation.seed(derive(0, "init"))
        model = MODELS[name]()
    model.train()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    data, loss_function = Samples(name), loss_of(name)
    sampler = Sampler(SAMPLES, 0, MICRO_BATCH * COUNT, MICRO_BATCH)
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        total = 0.0
        for m in range(COUNT):
            batch = torch.utils.data.default_collate([data[i] for i in sampler.indices(step, m).tolist()])
            if isinstance(batch, dict):
                loss = loss_function(model(**batch), batch) / COUNT
            else:
                loss = loss_function(model(batch[0]), batch[1]) / COUNT
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        optimizer.step()
        losses.append(total)
    return losses
