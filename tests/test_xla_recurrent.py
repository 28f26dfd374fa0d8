"""LSTM, GRU and RNN through the engine that translates: one loop over the steps, and torch's numbers."""

from __future__ import annotations

import jax
import jax.export
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from pytorch2jax import InferenceError, convert_pytnn_to_jax, t2j, torch2jax

LAYERS = {
    "lstm": lambda: nn.LSTM(3, 4, 2, bidirectional=True, batch_first=True),
    "lstm with projections": lambda: nn.LSTM(3, 4, 2, proj_size=2),
    "lstm with projections, without biases": lambda: nn.LSTM(3, 4, proj_size=2, bias=False),
    "gru": lambda: nn.GRU(3, 4, 2, bidirectional=True),
    "gru without biases": lambda: nn.GRU(3, 4, bias=False),
    "rnn": lambda: nn.RNN(3, 4, 2, batch_first=True),
    "rnn with relu": lambda: nn.RNN(3, 4, nonlinearity="relu", bidirectional=True),
}


def loss(outputs):
    """Of everything that a layer returns."""
    y, state = outputs
    return (y**2).sum() + sum((s**3).sum() for s in (state if isinstance(state, tuple) else (state,)))


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    return LAYERS[request.param]().double()


def loops(function, *args):
    return str(jax.make_jaxpr(function)(*args)).count(" scan[")


def test_one_loop_for_each_layer_and_direction(layer):
    apply, params = convert_pytnn_to_jax(layer, backend="xla")
    assert loops(apply, params, jnp.ones((5, 2, 3))) == layer.num_layers * (1 + layer.bidirectional)


def test_one_loop_where_parameters_are_constants():
    f = torch2jax(nn.LSTM(3, 4).double(), backend="xla")  # they require gradients
    assert loops(f, jnp.ones((5, 2, 3))) == 1


def test_outputs_and_gradients(layer):
    apply, params = convert_pytnn_to_jax(layer, backend="xla")
    x = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    expected = loss(layer(x))
    gradients = torch.autograd.grad(expected, [x, *layer.parameters()])
    value_and_grad = jax.jit(jax.value_and_grad(lambda params, x: loss(apply(params, x)), argnums=(0, 1)))
    value, (by_params, by_x) = value_and_grad(params, t2j(x.detach()))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-12)
    actual = [by_x, *(by_params[name] for name, _ in layer.named_parameters())]
    for ours, theirs in zip(actual, gradients, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["lstm with projections", "gru", "rnn"])
def test_second_order(name):
    layer = LAYERS[name]().double()
    apply, params = convert_pytnn_to_jax(layer, backend="xla")
    through_torch, _ = convert_pytnn_to_jax(layer)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 2, 3)))
    tangents = jax.tree.map(jnp.cos, params)

    def products(apply):
        gradient = jax.grad(lambda params: loss(apply(params, x)))
        forward = jax.jvp(gradient, (params,), (tangents,))[1]
        reverse = jax.grad(lambda params: sum(map(jnp.vdot, *map(jax.tree.leaves, (gradient(params), tangents)))))
        return forward, reverse(params)

    for ours, theirs in zip(*(jax.tree.leaves(products(f)) for f in (apply, through_torch)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)


def equations(jaxpr, inside=False):
    """All equations with whether a loop is around them."""
    for equation in jaxpr.eqns:
        yield equation, inside
        looped = inside or equation.primitive.name == "scan"
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner, looped)


def test_the_gradients_of_weights_are_summed_after_the_loop():
    apply, params = convert_pytnn_to_jax(nn.LSTM(3, 4).double(), backend="xla")
    jaxpr = jax.make_jaxpr(jax.grad(lambda params: loss(apply(params, jnp.ones((5, 2, 3))))))(params)
    of_weights = [loop for e, loop in equations(jaxpr.jaxpr) if [v.aval.shape for v in e.outvars] == [(16, 4)]]
    assert of_weights
    assert not any(of_weights)


