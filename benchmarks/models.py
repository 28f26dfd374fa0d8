"""The models that are measured, in torch; `flax_models` has the same ones in Flax."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

BERT_VOCABULARY = 30522
Maker = Callable[[], nn.Module]


@dataclass(frozen=True)
class Workload:
    """A model and an input for it."""

    name: str
    make: Maker
    """Builds the torch module, with the random weights of seed 0."""
    make_input: Callable[[], torch.Tensor]
    flax: str
    """The name of the function in `flax_models` that builds its twin."""

    def model(self, device: str) -> nn.Module:
        """The module in eval mode."""
        torch.manual_seed(0)
        return self.make().eval().to(device)

    def input(self, device: str) -> torch.Tensor:
        """The input, always the same."""
        torch.manual_seed(1)
        return self.make_input().to(device)


def mlp() -> nn.Module:
    """64-64-10."""
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def transformer_encoder() -> nn.Module:
    """Four layers of width 256."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def small_conv_net() -> nn.Module:
    """Two convolutions and a linear layer, for images of 16 x 16."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2),
        nn.ReLU(),
        nn.Flatten(-3),
        nn.Linear(32 * 36, 10),
    )


class LSTM(nn.Module):
    """Two layers of 128, as a function with one output."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(128, 128, num_layers=2, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The outputs of the upper layer."""
        return self.lstm(x)[0]


class Bert(nn.Module):
    """BERT-base from its configuration, without the pooling layer."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        self.bert = BertModel(BertConfig(), add_pooling_layer=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """The last hidden state."""
        return self.bert(ids).last_hidden_state


class Block(nn.Module):
    """The basic block of a ResNet."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Identity()
        if stride != 1 or width_in != width:
            self.shortcut = nn.Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Two convolutions and the shortcut around them."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


def resnet18() -> nn.Module:
    """ResNet-18 for 1000 classes."""
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    widths = (64, 64, 128, 256, 512)
    blocks = []
    for stage, (width_in, width) in enumerate(itertools.pairwise(widths)):
        blocks += [Block(width_in, width, 1 if stage == 0 else 2), Block(width, width, 1)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000))


MLP = Workload("MLP 64-64-10, batch 32", mlp, lambda: torch.randn(32, 64), "mlp")
ENCODER = Workload(
    "transformer encoder, 8×64 tokens", transformer_encoder, lambda: torch.randn(8, 64, 256), "transformer_encoder"
)
RESNET_4 = Workload("ResNet-18, 4×3×128×128", resnet18, lambda: torch.randn(4, 3, 128, 128), "resnet18")
RESNET_32 = Workload("ResNet-18, 32×3×64×64", resnet18, lambda: torch.randn(32, 3, 64, 64), "resnet18")
LSTM_2 = Workload("LSTM, 2×128, 8×64 steps", LSTM, lambda: torch.randn(8, 64, 128), "lstm")
BERT = Workload("BERT-base, 4×64 tokens", Bert, lambda: torch.randint(0, BERT_VOCABULARY, (4, 64)), "bert")
CONV_NET = Workload(
    "small conv net, 64 images of 3×16×16", small_conv_net, lambda: torch.randn(64, 3, 16, 16), "small_conv_net"
)
MLP_64 = Workload("MLP 64-64-10, 64 rows", mlp, lambda: torch.randn(64, 64), "mlp")

MODELS = (MLP, ENCODER, RESNET_4, RESNET_32, LSTM_2, BERT)
"""Those whose forward pass and gradient are measured."""
