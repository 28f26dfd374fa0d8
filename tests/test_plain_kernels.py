"""Kernels that have derivatives of every order in the place of fused ones: the same values, and nobody else sees it."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence
from torch.utils import _pytree as torch_pytree

from pytorch2jax import convert_pytnn_to_jax, torch2jax
from pytorch2jax._plain_kernels import PlainKernels


def tensors_of(out):
    return [t for t in torch_pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("kind", "proj_size"), [("LSTM", 0), ("LSTM", 3), ("GRU", 0), ("RNN", 0)])
@pytest.mark.parametrize("packed", [False, True])
def test_recurrent_layers(kind, proj_size, packed):
    options = {"proj_size": proj_size} if proj_size else {}
    for bidirectional, batch_first, bias in itertools.product([False, True], repeat=3):
        torch.manual_seed(0)
        shared = {"bidirectional": bidirectional, "batch_first": batch_first, "bias": bias, **options}
        layer = getattr(nn, kind)(4, 5, num_layers=2, dropout=0.5, **shared).double()
        x = torch.randn((3, 6, 4) if batch_first else (6, 3, 4), dtype=torch.float64)
        given = pack_padded_sequence(x, [6, 4, 1], batch_first=batch_first) if packed else x
        torch.manual_seed(1)
        expected, state = layer(given)
        torch.manual_seed(1)
        with PlainKernels():
            found, last = layer(given)
        for a, b in zip(tensors_of((tuple(found), last)), tensors_of((tuple(expected), state)), strict=True):
            torch.testing.assert_close(a, b)


MASKS = {
    "none": None,
    "bool": torch.tensor([[True, False], [True, True], [False, True]]),
    "float": torch.tensor([[0.5, -1.0], [0.0, 2.0], [-torch.inf, 1.0]]),
    "nothing": torch.zeros(3, 2, dtype=torch.bool),
}


@pytest.mark.parametrize("mask", list(MASKS))
@pytest.mark.parametrize("heads", [4, 2])
def test_attention(mask, heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 4, 3, 8), torch.randn(2, heads, 2, 8), torch.randn(2, heads, 2, 8)

    def fn():
        options = {"enable_gqa": heads != 4, "scale": 0.3}
        masked = F.scaled_dot_product_attention(q, k, v, MASKS[mask], **options)
        causal = F.scaled_dot_product_attention(q, k, v, is_causal=True, **options)
        return torch.stack([masked, causal])

    with PlainKernels():
        plain = fn()
    torch.testing.assert_close(plain, fn())


def flags():
    return (
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cuda.mem_efficient_sdp_enabled(),
        torch.backends.cuda.math_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.mkldnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


class Seeing(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, dropout=0.0)
        self.lstm = nn.LSTM(8, 4, batch_first=True)

    def forward(self, x):
        SEEN.append(flags())
        return self.lstm(self.encoder(x))[0]


SEEN: list[tuple[bool, ...]] = []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_torchs_switches_are_left_alone(backend):
    """They hold for the whole process: while a model is converted or differentiated, others compute as ever."""
    model, before = Seeing().eval(), flags()
    SEEN.clear()
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    x = jnp.ones((1, 3, 8), jnp.float32)

    def loss(x):
        return (apply(params, x) ** 2).sum()

    jax.jit(apply)(params, x)
    jax.grad(loss)(x)
    jax.jvp(jax.grad(loss), (x,), (x,))
    jax.vmap(jax.grad(loss))(x[None])
    assert SEEN
    assert set(SEEN) == {before}


def test_second_derivatives_of_fused_kernels():
    torch.manual_seed(0)
    lstm = nn.LSTM(2, 3, batch_first=True)  # in single precision, for which oneDNN has a kernel

    def plain(x):
        return lstm.double()(x)[0].sin().sum()

    x = torch.randn(1, 4, 2)
    expected = torch.autograd.functional.hessian(plain, x.double())
    lstm.float()
    f = torch2jax(lambda x: lstm(x)[0].sin().sum())
    found = jax.hessian(f)(jnp.asarray(x.numpy()))
    torch.testing.assert_close(torch.from_numpy(jax.device_get(found).copy()), expected.float(), rtol=1e-3, atol=1e-5)
