"""No JAX array changes, whatever torch writes to."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch import nn

from pytorch2jax import StateError, convert_pytnn_to_jax, torch2jax


def _numpy_write(x):
    x.numpy()[0] = 7.0
    return x * 2


def _data_write(x):
    x.data.add_(1)
    return x * 2


def _out_argument(x):
    torch.add(x, 1, out=x)
    return x * 2


def _set_item(x):
    x[0] = 5.0
    return x * 2


def _view_write(x):
    x.view(-1)[1:].zero_()
    return x * 2


def _detached_write(x):
    x.detach().mul_(3)
    return x * 2


def _foreach_write(x):
    torch._foreach_add_([x], 1.0)
    return x * 2


def _copy(x):
    x.copy_(torch.zeros_like(x))
    return x * 2


def _read_and_write(x):
    if x.sum().item() > -1e9:
        x.add_(1)
    return x * 2


def _batch_statistics(x):
    nn.functional.batch_norm(torch.ones(4, 3, dtype=x.dtype), x, x.abs() + 1, training=True)
    return x * 2


WRITERS = [
    lambda x: x.add_(1),
    lambda x: x.mul_(2).sin_(),
    lambda x: nn.functional.relu(x - 1, inplace=True) + x.relu_(),
    _numpy_write,
    _data_write,
    _out_argument,
    _set_item,
    _view_write,
    _detached_write,
    _foreach_write,
    _copy,
    _read_and_write,
    _batch_statistics,
]


NOT_DIFFERENTIABLE = (_numpy_write, _out_argument, _batch_statistics)
SINGLE = (_numpy_write, _read_and_write, _batch_statistics)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_the_callers_array_stays(write, dtype):
    f = torch2jax(write)
    a = jnp.arange(1.0, 4.0, dtype=dtype)
    expected = write(torch.arange(1.0, 4.0, dtype=torch.float32 if dtype == jnp.float32 else torch.float64))
    for call in (f, jax.jit(f), lambda x: jax.vmap(f)(x[None])[0] if write not in SINGLE else f(x)):
        np.testing.assert_allclose(call(a), expected, rtol=1e-6)
        np.testing.assert_array_equal(a, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("write", [w for w in WRITERS if w not in NOT_DIFFERENTIABLE])
def test_the_callers_array_stays_under_grad(write):
    f = torch2jax(write)
    a = jnp.arange(1.0, 4.0)
    jax.grad(lambda x: f(x).sum())(a)
    jax.jit(jax.grad(lambda x: f(x).sum()))(a)
    jax.jvp(f, (a,), (a,))
    np.testing.assert_array_equal(a, [1.0, 2.0, 3.0])


@pytest.mark.parametrize("size", [3, 100_000])
def test_xlas_intermediates_stay(size):
    f = torch2jax(lambda x: x.mul_(10))

    @jax.jit
    def program(a):
        b = a + 1
        return f(b), b, f(b) + b

    a = jnp.ones(size)
    ten_times, b, eleven_times = program(a)
    np.testing.assert_array_equal(b, np.full(size, 2.0))
    np.testing.assert_array_equal(ten_times, np.full(size, 20.0))
    np.testing.assert_array_equal(eleven_times, np.full(size, 22.0))


def test_the_same_array_twice():
    f = torch2jax(lambda x, y: (x.add_(1), y.mul_(3)))
    a = jnp.arange(3.0)
    x, y = jax.jit(f)(a, a)
    np.testing.assert_array_equal(x, a + 1)
    np.testing.assert_array_equal(y, a * 3)


def test_outputs_that_alias_inputs_are_arrays_of_their_own():
    f = torch2jax(lambda x: (x, x.view(-1), x[:1]))
    a = jnp.arange(4.0).reshape(2, 2)
    for outputs in (f(a), jax.jit(f)(a)):
        pointers = {o.unsafe_buffer_pointer() for o in outputs} | {a.unsafe_buffer_pointer()}
        assert len(pointers) == 4
    # They outlive the input.
    outputs = jax.jit(f, donate_argnums=0)(a + 0)
    np.testing.assert_array_equal(outputs[0], a)


def test_constants_in_loops_and_carries_stay():
    f = torch2jax(lambda x, c: x.add_(c.mul_(2)))
    c = jnp.ones(3)
    total, _ = jax.lax.scan(lambda x, _: (f(x, c), None), jnp.zeros(3), None, length=4)
    np.testing.assert_array_equal(total, [8.0] * 3)
    np.testing.assert_array_equal(c, [1.0] * 3)


def test_only_what_is_written_is_copied():
    """The other inputs arrive at the address that XLA has them at."""
    seen = {}

    def f(x, y):
        if not isinstance(x, torch._subclasses.FakeTensor):
            seen.update(x=x.data_ptr(), y=y.data_ptr())
        return x.add_(1) + y

    x, y = jnp.ones(64), jnp.ones(64)
    jax.jit(torch2jax(f))(x, y).block_until_ready()
    assert seen["y"] == y.unsafe_buffer_pointer()
    assert seen["x"] != x.unsafe_buffer_pointer()


def test_buffers_and_parameters_stay():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))
            self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x):
            self.calls += 1
            return self.norm(x * self.weight)

    apply, params, state = convert_pytnn_to_jax(Model(), with_state=True)
    before = jax.tree.map(np.array, (params, state))
    x = jnp.cos(jnp.arange(12.0, dtype=jnp.float32)).reshape(4, 3)
    for call in (apply, jax.jit(apply, static_argnames="train")):
        _, new_state = call(params, state, x, train=True)
        assert new_state["calls"] == 1
        assert new_state["norm"]["num_batches_tracked"] == 1
        jax.tree.map(np.testing.assert_array_equal, (params, state), before)


def test_what_torch_does_to_its_model_does_not_reach_copied_parameters():
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    apply, params, state = convert_pytnn_to_jax(model, with_state=True)
    x = jnp.ones((4, 3), dtype=jnp.float32)
    before = apply(params, state, x)[0]
    with torch.no_grad():
        model.train()(torch.randn(4, 3))
        for tensor in model.state_dict().values():
            tensor.add_(1)
    model[0] = nn.Identity()
    np.testing.assert_array_equal(apply(params, state, x)[0], before)


def test_shared_parameters_follow_torch_as_documented():
    model = nn.Linear(16, 16)
    _, params = convert_pytnn_to_jax(model, copy=False)
    assert params["weight"].unsafe_buffer_pointer() == model.weight.data_ptr()
    with torch.no_grad():
        model.weight.zero_()
    np.testing.assert_array_equal(params["weight"], 0)


# -- found in use -----------------------------------------------------------------------------------------------


def test_arguments_that_a_function_keeps_are_copies():
    kept = []
    f = torch2jax(lambda x: (kept.append(x), x * 2)[1])
    x = jnp.arange(5.0)
    f(x)
    address = x.unsafe_buffer_pointer()
    assert all(t.data_ptr() != address for t in kept)
    assert kept[-1].tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


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


def test_an_output_argument_that_is_written_to_when_nobody_watches():
    """Torch's `matrix_rank` leaves `out` as it is while its operators are watched, as they are at trace time."""
    f = torch2jax(lambda x, out: torch.linalg.matrix_rank(x, out=out))
    x, out = jnp.eye(3), jnp.zeros((), jnp.int64)
    for run in (f, jax.jit(f)):
        assert run(x, out) == 3
        assert out == 0
