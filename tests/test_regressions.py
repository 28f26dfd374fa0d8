"""Bugs that were found, each with the program that showed it."""

from __future__ import annotations

import copy
import functools
import gc
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn

from pytorch2jax import (
    ConversionError,
    InferenceError,
    RandomnessError,
    StateError,
    UnsupportedTransformError,
    convert_pytnn_to_jax,
    load_params,
    t2j,
    torch2jax,
)
from pytorch2jax._bound import BoundFunction

KEY = jax.random.key(0)


# -- what a function keeps -----------------------------------------------------------------------------------


def test_a_cache_of_the_user_is_not_filled_with_fake_tensors():
    cache = {}

    def f(x):
        if x.shape not in cache:
            cache[x.shape] = (torch.arange(x.shape[0]).to(x.dtype),)
        return x + cache[x.shape][0]

    assert torch2jax(f)(jnp.ones(3)).tolist() == [1.0, 2.0, 3.0]
    assert f(torch.ones(3)).tolist() == [1.0, 2.0, 3.0]


def test_an_lru_cache_is_not_filled_with_fake_tensors():
    @functools.lru_cache
    def positions(n):
        return torch.arange(n)

    f = torch2jax(lambda x: x + positions(x.shape[0]))
    assert f(jnp.ones(3)).tolist() == [1.0, 2.0, 3.0]
    assert positions(3).tolist() == [0, 1, 2]


def test_a_cache_that_cannot_be_emptied_is_an_error():
    class Keeper:
        mask = None

    keeper = Keeper()

    def f(x):
        if keeper.mask is None:
            keeper.mask = torch.arange(3.0)
        return x * keeper.mask

    with pytest.raises(InferenceError, match="keeps tensors from one call to the next"):
        torch2jax(f)(jnp.ones(3))


def test_objects_inside_of_a_module_are_put_back():
    class Box:
        mask = None

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.box, self.nested = Box(), [[None]]
            self.box.mask = None

        def forward(self, x):
            if self.box.mask is None:
                self.box.mask = torch.arange(3.0)
            if self.nested[0][0] is None:
                self.nested[0][0] = torch.arange(3.0)
            return x * self.box.mask + self.nested[0][0]

    apply, params = convert_pytnn_to_jax(Model())
    for _ in range(2):
        assert apply(params, jnp.ones(3, jnp.float32)).tolist() == [0.0, 2.0, 4.0]


def test_arguments_that_a_function_keeps_are_copies():
    kept = []
    f = torch2jax(lambda x: (kept.append(x), x * 2)[1])
    x = jnp.arange(5.0)
    f(x)
    address = x.unsafe_buffer_pointer()
    assert all(t.data_ptr() != address for t in kept)
    assert kept[-1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_a_module_that_streams_is_refused():
    class Streaming(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.LSTMCell(3, 4)
            self.hidden = None

        def forward(self, x):
            self.hidden = self.cell(x, self.hidden)
            return self.hidden[0]

    apply, params = convert_pytnn_to_jax(Streaming())
    with pytest.raises(StateError, match=r"hidden: the forward pass keeps here what it computes from its arguments"):
        apply(params, jnp.ones((2, 3), jnp.float32))


# -- writes and state on some calls only -----------------------------------------------------------------------


def test_a_write_that_depends_on_values():
    def f(x):
        if x.sum() > 100:
            x.add_(1)
        return x * 2

    g = jax.jit(torch2jax(f))
    g(jnp.zeros(3))
    c = jnp.full(3, 100.0)
    assert g(c).tolist() == [202.0] * 3
    assert c.tolist() == [100.0] * 3


def test_a_write_that_depends_on_earlier_calls_is_an_error():
    calls = []

    def f(x):
        calls.append(1)
        if len(calls) > 3:
            x[0] = 99.0
        return x * 2

    g = torch2jax(f)
    x = jnp.ones(3)
    g(x)
    g(x)
    with pytest.raises(StateError, match="wrote to an input in place"):
        g(x)
    x = jnp.ones(3)
    assert g(x).tolist() == [198.0, 2.0, 2.0]
    assert x.tolist() == [1.0] * 3


@pytest.mark.parametrize("write", [lambda m, x: setattr(m, "ema", x.mean()), lambda m, x: m.ema.copy_(x.mean())])
def test_state_that_changes_on_some_calls_only_is_an_error(write):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("n", torch.zeros((), dtype=torch.int64))
            self.register_buffer("ema", torch.zeros((), dtype=torch.float64))

        def forward(self, x):
            self.n += 1
            if self.n % 2 == 0:
                write(self, x)
            return x

    apply, params, state = convert_pytnn_to_jax(Model(), with_state=True)
    _, state = apply(params, state, jnp.ones(3))
    with pytest.raises(StateError):
        apply(params, state, jnp.ones(3))


def test_parameters_that_forward_changes_are_an_error():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))

        def forward(self, x):
            with torch.no_grad():
                self.w.mul_(0.5)
            return x * self.w

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match=r"params\.w: a parameter that the forward pass changes"):
        apply(params, jnp.ones(3))


