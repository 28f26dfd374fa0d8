"""`convert_flax_to_pytnn`, `convert_nnx_to_pytnn`, `convert_equinox_to_pytnn`: JAX and optax are the oracle."""

from __future__ import annotations

import copy
import pickle

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from flax import nnx

from pytorch2jax import (
    ConversionError,
    DtypeError,
    StateError,
    convert_equinox_to_pytnn,
    convert_flax_to_pytnn,
    convert_nnx_to_pytnn,
)

F64 = torch.float64
X = np.cos(np.arange(24.0)).reshape(8, 3)
Y = X.sum(axis=1, keepdims=True)
KEY = jax.random.key(0)
STEPS = 5


class Net(nn.Module):
    dropout: float = 0.0

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4, param_dtype=jnp.float64)(x)
        x = nn.BatchNorm(use_running_average=not train, param_dtype=jnp.float64)(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(nn.relu(x))
        return nn.Dense(1, param_dtype=jnp.float64)(x)


class NnxNet(nnx.Module):
    def __init__(self, rngs, dropout=0.0):
        self.first = nnx.Linear(3, 4, rngs=rngs, param_dtype=jnp.float64)
        self.norm = nnx.BatchNorm(4, rngs=rngs, param_dtype=jnp.float64)
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(4, 1, rngs=rngs, param_dtype=jnp.float64)])

    def __call__(self, x):
        return self.layers[0](self.dropout(nnx.relu(self.norm(self.first(x)))))


class EqxNet(eqx.Module):
    first: eqx.nn.Linear
    norm: eqx.nn.BatchNorm
    dropout: eqx.nn.Dropout
    second: eqx.nn.Linear

    def __init__(self, key, dropout=0.0):
        first, second = jax.random.split(key)
        self.first = eqx.nn.Linear(3, 4, key=first)
        self.norm = eqx.nn.BatchNorm(4, axis_name="batch", mode="batch")
        self.dropout = eqx.nn.Dropout(dropout)
        self.second = eqx.nn.Linear(4, 1, key=second)

    def __call__(self, x, state, key=None):
        x, state = self.norm(self.first(x), state)
        return self.second(self.dropout(jax.nn.relu(x), key=key)), state


def over_batch(module, x, state, key=None):
    keys = None if key is None else jax.random.split(key, x.shape[0])
    run = jax.vmap(module, axis_name="batch", in_axes=(0, None, None if key is None else 0), out_axes=(0, None))
    return run(x, state, keys)


def in_float64(tree):
    return jax.tree.map(lambda a: a.astype(jnp.float64), tree)  # Flax makes running statistics in float32


def linen(dropout=0.0):
    model = Net(dropout)
    variables = in_float64(model.init(KEY, X))
    return convert_flax_to_pytnn(model, variables), (model, variables)


def nnx_net(dropout=0.0):
    model = NnxNet(nnx.Rngs(0), dropout)
    nnx.update(model, in_float64(nnx.state(model, (nnx.Param, nnx.BatchStat))))
    return convert_nnx_to_pytnn(model), model


def equinox(dropout=0.0):
    model, state = eqx.nn.make_with_state(EqxNet)(KEY, dropout)
    return convert_equinox_to_pytnn(model, state, call=over_batch), (model, state)


def train_in_torch(net):
    x, y = torch.from_numpy(X), torch.from_numpy(Y)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = ((net(x) - y) ** 2).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def train_in_jax(params, kept, loss):
    """`loss(params, kept)` returns `(value, what to keep)`."""
    optimizer = optax.sgd(0.05, momentum=0.9)
    opt_state, losses = optimizer.init(params), []
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    for _ in range(STEPS):
        (value, kept), gradient = step(params, kept)
        updates, opt_state = optimizer.update(gradient, opt_state)
        params = optax.apply_updates(params, updates)
        losses.append(value.item())
    return losses, params, kept


def same(left, right):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), left, right)


# -- training ----------------------------------------------------------------------------------------------------


