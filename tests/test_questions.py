"""What no mode sees: which type a tensor is of, and the seeds of generators. It is as in torch, or refused."""

from __future__ import annotations

import cProfile
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from pytorch2jax import CaptureError, convert_pytnn_to_jax, torch2jax

QUESTIONS = {
    "==": lambda x: x * 2 if type(x) == torch.Tensor else x.sum(),  # noqa: E721
    "is": lambda x: x * 2 if type(x) is Tensor else x.sum(),
    "is not": lambda x: x.sum() if type(x) is not Tensor else x * 2,
    "in": lambda x: x * 2 if type(x) in (torch.Tensor, nn.Parameter) else x.sum(),
    "the other way round": lambda x: x * 2 if torch.Tensor is type(x) else x.sum(),
    "__class__": lambda x: x * 2 if x.__class__ is torch.Tensor else x.sum(),
    "an intermediate value": lambda x: x * 2 if type(x.sin().cos()) is torch.Tensor else x.sum(),
}


@pytest.mark.parametrize("question", QUESTIONS)
def test_exact_types_of_tensors(question):
    f, x = torch2jax(lambda x: QUESTIONS[question](x)), jnp.arange(3.0)
    for call in (f, jax.jit(f)):
        np.testing.assert_array_equal(call(x), 2 * x)
    np.testing.assert_array_equal(jax.grad(lambda x: f(x).sum())(x), [2.0, 2.0, 2.0])
    with pytest.raises(CaptureError, match=r"test_questions\.py:\d+ whether a type is exactly torch\.Tensor"):
        torch2jax(lambda x: QUESTIONS[question](x), backend="xla")(x)


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_other_types_may_be_asked_for(backend):
    def fn(x, how="a"):
        if type(how) is str and isinstance(x, torch.Tensor) and not isinstance(x, Parameter):
            return x * 2
        return x.sum()

    np.testing.assert_array_equal(torch2jax(fn, backend=backend)(jnp.arange(3.0)), 2 * jnp.arange(3.0))


class Asks(nn.Module):
    def __init__(self, question):
        super().__init__()
        self.question, self.linear, self.norm = question, nn.Linear(3, 3), nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.ones(3))

    def forward(self, x):
        return self.linear(x) if self.question(self) else x.sum()


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_parameters_are_parameters_and_buffers_are_none(backend):
    model = Asks(lambda m: isinstance(m.linear.weight, nn.Parameter) and not isinstance(m.scale, nn.Parameter))
    apply, params = convert_pytnn_to_jax(model, backend=backend)
    x = jnp.ones((2, 3), jnp.float32)
    for call in (apply, jax.jit(apply)) * 2:
        np.testing.assert_allclose(call(params, x), model(torch.ones(2, 3)).detach(), rtol=1e-6)
    gradient = jax.grad(lambda params: apply(params, x).sum())(params)
    np.testing.assert_array_equal(gradient["linear"]["bias"], [2.0, 2.0, 2.0])


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_exact_types_of_parameters_are_refused(backend):
    apply, params = convert_pytnn_to_jax(Asks(lambda m: type(m.linear.weight) is Parameter), backend=backend)
    with pytest.raises(CaptureError, match=r"exactly nn\.Parameter.*isinstance\(x, nn\.Parameter\)"):
        apply(params, jnp.ones((2, 3), jnp.float32))


def _seeds(x):
    torch.manual_seed(3)
    return x + torch.rand(3)


def _seeds_for_a_while(x):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        return x + torch.rand(3)


def _draws_again(x):
    state = torch.get_rng_state()
    first = torch.rand(3)
    torch.set_rng_state(state)
    return x + first * torch.rand(3)


@pytest.mark.parametrize("fn", [_seeds, _seeds_for_a_while, _draws_again])
def test_seeds_that_a_function_sets(fn):
    f, x, key = torch2jax(fn), jnp.zeros(3, jnp.float32), jax.random.key(0)
    if fn is _draws_again:
        roots = f(x, rng=key) ** 0.5
        np.testing.assert_allclose(roots, torch2jax(lambda x: x + torch.rand(3))(x, rng=key), rtol=1e-6)
    else:
        torch.manual_seed(3)
        np.testing.assert_array_equal(f(x, rng=key), torch.rand(3))
    with pytest.raises(CaptureError, match="sets the seed"):
        torch2jax(fn, backend="xla")(x, rng=key)


def test_what_only_looks_at_the_seed_is_translated():
    def fn(x):
        torch.get_rng_state()
        return x + torch.rand(3)

    assert torch2jax(fn, backend="xla")(jnp.zeros(3), rng=jax.random.key(0)).shape == (3,)


@pytest.mark.parametrize("profiler", ["cProfile", "a function"])
def test_questions_are_heard_under_a_profiler(profiler):
    def fn(x):
        return x * 2 if type(x) is torch.Tensor else x * 3

    f = torch2jax(fn, backend="xla")
    seen = []
    profile = cProfile.Profile()
    begin, end = (
        (profile.enable, profile.disable)
        if profiler == "cProfile"
        else (
            lambda: sys.setprofile(lambda *event: seen.append(event[1])),
            lambda: sys.setprofile(None),
        )
    )
    begin()
    try:
        with pytest.raises(CaptureError, match="exactly torch.Tensor"):
            f(jnp.ones(3))
        seen.clear()
        jnp.ones(3)
        if profiler == "cProfile":
            profile.create_stats()
            assert any("ones" in key[2] for key in profile.stats)
        else:
            assert seen
    finally:
        end()
