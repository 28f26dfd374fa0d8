"""What `torch2jax` takes besides a function: the options of `wrap-torch2jax`, with their meaning there."""

from __future__ import annotations

import contextlib
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pytorch2jax
from pytorch2jax import (
    OptionError,
    OutputMismatchError,
    UnsupportedTransformError,
    convert_pytnn_to_jax,
    torch2jax,
    torch2jax_auto,
    torch2jax_with_vjp,
    torch2jax_without_vjp,
    wrap_torch_fn,
)

X, W = jnp.linspace(-1.0, 1.0, 12).reshape(3, 4), jnp.linspace(0.1, 1.0, 8).reshape(4, 2)


def layer(x, w):
    return torch.tanh(x @ w)


def jax_layer(x, w):
    return jnp.tanh(x @ w)


def struct(*shape, dtype=jnp.float64):
    return jax.ShapeDtypeStruct(shape, dtype)


# -- examples and output shapes ------------------------------------------------------------------------------

EXAMPLES = {
    "none": (),
    "tensors": (torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)),
    "arrays": (X, W),
    "structs": (struct(3, 4), struct(4, 2)),
    "mixed": (torch.zeros(3, 4, dtype=torch.float64), struct(4, 2)),
}
SHAPES = {
    "none": None,
    "torch.Size": torch.Size((3, 2)),
    "tuple": (3, 2),
    "list": [3, 2],
    "struct": struct(3, 2),
    "array": jnp.zeros((3, 2)),
    "numpy": np.zeros((3, 2)),
    "tensor": torch.zeros(3, 2, dtype=torch.float64),
    "meta": torch.empty(3, 2, dtype=torch.float64, device="meta"),
}


@pytest.mark.parametrize("shapes", SHAPES)
@pytest.mark.parametrize("examples", EXAMPLES)
def test_examples_and_shapes(examples, shapes):
    f = torch2jax(layer, *EXAMPLES[examples], output_shapes=SHAPES[shapes])
    for call in (f, jax.jit(f)):
        np.testing.assert_allclose(call(X, W), jax_layer(X, W), rtol=1e-12)
    got = jax.jit(jax.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)))(X, W)
    expected = jax.grad(lambda x, w: jax_layer(x, w).sum(), argnums=(0, 1))(X, W)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12), got, expected)


@pytest.mark.parametrize(
    "shapes",
    [
        {"a": torch.Size((3, 2)), "b": [(3,), [torch.Size(())]]},
        {"a": struct(3, 2), "b": [jnp.zeros(3), [torch.zeros((), dtype=torch.float64)]]},
    ],
)
def test_nested_shapes(shapes):
    def fn(x, w):
        y = x @ w
        return {"a": y, "b": [y.sum(1), [y.sum()]]}

    out = jax.jit(torch2jax(fn, output_shapes=shapes))(X, W)
    np.testing.assert_allclose(out["a"], X @ W, rtol=1e-12)
    np.testing.assert_allclose(out["b"][0], (X @ W).sum(1), rtol=1e-12)
    np.testing.assert_allclose(out["b"][1][0], (X @ W).sum(), rtol=1e-12)


def test_shapes_alone_have_the_dtype_of_the_arguments():
    f = torch2jax(lambda x, n: x * n, output_shapes=torch.Size((3,)))
    for dtype in (jnp.float32, jnp.float64, jnp.bfloat16):
        assert f(jnp.ones(3, dtype), jnp.arange(3)).dtype == dtype
    with pytest.raises(OptionError, match="output_shapes: expected shapes with dtypes.*float32, float64"):
        f(jnp.ones(3, jnp.float32), jnp.ones(3))
    with pytest.raises(OptionError, match="output_shapes: expected shapes with dtypes.*none"):
        f(jnp.arange(3), 2)


def test_declared_shapes_hold_for_all_calls_in_any_order():
    calls = []

    def fn(x):
        calls.append(tuple(x.shape))
        return x * 2

    for order in ((3, 5), (5, 3)):
        f = jax.jit(torch2jax(fn, output_shapes=torch.Size((3,))))
        calls.clear()
        for n in order:
            wrong = pytest.raises(OutputMismatchError, match="expected float64.3.")
            with wrong if n == 5 else contextlib.nullcontext():
                np.testing.assert_array_equal(f(jnp.ones(n)), 2 * jnp.ones(n))
        assert sorted(calls) == [(3,), (3,), (5,)]  # the call, and a run on fake tensors for each declaration