def test_training_a_linen_module():
    net, (model, variables) = linen()

    def loss(params, stats):
        out, new = model.apply({"params": params, "batch_stats": stats}, X, train=True, mutable=["batch_stats"])
        return ((out - Y) ** 2).mean(), new["batch_stats"]

    losses, params, stats = train_in_jax(variables["params"], variables["batch_stats"], loss)
    np.testing.assert_allclose(train_in_torch(net), losses, rtol=1e-9)
    same(net.to_jax(), {"params": params, "batch_stats": stats})
    expected = model.apply({"params": params, "batch_stats": stats}, X)
    np.testing.assert_allclose(net.eval()(torch.from_numpy(X)).detach(), expected, rtol=1e-9)


def test_training_an_nnx_module():
    net, model = nnx_net()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, kept):
        merged = nnx.merge(graph, params, jax.tree.map(jnp.copy, kept))  # variables of this trace, which it may update
        merged.train()
        value = ((merged(X) - Y) ** 2).mean()
        return value, nnx.split(merged, nnx.Param, ...)[2]

    losses, params, rest = train_in_jax(params, rest, loss)
    np.testing.assert_allclose(train_in_torch(net), losses, rtol=1e-9)
    trained = net.to_jax()
    same(nnx.state(trained, nnx.Param), params)
    same(nnx.state(trained, nnx.BatchStat), nnx.state(nnx.merge(graph, params, rest), nnx.BatchStat))
    trained.eval()
    np.testing.assert_allclose(net.eval()(torch.from_numpy(X)).detach(), trained(X), rtol=1e-9)


def test_training_an_equinox_module():
    net, (model, state) = equinox()
    params, static = eqx.partition(model, eqx.is_inexact_array)

    def loss(params, kept):
        out, new = over_batch(eqx.combine(params, static), X, kept)
        return ((out - Y) ** 2).mean(), new

    losses, params, state = train_in_jax(params, state, loss)
    np.testing.assert_allclose(train_in_torch(net), losses, rtol=1e-9)
    trained, new_state = net.to_jax()
    same(eqx.filter(trained, eqx.is_array), eqx.filter(params, eqx.is_array))
    same(jax.tree.leaves(new_state), jax.tree.leaves(state))
    expected, _ = over_batch(eqx.nn.inference_mode(trained), X, new_state)
    np.testing.assert_allclose(net.eval()(torch.from_numpy(X)).detach(), expected, rtol=1e-9)


# -- what a torch module is expected to do -------------------------------------------------------------------------

NAMES = {
    linen: {
        "params": ["BatchNorm_0.bias", "BatchNorm_0.scale", "Dense_0.bias", "Dense_0.kernel", "Dense_1.bias",
                   "Dense_1.kernel"],
        "buffers": ["BatchNorm_0.mean", "BatchNorm_0.var"],
    },
    nnx_net: {
        "params": ["first.bias", "first.kernel", "layers.0.bias", "layers.0.kernel", "norm.bias", "norm.scale"],
        "buffers": ["norm.mean", "norm.var"],
    },
    equinox: {
        "params": ["first.bias", "first.weight", "norm.bias", "norm.weight", "second.bias", "second.weight"],
        "buffers": None,
    },
}  # fmt: skip

every = pytest.mark.parametrize("make", NAMES, ids=lambda make: make.__name__)


@every
def test_names(make):
    net, _ = make()
    assert sorted(name for name, _ in net.named_parameters()) == NAMES[make]["params"]
    buffers = sorted(name for name, _ in net.named_buffers())
    if NAMES[make]["buffers"] is not None:
        assert buffers == NAMES[make]["buffers"]
    assert sorted(net.state_dict()) == sorted(NAMES[make]["params"] + buffers)
    assert net.get_parameter(NAMES[make]["params"][0]).requires_grad


@every
def test_state_dict_and_copies(make):
    net, _ = make()
    untouched = copy.deepcopy(net)
    before = untouched.eval()(torch.from_numpy(X))
    train_in_torch(net)
    assert not torch.allclose(net.eval()(torch.from_numpy(X)), before)
    assert torch.equal(untouched(torch.from_numpy(X)), before)
    other, _ = make()
    other.load_state_dict(net.state_dict())
    assert torch.equal(other.eval()(torch.from_numpy(X)), net(torch.from_numpy(X)))
    with pytest.raises(ConversionError, match=r"expected a module that can be pickled.* `state_dict\(\)`"):
        pickle.dumps(net)


@every
def test_eval_mode_changes_nothing(make):
    net, _ = make(dropout=0.5)
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    generator = torch.get_rng_state()
    assert torch.equal(net(torch.from_numpy(X)), net(torch.from_numpy(X)))
    assert torch.equal(torch.get_rng_state(), generator)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@every
