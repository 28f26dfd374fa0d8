"""`torch.cond`, `while_loop`, `scan`, `map` and attention with functions, on both engines."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import OldStyleCube, arrays, assert_same, scalar, some, torch_gradients
from torch._higher_order_ops import associative_scan, map as torch_map, scan, while_loop
from torch.nn.attention.flex_attention import flex_attention

from pytorch2jax import (
    CaptureError,
    InferenceError,
    UnsupportedTransformError,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    t2j,
    torch2jax,
)
from pytorch2jax._control_flow import RUN
from pytorch2jax._internals import operators_on_functions


def _cond(x):
    return torch.cond(x.sum() > 0, torch.sin, lambda x: x.cos() * 2, (x,))


def _cond_in_python(x):
    return x.sin() if x.sum() > 0 else x.cos() * 2


def _closure(x):
    y = x * 2
    return torch.cond(x[0, 0] > 0, lambda x: x * y, lambda x: x - y.sin(), (x,))


def _closure_in_python(x):
    y = x * 2
    return x * y if x[0, 0] > 0 else x - y.sin()


def _trees(x):
    operands = ({"a": x, "b": [x.cos(), 3]},)
    out = torch.cond(x.sum() > 0, lambda d: {"y": d["a"] * d["b"][1]}, lambda d: {"y": d["b"][0]}, operands)
    return out["y"]


def _trees_in_python(x):
    return x * 3 if x.sum() > 0 else x.cos()


def _nan_in_the_other(x):
    return torch.cond(x.min() < 0, lambda x: x * 3, torch.sqrt, (x,))


def _nan_in_the_other_in_python(x):
    return x * 3 if x.min() < 0 else x.sqrt()


def _hand_written(x):
    return torch.cond(x.sum() > 0, OldStyleCube.apply, torch.sin, (x,))


def _hand_written_in_python(x):
    return OldStyleCube.apply(x) if x.sum() > 0 else x.sin()


def _scan(x):
    carry, ys = scan(lambda c, row: ({"a": c["a"] + row}, [c["a"] * row]), {"a": x[0] * 2}, x, reverse=True)
    return carry["a"], ys[0]


def _scan_in_python(x):
    carry, ys = x[0] * 2, []
    for row in x.flip(0):
        ys.append(carry * row)
        carry = carry + row
    return carry, torch.stack(ys[::-1])


def _cond_in_scan(x):
    def step(carry, row):
        carry = torch.cond(row.sum() > 0, lambda c, r: c + r.sin(), lambda c, r: c * r, (carry, row))
        return carry, carry * 1

    return scan(step, torch.ones_like(x[0]), x)[1]


def _cond_in_scan_in_python(x):
    carry, ys = torch.ones_like(x[0]), []
    for row in x:
        carry = carry + row.sin() if row.sum() > 0 else carry * row
        ys.append(carry)
    return torch.stack(ys)


def _map(x):
    return torch_map(lambda row, scale: row.sin() * scale, x, x.sum())


def _map_in_python(x):
    return torch.stack([row.sin() * x.sum() for row in x])


def _associative(x):
    return associative_scan(lambda a, b: a * b, x + 2, 0, combine_mode="generic")


def _associative_in_python(x):
    return (x + 2).cumprod(0)


OPERATORS = {
    _cond: _cond_in_python,
    _closure: _closure_in_python,
    _trees: _trees_in_python,
    _nan_in_the_other: _nan_in_the_other_in_python,
    _hand_written: _hand_written_in_python,
    _scan: _scan_in_python,
    _cond_in_scan: _cond_in_scan_in_python,
    _map: _map_in_python,
    _associative: _associative_in_python,
}
POINTS = [
    torch.linspace(-1, 2, 12, dtype=torch.float64).reshape(4, 3),
    torch.linspace(-3, 1, 12).double().reshape(4, 3),
]


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("backend", ["torch", "xla"])
@pytest.mark.parametrize("fn", some(OPERATORS, [_closure, _cond_in_scan]), ids=lambda fn: fn.__name__)
def test_operators_on_functions(fn, backend):
    """The oracle is torch without these operators: plain `if` and `for`."""
    f, in_python = torch2jax(fn, backend=backend), OPERATORS[fn]
    for x in POINTS:
        (a,) = arrays([x])
        assert_same(f(a), in_python(x))
        assert_same(jax.jit(f)(a), in_python(x))
        (expected,) = torch_gradients(in_python, [x])
        for derivative in (jax.grad(scalar(f)), jax.jit(jax.grad(scalar(f)))):
            np.testing.assert_allclose(derivative(a), expected, rtol=1e-9)
        pushed = jax.jvp(scalar(f), (a,), (jnp.ones_like(a),))[1]
        np.testing.assert_allclose(pushed, expected.sum(), rtol=1e-9)
    both = arrays([torch.stack(POINTS)])[0]
    outputs = [in_python(x) for x in POINTS]
    outputs = [o if isinstance(o, tuple) else (o,) for o in outputs]
    assert_same(jax.vmap(f)(both), [torch.stack(o) for o in zip(*outputs, strict=True)])
    gradients = torch.stack([torch_gradients(in_python, [x])[0] for x in POINTS])
    np.testing.assert_allclose(jax.vmap(jax.grad(scalar(f)))(both), gradients, rtol=1e-9)


def _while(x):
    return while_loop(lambda i, x: x.abs().sum() > 1, lambda i, x: (i + 1, x.sin() * 0.5), (torch.tensor(0), x))


def _while_in_python(x):
    i = 0
    while x.abs().sum() > 1:
        i, x = i + 1, x.sin() * 0.5
    return torch.tensor(i), x


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_while_loops_of_torchs(backend):
    f = torch2jax(_while, backend=backend)
    points = [*POINTS, POINTS[0] * 0.01]  # of the last, no step is made
    for x in points:
        (a,) = arrays([x])
        for call in (f, jax.jit(f)):
            assert_same(call(a), _while_in_python(x))
        expected = torch_gradients(lambda x: _while_in_python(x)[1], [x])[0]
        last = scalar(lambda a: f(a)[1])
        np.testing.assert_allclose(jax.jvp(last, (a,), (jnp.ones_like(a),))[1], expected.sum(), rtol=1e-9)
        if backend == "torch":
            np.testing.assert_allclose(jax.grad(last)(a), expected, rtol=1e-9)
        else:
            for call in (jax.grad(last), jax.jit(jax.grad(last))):
                with pytest.raises(UnsupportedTransformError, match=r'while_loop: expected forward.*backend="torch"'):
                    call(a)


class _Gated(torch.nn.Module):
    """Parameters, buffers and random numbers inside of the functions."""

    def __init__(self):
        super().__init__()
        self.left, self.right = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        self.drop = torch.nn.Dropout(0.5)
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.drop(self.left(x)), lambda x: self.right(x) * self.scale, (x,))

    def in_python(self, x):
        return self.drop(self.left(x)) if x.sum() > 0 else self.right(x) * self.scale


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_modules_with_operators_on_functions(backend):
    net = _Gated().double()
    for convert in (convert_pytnn_to_jax, convert_pytnn_to_flax):
        converted, params = convert(net, backend=backend)
        apply = converted if convert is convert_pytnn_to_jax else lambda p, x, c=converted: c().apply({"params": p}, x)
        for x in POINTS:
            (a,) = arrays([x])
            net.eval().zero_grad()
            expected = net.in_python(x)
            np.testing.assert_allclose(jax.jit(apply)(params, a), expected.detach(), rtol=1e-9)
            expected.sin().sum().backward()
            gradients = jax.grad(lambda p, a=a, f=apply: jnp.sin(f(p, a)).sum())(params)
            for name, parameter in net.named_parameters():
                layer, leaf = name.split(".")
                want = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                np.testing.assert_allclose(gradients[layer][leaf], want, rtol=1e-9, atol=1e-12)
    apply, params = convert_pytnn_to_jax(net, backend=backend)
    (a,) = arrays([POINTS[0]])
    masked = [jax.jit(lambda k: apply(params, a, rng=k, train=True))(jax.random.key(i)) for i in (0, 0, 1)]
    np.testing.assert_array_equal(masked[0], masked[1])
    assert not np.allclose(masked[0], masked[2])
    assert 0 < np.count_nonzero(masked[0] == 0) < 12


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_steps_of_a_scan_draw_numbers_of_their_own(backend):
    apply, _ = convert_pytnn_to_jax(_Noisy(), backend=backend)
    rows = jax.jit(lambda k: apply({}, jnp.ones((4, 50)), rng=k, train=True))(jax.random.key(0))
    assert len({tuple(row) for row in np.asarray(rows).tolist()}) == 4


class _Noisy(torch.nn.Module):
    def forward(self, x):
        return scan(lambda c, row: (c, torch.nn.functional.dropout(row)), x[0] * 0, x)[1]


def _flex(x):
    return flex_attention(x, x, x, score_mod=lambda score, b, h, i, j: score + (i - j))


def _flex_in_python(x):
    positions = torch.arange(x.shape[-2])
    scores = x @ x.mT / x.shape[-1] ** 0.5 + (positions[:, None] - positions)
    return scores.softmax(-1) @ x


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_flex_attention(backend):
    x = POINTS[0][None, None]
    (a,) = arrays([x])
    f = torch2jax(_flex, backend=backend)
    for call in (f, jax.jit(f)):
        assert_same(call(a), _flex_in_python(x))
    expected = torch_gradients(_flex_in_python, [x])[0]  # of `flex_attention` itself, torch has none on the host
    for call in (jax.grad(scalar(f)), jax.jit(jax.grad(scalar(f)))):
        np.testing.assert_allclose(call(a), expected, rtol=1e-9)


def _writes(x):
    y = x * 1
    return torch.cond(x.sum() > 0, lambda x: y.add_(x), lambda x: y * x, (x,)) + y


def _numbers(x):
    return torch.cond(x.sum() > 0, lambda x: (x, 1), lambda x: (x * 2, 1), (x,))[0]


def _gradient_inside(fn):
    """The gradient of `fn(x) + x`, which autograd finds also where it sees nothing of `fn`."""

    def gradient(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            return torch.autograd.grad((fn(x) + x).sum(), x)[0]

    return gradient


INSIDE = {
    "an operand of cond": lambda x: torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,)),
    "around cond": lambda x: torch.cond(x.sum() > 0, lambda: x * 2, lambda: x * 3, ()),
    "around one of two functions": lambda x: torch.cond(x.sum() > 0, lambda: torch.ones(1, 4, 3), lambda: x * 3.0, ()),
    "around the steps of scan": lambda x: scan(lambda c, r: (c, r * x.sum()), torch.zeros(()), torch.ones(3))[1].sum(),
    "around the steps of map": lambda x: torch_map(lambda r: r * x.sum(), torch.ones(3)).sum(),
    "around the steps of while_loop": lambda x: while_loop(
        lambda i, y: i < 3, lambda i, y: (i + 1, y + x.sum()), (torch.tensor(0), torch.zeros(()))
    )[1],
}


@pytest.mark.parametrize("name", INSIDE)
def test_gradients_inside_of_a_function_see_what_its_operators_take_from_around(name):
    """On the second engine they are refused: JAX's operators would be constants for autograd."""
    fn = _gradient_inside(INSIDE[name])
    x = POINTS[0][None].float()
    a = t2j(x)
    with operators_on_functions(RUN):
        expected = fn(x)
    for call in (torch2jax(fn), jax.jit(torch2jax(fn))):
        np.testing.assert_allclose(call(a), expected, rtol=1e-5)
    for call in (torch2jax(fn, backend="xla"), jax.jit(torch2jax(fn, backend="xla"))):
        with pytest.raises(CaptureError, match="an operator on functions in a function that takes derivatives"):
            call(a)