@pytest.mark.parametrize("example", [torch.ones(3, dtype=torch.float64), struct(3)])
def test_with_examples_declared_shapes_hold_for_inputs_like_these(example):
    calls = []

    def fn(x):
        calls.append(tuple(x.shape))
        return x * 2

    for order in ((3, 5), (5, 3)):
        f = jax.jit(torch2jax(fn, example, output_shapes=torch.Size((3,))))
        calls.clear()
        for n in order:
            np.testing.assert_array_equal(f(jnp.ones(n)), 2 * jnp.ones(n))
        assert calls.count((3,)) == 1
        assert calls.count((5,)) == 2  # once to find out


def test_declared_shapes_are_the_last_resort_for_others():
    def fn(x):
        if x.shape[0] != 3 and isinstance(x, torch._subclasses.FakeTensor):
            raise ValueError("not now")
        return torch.as_tensor(float(x.numpy().sum()), dtype=x.dtype)

    f = torch2jax(fn, torch.ones(3, dtype=torch.float64), output_shapes=struct())
    assert f(jnp.ones(5)) == 5
    assert f(jnp.ones(3)) == 3


def test_new_shapes_after_examples():
    f = torch2jax(layer, torch.zeros(3, 4, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64))
    np.testing.assert_allclose(f(X[:2], W), jax_layer(X[:2], W), rtol=1e-12)


def test_examples_are_checked_at_once():
    with pytest.raises(pytorch2jax.InferenceError, match="layer"):
        torch2jax(layer, torch.zeros(3, 4), torch.zeros(3, 4))


def test_torch_gets_the_dtypes_of_the_examples():
    def fn(x, n, m):
        assert (x.dtype, n.dtype, m.dtype) == (torch.float64, torch.int32, torch.int64)
        return x * n + m

    with jax.enable_x64(False):
        examples = (torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.int32), torch.zeros(3).long())
        f = torch2jax(fn, *examples)
        x, n = jnp.ones(3, jnp.float32), jnp.arange(3)
        assert f(x, n, n).dtype == jnp.float32
        np.testing.assert_array_equal(jax.jit(f)(x, n, n), x * n + n)
        np.testing.assert_array_equal(jax.grad(lambda x: f(x, n, n).sum())(x), n)


def test_example_keywords_and_their_gradients():
    f = torch2jax(layer, X, example_kw={"w": W})
    got = jax.jit(jax.grad(lambda x, w: f(x, w=w).sum(), argnums=(0, 1)))(X, W)
    expected = jax.grad(lambda x, w: jax_layer(x, w).sum(), argnums=(0, 1))(X, W)
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12), got, expected)


# -- derivatives ---------------------------------------------------------------------------------------------


def nth_derivative(f, n):
    for _ in range(n):
        f = jax.grad(lambda x, g=f: g(x).sum())
    return f


@pytest.mark.parametrize("mode", [jax.jit, lambda f: f], ids=["jit", "eager"])
@pytest.mark.parametrize("depth", [0, 1, 2, 3, None])
def test_depth(depth, mode):
    f = torch2jax(torch.sin, depth=depth)
    x = jnp.linspace(0.0, 1.0, 3)
    for order in range(4):
        call = mode(nth_derivative(f, order))
        if depth is None or order <= depth:
            np.testing.assert_allclose(call(x), nth_derivative(jnp.sin, order)(x), rtol=1e-10)
        else:
            with pytest.raises(
                UnsupportedTransformError, match=f"`depth={depth}`, got a derivative of order {depth + 1}"
            ):
                call(x)


def test_depth_counts_forward_mode():
    f = torch2jax(torch.sin, depth=0)
    with pytest.raises(UnsupportedTransformError, match="expected no derivatives"):
        jax.jvp(f, (X,), (X,))
    g = torch2jax(torch.sin, depth=1)
    with pytest.raises(UnsupportedTransformError, match="up to order 1"):
        jax.hessian(lambda x: g(x).sum())(X)
    jax.jacfwd(g)(X)


def test_functions_of_different_depth_are_different():
    assert jax.grad(torch2jax(torch.sin))(1.0) == pytest.approx(np.cos(1.0))
    with pytest.raises(UnsupportedTransformError, match="no derivatives"):
        jax.grad(torch2jax(torch.sin, depth=0))(1.0)


def test_constants_of_a_function_without_derivatives_are_fine():
    f = torch2jax(torch.sin, depth=0)
    np.testing.assert_array_equal(jax.grad(lambda x: (x * f(jax.lax.stop_gradient(x))).sum())(X), f(X))


