"""Transformations × cases, with torch as the oracle, in float64."""

from __future__ import annotations

import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import CASES, arrays, assert_same, leaves, scalar, table, tensors, torch_gradients

from pytorch2jax import LoopWarning, use_tape

pytestmark = pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning", "ignore:Accessing the data pointer")


QUICK = (
    "two outputs",
    "in place on a view",
    "integer output",
    "norms",
    "old-style function",
    "reads a value",
)
"""One case of each kind: these go through all transformations in `make test`; the others through `grad` and `vmap`."""
ALL = [case.name for case in CASES if case.name not in ("encoder", "lstm")]


def built(param):
    case, engine = param
    fn, jax_fn, inputs = case.build(engine)
    with use_tape(engine != "recomputed"):
        # Torch's own result, on copies: some cases write to their inputs.
        yield case, fn, jax_fn, inputs, arrays(inputs)


@pytest.fixture(params=table(CASES, ("tape", "xla"), QUICK))
def case(request):
    yield from built(request.param)


@pytest.fixture(params=table(CASES, ("tape", "recomputed", "xla"), QUICK))
def reverse(request):
    """A case for transformations that take a gradient of first order."""
    yield from built(request.param)


@pytest.fixture(params=table(CASES, ("tape", "recomputed", "xla"), ALL))
def every(request):
    """The same, all of them in `make test`."""
    yield from built(request.param)


@pytest.fixture(params=table(CASES, ("tape",), QUICK))
def torchs(request):
    """A case for what is about `backend="torch"` only."""
    yield from built(request.param)


def directions(xs):
    return [jnp.cos(1.0 + jnp.arange(x.size, dtype=x.dtype)).reshape(x.shape) for x in xs]


def stacked(xs, n=3):
    return [jnp.stack([x * (1 + 0.1 * i) for i in range(n)]) for x in xs]


def pick(xs, i):
    return [x[i] for x in xs]


def test_eager_equals_torch(case):
    _, fn, jax_fn, inputs, xs = case
    assert_same(jax_fn(*xs), fn(*(t.clone() for t in inputs)))


def test_jit_equals_torch_and_leaves_its_inputs_alone(case):
    _, fn, jax_fn, inputs, xs = case
    before = [np.array(x) for x in xs]
    assert_same(jax.jit(jax_fn)(*xs), fn(*(t.clone() for t in inputs)))
    assert_same(xs, before, rtol=0, atol=0)


def test_grad_equals_torch_backward(every):
    _, fn, jax_fn, inputs, xs = every
    expected = torch_gradients(fn, inputs)
    everything = tuple(range(len(xs)))
    assert_same(jax.grad(scalar(jax_fn), everything)(*xs), expected)
    assert_same(jax.jit(jax.grad(scalar(jax_fn), everything))(*xs), expected)


def test_value_and_grad(reverse):
    _, fn, jax_fn, inputs, xs = reverse
    value, gradient = jax.jit(jax.value_and_grad(scalar(jax_fn)))(*xs)
    assert_same(value, scalar(jax_fn)(*xs))
    assert_same(gradient, torch_gradients(fn, inputs)[0])


def test_vjp_may_be_called_twice(reverse):
    _, _, jax_fn, _, xs = reverse
    value, pull = jax.vjp(scalar(jax_fn), *xs)
    first, second = pull(jnp.ones_like(value)), pull(2 * jnp.ones_like(value))
    assert_same([2 * g for g in first], second)


def test_jvp_and_linearize_agree_with_grad(case):
    _, _, jax_fn, _, xs = case
    vs = directions(xs)
    gradient = jax.grad(scalar(jax_fn), tuple(range(len(xs))))(*xs)
    expected = sum(jnp.vdot(g, v) for g, v in zip(gradient, vs, strict=True))
    assert_same(jax.jvp(scalar(jax_fn), xs, vs)[1], expected)
    assert_same(jax.jit(lambda xs, vs: jax.jvp(scalar(jax_fn), xs, vs)[1])(xs, vs), expected)
    assert_same(jax.linearize(scalar(jax_fn), *xs)[1](*vs), expected)


def test_jacfwd_and_jacrev_agree_with_torch(case):
    _, fn, jax_fn, inputs, xs = case

    def only_inexact(*args):
        return [x for x in jax.tree.leaves(jax_fn(*args)) if jnp.issubdtype(x.dtype, jnp.inexact)]

    def torch_inexact(x):
        outputs = jax.tree.leaves(fn(x * 1, *(t.clone() for t in inputs[1:])))
        return tuple(o for o in outputs if o.is_floating_point())

    expected = torch.autograd.functional.jacobian(torch_inexact, inputs[0])
    assert_same(jax.jacrev(only_inexact)(*xs), list(expected))
    assert_same(jax.jacfwd(only_inexact)(*xs), list(expected))


def test_vmap_equals_a_loop(every):
    _, fn, jax_fn, _, xs = every
    batch = stacked(xs)
    expected = [leaves(fn(*tensors(pick(batch, i)))) for i in range(3)]
    columns = [np.stack(column) for column in zip(*expected, strict=True)]
    assert_same(jax.vmap(jax_fn)(*batch), columns)
    assert_same(jax.jit(jax.vmap(jax_fn))(*batch), columns)


