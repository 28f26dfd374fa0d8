"""`convert_pytnn_to_equinox`: torch modules as Equinox modules."""

from __future__ import annotations

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from pytorch2jax import RandomnessError, StateError, convert_pytnn_to_equinox, load_params

X = jnp.cos(jnp.arange(15.0, dtype=jnp.float32)).reshape(5, 3)
KEY = jax.random.key(0)
pytestmark = pytest.mark.usefixtures("x32")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))


def test_array_leaves_are_the_parameters(model):
    module = convert_pytnn_to_equinox(model)
    arrays, static = eqx.partition(module, eqx.is_array)
    assert len(jax.tree.leaves(arrays)) == len(list(model.parameters()))
    expected = model.eval()(torch.from_numpy(np.array(X))).detach()
    np.testing.assert_allclose(eqx.combine(arrays, static)(X), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(eqx.filter_jit(module)(X), module(X))


def test_filter_grad_and_tree_at(model):
    module = convert_pytnn_to_equinox(model)
    gradient = eqx.filter_jit(eqx.filter_grad(lambda m: (m(X) ** 2).sum()))(module)
    live = model.eval()(torch.from_numpy(np.array(X)))
    (live**2).sum().backward()
    np.testing.assert_allclose(gradient.params["0"]["weight"], model[0].weight.grad, rtol=1e-4, atol=1e-5)
    changed = eqx.tree_at(lambda m: m.params["1"]["bias"], module, jnp.full(4, 7.0))
    np.testing.assert_allclose(changed(X) - module(X), 7.0, rtol=1e-5)


def test_filter_vmap(model):
    module = convert_pytnn_to_equinox(model)
    np.testing.assert_allclose(eqx.filter_vmap(module)(jnp.stack([X, 2 * X]))[1], module(2 * X), rtol=1e-5, atol=1e-6)
    params = jax.tree.map(lambda p: jnp.stack([p, 2 * p]), module.params)
    ensemble = eqx.tree_at(lambda m: m.params, module, params)
    out = eqx.filter_vmap(lambda m, x: m(x), in_axes=(eqx.if_array(0), None))(ensemble, X)
    np.testing.assert_allclose(out[0], module(X), rtol=1e-5, atol=1e-6)


def test_inference_mode_state_and_keys(model):
    module, state = convert_pytnn_to_equinox(model, with_state=True)
    out, same = module(X, state)
    assert same is state
    np.testing.assert_array_equal(module(X, state=state)[0], out)
    training = eqx.nn.inference_mode(module, value=False)
    with pytest.raises(RandomnessError, match="key=jax.random.key"):
        training(X, state)
    noisy, new = eqx.filter_jit(training)(X, state, key=KEY)
    assert (np.asarray(noisy) == 0).any()
    assert new.get(training.state_index)["1"]["num_batches_tracked"] == 1
    assert state.get(training.state_index)["1"]["num_batches_tracked"] == 0
    np.testing.assert_array_equal(module(X, state, key=KEY, inference=False)[0], noisy)


def test_state_that_is_missing(model):
    module, _ = convert_pytnn_to_equinox(model, with_state=True)
    with pytest.raises(StateError, match=r"state: expected the eqx.nn.State .* got NoneType"):
        module(X)
    without = convert_pytnn_to_equinox(model)
    with pytest.raises(StateError, match="with_state=True"):
        without(X, key=KEY, inference=False)


def test_as_a_field_of_another_module_it_trains(model):
    class Classifier(eqx.Module):
        encoder: eqx.Module
        head: eqx.nn.Linear

        def __call__(self, x):
            return jax.vmap(self.head)(self.encoder(x))

    classifier = Classifier(convert_pytnn_to_equinox(model), eqx.nn.Linear(4, 1, key=KEY))
    y = jnp.sin(X.sum(1, keepdims=True))
    optimizer = optax.adam(1e-2)
    opt_state = optimizer.init(eqx.filter(classifier, eqx.is_inexact_array))

    @eqx.filter_jit
    def step(classifier, opt_state):
        loss, gradient = eqx.filter_value_and_grad(lambda m: ((m(X) - y) ** 2).mean())(classifier)
        updates, opt_state = optimizer.update(gradient, opt_state)
        return eqx.apply_updates(classifier, updates), opt_state, loss

    losses = []
    for _ in range(60):
        classifier, opt_state, loss = step(classifier, opt_state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 2
    before = model[0].weight.detach().clone()
    load_params(model, classifier.encoder)
    assert not torch.equal(model[0].weight, before)


def test_serialising_leaves(model, tmp_path):
    module, state = convert_pytnn_to_equinox(model, with_state=True)
    changed = eqx.tree_at(lambda m: m.params["0"]["bias"], module, jnp.arange(4.0))
    eqx.tree_serialise_leaves(tmp_path / "leaves.eqx", (changed, state))
    restored, _ = eqx.tree_deserialise_leaves(tmp_path / "leaves.eqx", convert_pytnn_to_equinox(model, with_state=True))
    np.testing.assert_array_equal(restored.params["0"]["bias"], jnp.arange(4.0))


def test_running_statistics_equal_torchs(model):
    model = model[:2]
    module, state = convert_pytnn_to_equinox(model, with_state=True)
    step = eqx.filter_jit(lambda m, s, x: m(x, s, inference=False)[1])
    for i in range(5):
        state = step(module, state, X * i)
        model.train()(torch.from_numpy(np.array(X * i)))
    statistics = state.get(module.state_index)["1"]
    np.testing.assert_allclose(statistics["running_mean"], model[1].running_mean, rtol=1e-5, atol=1e-7)
    assert statistics["num_batches_tracked"] == 5
