"""Random numbers: from the key that was passed, the same in a forward and its gradient."""

from __future__ import annotations

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import assert_same_numbers
from torch import nn

from pytorch2jax import LoopWarning, RandomnessError, convert_pytnn_to_jax, torch2jax

pytestmark = pytest.mark.usefixtures("tape")

MODELS = [
    lambda: nn.Dropout(0.5),
    lambda: nn.Sequential(nn.Linear(50, 50), nn.Dropout(0.3), nn.AlphaDropout(0.3)),
    lambda: nn.RReLU(0.1, 0.9),
    lambda: Noise(),
    lambda: nn.TransformerEncoderLayer(50, 2, 16, 0.5, batch_first=True),
]
X = jnp.cos(jnp.arange(200.0, dtype=jnp.float32)).reshape(4, 50)
KEY = jax.random.key(3)


class Noise(nn.Module):
    def forward(self, x):
        keep = torch.multinomial(torch.ones(2), 1).to(x.dtype)
        return x * torch.randn_like(x) + keep + torch.rand(1)


@pytest.fixture(params=range(len(MODELS)))
def model(request):
    torch.manual_seed(0)
    return convert_pytnn_to_jax(MODELS[request.param]())


def test_same_key_same_numbers(model):
    apply, params = model
    first = apply(params, X, rng=KEY, train=True)
    assert_same_numbers(apply(params, X, rng=KEY, train=True), first)
    assert_same_numbers(jax.jit(lambda k: apply(params, X, rng=k, train=True))(KEY), first)
    raw = jax.random.key_data(KEY)
    assert_same_numbers(apply(params, X, rng=raw, train=True), first)
    other = apply(params, X, rng=jax.random.key(4), train=True)
    assert not np.array_equal(other, first)


