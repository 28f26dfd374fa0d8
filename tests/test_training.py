"""A real training run, once in torch and once in each module system: digits, with batch normalisation and dropout."""

from __future__ import annotations

import copy

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import torch.nn.functional as F
from flax import nnx
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from pytorch2jax import (
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_nnx,
    load_params,
)

pytestmark = pytest.mark.usefixtures("x32")
EPOCHS, BATCH, RATE = 3, 64, 2e-3


def network(dropout):
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Conv2d(1, 16, 3, padding=1, bias=False),  # its gradient would be zero but for rounding
        torch.nn.BatchNorm2d(16),
        torch.nn.ReLU(),
        torch.nn.MaxPool2d(2),
        torch.nn.Dropout(dropout),
        torch.nn.Flatten(),
        torch.nn.Linear(256, 10),
    )


@pytest.fixture(scope="module")
def digits():
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    return train_test_split(images, labels.astype(np.int32), test_size=360, random_state=0, stratify=labels)


def batches(images, labels):
    order = np.random.default_rng(0)
    for _ in range(EPOCHS):
        index = order.permutation(len(images))
        for start in range(0, len(images) - BATCH + 1, BATCH):
            chosen = index[start : start + BATCH]
            yield images[chosen], labels[chosen]


def loss_of(logits, labels):
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def train_torch(model, images, labels):
    optimizer = torch.optim.Adam(model.parameters(), RATE)
    torch.manual_seed(1)
    for x, y in batches(images, labels):
        optimizer.zero_grad()
        F.cross_entropy(model.train()(torch.from_numpy(x)), torch.from_numpy(y).long()).backward()
        optimizer.step()
    return model


def train_linen(model, images, labels):
    module_class, _ = convert_pytnn_to_flax(model)

    class Wrapper(linen.Module):
        @linen.compact
        def __call__(self, x, train=False):
            return module_class(name="net")(x, train=train)

    wrapper, tx = Wrapper(), optax.adam(RATE)
    variables = wrapper.init(jax.random.key(0), images[:2])
    params, statistics = variables["params"], variables["batch_stats"]
    opt_state = tx.init(params)

    @jax.jit
    def step(params, statistics, opt_state, x, y, key):
        def loss(params):
            out, update = wrapper.apply(
                {"params": params, "batch_stats": statistics},
                x,
                train=True,
                mutable=["batch_stats"],
                rngs={"dropout": key},
            )
            return loss_of(out, y), update["batch_stats"]

        gradient, statistics = jax.grad(loss, has_aux=True)(params)
        updates, opt_state = tx.update(gradient, opt_state)
        return optax.apply_updates(params, updates), statistics, opt_state

    for i, (x, y) in enumerate(batches(images, labels)):
        params, statistics, opt_state = step(params, statistics, opt_state, x, y, jax.random.key(i))
    return params["net"], statistics["net"]


def train_nnx(model, images, labels):
    module = convert_pytnn_to_nnx(model, rngs=nnx.Rngs(dropout=0))
    module.train()
    optimizer = nnx.Optimizer(module, optax.adam(RATE), wrt=nnx.Param)

    @nnx.jit
    def step(module, optimizer, x, y):
        optimizer.update(module, nnx.grad(lambda m: loss_of(m(x), y))(module))

    for x, y in batches(images, labels):
        step(module, optimizer, x, y)
    state = nnx.to_pure_dict(nnx.state(module))
    return state["params"], state["batch_stats"]


def train_equinox(model, images, labels):
    module, state = convert_pytnn_to_equinox(model, with_state=True)
    module = eqx.nn.inference_mode(module, value=False)
    tx = optax.adam(RATE)
    opt_state = tx.init(eqx.filter(module, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(module, state, opt_state, x, y, key):
        def loss(module):
            out, new_state = module(x, state, key=key)
            return loss_of(out, y), new_state

        gradient, state_ = eqx.filter_grad(loss, has_aux=True)(module)
        updates, opt_state = tx.update(gradient, opt_state)
        return eqx.apply_updates(module, updates), state_, opt_state

    for i, (x, y) in enumerate(batches(images, labels)):
        module, state, opt_state = step(module, state, opt_state, jnp.asarray(x), jnp.asarray(y), jax.random.key(i))
    return module.params, state.get(module.state_index)


SYSTEMS = [train_linen, train_nnx, train_equinox]


def accuracy(model, images, labels):
    with torch.no_grad():
        return float((model.eval()(torch.from_numpy(images)).argmax(1) == torch.from_numpy(labels)).float().mean())


@pytest.fixture(scope="module")
def reference(digits):
    train_x, test_x, train_y, test_y = digits
    return accuracy(train_torch(network(0.3), train_x, train_y), test_x, test_y)


@pytest.mark.parametrize("train", SYSTEMS)
def test_the_same_accuracy_as_in_torch(train, digits, reference):
    train_x, test_x, train_y, test_y = digits
    model = network(0.3)
    params, statistics = train(copy.deepcopy(model), train_x, train_y)
    ours = accuracy(load_params(model, params, statistics), test_x, test_y)
    assert reference > 0.9
    assert abs(ours - reference) < 0.03  # two standard errors of the difference, on 360 images


@pytest.mark.parametrize("train", SYSTEMS)
def test_without_masks_every_weight_and_statistic_is_torchs(train, digits):
    train_x, _, train_y, _ = digits
    model = network(0.0)
    params, statistics = train(copy.deepcopy(model), train_x[: 8 * BATCH], train_y[: 8 * BATCH])
    expected = train_torch(copy.deepcopy(model), train_x[: 8 * BATCH], train_y[: 8 * BATCH])
    ours = load_params(model, params, statistics).state_dict()
    assert ours["1.num_batches_tracked"] == expected.state_dict()["1.num_batches_tracked"] == 8 * EPOCHS
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-3, atol=2e-4)
