"""Odd functions and odd inputs: right, or one of the library's own errors; never a crash, never silently wrong."""

from __future__ import annotations

import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pytorch2jax
from pytorch2jax import (
    ConversionError,
    DtypeError,
    InferenceError,
    LeafTypeError,
    MissingLeafError,
    OptionError,
    OutputMismatchError,
    Pytorch2JaxError,
    StateError,
    StructureError,
    TorchCallError,
    convert_pytnn_to_jax,
    load_params,
    params_to_state_dict,
    t2j,
    torch2jax,
    trainable_mask,
)

X = jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)
UNCHANGED = np.array(X)
GLOBAL = torch.arange(6.0, dtype=torch.float64).reshape(2, 3)
AT_RUN_TIME = (Pytorch2JaxError, jax.errors.JaxRuntimeError, ValueError)


def both(f):
    return (torch2jax(f), jax.jit(torch2jax(f)))


# -- what functions return ---------------------------------------------------------------------------------------

RETURNS = {
    "its input": (lambda x: x, X),
    "a view of its input": (lambda x: x.T[1:], X.T[1:]),
    "the same twice": (lambda x: (x, x), (X, X)),
    "a global": (lambda x: GLOBAL, np.arange(6.0).reshape(2, 3)),
    "a view of a global": (lambda x: GLOBAL[1], np.arange(3.0, 6.0)),
    "numbers": (lambda x: [1, 2.5, True], [1, 2.5, True]),
    "an array of NumPy's": (lambda x: x.numpy() * 2, 2 * X),
    "nothing": (lambda x: None, None),
    "no outputs": (lambda x: (), ()),
    "keys that are numbers": (lambda x: {1: x, 2: x}, {1: X, 2: X}),
    "what requires a gradient": (lambda x: x.clone().requires_grad_(), X),
    "a parameter": (lambda x: torch.nn.Parameter(x.clone()), X),
    "an empty tensor": (lambda x: x[:0], X[:0]),
    "complex numbers": (lambda x: torch.complex(x, x), X + 1j * X),
    "a conjugate view": (lambda x: torch.complex(x, x).conj(), X - 1j * X),
    "the imaginary part of a conjugate": (lambda x: torch.complex(x, x).conj().imag, -X),
    "an expanded tensor": (lambda x: x[0, :1].expand(4), jnp.full(4, -1.0)),
    "what it has resized": (lambda x: x.clone().resize_(1), X[0, :1]),
}


@pytest.mark.parametrize("name", RETURNS)
def test_what_functions_return(name):
    fn, expected = RETURNS[name]
    before = GLOBAL.clone()
    for call in both(fn):
        out = call(X)
        jax.tree.map(np.testing.assert_allclose, out, expected)
        again = call(X)
        jax.tree.map(np.testing.assert_array_equal, again, out)
    # What comes back is JAX's: changing the global does not reach it.
    GLOBAL.add_(1)
    jax.tree.map(np.testing.assert_allclose, out, expected)
    GLOBAL.copy_(before)
    np.testing.assert_array_equal(X, UNCHANGED)