def test_an_embedding_that_is_renormalised():
    model = nn.Embedding(5, 3, max_norm=0.5)
    with torch.no_grad():
        model.weight.fill_(1.0)
    apply, params = convert_pytnn_to_jax(model)
    out = apply(params, jnp.array([1, 2]))
    np.testing.assert_allclose(np.linalg.norm(out, axis=1), 0.5, rtol=1e-5)
    np.testing.assert_array_equal(params["weight"], 1.0)


# -- random numbers --------------------------------------------------------------------------------------------


def test_masks_do_not_depend_on_strides():
    f = torch2jax(lambda x: F.dropout(x.T, 0.5))
    x = jnp.arange(1.0, 13.0).reshape(3, 4)

    def h(x):
        return f(x, rng=KEY)

    np.testing.assert_array_equal(jax.jvp(h, (x,), (x,))[1], h(x))
    np.testing.assert_array_equal(jax.jit(jax.vmap(h))(x[None])[0], h(x))
    np.testing.assert_array_equal(jax.vmap(h, in_axes=-1, out_axes=-1)(x[..., None])[..., 0], h(x))
    np.testing.assert_array_equal(jnp.einsum("abcd,cd->ab", jax.jacrev(h)(x), x), h(x))
    np.testing.assert_array_equal(jnp.einsum("abcd,cd->ab", jax.jacfwd(h)(x), x), h(x))


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
            np.testing.assert_array_equal(jitted(x, KEY), expected)
    finally:
        stop.set()
        thread.join(timeout=60)
    assert not thread.is_alive()


# -- derivatives -----------------------------------------------------------------------------------------------


def test_inference_mode_around_a_gradient():
    gradient = jax.jit(jax.grad(lambda x: torch2jax(torch.sin)(x).sum()))
    expected = gradient(jnp.ones(1))
    with torch.inference_mode():
        np.testing.assert_array_equal(gradient(jnp.ones(1)), expected)
        np.testing.assert_array_equal(jax.grad(lambda x: torch2jax(torch.sin)(x).sum())(jnp.ones(1)), expected)


class OnceDifferentiable(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        return g * ctx.saved_tensors[0].exp()


class NumpyBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, g):
        return torch.from_numpy(g.detach().numpy() * np.exp(ctx.saved_tensors[0].detach().numpy()))


@pytest.mark.parametrize("function", [OnceDifferentiable, NumpyBackward])
def test_a_backward_that_cannot_be_differentiated_is_an_error_and_no_zero(function):
    f = torch2jax(lambda x: function.apply(x) + x.sin())
    x = jnp.zeros(2)
    np.testing.assert_allclose(jax.grad(lambda x: f(x).sum())(x), 2.0)
    for derivative in (
        lambda: jax.jvp(f, (x,), (x + 1,)),
        lambda: jax.jacfwd(f)(x),
        lambda: jax.hessian(lambda x: f(x).sum())(x),
        lambda: jax.grad(lambda x: jax.grad(lambda x: f(x).sum())(x).sum())(x),
    ):
        with pytest.raises((UnsupportedTransformError, RuntimeError), match=r"differentia"):
            derivative()