def test_vmap_with_other_axes(case):
    _, fn, jax_fn, inputs, xs = case
    first = jnp.moveaxis(stacked(xs)[0], 0, -1)
    expected = [leaves(fn(*tensors([first[..., i]]), *(t.clone() for t in inputs[1:]))) for i in range(3)]
    in_axes = (-1, *[None] * (len(xs) - 1))
    batched = jax.vmap(jax_fn, in_axes=in_axes, out_axes=-1)(first, *xs[1:])
    assert_same(batched, [np.stack(column, -1) for column in zip(*expected, strict=True)])


def test_vmap_of_grad_gives_per_example_gradients(reverse):
    _, fn, jax_fn, _, xs = reverse
    batch = stacked(xs)
    expected = [torch_gradients(fn, tensors(pick(batch, i))) for i in range(3)]
    columns = [np.stack([t.numpy() for t in column]) for column in zip(*expected, strict=True)]
    per_example = jax.vmap(jax.grad(scalar(jax_fn), tuple(range(len(xs)))))
    assert_same(per_example(*batch), columns)
    assert_same(jax.jit(per_example)(*batch), columns)


def test_grad_of_vmap(reverse):
    _, fn, jax_fn, _, xs = reverse
    batch = stacked(xs)
    expected = [torch_gradients(fn, tensors(pick(batch, i))) for i in range(3)]
    columns = [np.stack([t.numpy() for t in column]) for column in zip(*expected, strict=True)]
    total = jax.grad(lambda *b: jax.vmap(scalar(jax_fn))(*b).sum(), tuple(range(len(xs))))
    assert_same(total(*batch), columns)


def test_jvp_of_vmap_and_vmap_of_jvp_agree(case):
    _, _, jax_fn, _, xs = case
    batch = stacked(xs)
    vs = directions(batch)
    inner = jax.vmap(lambda xs, vs: jax.jvp(scalar(jax_fn), xs, vs)[1])(batch, vs)
    outer = jax.jvp(jax.vmap(scalar(jax_fn)), batch, vs)[1]
    assert_same(inner, outer)


def test_nested_vmap(case):
    _, _, jax_fn, _, xs = case
    grid = [jnp.stack([x, x * 0.5]) for x in stacked(xs, 2)]
    nested = jax.vmap(jax.vmap(scalar(jax_fn)))(*grid)
    flat = jax.vmap(scalar(jax_fn))(*(g.reshape(4, *g.shape[2:]) for g in grid))
    assert_same(nested.reshape(4), flat)


def test_transposing_a_linearised_function(reverse):
    _, _, jax_fn, _, xs = reverse
    value, push = jax.linearize(scalar(jax_fn), *xs)
    pulled = jax.linear_transpose(push, *xs)(jnp.ones_like(value))
    assert_same(list(pulled), list(jax.grad(scalar(jax_fn), tuple(range(len(xs))))(*xs)))


def test_vmap_over_a_linearised_function_can_be_transposed(reverse):
    """`Vmap(Jvp(f))` with unbatched primals, transposed: the cotangents of what was not batched are summed."""
    _, _, jax_fn, _, xs = reverse
    value, push = jax.linearize(scalar(jax_fn), *xs)
    batch = stacked(xs)
    pulled = jax.linear_transpose(jax.vmap(push), *batch)(jnp.arange(1.0, 4.0) * jnp.ones_like(value))
    gradient = jax.grad(scalar(jax_fn), tuple(range(len(xs))))(*xs)
    assert_same(list(pulled), [jnp.stack([g, 2 * g, 3 * g]) for g in gradient])


def test_checkpoint(reverse):
    _, fn, jax_fn, inputs, xs = reverse
    gradient = jax.jit(jax.grad(jax.checkpoint(scalar(jax_fn)), tuple(range(len(xs)))))(*xs)
    assert_same(gradient, torch_gradients(fn, inputs))


def test_eval_shape_tells_what_comes_out(case):
    _, _, jax_fn, _, xs = case
    shapes, outputs = jax.eval_shape(jax_fn, *xs), jax_fn(*xs)
    assert jax.tree.map(lambda s: (s.shape, s.dtype), shapes) == jax.tree.map(lambda x: (x.shape, x.dtype), outputs)


def test_a_loop_is_said_once(torchs):
    row, _, jax_fn, _, xs = torchs
    batch = stacked(xs)
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        jax.vmap(jax_fn)(*batch)
        jax.vmap(jax_fn)(*batch)
        jax.vmap(jax_fn)(*stacked(xs, 2))
    loops = [w for w in record if issubclass(w.category, LoopWarning)]
    assert len(loops) == row.loops


_FORWARD_MODE_FIRST = """
import warnings
import jax, jax.numpy as jnp, torch
import pytorch2jax
warnings.simplefilter("error")
f = pytorch2jax.torch2jax(torch.sin)
out = jax.jvp(f, (jnp.zeros(2),), (jnp.ones(2),))[1]
assert out.tolist() == [1.0, 1.0], out
print(jax.jit(jax.hessian(lambda x: f(x).sum()))(jnp.zeros(2)).tolist())
"""


def test_the_first_use_of_forward_mode_warns_of_nothing():
    """Torch loads TorchScript then, and warns everybody that it is deprecated; here warnings are errors."""
    done = subprocess.run(
        [sys.executable, "-c", _FORWARD_MODE_FIRST], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] in ("[[0.0, 0.0], [0.0, 0.0]]", "[[-0.0, -0.0], [-0.0, -0.0]]"), done.stdout