def test_dropout_draws_from_torch_in_train_mode(make):
    net, _ = make(dropout=0.5)
    x = torch.from_numpy(X)

    def draw(seed):
        torch.manual_seed(seed)
        return net(x).detach()

    assert torch.equal(draw(0), draw(0))
    assert not torch.equal(draw(0), draw(1))
    torch.manual_seed(0)
    assert not torch.equal(net(x), net(x))


@every
def test_to_dtype_and_frozen_parameters(make):
    net, _ = make()
    expected = net.eval()(torch.from_numpy(X))
    net.to(torch.float32)
    out = net(torch.from_numpy(X).float())
    assert make is equinox or out.dtype == torch.float32  # its BatchNorm computes with Python numbers in float64
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    first = net.get_parameter(NAMES[make]["params"][0]).requires_grad_(False)
    net.train()(torch.from_numpy(X).float()).sum().backward()
    assert first.grad is None
    assert all(p.grad is not None for p in net.parameters() if p is not first)


@every
def test_functional_call_and_per_example_gradients(make):
    net, _ = make()
    net.eval()
    params = {name: p.detach() for name, p in net.named_parameters()}
    x = torch.from_numpy(X)

    def loss(params, x):
        return torch.func.functional_call(net, params, (x[None],)).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    net(x).sum().backward()
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(each[name].sum(0), parameter.grad)


@every
def test_to_jax_copies(make):
    net, _ = make()
    leaves = [leaf for leaf in jax.tree.leaves(net.to_jax()) if eqx.is_inexact_array(leaf)]
    before = [np.array(leaf) for leaf in leaves]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(9.0)
    for leaf, value in zip(leaves, before, strict=True):
        np.testing.assert_array_equal(leaf, value)
    assert any((leaf == 9.0).all() for leaf in jax.tree.leaves(net.to_jax(copy=False)) if eqx.is_inexact_array(leaf))


def test_two_calls_before_one_backward():
    net, (model, variables) = linen()
    x = torch.from_numpy(X)
    (net(x).sum() + net(2 * x).sum()).backward()

    def loss(params):
        stats, out = variables["batch_stats"], 0.0
        for scale in (1, 2):
            y, new = model.apply(
                {"params": params, "batch_stats": stats}, scale * X, train=True, mutable=["batch_stats"]
            )
            stats, out = new["batch_stats"], out + y.sum()
        return out, stats

    gradient, stats = jax.grad(loss, has_aux=True)(variables["params"])
    np.testing.assert_allclose(net.Dense_0.kernel.grad, gradient["Dense_0"]["kernel"], rtol=1e-9, atol=1e-12)
    same(net.to_jax()["batch_stats"], stats)


def test_the_caller_may_give_the_mode():
    net, (model, variables) = linen()
    expected = model.apply(variables, X)
    for arguments, keywords in (((False,), {}), ((), {"train": False})):
        out = net(torch.from_numpy(X), *arguments, **keywords)
        np.testing.assert_allclose(out.detach(), expected, rtol=1e-9)


class Deterministic(nn.Module):
    @nn.compact
    def __call__(self, x, deterministic):
        return nn.Dropout(0.5, deterministic=deterministic)(x)


class OfItsOwn(nn.Module):
    @nn.compact
    def __call__(self, x, learn):
        return nn.Dropout(0.5, deterministic=not learn, rng_collection="noise")(x)


@pytest.mark.parametrize(
    ("model", "options"), [(Deterministic(), {}), (OfItsOwn(), {"mode": "learn", "rngs": ["noise"]})]
)
def test_other_names_for_the_mode(model, options):
    net = convert_flax_to_pytnn(model, {}, **options)
    x = torch.ones(100)
    assert 10 < (net(x) == 0).sum() < 90
    assert torch.equal(net.eval()(x), x)


class Awkward(nn.Module):
    @nn.compact
    def __call__(self, x):
        dense = nn.Dense(2, name="forward")(x)
        scale = self.param("scale", nn.initializers.ones, (2,))
        twin = self.variable("cache", "scale", lambda: jnp.zeros((), jnp.int32))
        if not self.is_initializing():
            twin.value = twin.value + 1
        return dense * scale