def test_operators_of_aten_themselves_have_right_second_derivatives():
    def fused(x):
        return torch.ops.aten.layer_norm(x, [4]).tanh() + torch.native_layer_norm(x, [4], None, None, 1e-5)[0]

    def plain(x):
        mean, variance = x.mean(-1, keepdims=True), x.var(-1, keepdims=True)
        normed = (x - mean) / jnp.sqrt(variance + 1e-5)
        return jnp.tanh(normed) + normed

    x = jax.random.normal(KEY, (2, 4))
    v = jnp.cos(x)
    f = torch2jax(fused)

    def second(f):
        def first(x):
            return jax.jvp(lambda x: (f(x) ** 2).sum() + f(x)[0, 0], (x,), (v,))[1]

        return jax.jvp(first, (x,), (v,))[1], jax.grad(first)(x)

    for ours, theirs in zip(second(f), second(plain), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-8)


def test_a_closure_over_the_original_module_is_an_error_and_no_zero():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.f = lambda x: x * self.w

        def forward(self, x):
            return self.f(x)

    model = Model()
    apply, params = convert_pytnn_to_jax(model)
    with pytest.raises(StateError, match=r"w: used by the forward pass from somewhere else"):
        apply(params, jnp.ones(3))


def test_parameters_in_plain_lists():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
            self.both = [self.a, self.b]

        def forward(self, x):
            return x * self.both[0] + self.both[1]

    apply, params = convert_pytnn_to_jax(Model())
    x = jnp.full(3, 2.0, jnp.float32)
    gradient = jax.grad(lambda p: apply(p, x).sum())(params)
    assert gradient["a"].tolist() == [2.0] * 3
    assert gradient["b"].tolist() == [1.0] * 3


# -- transformations -------------------------------------------------------------------------------------------


def test_disable_jit():
    with jax.disable_jit():
        np.testing.assert_allclose(torch2jax(torch.sin)(jnp.ones(2)), np.sin(1.0))
        np.testing.assert_allclose(jax.grad(lambda x: torch2jax(torch.sin)(x).sum())(jnp.ones(2)), np.cos(1.0))


def test_a_function_that_calls_itself_while_it_is_traced():
    def f(x):
        if x.shape[0] > 2:
            return x.sum()
        return x * float(g(jnp.ones(3)))

    g = torch2jax(f)
    done = []

    def call():
        try:
            done.append(g(jnp.ones(2)))
        except RuntimeError as error:  # it may be refused, but it may not hang
            done.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(timeout=60)
    assert done


def test_linear_transpose_of_a_linear_function():
    f = torch2jax(lambda x, y: 3 * x * y)
    y = jnp.array([1.0, 2.0])
    (out,) = jax.linear_transpose(lambda x: f(x, y), jnp.ones(2))(jnp.array([1.0, 10.0]))
    assert out.tolist() == [3.0, 60.0]


def test_python_integers_that_jax_wraps():
    f = torch2jax(lambda x, i: x * i)
    value, pull = jax.vjp(f, jnp.ones(2), 3)
    assert value.tolist() == [3.0, 3.0]
    assert pull(jnp.ones(2))[1].dtype == jax.dtypes.float0


def test_numpy_integers_inside_of_a_trace(x32):
    apply, params = convert_pytnn_to_jax(nn.Embedding(10, 3))
    ids = np.array([[1, 2]])
    np.testing.assert_array_equal(jax.jit(lambda p: apply(p, ids))(params), apply(params, ids))


def test_errors_of_the_user_are_raised_at_once():
    runs = []

    def f(x):
        runs.append(1)
        if len(runs) > 1:
            raise ValueError("no")
        return x

    with pytest.raises(RuntimeError, match="no"):
        jax.vmap(torch2jax(f))(jnp.ones((2, 2)))
    assert len(runs) == 2


# -- memory ----------------------------------------------------------------------------------------------------


def count():
    gc.collect()
    return sum(type(o) is BoundFunction for o in gc.get_objects())


def test_models_that_were_called_are_freed():
    x = jnp.ones((1, 4), jnp.float32)

    def use():
        apply, params = convert_pytnn_to_jax(nn.Linear(4, 4))
        apply(params, x)
        jax.grad(lambda p: apply(p, x).sum())(params)
        jax.vmap(lambda x: apply(params, x))(x)

    use()
    before = count()
    for _ in range(5):
        use()
    assert count() <= before + 1


