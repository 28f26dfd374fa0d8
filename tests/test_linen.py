"""`convert_pytnn_to_flax`: torch modules as Linen modules."""

from __future__ import annotations

from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax.training.train_state import TrainState

from pytorch2jax import (
    MissingLeafError,
    RandomnessError,
    StateError,
    StructureError,
    convert_pytnn_to_flax,
    load_params,
    trainable_mask,
)


class Model(torch.nn.Module):
    """Names that are attributes of every Linen module, statistics, dropout, a constant buffer."""

    runs = 0

    def __init__(self):
        super().__init__()
        self.name = torch.nn.Linear(3, 4)
        self.parent = torch.nn.BatchNorm1d(4)
        self.scope = torch.nn.Dropout(0.5)
        self.register_buffer("variables", torch.full((4,), 2.0))

    def forward(self, x, scale=1.0):
        Model.runs += not isinstance(x, torch._subclasses.FakeTensor)
        return self.scope(self.parent(self.name(x))) * self.variables * scale


X = jnp.cos(jnp.arange(15.0, dtype=jnp.float32)).reshape(5, 3)
KEY = jax.random.key(0)


@pytest.fixture
def model():
    return Model()


@pytest.fixture
def converted(model):
    return convert_pytnn_to_flax(model)


def shapes(tree):
    return jax.tree.map(jnp.shape, tree)


def test_init_gives_torchs_values_and_under_jit_without_running_torch(model, converted):
    module, params = converted
    for init, n_runs in ((module().init, 1), (jax.jit(module().init), 0)):
        Model.runs = 0
        variables = init(KEY, X)
        assert Model.runs == n_runs
        assert shapes(variables) == {
            "params": {"name": {"weight": (4, 3), "bias": (4,)}, "parent": {"weight": (4,), "bias": (4,)}},
            "batch_stats": {"parent": {"running_mean": (4,), "running_var": (4,), "num_batches_tracked": ()}},
            "buffers": {"variables": (4,)},
        }
        jax.tree.map(np.testing.assert_array_equal, variables["params"], params)
    np.testing.assert_array_equal(params["name"]["weight"], model.name.weight.detach())
    assert shapes(jax.eval_shape(module().init, KEY, X)) == shapes(variables)
    assert module().lazy_init(KEY, jax.ShapeDtypeStruct(X.shape, X.dtype)).keys() == variables.keys()


def test_init_with_output_runs_it(converted):
    module, _ = converted
    out, variables = module().init_with_output(KEY, X)
    np.testing.assert_array_equal(out, module().apply(variables, X))
    assert np.abs(out).sum() > 0


def test_apply_equals_torch(model, converted):
    module, _ = converted
    variables = module().init(KEY, X)
    expected = model.eval()(torch.from_numpy(np.array(X)), scale=3.0).detach()
    np.testing.assert_allclose(module().apply(variables, X, scale=3.0), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(module().apply)(variables, X) * 3, expected, rtol=1e-5)


def test_buffers_may_be_left_out_but_statistics_may_not(converted):
    module, params = converted
    variables = module().init(KEY, X)
    without_buffers = {"params": params, "batch_stats": variables["batch_stats"]}
    np.testing.assert_array_equal(module().apply(without_buffers, X), module().apply(variables, X))
    with pytest.raises(MissingLeafError, match=r"batch_stats\.parent\.running_mean.*missing"):
        module().apply({"params": params}, X)
    with pytest.raises(MissingLeafError, match=r"params\.name\.weight"):
        module().apply({**variables, "params": {}}, X)
    with pytest.raises(StructureError, match=r"params\.name\.weight: expected shape \(4, 3\)"):
        module().apply({**variables, "params": {**params, "name": {"weight": X, "bias": X}}}, X)


def test_training_mode(converted):
    module, _ = converted
    variables = module().init(KEY, X)
    rngs = {"dropout": jax.random.key(1)}
    out, update = jax.jit(lambda v: module().apply(v, X, train=True, mutable=["batch_stats"], rngs=rngs))(variables)
    assert (np.asarray(out) == 0).any()
    statistics = update["batch_stats"]["parent"]
    assert statistics["num_batches_tracked"] == 1
    assert np.abs(statistics["running_mean"]).sum() > 0
    with pytest.raises(StateError, match=r"batch_stats: changed.*mutable=\['batch_stats'\]"):
        module().apply(variables, X, train=True, rngs=rngs)
    with pytest.raises(RandomnessError, match=r"rngs={'dropout'"):
        module().apply(variables, X, train=True, mutable=["batch_stats"])


class Parent(nn.Module):
    flax_module: Any

    @nn.compact
    def __call__(self, x, train=False):
        twice = self.flax_module(name="shared")
        features = self.flax_module()(x, train=train) + self.flax_module()(x) + twice(x) + twice(x)
        return nn.Dense(2)(features)


def test_several_times_in_one_parent(converted):
    module, params = converted
    parent = Parent(module)
    variables = parent.init(KEY, X)
    assert sorted(variables["params"]) == ["Dense_0", "Model_0", "Model_1", "shared"]
    changed = {**variables["params"], "Model_1": jax.tree.map(jnp.zeros_like, params)}
    gradient = jax.jit(jax.grad(lambda p: (parent.apply({**variables, "params": p}, X) ** 2).sum()))(changed)
    single = jax.grad(lambda p: module().apply({**variables, "params": p, **stats(variables)}, X).sum())(params)
    assert shapes(gradient["Model_0"]) == shapes(single)
    np.testing.assert_allclose(gradient["shared"]["name"]["bias"], 2 * gradient["Model_0"]["name"]["bias"], rtol=1e-5)
    _, update = parent.apply(variables, X, train=True, mutable=["batch_stats"], rngs={"dropout": KEY})
    counts = {k: int(v["parent"]["num_batches_tracked"]) for k, v in update["batch_stats"].items()}
    assert counts == {"Model_0": 1, "Model_1": 0, "shared": 0}