@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_parameters_of_a_global_module_are_constants(backend):
    layer = torch.nn.Linear(3, 3).double()

    def branch(x, weight):
        return layer(x) @ weight

    def fn(x):
        return torch.cond(x.sum() > 0, branch, torch.mul, (x, layer.weight * 2))

    def in_python(x):
        return branch(x, layer.weight * 2) if x.sum() > 0 else x * (layer.weight * 2)

    x = torch.ones(3, 3, dtype=torch.float64)
    f = torch2jax(fn, backend=backend)
    assert_same(f(t2j(x)), in_python(x))
    np.testing.assert_allclose(jax.grad(scalar(f))(t2j(x)), torch_gradients(in_python, [x])[0], rtol=1e-9)


def test_no_gradient_inside_goes_through_what_is_cut():
    """Where grad mode is off, operators on functions are constants for torch, too."""

    def fn(x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            with torch.no_grad():
                y = torch.cond(x.sum() > 0, lambda: x * 2, lambda: x * 3, ())
            return torch.autograd.grad((y * x).sum(), x)[0]

    (a,) = arrays([POINTS[0]])
    for backend in ("torch", "xla"):
        np.testing.assert_allclose(torch2jax(fn, backend=backend)(a), 2 * a)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (_writes, "cond: expected functions that leave their arguments"),
        (_numbers, "cond: expected functions that return tensors"),
        (torch.vmap(_cond), "cond: an operator on functions in a function that takes derivatives or batches"),
    ],
)
def test_what_jaxs_control_flow_cannot_do_is_refused(fn, message):
    (a,) = arrays([POINTS[0][None]])
    with pytest.raises(CaptureError, match=message):
        torch2jax(fn, backend="xla")(a)


def test_torch_is_as_it_was_after_an_operator_on_functions():
    before = type(torch.ops.higher_order.cond).__call__, torch.compiler.is_dynamo_compiling
    f = torch2jax(_cond)
    (a,) = arrays([POINTS[0]])
    seen = []

    def slow(x):
        seen.append(torch.compiler.is_dynamo_compiling())  # of everybody else nobody says so
        return _cond(x)

    torch2jax(slow)(a)
    f(a)
    assert (type(torch.ops.higher_order.cond).__call__, torch.compiler.is_dynamo_compiling) == before
    assert not any(seen)
    with pytest.raises(InferenceError, match="the two functions: expected tensors of the same shapes"):
        torch2jax(lambda x: torch.cond(x.sum() > 0, lambda x: x, lambda x: x[0], (x,)))(a)
    assert (type(torch.ops.higher_order.cond).__call__, torch.compiler.is_dynamo_compiling) == before