def test_programs_for_static_values_are_bounded():
    from pytorch2jax import _function

    f = torch2jax(lambda x, n: x * n)
    before = count()
    for n in range(_function._KEPT_PROGRAMS + 50):
        jax.eval_shape(lambda x, n=n: f(x, n), jnp.ones(()))
    assert count() <= before + _function._KEPT_PROGRAMS + 5


def test_load_params_into_a_model_that_shares_its_memory():
    model = nn.Linear(3, 3)
    _, params = convert_pytnn_to_jax(model, copy=False)
    load_params(model, jax.tree.map(lambda p: p * 2, params))
    assert torch.isfinite(model.weight).all()


# -- a second reading --------------------------------------------------------------------------------------------


class Holder:
    pass


@pytest.mark.parametrize("where", ["object", "nested list"])
def test_parameters_in_objects_and_nested_lists(where):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 3))
            self.holder = Holder()
            self.holder.w = self.w if where == "object" else [[self.w]]

        def forward(self, x):
            return x @ (self.holder.w if where == "object" else self.holder.w[0][0])

    apply, params = convert_pytnn_to_jax(Model())
    x = jnp.arange(3.0, dtype=jnp.float32)
    assert apply(params, x).tolist() == [3.0] * 3
    assert jax.grad(lambda p: apply(p, x).sum())(params)["w"].tolist() == [[0.0] * 3, [1.0] * 3, [2.0] * 3]


def test_parameters_in_tuples_are_refused():
    model = nn.Linear(3, 3)
    model.both = (model.weight, model.bias)
    with pytest.raises(ConversionError, match=r"both\[0\]: a parameter or buffer in a tuple"):
        convert_pytnn_to_jax(model)


@pytest.mark.parametrize("override", ["train", "eval"])
def test_train_and_eval_that_do_more_than_setting_flags(override):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.temperature = nn.Linear(3, 3), 1.0

        def forward(self, x):
            return self.linear(x) * self.temperature

    def train(self, mode=True):
        nn.Module.train(self, mode)
        self.temperature = 1.0 if mode else 0.1
        return self

    def evaluate(self):
        self.temperature = 0.1
        return nn.Module.eval(self)

    setattr(Model, override, train if override == "train" else evaluate)
    model = Model()
    apply, params = convert_pytnn_to_jax(model)
    x = torch.ones(2, 3)
    for _ in range(2):
        training = apply(params, jnp.ones((2, 3), jnp.float32), train=True)
        np.testing.assert_allclose(training, model.linear(x).detach(), rtol=1e-6)
        evaluation = apply(params, jnp.ones((2, 3), jnp.float32))
        np.testing.assert_allclose(evaluation, 0.1 * model.linear(x).detach(), rtol=1e-6)


def test_weights_that_are_fused_when_training_ends():
    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.fused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3)), None

        def train(self, mode=True):
            super().train(mode)
            self.fused = None if mode else self.a * self.b
            return self

        def forward(self, x):
            return x * (self.a * self.b if self.fused is None else self.fused)

    apply, params = convert_pytnn_to_jax(Fused().eval())
    x = jnp.full(3, 2.0, jnp.float32)
    assert apply(jax.tree.map(lambda p: 3 * p, params), x).tolist() == [18.0] * 3
    assert jax.grad(lambda p: apply(p, x).sum())(params)["a"].tolist() == [2.0] * 3


def test_what_was_computed_from_parameters_before_conversion_is_refused():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3))
            self.doubled = self.w * 2

        def forward(self, x):
            return x * self.doubled

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match="doubled: used by the forward pass"):
        apply(params, jnp.ones(3))


@pytest.mark.parametrize("value", [lambda: torch.zeros(()), lambda: np.zeros(1)])
def test_plain_tensors_and_arrays_that_are_changed_in_place(value):
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.n = nn.Linear(3, 3), value()

        def forward(self, x):
            self.n += 1
            return self.linear(x) * float(self.n.item())

    apply, params = convert_pytnn_to_jax(Counts())
    x = jnp.ones((2, 3), jnp.float32)
    if isinstance(value(), torch.Tensor):
        with pytest.raises(StateError, match=r"n: a tensor that the forward pass writes to and that is no buffer"):
            apply(params, x)
    else:  # it is put back
        first = apply(params, x)
        np.testing.assert_array_equal(apply(params, x), first)


