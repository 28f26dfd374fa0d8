"""The models of `models` in Flax Linen, as one would write them there: images have their channels last."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.models import BERT_VOCABULARY

Array = jax.Array


class MLP(nn.Module):
    """64-64-10."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        return nn.Dense(10)(nn.relu(nn.Dense(64)(x)))


class SmallConvNet(nn.Module):
    """Two convolutions and a linear layer."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x))
        x = nn.relu(nn.Conv(32, (3, 3), strides=2, padding="VALID")(x))
        return nn.Dense(10)(x.reshape(*x.shape[:-3], -1))


class EncoderLayer(nn.Module):
    """Attention and a feed-forward network, each followed by a normalisation."""

    width: int
    heads: int
    hidden: int
    activation: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.LayerNorm()(x + nn.MultiHeadDotProductAttention(self.heads)(x))
        y = nn.Dense(self.width)(self.activation(nn.Dense(self.hidden)(x)))
        return nn.LayerNorm()(x + y)


class TransformerEncoder(nn.Module):
    """Four layers of width 256."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(4):
            x = EncoderLayer(256, 4, 1024, nn.relu)(x)
        return x


class Bert(nn.Module):
    """BERT-base without the pooling layer."""

    @nn.compact
    def __call__(self, ids: Array) -> Array:
        x = nn.Embed(BERT_VOCABULARY, 768)(ids)
        x += nn.Embed(2, 768)(jnp.zeros_like(ids)) + nn.Embed(512, 768)(jnp.arange(ids.shape[-1]))
        x = nn.LayerNorm()(x)
        for _ in range(12):
            x = EncoderLayer(768, 12, 3072, partial(nn.gelu, approximate=False))(x)
        return x


class LSTM(nn.Module):
    """Two layers of 128."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        for _ in range(2):
            x = nn.RNN(nn.OptimizedLSTMCell(128))(x)
        return x


class Block(nn.Module):
    """The basic block of a ResNet."""

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: Array) -> Array:
        norm = partial(nn.BatchNorm, use_running_average=True)
        conv = partial(nn.Conv, self.width, use_bias=False)
        y = nn.relu(norm()(conv((3, 3), strides=self.stride, padding=1)(x)))
        y = norm()(conv((3, 3), padding=1)(y))
        if x.shape != y.shape:
            x = norm()(conv((1, 1), strides=self.stride)(x))
        return nn.relu(x + y)


class ResNet18(nn.Module):
    """ResNet-18 for 1000 classes."""

    @nn.compact
    def __call__(self, x: Array) -> Array:
        x = nn.Conv(64, (7, 7), strides=2, padding=3, use_bias=False)(x)
        x = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage, width in enumerate((64, 128, 256, 512)):
            x = Block(width, 1 if stage == 0 else 2)(x)
            x = Block(width, 1)(x)
        return nn.Dense(1000)(x.mean(axis=(-3, -2)))


class RNNCell(nn.Module):
    """A step of an Elman network."""

    width: int

    @nn.compact
    def __call__(self, x: Array, h: Array) -> Array:
        return nn.tanh(nn.Dense(self.width)(x) + nn.Dense(self.width)(h))


TWINS: dict[str, type[nn.Module]] = {
    "mlp": MLP,
    "small_conv_net": SmallConvNet,
    "transformer_encoder": TransformerEncoder,
    "bert": Bert,
    "lstm": LSTM,
    "resnet18": ResNet18,
}
"""By the names under which `models` knows them."""