def test_awkward_names_and_counters():
    model = Awkward()
    variables = model.init(KEY, jnp.ones((1, 3)))
    net = convert_flax_to_pytnn(model, variables)
    assert sorted(net.state_dict()) == ["cache.scale", "forward.bias", "forward.kernel", "scale"]
    x = torch.ones(1, 3)
    expected = model.apply(variables, jnp.ones((1, 3)), mutable=["cache"])[0]
    for count in range(3):
        assert net.state_dict()["cache.scale"].item() == count
        np.testing.assert_allclose(net(x).detach(), expected, rtol=1e-6)


class Growing(nn.Module):
    @nn.compact
    def __call__(self, x):
        seen = self.variable("cache", "seen", lambda: jnp.zeros(0))
        if not self.is_initializing():
            seen.value = jnp.concatenate([seen.value, x])
        return x


def test_state_that_changes_its_shape():
    net = convert_flax_to_pytnn(Growing(), Growing().init(KEY, jnp.ones(2)))
    with pytest.raises(
        StateError, match=r"Growing: seen: expected the forward pass to keep the shape .*\[0\], got \[2\]"
    ):
        net(torch.ones(2))


def test_partitioned_variables_and_frozen_dicts():
    import flax.core

    model = nn.Dense(2, kernel_init=nn.with_partitioning(nn.initializers.ones, (None, "model")))
    variables = flax.core.freeze(model.init(KEY, jnp.ones((1, 3))))
    net = convert_flax_to_pytnn(model, variables)
    assert net(torch.ones(1, 3)).tolist() == [[3.0, 3.0]]
    assert jax.tree.structure(net.to_jax()) == jax.tree.structure(variables)


def test_equinox_without_state():
    mlp = eqx.nn.MLP(3, 1, 8, depth=1, key=KEY)
    net = convert_equinox_to_pytnn(mlp).eval()
    x = torch.from_numpy(X)
    np.testing.assert_allclose(net(x[0]).detach(), mlp(X[0]), rtol=1e-9)
    np.testing.assert_allclose(torch.func.vmap(net)(x).detach(), jax.vmap(mlp)(X), rtol=1e-9)
    dropout = convert_equinox_to_pytnn(eqx.nn.Dropout(0.5))
    assert 10 < (dropout(torch.ones(100)) == 0).sum() < 90
    assert torch.equal(dropout(torch.ones(3), key=KEY), dropout(torch.ones(3), key=KEY))
    assert torch.equal(dropout.eval()(torch.ones(3)), torch.ones(3))


def test_inside_of_another_torch_module():
    net, _ = linen()
    both = torch.nn.Sequential(torch.nn.Linear(3, 3, dtype=F64), net)
    both(torch.from_numpy(X)).sum().backward()
    assert both[0].weight.grad is not None
    assert "1.Dense_0.kernel" in both.state_dict()
    assert both.eval()[1].training is False
    assert "Net" in repr(both)


def test_errors():
    with pytest.raises(ConversionError, match=r"module: expected an instance of flax\.linen\.Module, got Net"):
        convert_flax_to_pytnn(Net, {})
    with pytest.raises(ConversionError, match=r"variables: expected a dict of collections.*got int\. Pass all that"):
        convert_flax_to_pytnn(Net(), 3)
    with pytest.raises(ConversionError, match=r"expected an instance of flax\.nnx\.Module, got Net"):
        convert_nnx_to_pytnn(Net())
    with pytest.raises(ConversionError, match=r"expected an instance of eqx\.Module that can be called, got EqxNet"):
        convert_equinox_to_pytnn(EqxNet)
    with pytest.raises(StateError, match=r"state: expected the eqx\.nn\.State .* got dict"):
        convert_equinox_to_pytnn(eqx.nn.Identity(), {})
    with pytest.raises(DtypeError, match=r"Dense: kernel: dtype_j2t: expected a dtype that torch has"):
        convert_flax_to_pytnn(nn.Dense(2), {"params": {"kernel": jnp.ones(2, jnp.int4)}})
    clashing = {name: jnp.ones(2) for name in ("a.b.c", "a_b.c", "a_b_c")}
    with pytest.raises(ConversionError, match=r"Dense: params\.a_b_c: expected different names for all arrays"):
        convert_flax_to_pytnn(nn.Dense(2), {"params": clashing})