def test_forward_mode_respects_no_grad():
    def f(w):
        with torch.no_grad():
            frozen = w * w
        return (frozen * w).sum()

    g, w = torch2jax(f), jnp.array([2.0, 3.0])
    assert jax.grad(g)(w).tolist() == [4.0, 9.0]
    assert jax.jacfwd(g)(w).tolist() == [4.0, 9.0]
    assert jnp.diag(jax.hessian(g)(w)).tolist() == [0.0, 0.0]
    batch = jnp.stack([w, 2 * w])
    np.testing.assert_array_equal(jax.vmap(jax.jacfwd(g))(batch), batch**2)


@pytest.mark.parametrize(
    "write", [lambda g: g.data.mul_(2), lambda g: g.mul_(2), lambda g: np.multiply(g.numpy(), 2, out=g.numpy())]
)
def test_a_backward_that_writes_to_its_cotangent(write):
    class Writes(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x * 2

        @staticmethod
        def backward(ctx, g):
            write(g)
            return g

    cotangent = jnp.ones(3)
    _, pull = jax.vjp(torch2jax(lambda x: Writes.apply(x)), jnp.ones(3))
    for _ in range(2):
        assert pull(cotangent)[0].tolist() == [2.0] * 3
    assert cotangent.tolist() == [1.0] * 3


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

    np.testing.assert_array_equal(gradient(KEY), gradient(KEY))
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


def test_a_closure_is_seen_where_values_are_read_too():
    base = nn.Linear(3, 3)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.base = base
            self.fn = lambda z: base(z)

        def forward(self, x):
            return x if x.abs().max().item() > 1e6 else self.fn(x)

    apply, params = convert_pytnn_to_jax(Model())
    with pytest.raises(StateError, match="used by the forward pass from somewhere else"):
        apply(params, jnp.ones((1, 3), jnp.float32))


def test_a_batch_norm_that_is_called_twice_in_one_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    x = jax.random.normal(KEY, (8, 3))

    def two(params):
        first, middle = apply(params, state, x, train=True)
        second, _ = apply(params, middle, 2 * x)
        return (first**3).sum() + (second**2).sum()

    gradient = jax.jit(jax.grad(two))(params)
    tensor = torch.from_numpy(np.array(x))
    first = model.train()(tensor)
    ((first**3).sum() + (model.eval()(2 * tensor) ** 2).sum()).backward()
    np.testing.assert_allclose(gradient["0"]["weight"], model[0].weight.grad, rtol=1e-8)
    np.testing.assert_allclose(jax.jacfwd(two)(params)["0"]["weight"], model[0].weight.grad, rtol=1e-8)
    carried = jax.lax.scan(lambda s, x: apply(params, s, x, train=True)[::-1], state, jnp.stack([x, x]))[0]
    assert carried["1"]["num_batches_tracked"] == 2


def test_copies_and_views_of_nnx_modules():
    from flax import nnx

    from pytorch2jax import convert_pytnn_to_equinox, convert_pytnn_to_nnx

    module = convert_pytnn_to_nnx(nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)))
    x = jnp.ones((20, 3), jnp.float32)
    np.testing.assert_array_equal(copy.deepcopy(module)(x), module(x))
    assert (np.asarray(nnx.view(module, deterministic=False)(x, rngs=KEY)) == 0).any()
    plain = convert_pytnn_to_nnx(nn.Linear(3, 3))
    plain(x, train=True, rngs=nnx.Rngs(params=0))  # draws nothing
    with pytest.raises(RandomnessError, match="expected a stream `dropout`"):
        module(x, train=True, rngs=nnx.Rngs(params=0))
    copy.deepcopy(convert_pytnn_to_equinox(nn.Linear(3, 3)))(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
def test_reentrant_checkpoints_have_a_gradient():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh()).double()

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.model, x * 1.0, use_reentrant=True)

    apply, params = convert_pytnn_to_jax(Checkpointed())
    plain, inner = convert_pytnn_to_jax(model)
    x = jax.random.normal(KEY, (2, 3))
    for _ in range(2):
        gradient = jax.grad(lambda p, x: (apply(p, x) ** 2).sum(), argnums=(0, 1))(params, x)
        expected = jax.grad(lambda p, x: (plain(p, x) ** 2).sum(), argnums=(0, 1))(inner, x)
        np.testing.assert_allclose(gradient[1], expected[1])
        np.testing.assert_allclose(gradient[0]["model"]["0"]["weight"], expected[0]["0"]["weight"])