REFUSED = {
    "an object": (lambda x: object(), LeafTypeError, "expected tensors, numbers, strings or None.*got object"),
    "a generator": (lambda x: (row for row in x), LeafTypeError, "got generator"),
    "a set": (lambda x: {1}, LeafTypeError, "got set"),
    "a sparse tensor": (lambda x: x.to_sparse(), LeafTypeError, "expected a dense tensor.*sparse_coo"),
    "a nested tensor": (
        lambda x: torch.nested.as_nested_tensor([x, x]),
        Pytorch2JaxError,
        "[Nn]ested",
    ),
    "a dtype that JAX lacks": (lambda x: x.to(torch.complex32), DtypeError, "complex32"),
    "a tensor without data": (lambda x: x.to("meta"), StateError, "output"),
    "nothing, but raises": (lambda x: 1 / 0, InferenceError, "ZeroDivisionError: division by zero"),
    "nothing, but stops": (lambda x: next(iter([])), InferenceError, "StopIteration"),
    "nothing, for it takes no arguments": (lambda: None, InferenceError, "takes 0 positional arguments"),
    "a wrapped function of its tensor": (lambda x: torch2jax(torch.sin)(x), Pytorch2JaxError, "sin|t2j"),
    "an array of a tensor": (lambda x: t2j(x), Pytorch2JaxError, "sin|t2j"),
    "more than there is memory": (lambda x: torch.zeros(1 << 43) + x.sum(), AT_RUN_TIME, "memory|RESOURCE_EXHAUSTED"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_what_functions_may_not_return(name):
    fn, error, match = REFUSED[name]
    for call in both(fn):
        with pytest.raises((error, *AT_RUN_TIME) if isinstance(error, type) else error, match=match):
            jax.block_until_ready(call(X))
    np.testing.assert_allclose(torch2jax(torch.sin)(X), jnp.sin(X))  # the process is usable


def test_strings_come_back_outside_of_jit():
    assert torch2jax(lambda x: "abc")(X) == "abc"
    with pytest.raises(TypeError, match="not a valid JAX type"):
        jax.jit(torch2jax(lambda x: "abc"))(X)


def test_system_exit_is_not_an_error_of_the_functions():
    def leaves(x):
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        torch2jax(leaves)(X)


# -- what functions do --------------------------------------------------------------------------------------------


def test_a_shape_that_changes_between_calls():
    calls = []

    def fn(x):
        calls.append(1)
        return x[:, : 1 + len(calls) % 2]

    f = torch2jax(fn)
    with pytest.raises(OutputMismatchError, match=r"expected torch.float64\[2, 2\], as inferred, got"):
        f(X), f(X)


def test_globals_that_are_changed():
    """They belong to torch; the change is made once a call, and not by inference."""
    total = torch.zeros(3, dtype=torch.float64)

    def fn(x):
        total.add_(x.sum(0))
        return total.clone()

    f = jax.jit(torch2jax(fn))
    for n in (1, 2, 3):
        np.testing.assert_allclose(f(X), n * X.sum(0), rtol=1e-12)


def test_the_default_dtype():
    def fn(x):
        torch.set_default_dtype(torch.float64)
        return x * torch.ones(3)

    for call in both(fn):
        try:
            np.testing.assert_array_equal(call(X), X)
        finally:
            torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("enabled", [True, False])
def test_grad_mode(enabled):
    def fn(x):
        torch.set_grad_enabled(enabled)
        return x * 2

    for call in both(fn):
        np.testing.assert_array_equal(call(X), 2 * X)
        assert torch.is_grad_enabled()


def test_threads():
    def fn(x):
        out = []
        thread = threading.Thread(target=lambda: out.append(torch.sin(x)))
        thread.start()
        thread.join()
        return out[0]

    for call in both(fn):
        np.testing.assert_allclose(call(X), jnp.sin(X))


def test_random_numbers_without_a_key():
    f = jax.jit(torch2jax(lambda x: x * 0 + torch.rand(2, 3)))
    assert not np.array_equal(f(X), f(X))
    torch.manual_seed(1)
    first = f(X)
    torch.manual_seed(1)
    np.testing.assert_array_equal(f(X), first)


def test_seeding_inside():
    def fn(x):
        torch.manual_seed(0)
        return x * 0 + torch.rand(2, 3)

    before = torch.get_rng_state()
    f = jax.jit(torch2jax(fn))
    np.testing.assert_array_equal(f(X, rng=jax.random.key(0)), f(X, rng=jax.random.key(1)))
    assert torch.equal(torch.get_rng_state(), before)


# -- values --------------------------------------------------------------------------------------------------------


def test_nan_and_infinity_pass():
    x = jnp.array([np.nan, np.inf, -np.inf, -0.0, 1.0])
    for call in both(lambda x: x * 1):
        out = call(x)
        np.testing.assert_array_equal(out, x)
        np.testing.assert_array_equal(np.signbit(out), np.signbit(x))
    gradient = jax.grad(lambda x: torch2jax(torch.sqrt)(x).sum())(x)
    expected = torch.tensor(np.array(x)).requires_grad_()
    torch.sqrt(expected).sum().backward()
    np.testing.assert_array_equal(gradient, expected.grad)


@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0, 2), ()])
def test_empty_arrays(shape):
    x = jnp.ones(shape)
    for call in both(lambda x: torch.tanh(x) * 2):
        np.testing.assert_allclose(call(x), jnp.tanh(x) * 2)
    assert jax.jit(jax.grad(lambda x: torch2jax(torch.tanh)(x).sum()))(x).shape == shape
    assert jax.vmap(torch2jax(torch.tanh))(jnp.ones((2, *shape))).shape == (2, *shape)
    assert jax.vmap(torch2jax(torch.tanh))(jnp.ones((0, *shape))).shape == (0, *shape)