@pytest.mark.parametrize("depth", [-1, 1.0, True, "2"])
def test_wrong_depth(depth):
    with pytest.raises(OptionError, match="depth: expected None or a number"):
        torch2jax(torch.sin, depth=depth)


CONSTANTS = {
    "argnums": {"nondiff_argnums": (1,)},
    "one number": {"nondiff_argnums": 1},
    "from the end": {"nondiff_argnums": [-1]},
    "mask": {"nondiff_mask": (False, True)},
    "list": {"nondiff_mask": [False, True]},
    "both": {"nondiff_argnums": (1,), "nondiff_mask": (False, False)},
}


@pytest.mark.parametrize("use_zeros", [True, False])
@pytest.mark.parametrize("use_torch_vjp", [True, False])
@pytest.mark.parametrize("name", CONSTANTS)
def test_arguments_that_are_not_differentiated(name, use_zeros, use_torch_vjp):
    backward = []

    class Watched(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, g):
            backward.append(1)
            return g

    def fn(x, w):
        return torch.tanh(x @ Watched.apply(w))

    f = torch2jax(fn, X, W, use_zeros=use_zeros, use_torch_vjp=use_torch_vjp, **CONSTANTS[name])
    got = jax.jit(jax.grad(lambda x, w: f(x, w).sum(), argnums=(0, 1)))(X, W)
    np.testing.assert_allclose(got[0], jax.grad(lambda x: jax_layer(x, W).sum())(X), rtol=1e-12)
    np.testing.assert_array_equal(got[1], jnp.zeros_like(W))
    assert backward == []


def test_a_mask_for_leaves():
    f = torch2jax(lambda p, x: x * p["a"] + p["b"], nondiff_mask=({"a": True, "b": False}, False))
    p = {"a": jnp.ones(3), "b": jnp.ones(3)}
    grads = jax.grad(lambda p: f(p, jnp.arange(3.0)).sum())(p)
    np.testing.assert_array_equal(grads["a"], jnp.zeros(3))
    np.testing.assert_array_equal(grads["b"], jnp.ones(3))
    g = torch2jax(lambda p, x: x * p["a"] + p["b"], nondiff_mask=(True, False))
    np.testing.assert_array_equal(jax.grad(lambda p: g(p, jnp.arange(3.0)).sum())(p)["b"], jnp.zeros(3))


def test_constants_that_do_not_fit():
    with pytest.raises(OptionError, match=r"nondiff_argnums: expected numbers of positional arguments, below 2.*2"):
        torch2jax(layer, nondiff_argnums=2)(X, W)
    with pytest.raises(OptionError, match="nondiff_argnums: expected whole numbers"):
        torch2jax(layer, nondiff_argnums=(0.5,))
    with pytest.raises(OptionError, match="nondiff_mask: expected bools in the structure"):
        torch2jax(layer, nondiff_mask=(True, True, False))(X, W)


# -- vmap ----------------------------------------------------------------------------------------------------

