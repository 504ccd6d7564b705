"""Handwritten digits: a small convolutional network with BatchNorm and dropout on scikit-learn's 8x8 images."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from unisono.errors import ConfigurationError
from unisono.tasks.task import no_split

VALIDATION_SHARE = 5


class Images:
    """The task ``images``.

    Arguments:
        width: channels of the first convolution.
        dropout: before the last layer.
        lr, momentum: of SGD, where the configuration names no optimizer.
    """

    def __init__(self, width: int = 16, dropout: float = 0.2, lr: float = 0.05, momentum: float = 0.9) -> None:
        self._width, self._dropout, self._lr, self._momentum = width, dropout, lr, momentum

    def model(self) -> nn.Module:
        """Two convolutions with BatchNorm, one linear layer."""
        w = self._width
        return nn.Sequential(
            nn.Conv2d(1, w, 3, padding=1),
            nn.BatchNorm2d(w),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(w, 2 * w, 3, padding=1),
            nn.BatchNorm2d(2 * w),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(self._dropout),
            nn.Linear(8 * w, 10),
        )

    def dataset(self, split: str) -> TensorDataset:
        """Every fifth image is held out."""
        if split not in ("train", "validation"):
            raise no_split(split)
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise ConfigurationError("task images needs scikit-learn: pip install 'unisono[examples]'") from error
        digits = load_digits()
        images = torch.from_numpy(digits.images).float().unsqueeze(1) / 16
        labels = torch.from_numpy(digits.target).long()
        held_out = torch.arange(len(labels)) % VALIDATION_SHARE == 0
        chosen = held_out if split == "validation" else ~held_out
        return TensorDataset(images[chosen], labels[chosen])

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy."""
        return F.cross_entropy(output, target)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(parameters, lr=self._lr, momentum=self._momentum)

    def metrics(self, output: Tensor, target: Tensor) -> Mapping[str, float]:
        """The share of images that are recognised."""
        return {"accuracy": float((output.argmax(-1) == target).float().mean())}
