"""Hooks on tensors and parameters: they act on gradients, or are refused."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import some
from torch import nn

from pytorch2jax import (
    CaptureError,
    ConversionError,
    UnsupportedTransformError,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    t2j,
    torch2jax,
    use_tape,
)


def hooked(*hooks, size=3):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.Tanh(), nn.Linear(size, 1)).double()
    for hook in hooks:
        model[0].weight.register_hook(hook)
    return model


def expected(model, x):
    model.zero_grad()
    model(x).sum().backward()
    return model[0].weight.grad.clone()


@pytest.mark.parametrize("size", some([3, 192], [3]))
@pytest.mark.parametrize("tape", [True, False])
def test_hooks_of_parameters_act_on_their_gradients(tape, size):
    """In the order in which they were registered."""
    mask = torch.rand(size, size).round()
    model = hooked(lambda g: g * 0.1, lambda g: g.clamp(-0.01, 0.01), lambda g: None, lambda g: g * mask, size=size)
    x = torch.randn(4, size, dtype=torch.float64)
    with use_tape(tape):
        apply, params = convert_pytnn_to_jax(model)

        def loss(params):
            return apply(params, t2j(x)).sum()

        for gradient in (jax.grad(loss), jax.jit(jax.grad(loss))) * 2:
            np.testing.assert_allclose(gradient(params)["0"]["weight"], expected(model, x), rtol=1e-12)
        each = jax.vmap(jax.grad(lambda p, x: apply(p, x).sum()), in_axes=(None, 0))
        with pytest.warns(UserWarning, match="loop over the whole function"):
            found = each(params, t2j(x))["0"]["weight"]
        for index in range(4):
            np.testing.assert_allclose(found[index], expected(model, x[index]), rtol=1e-12)


def test_hooks_that_are_methods_of_the_module():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(3, 3)
            self.register_buffer("mask", torch.tensor([1.0, 0.0, 2.0]))
            self.weight.register_hook(self.masked)

        def masked(self, gradient):
            return gradient * self.mask

    model = Masked()
    apply, params, _ = convert_pytnn_to_jax(model, with_state=True)
    x = jnp.ones((2, 3), jnp.float32)
    found = jax.grad(lambda p: apply(p, {"mask": jnp.array([3.0, 4.0, 5.0], jnp.float32)}, x)[0].sum())(params)
    np.testing.assert_array_equal(found["weight"], 2 * np.tile([3.0, 4.0, 5.0], (3, 1)))
    assert model.weight.grad is None


def test_derivatives_with_linear_hooks_and_with_others():
    x = torch.randn(4, 3, dtype=torch.float64)
    apply, params = convert_pytnn_to_jax(hooked(lambda g: g * 0.1))

    def loss(params):
        return apply(params, t2j(x)).sum()

    tangents = jax.tree.map(jnp.ones_like, params)
    pushed = jax.jvp(loss, (params,), (tangents,))[1]
    np.testing.assert_allclose(pushed, sum(g.sum() for g in jax.tree.leaves(jax.grad(loss)(params))), rtol=1e-10)
    apply, params = convert_pytnn_to_jax(hooked(lambda g: g.clamp(-0.01, 0.01)))
    with pytest.raises(UnsupportedTransformError, match="hooks on its gradients"):
        jax.jvp(loss, (params,), (tangents,))


CONVERTERS = {
    "jax": lambda model, **options: convert_pytnn_to_jax(model, **options),
    "flax": lambda model, **options: convert_pytnn_to_flax(model, **options),
    "nnx": lambda model, **options: convert_pytnn_to_nnx(model, **options),
    "equinox": lambda model, **options: convert_pytnn_to_equinox(model, **options),
}


@pytest.mark.parametrize("converter", CONVERTERS)
def test_hooks_that_nobody_would_call_are_refused(converter):
    with pytest.raises(ConversionError, match=r"0\.weight: .*register_hook"):
        CONVERTERS[converter](hooked(lambda g: g), backend="xla")
    model = hooked()
    model[2].bias.register_post_accumulate_grad_hook(lambda p: None)
    for backend in ("torch", "xla"):
        with pytest.raises(ConversionError, match=r"2\.bias: .*register_post_accumulate_grad_hook"):
            CONVERTERS[converter](model, backend=backend)


def _hooks_inside(x):
    y = x * 2
    y.register_hook(lambda g: g * 0.1)
    return y.sin()


def _hooks_an_input(x):
    x.register_hook(lambda g: g * 0.1)
    return (x * 2).sin()


def _hooks_what_it_writes(x):
    x.mul_(2)
    x.register_hook(lambda g: g * 0.1)
    return x.sin()


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("fn", [_hooks_inside, _hooks_an_input, _hooks_what_it_writes])
def test_hooks_inside_of_a_function(fn, tape):
    x = torch.linspace(-1, 2, 4, dtype=torch.float64)
    live = x.clone().requires_grad_()
    y = fn(live if fn is not _hooks_what_it_writes else live * 1)
    (gradient,) = torch.autograd.grad(y.sum(), live)
    with use_tape(tape):
        f = torch2jax(fn)
        for call in (f, jax.jit(f), jax.vmap(f)):
            np.testing.assert_allclose(call(t2j(x)), y.detach(), rtol=1e-12)
        for call in (jax.grad(lambda x: f(x).sum()), jax.jit(jax.grad(lambda x: f(x).sum())), jax.vmap(jax.grad(f))):
            np.testing.assert_allclose(call(t2j(x)), gradient, rtol=1e-12)
        np.testing.assert_allclose(jax.jvp(f, (t2j(x),), (t2j(x),))[1], gradient * x, rtol=1e-12)


def test_hooks_on_what_does_not_depend_on_the_differentiated_argument():
    def fn(x, w):
        y = w * 2
        y.register_hook(lambda g: g * 0.1)
        return x * y

    f, (x, w) = torch2jax(fn), (jnp.array([1.0, 2.0]), jnp.array([3.0, 4.0]))
    np.testing.assert_allclose(jax.grad(lambda x: f(x, w).sum())(x), 2 * w)
    np.testing.assert_allclose(jax.grad(lambda w: f(x, w).sum())(w), 0.2 * x)


def test_the_second_engine_refuses_hooks_inside_of_a_function():
    with pytest.raises(CaptureError, match="register_hook"):
        torch2jax(_hooks_inside, backend="xla")(jnp.ones(3))