METHODS = (None, "sequential", "sequential_unrolled", "expand_dims", "broadcast_all", "legacy_vectorized")
XS = jnp.linspace(-1.0, 1.0, 5 * 12).reshape(5, 3, 4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_vmap_methods(method, axis):
    seen = []

    def fn(x, w):
        seen.append((tuple(x.shape), tuple(w.shape)))
        return torch.tanh(x @ w)

    f = torch2jax(fn, X, W, vmap_method=method)
    xs = jnp.moveaxis(XS, 0, axis)
    seen.clear()
    got = jax.jit(jax.vmap(f, (axis, None), axis))(xs, W)
    np.testing.assert_allclose(got, jax.vmap(jax_layer, (axis, None), axis)(xs, W), rtol=1e-12)
    one, all_x, all_w = ((3, 4), (4, 2)), (5, 3, 4), (5, 4, 2)
    expected = {
        "sequential": [one] * 5,
        "sequential_unrolled": [one] * 5,
        "expand_dims": [(all_x, (1, 4, 2))],
        "broadcast_all": [(all_x, all_w)],
        "legacy_vectorized": [(all_x, all_w)],
        None: [one],
    }
    assert seen == expected[method]


@pytest.mark.parametrize("method", METHODS)
def test_vmap_methods_with_declared_outputs(method):
    """Then nobody knows whether the function draws, so that it has a seed."""
    spec = jax.ShapeDtypeStruct((3,), X.dtype)
    f = torch2jax(lambda x: 2 * x, output_shapes=spec, vmap_method=method)
    for transform in (jax.vmap, lambda f: jax.jit(jax.vmap(f))):
        np.testing.assert_array_equal(transform(f)(jnp.ones((4, 3))), np.full((4, 3), 2.0))


@pytest.mark.parametrize("keys", ["none", "one", "each"])
@pytest.mark.parametrize("method", ["sequential", "expand_dims", "broadcast_all"])
def test_vmap_methods_of_a_random_function(method, keys):
    """What a gradient sees is what its forward pass drew, and a key draws the same again."""
    f = torch2jax(lambda x: x * torch.rand_like(x), vmap_method=method)
    x = jnp.ones((4, 3))

    def batch(x):
        if keys == "each":
            return jax.vmap(lambda x, key: f(x, rng=key))(x, jax.random.split(jax.random.key(0), 4))
        key = {} if keys == "none" else {"rng": jax.random.key(0)}
        return jax.vmap(lambda x: f(x, **key))(x)

    for transform in (lambda f: f, jax.jit):
        out, gradient = transform(jax.vjp)(batch, x) if transform is not jax.jit else _vjp_in_jit(batch, x)
        np.testing.assert_allclose(out, gradient(jnp.ones_like(out))[0], rtol=1e-6)
        assert len(np.unique(out)) == (3 if keys == "one" and method == "sequential" else 12)
    if keys != "none":
        np.testing.assert_array_equal(batch(x), batch(x))


def _vjp_in_jit(function, x):
    out, gradient = jax.jit(lambda x: (lambda out, pull: (out, pull(jnp.ones_like(out))))(*jax.vjp(function, x)))(x)
    return out, lambda _: gradient


@pytest.mark.parametrize("method", METHODS)
def test_vmap_methods_under_derivatives(method):
    def losses(f):
        loss = lambda x, w: (f(x, w) ** 2).sum()  # noqa: E731
        return {
            "gradients for each": jax.vmap(jax.grad(loss, argnums=(0, 1)), (0, None)),
            "gradient of all": jax.grad(lambda xs, w: jax.vmap(loss, (0, None))(xs, w).sum(), argnums=(0, 1)),
            "tangents": jax.vmap(lambda x, w: jax.jvp(f, (x, w), (x, w))[1], (0, None)),
            "nested": jax.vmap(jax.vmap(f, (None, 0)), (0, None)),
            "second": jax.vmap(jax.grad(lambda x, w: jax.grad(loss)(x, w).sum(), argnums=(0, 1)), (0, None)),
        }

    ours, theirs = losses(torch2jax(layer, vmap_method=method)), losses(jax_layer)
    for name, call in ours.items():
        w = jnp.stack([W, -W]) if name == "nested" else W
        got, expected = jax.jit(call)(XS, w), theirs[name](XS, w)
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-10, atol=1e-12), got, expected)


def test_a_function_for_one_example_says_so():
    f = jax.vmap(torch2jax(lambda x: x.sum(), vmap_method="broadcast_all"))
    with pytest.raises(pytorch2jax.OutputMismatchError, match=r"expected an output with 1 batch axes.*got \[\]"):
        f(X)
    with pytest.raises(OptionError, match="vmap_method: expected one of None, 'sequential'.*got 'loop'"):
        torch2jax(layer, vmap_method="loop")


