"""How functions are written down: memory that is shared, gradients that are cut or hand-written, random numbers."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import CASES, REFUSED, arrays, assert_same, scalar
from hypothesis import given, settings, strategies as st
from torch import nn

import pytorch2jax
from pytorch2jax import BridgedWarning, CaptureError, LoopWarning, OptionError, convert_pytnn_to_jax
from pytorch2jax.xla._registry import lowers
from pytorch2jax.xla._storage import Read, Write, geometry_of


def torch2jax(fn, **options):
    return pytorch2jax.torch2jax(fn, backend="xla", **options)


X = torch.linspace(-1.0, 2.0, 24, dtype=torch.float64).reshape(2, 3, 4)


def check(fn, *inputs):
    inputs = inputs or (X,)
    expected = fn(*(t.clone() for t in inputs))
    assert_same(jax.jit(torch2jax(fn))(*arrays(inputs)), expected)


# -- memory -----------------------------------------------------------------------------------------------------


def _several(x):
    x = x.clone()
    first, second = x[0], x[:, 1:]
    first.add_(1)
    second[..., ::2] *= 3
    x.transpose(0, 2)[1] = 7
    return x, first, second


def _through_a_reshape(x):
    y = x.clone()
    y.view(6, 4)[1::2].sub_(5)
    y.view(-1)[3:20:4] = 0
    return y


def _over_a_diagonal(x):
    y = x.clone()[:, :3, :3]
    y.diagonal(dim1=1, dim2=2).fill_(9)
    return y


def _as_strided(x):
    y = x.clone()
    y.as_strided((2, 2), (5, 2), 1).zero_()
    return y, y.as_strided((3, 3), (1, 1))


def _split_parts(x):
    y = x.clone()
    left, right = y.split(2, dim=-1)
    left += right
    y.unbind(0)[1].mul_(2)
    return y, left


def _accumulates(x):
    total = torch.zeros(3, 4, dtype=x.dtype)
    for part in x:
        total += part
        total[0, 0] += 1
    return total


def _into_out(x):
    y = torch.empty(0, dtype=x.dtype)
    torch.sum(x, 0, out=y)
    z = torch.empty_like(x)
    torch.mul(x, 2, out=z)
    return y, z


def _changes_shape_in_place(x):
    y = x.clone()
    y.transpose_(0, 1).squeeze_().unsqueeze_(-1)
    return y.add_(1)


def _index_put(x):
    y = x.clone()
    y[:, torch.tensor([0, 2]), 1] = -1
    y[y > 1] = 0
    y.index_add_(1, torch.tensor([0, 0]), x[:, :2])
    return y.masked_fill_(y < 0, 4)


def _complex_parts(x):
    z = torch.complex(x, x * 2)
    torch.view_as_real(z)
    return z.real + z.imag, z.conj() * z


@pytest.mark.parametrize(
    "fn",
    [
        _several,
        _through_a_reshape,
        _over_a_diagonal,
        _as_strided,
        _split_parts,
        _accumulates,
        _into_out,
        _changes_shape_in_place,
        _index_put,
        _complex_parts,
    ],
)
def test_writes_reach_all_who_share_memory(fn):
    check(fn)


@pytest.mark.parametrize("fn", [_several, _through_a_reshape, _accumulates, _index_put])
def test_their_gradients(fn):
    x = X.clone().requires_grad_()
    first = fn(x)
    first = first[0] if isinstance(first, tuple) else first
    (expected,) = torch.autograd.grad(first.sin().sum(), x)
    f = torch2jax(fn)

    def loss(x):
        out = f(x)
        return jnp.sin(out[0] if isinstance(out, tuple) else out).sum()

    assert_same(jax.grad(loss)(arrays([X])[0]), expected)


@st.composite
def views(draw):
    """A tensor and a view of it, by a chain of view operators."""
    base = torch.arange(24.0).reshape(draw(st.sampled_from([(24,), (4, 6), (2, 3, 4), (2, 1, 3, 4)])))
    base = base.permute(draw(st.permutations(range(base.dim()))))
    view = base
    for _ in range(draw(st.integers(0, 4))):
        kind = draw(st.sampled_from(["slice", "select", "permute", "unfold", "diagonal", "unsqueeze"]))
        if view.dim() == 0:
            break
        axis = draw(st.integers(0, view.dim() - 1))
        n = view.shape[axis]
        if kind == "slice":
            start = draw(st.integers(0, n - 1))
            view = view[
                (slice(None),) * axis + (slice(start, draw(st.integers(start + 1, n)), draw(st.integers(1, 3))),)
            ]
        elif kind == "select" and view.dim() > 1:
            view = view.select(axis, draw(st.integers(0, n - 1)))
        elif kind == "permute":
            view = view.permute(draw(st.permutations(range(view.dim()))))
        elif kind == "unfold":
            view = view.unfold(axis, draw(st.integers(1, n)), draw(st.integers(1, 2)))
        elif kind == "diagonal" and view.dim() > 1:
            view = view.diagonal()
        elif kind == "unsqueeze":
            view = view.unsqueeze(axis)
    return base, view


@pytest.mark.exhaustive
@settings(max_examples=60, deadline=None)
@given(views())
def test_parts_of_memory(pair):
    base, view = pair
    whole, part = geometry_of(base), geometry_of(view)
    read = Read(whole, part)(jnp.asarray(base.numpy()))
    np.testing.assert_array_equal(read, view.numpy())
    overlaps = len(set(view.reshape(-1).tolist())) < view.numel()
    if overlaps:
        return
    value = -torch.arange(1.0, view.numel() + 1).reshape(view.shape)
    written = Write(whole, part)(jnp.asarray(base.numpy()), jnp.asarray(value.numpy()))
    view.copy_(value)
    np.testing.assert_array_equal(written, base.numpy())


# -- random numbers -----------------------------------------------------------------------------------------------


def test_masks_come_from_the_key_and_are_the_same_in_the_gradient():
    f = torch2jax(lambda x: F.dropout(x, 0.5))
    x = jnp.ones(1000)
    first, second = jax.random.key(1), jax.random.key(2)
    y = f(x, rng=first)
    assert set(np.unique(y)) == {0.0, 2.0}
    assert 400 < (np.asarray(y) > 0).sum() < 600
    np.testing.assert_array_equal(y, jax.jit(f)(x, rng=first))
    assert not np.array_equal(y, f(x, rng=second))
    np.testing.assert_array_equal(jax.grad(lambda x: f(x, rng=first).sum())(x), y)
    both = jax.vmap(lambda key: f(x, rng=key))(jnp.stack([first, second]))
    np.testing.assert_array_equal(both, [y, f(x, rng=second)])


def test_each_draw_has_numbers_of_its_own():
    f = torch2jax(lambda x: (torch.rand_like(x), torch.randn_like(x), torch.rand_like(x)))
    a, _, b = f(jnp.ones(50), rng=jax.random.key(0))
    assert not np.array_equal(a, b)


def test_without_a_key_each_call_draws_anew_and_torch_is_seeded():
    f = torch2jax(lambda x: torch.rand_like(x))
    torch.manual_seed(3)
    first, second = f(jnp.ones(5)), f(jnp.ones(5))
    torch.manual_seed(3)
    np.testing.assert_array_equal(first, f(jnp.ones(5)))
    assert not np.array_equal(first, second)


# -- the rest ------------------------------------------------------------------------------------------------------


def test_a_function_is_written_down_once_for_each_kind_of_call():
    runs = []

    def fn(x, power=2):
        runs.append(1)
        return x**power

    f = torch2jax(fn)
    f(jnp.ones(3))
    once = len(runs)
    f(jnp.zeros(3))
    jax.jit(f)(jnp.ones(3))
    jax.grad(lambda x: f(x).sum())(jnp.ones(3))
    assert len(runs) == once
    f(jnp.ones(4))
    f(jnp.ones(4), power=3)
    assert len(runs) == 3 * once


def test_parameters_stay_arguments_and_tied_ones_are_one():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(3, 3), nn.Linear(3, 3)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x))

    model = Tied().double()
    apply, params = convert_pytnn_to_jax(model, backend="xla")
    x = torch.ones(2, 3, dtype=torch.float64)
    model(x).sum().backward()
    assert len(jax.tree.leaves(params)) == 3
    gradient = jax.grad(lambda p: apply(p, jnp.ones((2, 3))).sum())(params)
    assert_same(gradient["a"]["weight"], model.a.weight.grad)
    text = str(jax.make_jaxpr(apply)(params, jnp.ones((2, 3))))
    assert "torch_call" not in text


def test_running_statistics_move():
    model = nn.BatchNorm1d(3).double()
    apply, params, state = convert_pytnn_to_jax(model, with_state=True, backend="xla")
    x = torch.randn(8, 3, dtype=torch.float64)
    expected = model.train()(x)
    out, state = jax.jit(lambda *a: apply(*a, train=True))(params, state, arrays([x])[0])
    assert_same(out, expected)
    assert_same(state["running_mean"], model.running_mean)
    assert_same(state["running_var"], model.running_var)
    assert int(state["num_batches_tracked"]) == 1


@torch.library.custom_op("pytorch2jax_tests::cube", mutates_args=())
def cube(x: torch.Tensor) -> torch.Tensor:
    return x.pow(3)


@cube.register_fake
def _(x):
    return torch.empty_like(x)


cube.register_autograd(
    lambda ctx, grad: 3 * grad * ctx.x**2,
    setup_context=lambda ctx, inputs, output: setattr(ctx, "x", inputs[0]),
)


def test_an_operator_without_a_rule_runs_in_torch_and_is_named_once():
    f = torch2jax(lambda x: cube(x.sin()) + 1)
    a = arrays([X])[0]
    with pytest.warns(BridgedWarning, match="pytorch2jax_tests.cube.default"):
        out = jax.jit(f)(a)
    np.testing.assert_allclose(out, np.sin(X.numpy()) ** 3 + 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.simplefilter("ignore", LoopWarning)
        warnings.filterwarnings("ignore", "There is a performance drop")  # torch's own, of `vmap`
        gradient = jax.jit(jax.grad(lambda x: f(x).sum()))(a)
        rows = jax.vmap(f)(a)
    np.testing.assert_allclose(gradient, 3 * np.sin(X.numpy()) ** 2 * np.cos(X.numpy()), rtol=1e-12)
    np.testing.assert_allclose(rows, out)


@torch.library.custom_op("pytorch2jax_tests::double_into", mutates_args=("out",))
def double_into(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    out.copy_(2 * x)
    return x.sum()


@double_into.register_fake
def _(x, out):
    return x.new_empty(())


def test_an_operator_of_somebody_elses_writes_to_its_arguments():
    def fn(x):
        y = torch.zeros(2, *x.shape, dtype=x.dtype)
        z = y.flatten()
        total = torch.ops.pytorch2jax_tests.double_into(x, y[1])
        return y, z + total, x

    x = torch.randn(3, dtype=torch.float64)
    f = torch2jax(fn)
    with pytest.warns(BridgedWarning, match="double_into"):
        assert_same(jax.jit(f)(*arrays([x])), fn(x))


def test_a_constant_that_is_written_to_is_refused():
    count = torch.zeros(3, dtype=torch.float64)

    def fn(x):
        count.add_(1)
        return x + count

    with pytest.raises(CaptureError, match="no argument"):
        torch2jax(fn)(jnp.ones(3))


# -- numbers that are known while the function is written down ---------------------------------------------------


def _counts(x):
    c = torch.tensor(1.0)
    c += 1
    return x * c.item()


def _counts_until(x):
    c, n = torch.tensor(0), 0
    while c < 3 and n < 100:
        c += 1
        n += 1
    return x + n


def _through_a_view(x):
    c = torch.tensor(3.0)
    c.view(1).mul_(2)
    return x * c.item()


def _into_out(x):
    c = torch.tensor(3.0)
    torch.add(c, 4, out=c)
    return x * c.item()


@pytest.mark.parametrize("fn", [_counts, _counts_until, _through_a_view, _into_out])
def test_constants_are_read_after_writes_to_them(fn):
    check(fn)


def test_a_constant_that_got_a_value_of_the_inputs_is_not_known():
    def fn(x):
        c = torch.tensor(3.0, dtype=x.dtype)
        c.copy_(x.sum())
        return x * c.item()

    with pytest.raises(CaptureError, match=r"test_xla_capture.py:\d+ \(`return x \* c.item\(\)`\)"):
        torch2jax(fn)(arrays([X])[0])


def test_errors_name_the_line_of_the_model():
    class Model(nn.Module):
        def forward(self, x):
            if x.sum() > 0:  # the line
                return x
            return -x

    apply, params = convert_pytnn_to_jax(Model(), backend="xla")
    with pytest.raises(CaptureError, match=r"test_xla_capture.py:\d+ \(`if x.sum\(\) > 0:"):
        apply(params, jnp.ones(3))


def test_distributions_are_told_not_to_look_at_their_arguments(monkeypatch):
    monkeypatch.setattr(torch.distributions.Distribution, "_validate_args", True)  # `torch.compile` turns it off

    def log_prob(x):
        return torch.distributions.Normal(x, 1.0).log_prob(x)

    with pytest.raises(CaptureError, match=r"made with `validate_args=False`.* Use `backend=\"torch\"`"):
        torch2jax(log_prob)(arrays([X])[0])


def test_there_are_two_engines():
    with pytest.raises(OptionError, match="backend: expected 'torch' or 'xla', got 'tpu'"):
        pytorch2jax.torch2jax(torch.sin, backend="tpu")


def test_a_batch_times_one_matrix_is_one_product():
    """Torch expands the matrix where the batch is not contiguous."""
    f = torch2jax(lambda x, w: F.linear(x.transpose(0, 1), w))
    x, w = torch.randn(5, 4, 3, dtype=torch.float64), torch.randn(2, 3, dtype=torch.float64)
    text = str(jax.make_jaxpr(f)(*arrays([x, w])))
    assert "f64[20,2] = dot_general" in text
    text = str(jax.make_jaxpr(jax.grad(lambda w: f(arrays([x])[0], w).sum()))(arrays([w])[0]))
    assert not [whole for whole in ("f64[4,2,3]", "f64[4,3,2]") if whole in text]  # the expanded matrix's gradient
    assert_same(f(*arrays([x, w])), F.linear(x.transpose(0, 1), w))


def test_an_operator_has_one_rule():
    with pytest.raises(ValueError, match=r"aten.sin.default: expected one rule for each operator"):
        lowers("aten.sin.default")(jnp.sin)


def test_the_engine_is_imported_when_it_is_asked_for():
    program = "import sys, pytorch2jax; assert not [m for m in sys.modules if m.startswith('pytorch2jax.xla')]"
    root = str(pathlib.Path(pytorch2jax.__file__).parent.parent)
    subprocess.run([sys.executable, "-c", program], env={**os.environ, "PYTHONPATH": root}, timeout=120, check=True)


@pytest.mark.parametrize("case", [c for c in CASES if c.name in REFUSED], ids=str)
@pytest.mark.filterwarnings("ignore:Accessing the data pointer")
def test_what_depends_on_values_is_refused(case):
    _, jax_fn, inputs = case.build("xla")
    with pytest.raises(CaptureError, match=r"cases.py:\d+ .*backend=\"torch\""):
        jax.jit(scalar(jax_fn))(*arrays(inputs))


@pytest.mark.parametrize("draw", [lambda: float(np.random.rand()), lambda: __import__("random").random()])
def test_random_numbers_of_python_and_numpy_are_not_frozen(draw):
    f = torch2jax(lambda x: x + draw())
    with pytest.raises(CaptureError, match="Python's or NumPy's global generator.*Draw them with torch"):
        f(jnp.ones(2), rng=jax.random.key(0))