def test_torchs_generator_is_left_alone(model):
    apply, params = model
    before = torch.get_rng_state()
    apply(params, X, rng=KEY, train=True)
    jax.grad(lambda x: apply(params, x, rng=KEY, train=True).sum())(X)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_gradient_sees_the_numbers_of_the_forward(model):
    """Along any line the function with a fixed key is what its gradient says: compare with differences."""
    apply, params = model
    x, v = X.astype(jnp.float64), jnp.sin(jnp.arange(200.0)).reshape(4, 50)
    params = jax.tree.map(lambda p: p.astype(jnp.float64), params)

    def f(x):
        return (apply(params, x, rng=KEY, train=True).astype(jnp.float64) ** 2).sum()

    expected = (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6
    for gradient in (jax.grad(f), jax.jit(jax.grad(f)), jax.jit(jax.grad(jax.checkpoint(f)))):
        np.testing.assert_allclose(jnp.vdot(gradient(x), v), expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(jax.jvp(f, (x,), (v,))[1], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
def test_a_batch_of_keys_gives_what_a_loop_gives(model):
    apply, params = model
    keys = jax.random.split(KEY, 3)
    batched = jax.vmap(lambda k: apply(params, X, rng=k, train=True))(keys)
    np.testing.assert_allclose(batched, [apply(params, X, rng=k, train=True) for k in keys], rtol=1e-6)


def test_a_batch_with_one_key_shares_its_numbers():
    apply, params = convert_pytnn_to_jax(nn.Dropout(0.5))
    xs = jnp.ones((3, 100), jnp.float32)
    batched = jax.vmap(lambda x: apply(params, x, rng=KEY, train=True))(xs)
    assert_same_numbers(batched, jnp.stack([apply(params, x, rng=KEY, train=True) for x in xs]))


def test_scan_over_keys(model):
    apply, params = model
    keys = jax.random.split(KEY, 3)
    out = jax.lax.scan(lambda c, k: (c, apply(params, X, rng=k, train=True)), 0, keys)[1]
    np.testing.assert_allclose(out, [apply(params, X, rng=k, train=True) for k in keys], rtol=1e-6)


def test_no_key_is_an_error(model):
    apply, params = model
    with pytest.raises(RandomnessError, match=r"draws random numbers.*rng=jax.random.key"):
        apply(params, X, train=True)
    with pytest.raises(ValueError, match="draws random numbers"):
        jax.jit(lambda p, x: apply(p, x, train=True))(params, X)


@pytest.mark.parametrize("bad", [0, "key", jnp.ones(2), jax.random.split(KEY, 2), np.zeros((2, 2), np.uint32)])
def test_what_is_no_key(bad):
    apply, params = convert_pytnn_to_jax(nn.Dropout(0.5))
    with pytest.raises(RandomnessError, match="rng: expected one JAX key"):
        apply(params, X, rng=bad, train=True)


def test_a_model_that_draws_nothing_needs_no_key():
    apply, params = convert_pytnn_to_jax(nn.TransformerEncoderLayer(50, 2, 16, 0.5, batch_first=True))
    assert_same_numbers(apply(params, X), apply(params, X, rng=KEY))
    apply, params = convert_pytnn_to_jax(nn.TransformerEncoderLayer(50, 2, 16, 0.0, batch_first=True))
    apply(params, X, train=True)


def test_two_kinds_of_keys():
    apply, params = convert_pytnn_to_jax(nn.Dropout(0.5))
    a = apply(params, X, rng=jax.random.key(0, impl="rbg"), train=True)
    b = apply(params, X, rng=jax.random.key(1, impl="rbg"), train=True)
    assert not np.array_equal(a, b)


def test_plain_functions_draw_from_torch_or_from_a_key():
    f = torch2jax(lambda x: torch.rand(3) * x)
    x = jnp.ones(3)
    assert not np.array_equal(f(x), f(x))
    torch.manual_seed(5)
    first = f(x)
    torch.manual_seed(5)
    np.testing.assert_array_equal(f(x), first)
    np.testing.assert_array_equal(f(x, rng=KEY), f(x, rng=KEY))
    both = jax.jit(lambda x: (f(x), f(x)))(x)
    assert not np.array_equal(*both)
    steps = jax.jit(lambda x: jax.lax.scan(lambda c, _: (c, f(c)), x, None, length=4)[1])(x)
    assert len({float(s[0]) for s in steps}) == 4
    batch = jax.vmap(f)(jnp.ones((4, 3)))
    assert len({float(s[0]) for s in batch}) == 4


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_a_plain_functions_gradient_sees_its_own_numbers(wrap):
    f = torch2jax(lambda x: F.dropout(x, 0.5) * 3)
    x = jnp.ones(1000)
    value, pull = jax.vjp(wrap(f), x)
    np.testing.assert_array_equal(pull(jnp.ones(1000))[0], value)
    gradient, out = jax.grad(lambda x: (lambda y: (y.sum(), y))(wrap(f)(x)), has_aux=True)(x)
    np.testing.assert_array_equal(gradient, out)


def test_a_function_with_an_argument_of_its_own_called_rng():
    f = torch2jax(lambda x, rng: x * rng)
    assert f(jnp.ones(2), rng=3).tolist() == [3.0, 3.0]


def test_a_batched_key_is_said_to_be_a_loop():
    apply, params = convert_pytnn_to_jax(nn.Dropout(0.5))
    with pytest.warns(LoopWarning, match="Dropout"):
        jax.vmap(lambda k: apply(params, X, rng=k, train=True))(jax.random.split(KEY, 2))


def test_without_a_key_a_checkpoint_would_see_other_numbers_and_is_refused():
    f = torch2jax(lambda x: F.dropout(x, 0.5))
    with pytest.raises(NotImplementedError, match=r"checkpoint.*random numbers of torch without a JAX key.*rng=key"):
        jax.grad(lambda x: jax.checkpoint(f)(x).sum())(jnp.ones(3))
    with_key = jax.checkpoint(lambda x: f(x, rng=KEY))
    value, pull = jax.vjp(with_key, jnp.ones(100))
    np.testing.assert_array_equal(pull(jnp.ones(100))[0], value)


# -- found in use -----------------------------------------------------------------------------------------------


def test_masks_do_not_depend_on_strides():
    f = torch2jax(lambda x: F.dropout(x.T, 0.5))
    x = jnp.arange(1.0, 13.0).reshape(3, 4)

    def h(x):
        return f(x, rng=KEY)

    assert_same_numbers(jax.jvp(h, (x,), (x,))[1], h(x))
    assert_same_numbers(jax.jit(jax.vmap(h))(x[None])[0], h(x))
    assert_same_numbers(jax.vmap(h, in_axes=-1, out_axes=-1)(x[..., None])[..., 0], h(x))
    assert_same_numbers(jnp.einsum("abcd,cd->ab", jax.jacrev(h)(x), x), h(x))
    assert_same_numbers(jnp.einsum("abcd,cd->ab", jax.jacfwd(h)(x), x), h(x))


@pytest.mark.exhaustive
def test_a_transformer_layer_in_train_mode_in_every_mode():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.3, activation="gelu", batch_first=True).double()
    apply, params = convert_pytnn_to_jax(layer)
    x = jax.random.normal(KEY, (2, 3, 8))
    v = jnp.cos(x)

    def f(x):
        return (jnp.sin(x) * apply(params, x, rng=KEY, train=True) ** 3).sum()

    expected = (f(x + 1e-6 * v) - f(x - 1e-6 * v)) / 2e-6
    np.testing.assert_allclose(jax.jvp(f, (x,), (v,))[1], expected, rtol=1e-6)
    np.testing.assert_allclose(jnp.vdot(jax.grad(f)(x), v), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(f)(x[None]), f(x)[None], rtol=1e-10)
    second = (jax.grad(f)(x + 1e-6 * v) - jax.grad(f)(x - 1e-6 * v)) / 2e-6
    np.testing.assert_allclose(jax.jvp(jax.grad(f), (x,), (v,))[1], second, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("draw", [lambda: float(np.random.rand()), lambda: __import__("random").random()])
def test_numpy_and_python_draw_from_the_key_too(draw):
    g = torch2jax(lambda x: x * draw())
    before = np.random.get_state()[1].copy()
    assert g(jnp.ones(()), rng=KEY) == g(jnp.ones(()), rng=KEY)
    value, gradient = jax.value_and_grad(g)(jnp.ones(()))
    assert value == gradient
    np.testing.assert_array_equal(np.random.get_state()[1], before)


def test_a_generator_of_its_own_is_refused():
    generator = torch.Generator()
    f = torch2jax(lambda x: x * torch.rand(3, generator=generator))
    with pytest.raises(RandomnessError, match=r"torch.Generator of its own"):
        f(jnp.ones(3), rng=KEY)


def test_drawing_on_some_values_only_is_an_error():
    f = torch2jax(lambda x: x * torch.rand_like(x) if x.sum() > 0 else x * 2)
    f(-jnp.ones(2))
    with pytest.raises(RandomnessError, match="draws random numbers on these values"):
        f(jnp.ones(2))


def test_tracing_in_another_thread_does_not_disturb_the_numbers():
    draw = torch2jax(lambda x: x * torch.rand(50))
    jitted = jax.jit(lambda x, k: draw(x, rng=k))
    x = jnp.ones(50)
    expected = jitted(x, KEY)
    stop = threading.Event()

    def trace():
        n = 1
        while not stop.is_set():
            torch2jax(lambda x: x * (torch.rand(1).item() > 2))(jnp.ones(n))
            n += 1

    thread = threading.Thread(target=trace)
    thread.start()
    try:
        for _ in range(100):
            assert_same_numbers(jitted(x, KEY), expected)
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()


def test_randomness_in_a_backward_comes_from_the_key():
    class Noisy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            return g * torch.rand_like(g)

    f = torch2jax(lambda x: Noisy.apply(F.dropout(x, 0.5)))
    before = torch.get_rng_state()

    def gradient(key):
        return jax.grad(lambda x: f(x, rng=key).sum())(jnp.ones(50))

    assert_same_numbers(gradient(KEY), gradient(KEY))
    assert not np.array_equal(gradient(KEY), gradient(jax.random.key(1)))
    assert torch.equal(torch.get_rng_state(), before)


def test_checkpointed_dropout_on_a_transposed_tensor():
    def segment(h):
        return F.dropout(h.t(), 0.5) * h.t()

    def plain(x):
        return segment(x).sum(1)

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(segment, x, use_reentrant=False).sum(1)

    x = jnp.cos(jnp.arange(12.0)).reshape(3, 4)
    wrapped = [torch2jax(f) for f in (plain, checkpointed)]
    ours, theirs = (jax.grad(lambda x, f=f: (f(x, rng=KEY) ** 2).sum())(x) for f in wrapped)
    np.testing.assert_allclose(ours, theirs)
