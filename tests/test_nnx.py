"""`convert_pytnn_to_nnx`: torch modules as NNX modules."""

from __future__ import annotations

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from torch import nn

from pytorch2jax import RandomnessError, convert_pytnn_to_nnx, load_params
from pytorch2jax.flax import Buffer


class Model(torch.nn.Module):
    """Names that are methods of containers and modules, statistics of two kinds, dropout, a constant."""

    def __init__(self):
        super().__init__()
        self.keys = torch.nn.Linear(3, 4)
        self.train_ = torch.nn.BatchNorm1d(4)
        self.split = torch.nn.Dropout(0.5)
        self.register_buffer("items", torch.full((4,), 2.0))
        self.register_buffer("average", torch.zeros(4))

    def forward(self, x):
        y = self.train_(self.keys(x))
        if self.training:
            self.average.lerp_(y.detach().mean(0), 0.5)
        return self.split(y) * self.items


X = jnp.cos(jnp.arange(15.0, dtype=jnp.float32)).reshape(5, 3)
pytestmark = pytest.mark.usefixtures("x32")


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model()


@pytest.fixture
def module(model):
    return convert_pytnn_to_nnx(model, example_args=(X,))


def shapes(state):
    return jax.tree.map(jnp.shape, nnx.to_pure_dict(state))


def test_variables_are_of_their_types(module):
    assert shapes(nnx.state(module, nnx.Param)) == {
        "params": {"keys": {"weight": (4, 3), "bias": (4,)}, "train_": {"weight": (4,), "bias": (4,)}}
    }
    assert shapes(nnx.state(module, nnx.BatchStat)) == {
        "batch_stats": {
            "train_": {"running_mean": (4,), "running_var": (4,), "num_batches_tracked": ()},
            "average": (4,),
        }
    }
    assert shapes(nnx.state(module, Buffer)) == {"buffers": {"items": (4,)}}


def test_without_an_example_only_normalisations_count_as_statistics(model):
    module = convert_pytnn_to_nnx(model)
    assert set(module.batch_stats) == {"train_"}
    assert set(module.buffers) == {"items", "average"}
    module.train()
    module(X, rngs=nnx.Rngs(0))
    assert np.abs(module.buffers["average"].get_value()).sum() > 0  # it is updated all the same


def test_eval_and_train(model, module):
    expected = model.eval()(torch.from_numpy(np.array(X))).detach()
    np.testing.assert_allclose(module(X), expected, rtol=1e-6)
    module.train()
    with pytest.raises(RandomnessError, match="rngs=nnx.Rngs"):
        module(X)
    out = module(X, rngs=nnx.Rngs(dropout=0))
    assert (np.asarray(out) == 0).any()
    assert module.batch_stats["train_"]["num_batches_tracked"].get_value() == 1
    module.eval()
    before = nnx.to_pure_dict(nnx.state(module))
    module(X)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(module)), before)
    module(X, train=True, rngs=nnx.Rngs(0))
    assert module.batch_stats["train_"]["num_batches_tracked"].get_value() == 2


def test_sources_of_randomness(model):
    module = convert_pytnn_to_nnx(model, rngs=nnx.Rngs(dropout=3))
    module.train()
    assert not np.array_equal(module(X), module(X))  # the stream moves on
    key = jax.random.key(0)
    np.testing.assert_array_equal(module(X, rngs=key) == 0, module(X, rngs=key) == 0)
    module(X, rngs=nnx.Rngs(0).dropout)
    with pytest.raises(RandomnessError, match="expected nnx.Rngs, one of its streams or a JAX key, got str"):
        module(X, rngs="key")