def test_per_example_gradients_and_a_given_state():
    lstm = nn.LSTM(3, 4).double()
    f = torch2jax(lambda x, h, c: lstm(x, (h, c))[0].sin(), backend="xla")
    rng = np.random.default_rng(0)
    x, h, c = (jnp.asarray(rng.normal(size=shape)) for shape in ((6, 5, 2, 3), (6, 1, 2, 4), (6, 1, 2, 4)))
    gradient = jax.grad(lambda *args: f(*args).sum(), argnums=(0, 1, 2))
    together = jax.jit(jax.vmap(gradient))(x, h, c)
    for i in range(6):
        for ours, alone in zip(together, gradient(x[i], h[i], c[i]), strict=True):
            np.testing.assert_allclose(ours[i], alone, rtol=1e-10, atol=1e-12)


def test_where_torch_differentiates_inside_the_steps_are_torchs():
    lstm = nn.LSTM(3, 4).double()

    def by_autograd(x):
        x = x.requires_grad_()
        return torch.autograd.grad(lstm(x)[0].sum(), x, create_graph=True)[0]

    def by_autograd_of_a_copy(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((lstm(x)[0].sum(-1, keepdim=True) + x).sum(), x)[0]

    def by_functorch(x):
        return torch.func.grad(lambda x: lstm(x)[0].sum())(x)

    x = torch.randn(5, 2, 3, dtype=torch.float64)
    for fn in (by_autograd, by_autograd_of_a_copy, by_functorch):
        expected = fn(x.clone()).detach()
        np.testing.assert_allclose(torch2jax(fn, backend="xla")(t2j(x, copy=True)), expected, rtol=1e-10, atol=1e-12)


def test_half_precision_and_autocast():
    torch.manual_seed(0)
    gru = nn.GRU(3, 4)

    def fn(x):
        with torch.autocast("cpu", torch.bfloat16):
            return gru(x)[0]

    x = torch.randn(5, 2, 3)
    ours, theirs = torch2jax(fn, backend="xla")(t2j(x)), fn(x).detach()
    assert str(ours.dtype) == str(theirs.dtype).removeprefix("torch.")
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs.float(), atol=0.02)
    apply, params = convert_pytnn_to_jax(gru.bfloat16(), backend="xla")
    ours, theirs = apply(params, t2j(x.bfloat16()))[0], gru(x.bfloat16())[0].detach()
    assert ours.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(ours, np.float32), theirs.float(), atol=0.02)


def test_dropout_between_layers_comes_from_the_key():
    apply, params = convert_pytnn_to_jax(nn.GRU(3, 4, 2, dropout=0.5).train(), backend="xla")
    x = jnp.ones((5, 2, 3), jnp.float32)
    first, again, other = (apply(params, x, train=True, rng=jax.random.key(seed))[0] for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.exhaustive
def test_a_length_of_any_size_is_exported():
    torch.manual_seed(0)
    layer = nn.LSTM(3, 4).double()
    apply, params = convert_pytnn_to_jax(layer, backend="xla")
    steps, batch = jax.export.symbolic_shape("steps, batch")
    shape = jax.ShapeDtypeStruct((steps, batch, 3), jnp.float64)
    exported = jax.export.export(jax.jit(lambda params, x: apply(params, x)[0]))(params, shape)
    for size in ((5, 2, 3), (9, 1, 3)):
        x = torch.randn(size, dtype=torch.float64)
        np.testing.assert_allclose(exported.call(params, t2j(x)), layer(x)[0].detach(), rtol=1e-12)


def test_no_steps_are_refused_as_by_torch():
    f = torch2jax(nn.LSTM(3, 4).double(), backend="xla")
    with pytest.raises(InferenceError, match="Expected sequence length to be larger than 0"):
        f(jnp.ones((0, 2, 3)))