# -- lock ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lock", [True, threading.Lock(), threading.RLock()])
def test_locks(lock):
    inside, most = [], []

    def fn(x):
        inside.append(1)
        most.append(len(inside))
        y = torch.sin(x)
        threading.Event().wait(0.01)
        inside.pop()
        return y

    f = jax.jit(jax.grad(lambda x: torch2jax(fn, lock=lock)(x).sum()))
    f(X)
    threads = [threading.Thread(target=lambda: jax.block_until_ready(f(X))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    assert max(most) == 1
    np.testing.assert_allclose(f(X), jnp.cos(X), rtol=1e-12)


def test_what_is_no_lock():
    with pytest.raises(OptionError, match="lock: expected True, False or a lock"):
        torch2jax(layer, lock="yes")


# -- older names ---------------------------------------------------------------------------------------------


def test_older_names():
    np.testing.assert_allclose(torch2jax_auto(layer)(X, W), jax_layer(X, W), rtol=1e-12)
    assert torch2jax_auto(layer, output_shapes=torch.Size((3, 2)), depth=1)(X, W).shape == (3, 2)
    assert wrap_torch_fn is torch2jax
    with pytest.warns(DeprecationWarning, match=r"Write `torch2jax\(fn, ..., depth=2\)`"):
        f = torch2jax_with_vjp(layer, X, W)
    jax.hessian(lambda x: f(x, W).sum())(X)
    with pytest.raises(UnsupportedTransformError, match="up to order 2"):
        nth_derivative(lambda x: f(x, W), 3)(X)
    g = torch2jax_without_vjp(layer, X, example_kw={"w": W}, output_shapes=torch.Size((3, 2)))
    np.testing.assert_allclose(g(X, w=W), jax_layer(X, W), rtol=1e-12)
    with pytest.raises(UnsupportedTransformError, match="no derivatives"):
        jax.grad(lambda x: g(x, w=W).sum())(X)
    assert pytorch2jax.compile_and_import_module() is pytorch2jax


@pytest.mark.parametrize("via", ["dlpack", "cpu", "host"])
def test_ways_of_transfer(via):
    tensor = torch.arange(3.0)
    np.testing.assert_array_equal(pytorch2jax.t2j(tensor, via=via), tensor)
    assert torch.equal(pytorch2jax.j2t(jnp.arange(3.0), via=via), tensor.double())
    assert torch.equal(pytorch2jax.tree_j2t(pytorch2jax.tree_t2j({"a": tensor}, via=via), via=via)["a"], tensor)
    shares = pytorch2jax.t2j(tensor, via=via).unsafe_buffer_pointer() == tensor.data_ptr()
    assert shares == (via == "dlpack")
    with pytest.raises(OptionError, match="via: expected 'dlpack', 'cpu' or 'host', got 'pigeon'"):
        pytorch2jax.t2j(tensor, via="pigeon")


# -- programs as users of the older packages write them --------------------------------------------------------


def test_a_program_for_torch2jax():
    """Example arguments, a nested output, gradients, jit."""

    def torch_fn(batch, scale):
        logits = batch["features"] @ scale
        return {"loss": torch.nn.functional.cross_entropy(logits, batch["labels"]), "logits": logits}

    features, labels = torch.randn(10, 5, dtype=torch.float64), torch.randint(0, 3, (10,))
    scale = torch.randn(5, 3, dtype=torch.float64)
    fn = jax.jit(torch2jax(torch_fn, {"features": features, "labels": labels}, scale))
    batch, w = pytorch2jax.tree_t2j(({"features": features, "labels": labels}, scale))
    out = fn(batch, w)
    np.testing.assert_allclose(
        out["loss"], torch_fn({"features": features, "labels": labels}, scale)["loss"], rtol=1e-12
    )
    gradient = jax.grad(lambda w: fn(batch, w)["loss"])(w)
    scale.requires_grad_()
    torch_fn({"features": features, "labels": labels}, scale)["loss"].backward()
    np.testing.assert_allclose(gradient, scale.grad, rtol=1e-10)


def test_a_program_with_functional_call():
    model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)).double()
    params = dict(model.named_parameters())

    def torch_fwd(params, x):
        return torch.func.functional_call(model, params, x)

    x = torch.from_numpy(np.array(X))
    fwd = jax.jit(torch2jax(torch_fwd, params, x, output_shapes=model(x)))
    jparams = pytorch2jax.tree_t2j(params)
    grads = jax.grad(lambda p: jnp.sum(fwd(p, X) ** 2))(jparams)
    (model(x) ** 2).sum().backward()
    for name, p in model.named_parameters():
        np.testing.assert_allclose(grads[name], p.grad, rtol=1e-10)


def test_a_program_for_pytorch2jax():
    """A decorated function, a converted model, and one inside a Flax module."""
    import flax.linen as nn

    @pytorch2jax.py_to_jax_wrapper
    def noisy(x):
        return torch.rand((10, 10)) * x

    assert noisy(jnp.ones((10, 10))).shape == (10, 10)
    model = torch.nn.Linear(10, 10)
    apply, params = convert_pytnn_to_jax(model)
    gradient = jax.grad(lambda x: apply(params, x).sum())(jnp.ones((10,), jnp.float32))
    np.testing.assert_allclose(gradient, model.weight.detach().sum(0), rtol=1e-5)
    flax_module, _ = pytorch2jax.convert_pytnn_to_flax(model)

    class Outer(nn.Module):
        flax_module: type

        @nn.compact
        def __call__(self, x):
            return self.flax_module()(x)

    outer = Outer(flax_module)
    ones = jnp.ones((10, 10), jnp.float32)
    variables = outer.init(jax.random.PRNGKey(0), ones)
    expected = model(torch.ones(10, 10)).detach()
    np.testing.assert_allclose(outer.apply(variables, ones), expected, rtol=1e-5, atol=1e-6)
