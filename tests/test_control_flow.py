"""Inside `scan`, `while_loop`, `cond`, `checkpoint`, with donated arguments, nested and in parallel."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pytorch2jax import torch2jax

pytestmark = pytest.mark.usefixtures("tape")


@pytest.fixture
def step():
    return torch2jax(lambda c, x: torch.tanh(c * x + 0.5))


def jax_step(c, x):
    return jnp.tanh(c * x + 0.5)


def rollout(step):
    def f(c, xs):
        c, ys = jax.lax.scan(lambda c, x: (step(c, x),) * 2, c, xs)
        return (ys * c).sum()

    return f


C, XS = jnp.array([0.3, 0.7]), jnp.arange(8.0).reshape(4, 2) / 5


def test_scan_forward_and_gradient(step):
    for transform in (lambda f: f, lambda f: jax.grad(f, (0, 1)), jax.hessian, jax.jit):
        expected = transform(rollout(jax_step))(C, XS)
        jax.tree.map(
            lambda a, e: np.testing.assert_allclose(a, e, rtol=1e-9, atol=1e-12),
            transform(rollout(step))(C, XS),
            expected,
        )


def test_scan_under_vmap(step):
    batch = jnp.stack([C, 2 * C, 3 * C])
    ours, theirs = (jax.vmap(jax.grad(rollout(s)), in_axes=(0, None))(batch, XS) for s in (step, jax_step))
    np.testing.assert_allclose(ours, theirs, rtol=1e-9)


def test_scan_of_checkpointed_steps(step):
    ours = jax.jit(jax.grad(rollout(jax.checkpoint(step))))(C, XS)
    np.testing.assert_allclose(ours, jax.grad(rollout(jax_step))(C, XS), rtol=1e-9)


def test_while_loop(step):
    def run(step):
        return jax.lax.while_loop(lambda s: s[0] < 5, lambda s: (s[0] + 1, step(s[1], s[1])), (0, C))[1]

    np.testing.assert_allclose(run(step), run(jax_step))
    np.testing.assert_allclose(jax.jit(lambda: run(step))(), run(jax_step))

    def forward(step, c):
        return jax.lax.fori_loop(0, 3, lambda _, c: step(c, c), c)

    ours, theirs = (jax.jvp(lambda c, s=s: forward(s, c), (C,), (C,))[1] for s in (step, jax_step))
    np.testing.assert_allclose(ours, theirs)


def test_while_loop_that_torch_ends():
    proceed = torch2jax(lambda x: x.sum() < 10)
    assert jax.lax.while_loop(proceed, lambda x: x * 2, jnp.ones(2)).tolist() == [8.0, 8.0]


def test_cond_and_switch(step):
    def f(flag, c, s):
        return jax.lax.cond(flag, lambda c: s(c, c), lambda c: c * 2, c).sum()

    for flag in (True, False):
        np.testing.assert_allclose(jax.jit(lambda c, flag=flag: f(flag, c, step))(C), f(flag, C, jax_step))
        np.testing.assert_allclose(
            jax.grad(lambda c, flag=flag: f(flag, c, step))(C), jax.grad(lambda c, flag=flag: f(flag, c, jax_step))(C)
        )
    flags = jnp.array([True, False])
    batched = jax.vmap(lambda flag, c: f(flag, c, step))(flags, jnp.stack([C, C]))
    np.testing.assert_allclose(batched, [f(True, C, jax_step), f(False, C, jax_step)])


@pytest.mark.parametrize("policy", ["nothing_saveable", "everything_saveable", "dots_saveable"])
def test_checkpoint_policies(step, policy):
    f = jax.checkpoint(lambda c: step(step(c, c), c).sum(), policy=getattr(jax.checkpoint_policies, policy))
    expected = jax.grad(lambda c: jax_step(jax_step(c, c), c).sum())(C)
    np.testing.assert_allclose(jax.jit(jax.grad(f))(C), expected)


def test_donated_arguments():
    f = jax.jit(torch2jax(lambda x, y: (x.mul_(2), x + y)), donate_argnums=0)
    x, y = jnp.arange(1000.0), jnp.ones(1000)
    doubled, total = f(x + 0, y)
    np.testing.assert_array_equal(doubled, 2 * x)
    np.testing.assert_array_equal(total, 2 * x + 1)
    np.testing.assert_array_equal(y, jnp.ones(1000))


def test_a_function_without_inputs_or_without_outputs():
    assert jax.jit(torch2jax(lambda: torch.arange(3.0)))().tolist() == [0.0, 1.0, 2.0]
    assert torch2jax(lambda x: None)(jnp.ones(2)) is None
    assert jax.jit(torch2jax(lambda x: {"nothing": None}))(jnp.ones(2)) == {"nothing": None}


def test_custom_rules_around_it(step):
    @jax.custom_vjp
    def f(c):
        return step(c, c)

    f.defvjp(lambda c: (f(c), c), lambda c, g: (step(g, c),))
    np.testing.assert_allclose(jax.grad(lambda c: f(c).sum())(C), jax_step(jnp.ones(2), C))


def test_two_threads_call_one_jitted_function():
    f = jax.jit(torch2jax(lambda x: torch.sin(x) @ x.T))
    x = jnp.arange(2500.0).reshape(50, 50)
    expected, results = f(x), []

    def work():
        results.extend(f(x) for _ in range(50))

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive()
    assert len(results) == 100
    for result in results:
        np.testing.assert_array_equal(result, expected)