# -- threads -------------------------------------------------------------------------------------------------


def test_forward_mode_in_several_threads():
    """Torch counts the levels of forward mode in a global variable; a thread lost its tangents to another one."""

    def fn(x):
        for _ in range(20):
            x = torch.tanh(x @ x)
        return x.sum()

    f = torch2jax(fn)
    push = jax.jit(lambda x: jax.jvp(f, (x,), (x,))[1])
    arrays = [jnp.linspace(0.1, 0.2 * i, 100).reshape(10, 10) for i in range(1, 5)]
    expected = [float(push(x)) for x in arrays]
    wrong = []

    def work(i):
        for _ in range(50):
            if abs(float(push(arrays[i])) - expected[i]) > 1e-9 * abs(expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong


# -- torch's operator database -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [3, 500_000])
def test_zeros_without_memory(size):
    """Torch has tensors of zeros that lie nowhere; reading their address ended the process."""
    f = torch2jax(torch.abs)
    x = jnp.linspace(-1.0, 1.0, size)

    def pull(x, c):
        return jax.vjp(f, x)[1](c)[0]

    def twice(x, c):
        return jax.vjp(pull, x, c)[1](c)

    for run in (twice, jax.jit(twice)):
        by_primals, by_cotangents = run(x, jnp.cos(x))
        assert by_primals.unsafe_buffer_pointer() != 0
        np.testing.assert_array_equal(by_primals, np.zeros(size))
        np.testing.assert_allclose(by_cotangents, np.sign(x) * np.cos(x))


def test_zeros_without_memory_become_an_array():
    x, c = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
    gradient = torch.autograd.grad(x.abs(), x, c, create_graph=True)[0]
    zeros = torch.autograd.grad(gradient.sum(), x)[0]
    assert zeros.data_ptr() == 0
    array = t2j(zeros)
    assert array.unsafe_buffer_pointer() != 0
    assert array.tolist() == [0.0, 0.0, 0.0]


def test_calls_without_results_run():
    """XLA left them out: a function that returned nothing on the values that it was tried on returned nothing ever."""
    f = torch2jax(torch.argwhere)  # tried on zeros
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected torch.int64\[0, 1\].*got torch.int64\[2, 1\]"):
        jax.jit(f)(jnp.array([1, 0, 2]))
    assert jax.jit(f)(jnp.zeros(3, jnp.int64)).shape == (0, 1)
    assert jax.jit(torch2jax(lambda x: x[:0]))(jnp.ones(3)).shape == (0,)


def test_after_torch_has_forbidden_to_set_its_flags():
    """As `torch.testing` does. Every call was then tried on made-up values, and second order failed."""
    program = """
import jax, jax.numpy as jnp, torch
torch.backends.disable_global_flags()
from pytorch2jax import torch2jax
f = torch2jax(lambda q: torch.nn.functional.scaled_dot_product_attention(q, q, q))
calls = []
g = torch2jax(lambda x: calls.append(type(x).__name__) or torch.linalg.cholesky(x))
assert jax.eval_shape(g, jnp.eye(3)).shape == (3, 3)
assert calls == ["FakeTensor"], calls
assert jax.jacfwd(jax.grad(lambda q: f(q).sum()))(jnp.ones((1, 2, 3))).shape == (1, 2, 3, 1, 2, 3)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_saved_statistics_have_no_derivative():
    """The mean and scale that torch's normalisations return besides have none in torch, whatever the order."""
    x, c = torch.randn(4, 3, dtype=torch.float64), [torch.randn(s, dtype=torch.float64) for s in ((4, 3), (3,), (3,))]

    def norm(x):
        return torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)

    leaf = x.clone().requires_grad_()
    first = torch.autograd.grad(norm(leaf)[0], leaf, c[0], create_graph=True)[0]
    expected = torch.autograd.grad(first, leaf, torch.cos(x))[0]
    cotangents = tuple(jnp.array(t.numpy()) for t in c)
    f = torch2jax(norm)

    def pull(x):
        return jax.vjp(f, x)[1](cotangents)[0]

    got = jax.vjp(pull, jnp.array(x.numpy()))[1](jnp.cos(x.numpy()))[0]
    np.testing.assert_allclose(got, expected, rtol=1e-8)


