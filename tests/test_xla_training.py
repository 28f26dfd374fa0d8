"""Training through both engines; several devices without a word from the user."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import DEVICES
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from torch import nn

from pytorch2jax import ReplicationWarning, convert_pytnn_to_jax, torch2jax


def gpt2():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=64, n_positions=32, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore")
def test_a_gpt2_learns_the_same_through_both_engines(x32):
    tokens = np.random.default_rng(0).integers(0, 64, (8, 17))
    tokens[:, 1::2] = (tokens[:, 0::2][:, :8] * 3 + 1) % 64  # something to learn
    ids = jnp.asarray(tokens)

    def curve(backend):
        apply, params = convert_pytnn_to_jax(gpt2(), backend=backend)
        optimizer = optax.adamw(3e-3)

        def loss(params):
            logits = apply(params, input_ids=ids[:, :-1], use_cache=False, train=True)["logits"]
            return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()

        @jax.jit
        def step(params, state):
            value, gradients = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(gradients, state, params)
            return optax.apply_updates(params, updates), state, value

        state, values = optimizer.init(params), []
        for _ in range(100):
            params, state, value = step(params, state)
            values.append(float(value))
        return values

    ours, bridge = curve("xla"), curve("torch")
    assert bridge[-1] < 0.7 * bridge[0]
    np.testing.assert_allclose(ours, bridge, rtol=2e-2)
    np.testing.assert_allclose(ours[:20], bridge[:20], rtol=1e-4)


def mesh():
    return Mesh(np.array(DEVICES), ("i",))


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 3)).double()


def test_xla_shards_a_batch_by_itself():
    apply, params = convert_pytnn_to_jax(model(), backend="xla")
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 5, 8)))

    def loss(params, x):
        return (apply(params, x) ** 2).mean()

    expected = jax.value_and_grad(loss)(params, x)
    sharded = jax.device_put(x, NamedSharding(mesh(), P("i")))
    held = jax.device_put(params, NamedSharding(mesh(), P()))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplicationWarning)
        step = jax.jit(jax.value_and_grad(loss))
        got = step(held, sharded)
        text = step.lower(held, sharded).compile().as_text()
        out = jax.jit(apply)(held, sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), got, expected)
    assert out.sharding.spec[0] == "i"
    assert "all-reduce" in text
    assert "all-gather" not in text


def test_inside_of_shard_map_with_types_that_vary():
    f = torch2jax(lambda x, w: torch.tanh(x @ w), backend="xla")
    x, w = jnp.arange(32.0).reshape(16, 2) / 9, jnp.arange(6.0).reshape(2, 3) / 5

    def total(x, w):
        return jax.lax.psum(f(x, w).sum(), "i")

    mapped = jax.shard_map(total, mesh=mesh(), in_specs=(P("i"), P()), out_specs=P())
    gradient = jax.jit(jax.grad(mapped, (0, 1)))(x, w)
    expected = jax.grad(lambda x, w: jnp.tanh(x @ w).sum(), (0, 1))(x, w)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), gradient, expected)


def test_tensor_parallel_weights_without_a_rule():
    apply, params = convert_pytnn_to_jax(
        nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).double(), backend="xla"
    )
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8)))
    expected = apply(params, x)
    split = {
        "0": {"weight": P("i", None), "bias": P("i")},
        "2": {"weight": P(None, "i"), "bias": P()},
    }
    held = jax.tree.map(lambda a, s: jax.device_put(a, NamedSharding(mesh(), s)), params, split)
    np.testing.assert_allclose(jax.jit(apply)(held, x), expected, rtol=1e-9)