def test_many_dimensions_and_many_arguments():
    x = jnp.ones((1,) * 24)
    np.testing.assert_array_equal(jax.jit(torch2jax(lambda x: x + 1))(x), x + 1)
    arrays = [jnp.full((), float(i)) for i in range(1000)]
    total = torch2jax(lambda *xs: torch.stack(xs).sum())
    assert jax.jit(total)(*arrays) == 499_500
    assert len(jax.jit(jax.grad(total, argnums=tuple(range(1000))))(*arrays)) == 1000


# -- arguments ------------------------------------------------------------------------------------------------------

ARGUMENTS = {
    "an object": (object(), None, None),
    "an unhashable static value": ({"a": {1, 2}}, LeafTypeError, "args.0.a: expected an array or a hashable.*got set"),
    "an array of strings": (np.array(["a"]), Exception, "object|str|array"),
    "an array of objects": (np.array([object()]), Exception, "object|str|array"),
    "a key": (jax.random.key(0), DtypeError, "key"),
    "a sparse tensor": (torch.eye(2).to_sparse(), LeafTypeError, "expected a dense tensor"),
    "a tensor on meta": (torch.empty(2, device="meta"), LeafTypeError, "expected a tensor with data"),
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    value, error, match = ARGUMENTS[name]
    f = torch2jax(lambda x, y: torch.zeros(1) + (x is None))
    if error is None:
        assert f(value, X).shape == (1,)
        return
    with pytest.raises(error, match=match):
        f(value, X)


def test_deleted_and_donated_arrays():
    x = X * 1
    x.delete()
    with pytest.raises((RuntimeError, ValueError), match="deleted"):
        torch2jax(torch.sin)(x)
    with pytest.raises(LeafTypeError, match="deleted or donated"):
        pytorch2jax.j2t(x)


# -- models and their parameters ------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).double()


WRONG = {
    "a leaf is missing": (
        lambda p: {"0": {"weight": p["0"]["weight"]}, "1": p["1"]},
        MissingLeafError,
        "params.0.bias",
    ),
    "a module is missing": (lambda p: {"0": p["0"]}, MissingLeafError, "params.1"),
    "a leaf too many": (lambda p: {**p, "2": X}, StructureError, "params.2"),
    "a list": (lambda p: [p["0"], p["1"]], StructureError, "params"),
    "nothing": (lambda p: None, StructureError, "params"),
    "a string": (lambda p: "params", StructureError, "params"),
    "another shape": (
        lambda p: {**p, "0": {"weight": p["0"]["weight"].T, "bias": p["0"]["bias"]}},
        StructureError,
        r"params.0.weight: expected shape \(4, 3\), got \(3, 4\)",
    ),
    "a leaf that is a string": (
        lambda p: {**p, "0": {"weight": "w", "bias": p["0"]["bias"]}},
        Pytorch2JaxError,
        "params.0.weight",
    ),
    "a leaf that is None": (
        lambda p: {**p, "0": {"weight": None, "bias": p["0"]["bias"]}},
        Pytorch2JaxError,
        "params.0.weight",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_params(name):
    wrong, error, match = WRONG[name]
    net = model()
    apply, params = convert_pytnn_to_jax(net)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    for call in (
        lambda p: apply(p, X),
        lambda p: jax.jit(lambda x: apply(p, x))(X),
        lambda p: load_params(net, p),
        lambda p: params_to_state_dict(net, p),
    ):
        with pytest.raises(error, match=match):
            call(wrong(params))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())  # nothing is lost


@pytest.mark.parametrize("convert", ["jax", "flax", "nnx", "equinox"])
@pytest.mark.parametrize("value", [None, 3, "model", torch.sin, torch.nn.Linear, torch.zeros(2)])
def test_what_is_no_model(convert, value):
    with pytest.raises(ConversionError, match="expected a torch.nn.Module, got"):
        getattr(pytorch2jax, f"convert_pytnn_to_{convert}")(value)


@pytest.mark.parametrize("value", [None, 3, {}])
def test_what_else_is_no_model(value):
    for call in (
        lambda: load_params(value, {}),
        lambda: params_to_state_dict(value, {}),
        lambda: trainable_mask(value),
    ):
        with pytest.raises(Pytorch2JaxError, match="expected a torch.nn.Module, got"):
            call()


def test_params_of_another_dtype():
    apply, params = convert_pytnn_to_jax(torch.nn.Linear(3, 2).double())
    half = jax.tree.map(lambda p: p.astype(jnp.float32), params)
    with pytest.raises(Pytorch2JaxError, match=r"float32|dtype|Double|Float"):
        apply(half, X)
    ints = jax.tree.map(lambda p: p.astype(jnp.int32), params)
    with pytest.raises(Pytorch2JaxError):
        apply(ints, X)


def test_nan_in_params_passes():
    apply, params = convert_pytnn_to_jax(torch.nn.Linear(3, 2).double())
    bad = jax.tree.map(lambda p: p * jnp.nan, params)
    assert bool(jnp.isnan(jax.jit(apply)(bad, X)).all())


def test_a_model_without_anything():
    apply, params = convert_pytnn_to_jax(torch.nn.Identity())
    assert params == {}
    np.testing.assert_array_equal(jax.jit(apply)(params, X), X)


def test_an_error_in_torch_is_an_error_of_the_librarys():
    def fn(x):
        if float(x.sum()) > 1e6:
            raise KeyError("too large")
        return x

    with pytest.raises(TorchCallError, match="KeyError: 'too large'") as caught:
        torch2jax(fn)(X + 1e7) if not torch2jax(fn)(X).size else torch2jax(fn, X)(X + 1e7)
    assert isinstance(caught.value.__cause__, KeyError)


def test_recursion():
    def endless(x):
        return endless(x)

    with pytest.raises(Pytorch2JaxError, match="RecursionError"):
        torch2jax(endless)(X)


@pytest.mark.exhaustive
def test_no_crash_without_memory():
    """In a process of its own: torch and XLA refuse what is too large, and go on."""
    code = """
import jax, jax.numpy as jnp, torch
from pytorch2jax import torch2jax
for f in (lambda x: torch.zeros(1 << 43) + x.sum(), lambda x: x.expand(1 << 43).clone()):
    for call in (torch2jax(f), jax.jit(torch2jax(f)), jax.grad(lambda x: torch2jax(f)(x).sum())):
        try:
            jax.block_until_ready(call(jnp.ones(1)))
        except Exception as error:
            print(type(error).__name__)
print(torch2jax(torch.sin)(jnp.zeros(2)))
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "[0. 0.]" in result.stdout
    assert len(result.stdout.splitlines()) == 7


def test_a_class_in_the_place_of_a_module():
    with pytest.raises(ConversionError, match=r"got the class `Linear`: pass an instance, `Linear\(...\)`"):
        convert_pytnn_to_jax(torch.nn.Linear)


def test_a_mode_that_is_traced():
    apply, params = convert_pytnn_to_jax(torch.nn.Linear(3, 3))
    with pytest.raises(OptionError, match=r'`train` has to be a Python bool.*static_argnames="train"'):
        jax.jit(lambda train: apply(params, jnp.ones(3, jnp.float32), train=train))(True)
    for train in (1, np.True_):
        np.testing.assert_array_equal(
            apply(params, jnp.ones(3, jnp.float32), train=train), apply(params, jnp.ones(3, jnp.float32), train=True)
        )


def test_parameters_in_the_place_of_variables():
    net, _ = pytorch2jax.convert_pytnn_to_flax(torch.nn.Linear(3, 3))
    with pytest.raises(MissingLeafError, match=r'no collection "params".*apply\(\{"params": params\}, ...\)'):
        net().apply({}, jnp.ones(3, jnp.float32))