@pytest.mark.filterwarnings("ignore:Sparse ", "ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.to_sparse().to_dense() * 2,
        lambda x: torch.sparse.mm(x.to_sparse(), x),
        lambda x: x.to_sparse_csr() @ x,
        lambda x: torch.sparse_coo_tensor(torch.tensor([[0, 1], [1, 2]]), x[0, :2], (3, 3)).to_dense() * x,
    ],
    ids=["to_sparse", "sparse.mm", "csr", "of a part of x"],
)
def test_sparse_tensors_inside(fn):
    """They have no memory of their own that could be asked for, which ended each call with an error."""
    x = jnp.array([[0.0, 2.0, 0.0], [1.0, 0.0, 3.0], [0.0, 0.0, 4.0]])
    tensor = torch.from_numpy(np.array(x)).requires_grad_()
    expected = fn(tensor)
    (gradient,) = torch.autograd.grad((expected**2).sum(), tensor)
    f = torch2jax(fn)

    def loss(x):
        return (f(x) ** 2).sum()

    for run in (lambda f: f, jax.jit):
        np.testing.assert_allclose(run(f)(x), expected.detach())
        np.testing.assert_allclose(run(jax.grad(loss))(x), gradient)
    np.testing.assert_allclose(jax.vmap(f)(jnp.stack([x, 2 * x]))[0], expected.detach())


@pytest.mark.parametrize("index", [0, 2, -1])
def test_gradients_of_a_batch_of_select_scatter(index):
    """Torch's, through its own `vmap`, are too large by the length of the axis."""
    f = torch2jax(lambda x, y: torch.select_scatter(x, y, 1, index) * x)
    x, y = jax.random.normal(KEY, (3, 2, 4)), jax.random.normal(KEY, (3, 2))

    def gradient(x, y):
        return jax.grad(lambda x, y: (f(x, y) ** 3).sum(), argnums=(0, 1))(x, y)

    expected = jax.tree.map(lambda *rows: jnp.stack(rows), *map(gradient, x, y))
    np.testing.assert_allclose(jax.vmap(gradient)(x, y)[0], expected[0])
    np.testing.assert_allclose(jax.vmap(gradient)(x, y)[1], expected[1])


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("axis", [0, 1])
def test_examples_of_a_loop_have_memory_of_their_own(axis):
    """They were views of the batch, of which `as_strided` with an offset saw the first example."""

    def scatter(x, y):
        return torch.as_strided_scatter(x, y, (2,), (1,), 1)

    x, y = jnp.arange(12.0).reshape(3, 4), jnp.array([-1.0, -2.0])
    batch = x if axis == 0 else x.T
    out = jax.vmap(torch2jax(scatter), in_axes=(axis, None))(batch, y)
    expected = np.stack([scatter(torch.tensor(row), torch.tensor(np.array(y))) for row in np.array(x)])
    np.testing.assert_array_equal(out, expected)


def test_an_output_argument_that_is_written_to_when_nobody_watches():
    """Torch's `matrix_rank` leaves `out` as it is while its operators are watched, as they are at trace time."""
    f = torch2jax(lambda x, out: torch.linalg.matrix_rank(x, out=out))
    x, out = jnp.eye(3), jnp.zeros((), jnp.int64)
    for run in (f, jax.jit(f)):
        assert run(x, out) == 3
        assert out == 0


def test_second_derivatives_of_an_empty_normalisation():
    """Torch takes an empty vector for a batch without examples."""
    empty = jnp.zeros(0)
    f = torch2jax(lambda x, mean, var: F.batch_norm(x, mean, var))
    assert jax.hessian(lambda x: f(x, empty, empty).sum())(empty).shape == (0, 0)