def test_jit_grad_and_optimizer_train_it_as_torch_does():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.BatchNorm1d(8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    module = convert_pytnn_to_nnx(model)
    module.train()
    optimizer = nnx.Optimizer(module, optax.sgd(0.1), wrt=nnx.Param)
    y = jnp.sin(X.sum(1, keepdims=True))

    @nnx.jit
    def step(module, optimizer):
        loss, gradient = nnx.value_and_grad(lambda m: ((m(X) - y) ** 2).mean())(module)
        optimizer.update(module, gradient)
        return loss

    losses = [float(step(module, optimizer)) for _ in range(10)]
    reference = torch.optim.SGD(model.parameters(), 0.1)
    x, target = torch.from_numpy(np.array(X)), torch.from_numpy(np.array(y))
    for loss in losses:
        reference.zero_grad()
        expected = ((model.train()(x) - target) ** 2).mean()
        expected.backward()
        reference.step()
        np.testing.assert_allclose(loss, expected.item(), rtol=1e-4)
    np.testing.assert_allclose(module.batch_stats["1"]["running_var"].get_value(), model[1].running_var, rtol=1e-4)
    assert module.batch_stats["1"]["num_batches_tracked"].get_value() == 10


def test_split_and_merge(module):
    graph, state = nnx.split(module)
    np.testing.assert_array_equal(nnx.merge(graph, state)(X), module(X))
    assert hash(graph) == hash(nnx.split(module)[0])
    clone = nnx.clone(module)
    clone.params["keys"]["bias"].set_value(jnp.ones(4))
    assert not np.array_equal(clone(X), module(X))


def test_as_an_attribute_of_another_module(model):
    class Parent(nnx.Module):
        def __init__(self, rngs):
            self.encoder = convert_pytnn_to_nnx(model)
            self.head = nnx.Linear(4, 2, rngs=rngs)

        def __call__(self, x):
            return self.head(self.encoder(x))

    parent = Parent(nnx.Rngs(0))
    parent.train()
    assert parent.encoder.deterministic is False
    parent.eval()
    gradient = nnx.grad(lambda m: (m(X) ** 2).sum())(parent)
    assert np.abs(gradient["encoder"]["params"]["keys"]["weight"].get_value()).sum() > 0
    load_params(model, nnx.to_pure_dict(nnx.state(parent.encoder, nnx.Param))["params"], state=False)


def test_vmap_over_an_ensemble(model):
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(scale):
        module = convert_pytnn_to_nnx(model)
        module.params["keys"]["bias"].set_value(module.params["keys"]["bias"].get_value() * scale)
        return module

    ensemble = make(jnp.arange(3.0))
    out = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(ensemble, X)
    assert out.shape == (3, 5, 4)
    np.testing.assert_allclose(out[1], convert_pytnn_to_nnx(model)(X), rtol=1e-5)
    assert not np.allclose(out[0], out[2])


def test_scan_over_a_stack():
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 3)

    @nnx.vmap(in_axes=0, out_axes=0)
    def make(scale):
        module = convert_pytnn_to_nnx(layer)
        module.params["weight"].set_value(module.params["weight"].get_value() * scale)
        return module

    stack = make(jnp.array([0.5, 1.0, 2.0]))

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def forward(x, module):
        return jnp.tanh(module(x))

    expected = X
    for scale in (0.5, 1.0, 2.0):
        expected = jnp.tanh(expected @ (scale * layer.weight.detach().numpy().T) + layer.bias.detach().numpy())
    np.testing.assert_allclose(forward(X, stack), expected, rtol=1e-5)


def test_orbax_round_trip(model, module, tmp_path):
    module.params["keys"]["bias"].set_value(jnp.arange(4.0))
    _, state = nnx.split(module)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", nnx.to_pure_dict(state))
        checkpointer.wait_until_finished()
        fresh = convert_pytnn_to_nnx(model, example_args=(X,))
        graph, abstract = nnx.split(fresh)
        restored = checkpointer.restore(tmp_path / "state", nnx.to_pure_dict(abstract))
    nnx.replace_by_pure_dict(abstract, restored)
    np.testing.assert_array_equal(nnx.merge(graph, abstract)(X), module(X))


# -- found in use -----------------------------------------------------------------------------------------------

KEY = jax.random.key(0)


def test_copies_and_views_of_nnx_modules():
    from flax import nnx

    from pytorch2jax import convert_pytnn_to_equinox, convert_pytnn_to_nnx

    module = convert_pytnn_to_nnx(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    x = jnp.ones((20, 3), jnp.float32)
    np.testing.assert_array_equal(copy.deepcopy(module)(x), module(x))
    if hasattr(nnx, "view"):  # flax 0.12.2
        assert (np.asarray(nnx.view(module, deterministic=False)(x, rngs=KEY)) == 0).any()
    plain = convert_pytnn_to_nnx(nn.Linear(3, 3))
    plain(x, train=True, rngs=nnx.Rngs(params=0))  # draws nothing
    with pytest.raises(RandomnessError, match="expected a stream `dropout`"):
        module(x, train=True, rngs=nnx.Rngs(params=0))
    copy.deepcopy(convert_pytnn_to_equinox(nn.Linear(3, 3)))(x)