def stats(variables):
    return {c: variables[c]["Model_0"] for c in ("batch_stats", "buffers")}


def test_setup_style(converted):
    module, _ = converted

    class Setup(nn.Module):
        def setup(self):
            self.encoder = module()

        def __call__(self, x):
            return self.encoder(x)

    variables = Setup().init(KEY, X)
    assert list(variables["params"]) == ["encoder"]
    assert Setup().apply(variables, X).shape == (5, 4)


def test_lifted_vmap_over_parameters(converted):
    module, _ = converted
    axes = {"params": 0, "batch_stats": 0, "buffers": 0}
    rngs = {"params": True, "dropout": True}
    ensemble = nn.vmap(module, variable_axes=axes, split_rngs=rngs, in_axes=None, axis_size=3)
    variables = ensemble().init(KEY, X)
    assert variables["params"]["name"]["weight"].shape == (3, 4, 3)
    scaled = jax.tree.map(lambda p: p * jnp.arange(3.0, dtype=p.dtype).reshape(3, *(1,) * (p.ndim - 1)), variables)
    out = ensemble().apply({**variables, "params": scaled["params"]}, X)
    for i in range(3):
        member = jax.tree.map(lambda v, i=i: v[i], {**variables, "params": scaled["params"]})
        np.testing.assert_allclose(out[i], module().apply(member, X), rtol=1e-5, atol=1e-6)


def test_lifted_vmap_over_inputs(converted):
    module, _ = converted
    axes = {"params": None, "batch_stats": None, "buffers": None}
    batched = nn.vmap(module, variable_axes=axes, split_rngs={"params": False})
    variables = batched().init(KEY, jnp.stack([X, X]))
    assert variables["params"]["name"]["weight"].shape == (4, 3)
    out = batched().apply(variables, jnp.stack([X, 2 * X]))
    np.testing.assert_allclose(out[1], module().apply(variables, 2 * X), rtol=1e-5)


def test_lifted_remat(converted):
    module, _ = converted
    remat = nn.remat(module)
    variables = remat().init(KEY, X)
    ours, expected = (
        jax.grad(lambda p, m=m: (m().apply({**variables, "params": p}, X) ** 2).sum())(variables["params"])
        for m in (remat, module)
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, expected)


def test_lifted_scan(model):
    module, _ = convert_pytnn_to_flax(torch.nn.Linear(3, 3))

    class Step(nn.Module):
        @nn.compact
        def __call__(self, carry, _):
            return jnp.tanh(module()(carry)), None

    stack = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
    variables = stack().init(KEY, X, None)
    assert variables["params"]["Linear_0"]["weight"].shape == (4, 3, 3)
    out, _ = stack().apply(variables, X, None)
    expected, first = X, jax.tree.map(lambda p: p[0], variables["params"]["Linear_0"])
    for _ in range(4):
        expected = jnp.tanh(module().apply({"params": first}, expected))
    np.testing.assert_allclose(out, expected, rtol=1e-5)


def test_flax_tools_work_on_the_result(converted):
    module, params = converted
    variables = module().init(KEY, X)
    assert "name" in module().tabulate(KEY, X)
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    assert set(flat) == {"name/weight", "name/bias", "parent/weight", "parent/bias"}
    restored = flax.serialization.from_bytes(variables, flax.serialization.to_bytes(variables))
    jax.tree.map(np.testing.assert_array_equal, restored, variables)
    assert module().apply(flax.core.freeze(variables), X).shape == (5, 4)
    assert "Model" in repr(module())
    assert hash(module()) == hash(module())
    assert module() == module()


def test_fine_tuning_with_train_state_and_the_way_back():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.Tanh())
    model[0].bias.requires_grad_(False)
    module, _ = convert_pytnn_to_flax(model)

    class Classifier(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(1)(module(name="encoder")(x))

    classifier = Classifier()
    params = classifier.init(KEY, X)["params"]
    mask = {"encoder": jax.tree.map(lambda t: "train" if t else "freeze", trainable_mask(model)), "Dense_0": "train"}
    labels = {**mask, "Dense_0": jax.tree.map(lambda _: "train", params["Dense_0"])}
    tx = optax.multi_transform({"train": optax.adam(1e-2), "freeze": optax.set_to_zero()}, labels)
    state = TrainState.create(apply_fn=classifier.apply, params=params, tx=tx)
    y = jnp.sin(3 * X.sum(1, keepdims=True))

    @jax.jit
    def step(state):
        def loss_of(p):
            return ((state.apply_fn({"params": p}, X) - y) ** 2).mean()

        loss, gradient = jax.value_and_grad(loss_of)(state.params)
        return state.apply_gradients(grads=gradient), loss

    losses = []
    for _ in range(60):
        state, loss = step(state)
        losses.append(float(loss))
    assert losses[-1] < losses[0] / 3
    np.testing.assert_array_equal(state.params["encoder"]["0"]["bias"], params["encoder"]["0"]["bias"])
    load_params(model, state.params["encoder"])
    ours = module().apply({"params": state.params["encoder"]}, X)
    np.testing.assert_allclose(ours, model(torch.from_numpy(np.array(X))).detach(), rtol=1e-6)


def test_donated_weights_are_named(converted):
    module, params = converted
    variables = module().init(KEY, X)
    jax.jit(lambda v: jax.tree.map(lambda x: x + 1, v), donate_argnums=0)(variables)
    module().init(KEY, X)  # copies were donated
    for leaf in jax.tree.leaves(params):
        leaf.delete()
    with pytest.raises(StateError, match="donated"):
        module().init(KEY, X)
