"""Calls that XLA partitions over several devices, and explicit meshes: the eight devices of the host.

JAX's own functions are the oracle: on sharded arrays they are partitioned by XLA itself.
"""

from __future__ import annotations

import functools
import gc
import os
import pathlib
import subprocess
import sys
import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from cases import DEVICES, one_in
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P, reshard

import pytorch2jax
from pytorch2jax import (
    DeviceError,
    OptionError,
    ReplicationWarning,
    _ffi,
    convert_pytnn_to_equinox,
    convert_pytnn_to_flax,
    convert_pytnn_to_jax,
    convert_pytnn_to_nnx,
    torch2jax,
    use_tape,
)
from pytorch2jax._partition import Keeper


@pytest.mark.exhaustive
def test_the_example_of_tensor_parallelism():
    example = pathlib.Path(__file__).parent.parent / "examples" / "tensor_parallel.py"
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    result = subprocess.run(
        [sys.executable, example], env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "mesh: {'data': 4, 'model': 2}" in result.stdout


def layer(x, w):
    return torch.tanh(x @ w)


def jax_layer(x, w):
    return jnp.tanh(x @ w)


N = len(DEVICES)
X, W = jnp.linspace(-1.0, 1.0, 2 * N * 4).reshape(2 * N, 4), jnp.linspace(-1.0, 1.0, 24).reshape(4, 6)

# -- errors, on any number of devices ----------------------------------------------------------------------


@pytest.mark.parametrize("axes", ["0", 1.5, (0, "x"), True])
def test_what_are_no_batch_axes(axes):
    with pytest.raises(OptionError, match="batch_axes: expected a number, or a tuple"):
        torch2jax(layer, batch_axes=axes)


@pytest.mark.parametrize("rule", ["b i, i o", 3, "b 1 -> b", "b i -> b -> b"])
def test_what_is_no_rule(rule):
    with pytest.raises(OptionError, match="sharding_rule: expected a text such as"):
        torch2jax(layer, sharding_rule=rule)
    with pytest.raises(OptionError, match="without `batch_axes`"):
        torch2jax(layer, sharding_rule="b i, i o -> b o", batch_axes=0)


def test_axes_that_do_not_fit():
    with pytest.raises(OptionError, match=r"expected an axis of args.1, which has shape \[4, 6\], got 2"):
        torch2jax(layer, batch_axes=(0, 2))(X, W)
    with pytest.raises(OptionError, match="expected batches of the same length, got args.0: 16, args.1: 4"):
        torch2jax(layer, batch_axes=0)(X, W)
    with pytest.raises(OptionError, match="1 of them for more arguments"):
        torch2jax(layer, batch_axes=(0,))(X, W)
    with pytest.raises(OptionError, match=r"of length 16, in the first axis of each output, got shape \[\]"):
        torch2jax(lambda x: x.sum(), batch_axes=0)(X)
    with pytest.raises(OptionError, match=r"a name for each axis of the arguments, of shapes \[16, 4\], \[4, 6\]"):
        torch2jax(layer, sharding_rule="b, i o -> b o")(X, W)
    with pytest.raises(OptionError, match=r"a name for each axis of the outputs, of shapes \[16, 6\]"):
        torch2jax(layer, sharding_rule="b i, i o -> b")(X, W)


def test_on_one_device_nothing_changes():
    for f in (torch2jax(layer, batch_axes=(0, None)), torch2jax(layer, sharding_rule="b i, i o -> b o")):
        for call in (f, jax.jit(f)):
            np.testing.assert_allclose(call(X, W), jax_layer(X, W), rtol=1e-12)
        got = jax.jit(jax.grad(lambda x, w, f=f: f(x, w).sum(), argnums=(0, 1)))(X, W)
        expected = jax.grad(lambda x, w: jax_layer(x, w).sum(), argnums=(0, 1))(X, W)
        jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-12), got, expected)


MESH = jax.make_mesh((N,), ("i",), axis_types=(AxisType.Auto,), devices=DEVICES)
GRID = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=DEVICES)


def on(mesh, array, *spec):
    return jax.device_put(array, NamedSharding(mesh, P(*spec)))


XS, WS = on(MESH, X, "i"), on(MESH, W)


def close(got, expected):
    got = jax.block_until_ready(got)  # on all devices
    jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, rtol=1e-9, atol=1e-12), got, expected)


# -- batches --------------------------------------------------------------------------------------------


def loss(f):
    return lambda x, w: (f(x, w) ** 2).sum()


def scanned(f):
    def body(w, _):
        return w - 0.1 * jax.grad(loss(f), argnums=1)(X, w), None

    return lambda x, w: jax.lax.scan(body, w, None, length=3)[0]


def looped(f):
    return lambda x, w: jax.lax.while_loop(
        lambda c: c[0] < 3, lambda c: (c[0] + 1, c[1] + f(x, w).sum()), (0, jnp.zeros(()))
    )[1]


def _on_weights(f, x, w):
    return f(w)


TRANSFORMS = {
    "forward": lambda f: f,
    "gradient": lambda f: jax.grad(loss(f), argnums=(0, 1)),
    "gradient of the shared": lambda f: jax.grad(loss(f), argnums=1),
    "value and gradient": lambda f: jax.value_and_grad(loss(f), argnums=1),
    "tangent": lambda f: lambda x, w: jax.jvp(f, (x, w), (x, w))[1],
    "jacobian": lambda f: jax.jacrev(lambda w: f(X, w).sum(0)),
    "hessian": lambda f: jax.hessian(loss(f), argnums=1),
    "reverse over reverse": lambda f: jax.grad(
        lambda x, w: (jax.grad(loss(f), argnums=1)(x, w) ** 2).sum(), argnums=(0, 1)
    ),
    "vmap": lambda f: lambda x, w: jax.vmap(f, (None, 0))(x, jnp.stack([w, -w, 2 * w])),
    "vmap of the batch": lambda f: lambda x, w: jax.vmap(lambda row: f(row[None], w)[0])(x),
    "gradient of vmap": lambda f: jax.grad(
        lambda x, w: jax.vmap(loss(f), (None, 0))(x, jnp.stack([w, -w])).sum(), argnums=(0, 1)
    ),
    "checkpoint": lambda f: jax.grad(jax.checkpoint(loss(f)), argnums=(0, 1)),
    "scan": scanned,
    "while": looped,
    "inside other operations": lambda f: lambda x, w: jnp.sin(f(jnp.cos(x), w * 2)).mean(0),
    "transposed": lambda f: lambda x, w: f(x.T.reshape(x.shape), w),
}


@pytest.mark.parametrize("tape", [True, pytest.param(False, marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_each_device_has_its_part_of_the_batch(name, tape):
    seen = []

    def counted(x, w):
        seen.append(tuple(x.shape))
        return layer(x, w)

    transform = TRANSFORMS[name]
    if name == "jacobian":
        ours, theirs = (
            functools.partial(_on_weights, transform(f)) for f in (torch2jax(counted, batch_axes=(0, None)), jax_layer)
        )
    else:
        ours, theirs = transform(torch2jax(counted, batch_axes=(0, None))), transform(jax_layer)
    with use_tape(tape), warnings.catch_warnings():
        warnings.simplefilter("error", ReplicationWarning)
        call = jax.jit(ours)
        close(call(XS, WS), theirs(X, W))
        seen.clear()
        close(call(XS, WS), theirs(X, W))
    # Else the batch is not an axis, or not an argument, or not along whole axes of the mesh.
    if name not in ("vmap of the batch", "jacobian", "scan", "transposed"):
        assert {shape[-2] for shape in seen} == {2}


def test_a_gradient_runs_the_forward_once_on_each_device():
    seen = []

    def counted(x, w):
        seen.append(tuple(x.shape))
        return layer(x, w)

    step = jax.jit(jax.grad(loss(torch2jax(counted, batch_axes=(0, None))), argnums=1))
    jax.block_until_ready(step(XS, WS))
    seen.clear()
    gradient = jax.block_until_ready(step(XS, WS))
    assert seen == [(2, 4)] * N
    assert gradient.sharding.is_fully_replicated


def test_what_cannot_be_divided_is_computed_everywhere():
    f = torch2jax(layer, batch_axes=(0, None))
    x = on(MESH, X[:8], "i")
    call = jax.jit(lambda x, w: f(x[:7], w))
    close(call(x, WS), jax_layer(X[:7], W))


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_batches_along_other_axes(axis):
    f = torch2jax(lambda x, w: torch.tanh(x.movedim(axis, 0) @ w), batch_axes=(axis, None))
    spec = [None, None]
    spec[axis] = "i"
    x = jnp.moveaxis(X, 0, axis)
    step = jax.jit(jax.value_and_grad(loss(f), argnums=1))
    close(step(on(MESH, x, *spec), WS), jax.value_and_grad(loss(jax_layer), argnums=1)(X, W))


def test_pytrees_keywords_and_several_outputs():
    def fn(batch, w, *, shift):
        y = batch["x"] @ w + shift[:, None]
        return {"y": y, "n": batch["n"] * 2}

    f = torch2jax(fn, batch_axes=0)
    with pytest.raises(OptionError, match="batches of the same length"):
        f({"x": X, "n": jnp.arange(16)}, W, shift=jnp.ones(16))
    g = torch2jax(lambda batch, shift: fn(batch, torch.from_numpy(np.array(W)), shift=shift), batch_axes=0)
    batch = {"x": XS, "n": on(MESH, jnp.arange(16), "i")}
    out = jax.jit(lambda batch, shift: g(batch, shift=shift))(batch, on(MESH, jnp.ones(16), "i"))
    close(out, {"y": X @ W + 1, "n": 2 * jnp.arange(16)})
    assert out["y"].sharding.spec == P("i")


def test_eager_calls_on_sharded_arrays():
    f = torch2jax(layer, batch_axes=(0, None))
    out = f(XS, WS)
    close(out, jax_layer(X, W))
    assert out.sharding.spec == P("i")
    close(jax.grad(loss(f), argnums=1)(XS, WS), jax.grad(loss(jax_layer), argnums=1)(X, W))
    with pytest.raises(DeviceError, match="expected an array on one device, or one that is replicated"):
        torch2jax(layer)(XS, WS)


@pytest.mark.parametrize("mesh", ["auto", "explicit"])
@pytest.mark.parametrize("size", one_in(2, [1, 400]), ids=["small", "large"])
def test_eager_calls_on_replicated_arrays(mesh, size):
    """Nothing has to be gathered: each device has a copy. After `set_mesh`, each new array is like that."""
    mesh = MESH if mesh == "auto" else EXPLICIT
    with jax.set_mesh(mesh):
        x, w = (jax.device_put(jnp.tile(a, (size, 1) if a is X else (1, 1)), P()) for a in (X, W))
        apply, params = convert_pytnn_to_jax(torch.nn.Linear(4, 2).double())
        for f, g in ((torch2jax(layer), jax_layer), (torch2jax(layer, backend="xla"), jax_layer)):
            out = f(x, w)
            close(out, g(x, w))
            assert out.sharding.is_equivalent_to(g(x, w).sharding, out.ndim)
            close(f(x, W), g(x, w))
            close(jax.grad(loss(f), argnums=(0, 1))(x, w), jax.grad(loss(g), argnums=(0, 1))(x, w))
            close(jax.vmap(f, (0, None))(x[:, None], w), g(x, w)[:, None])
        expected = x @ params["weight"].T + params["bias"]
        close(apply(params, x), expected)
        close(apply(jax.device_put(params, P()), x), expected)
        step = jax.value_and_grad(lambda p: (apply(p, x) ** 2).sum())
        moved = jax.tree.map(lambda p, g: p - 0.1 * g, params, step(params)[1])
        assert np.isfinite(step(moved)[0])
    np.testing.assert_array_equal(pytorch2jax.j2t(x), X if size == 1 else np.tile(X, (size, 1)))


def test_declared_outputs_are_divided():
    f = torch2jax(layer, batch_axes=(0, None), output_shapes=jax.ShapeDtypeStruct((16, 6), X.dtype))
    close(jax.jit(f)(XS, WS), jax_layer(X, W))
    step = jax.jit(jax.grad(loss(f), argnums=1))
    close(step(XS, WS), jax.grad(loss(jax_layer), argnums=1)(X, W))


def test_errors_come_back():
    def fn(x, w):
        raise KeyError("on a device")

    f = torch2jax(fn, batch_axes=(0, None), output_shapes=jax.ShapeDtypeStruct((16, 6), X.dtype))
    with pytest.raises((ValueError, jax.errors.JaxRuntimeError), match="on a device"):
        jax.block_until_ready(jax.jit(f)(XS, WS))


def test_functions_are_freed_with_their_executables():
    class Function:
        def __call__(self, x, w):
            return layer(x, w)

    jax.clear_caches()
    gc.collect()
    before = _ffi.native().number_of_calls()
    function = Function()
    call = jax.jit(jax.grad(loss(torch2jax(function, batch_axes=(0, None))), argnums=1))
    for _ in range(3):
        gc.collect()
        close(call(XS, WS), jax.grad(loss(jax_layer), argnums=1)(X, W))
    assert _ffi.native().number_of_calls() > before
    gone = weakref.ref(function)
    del function, call
    jax.clear_caches()
    for _ in range(2):  # the executables, and then what they kept
        gc.collect()
    assert gone() is None
    assert _ffi.native().number_of_calls() <= before


def test_without_batch_axes_the_call_is_replicated_and_a_warning_says_so_once():
    seen = []

    def counted(x, w):
        seen.append(tuple(x.shape))
        return layer(x, w)

    f = torch2jax(counted)
    with pytest.warns(ReplicationWarning, match="the same call of torch runs on each of 8 devices"):
        close(jax.jit(f)(XS, WS), jax_layer(X, W))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(jax.jit(lambda x, w: f(x, w) * 1)(XS, WS), jax_layer(X, W))
    jax.effects_barrier()
    assert set(seen) == {(16, 4)}


# -- other axes -----------------------------------------------------------------------------------------

RULES = {
    "data": ("b i, i o -> b o", ("data",), ()),
    "columns": ("b i, i o -> b o", (), (None, "model")),
    "data and columns": ("b i, i o -> b o", ("data",), (None, "model")),
    "rows": ("b i, i o -> b o", (None, "model"), ("model",)),  # contracted in torch: gathered
}


@pytest.mark.parametrize("name", RULES)
def test_rules(name):
    rule, of_x, of_w = RULES[name]
    seen = []

    def counted(x, w):
        seen.append((tuple(x.shape), tuple(w.shape)))
        return layer(x, w)

    step = jax.jit(jax.value_and_grad(loss(torch2jax(counted, sharding_rule=rule)), argnums=(0, 1)))
    arguments = on(GRID, X, *of_x), on(GRID, W, *of_w)
    expected = jax.value_and_grad(loss(jax_layer), argnums=(0, 1))(X, W)
    close(step(*arguments), expected)
    seen.clear()
    close(step(*arguments), expected)
    n_rows = 4 if "data" in name else 16
    n_columns = 3 if "columns" in name else 6
    assert set(seen) == {((n_rows, 4), (4, n_columns))}


def test_a_batch_over_two_axes_of_the_mesh():
    step = jax.jit(jax.value_and_grad(loss(torch2jax(layer, batch_axes=(0, None))), argnums=1))
    got = step(on(GRID, X, ("data", "model")), on(GRID, W))
    close(got, jax.value_and_grad(loss(jax_layer), argnums=1)(X, W))


# -- modules --------------------------------------------------------------------------------------------


def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 3)).double()


Y = jnp.arange(2 * N) % 3


def train(apply, params, x, y):
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, x, y):
        def objective(p):
            return optax.softmax_cross_entropy_with_integer_labels(apply(p, x), y).mean()

        value, grads = jax.value_and_grad(objective)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, value

    state = optimizer.init(params)
    for _ in range(5):
        params, state, value = step(params, state, x, y)
    return params, value


def test_data_parallel_training_is_training():
    """By automatic partitioning, in all module systems; the parameters stay replicated."""
    apply, params = convert_pytnn_to_jax(model())
    expected = train(apply, params, X, Y)
    ys = on(MESH, Y, "i")

    def everywhere(tree):
        return jax.tree.map(lambda p: on(MESH, p), tree)

    sharded, _ = convert_pytnn_to_jax(model(), batch_axes=0)
    got = train(sharded, everywhere(params), XS, ys)
    close(got, expected)
    assert all(p.sharding.is_fully_replicated for p in jax.tree.leaves(got[0]))
    linen, _ = convert_pytnn_to_flax(model(), batch_axes=0)
    close(train(lambda p, x: linen().apply({"params": p}, x), everywhere(params), XS, ys), expected)


def test_the_other_module_systems():
    import equinox as eqx
    from flax import nnx

    apply, params = convert_pytnn_to_jax(model())
    expected = jax.grad(lambda p: (apply(p, X) ** 2).sum())(params)
    arrays, static = eqx.partition(convert_pytnn_to_equinox(model(), batch_axes=0), eqx.is_array)
    arrays = jax.tree.map(lambda a: on(MESH, a), arrays)
    got = jax.jit(jax.grad(lambda a: (eqx.combine(a, static)(XS) ** 2).sum()))(arrays)
    close(got.params, expected)
    graph, state = nnx.split(convert_pytnn_to_nnx(model(), batch_axes=0))
    state = jax.tree.map(lambda a: on(MESH, a), state)
    got = jax.jit(jax.grad(lambda s: (nnx.merge(graph, s)(XS) ** 2).sum(), allow_int=True))(state)
    close(nnx.to_pure_dict(got)["params"], expected)


def test_shards_draw_numbers_of_their_own_and_gradients_see_them():
    apply, params = convert_pytnn_to_jax(torch.nn.Dropout(0.5), batch_axes=0)
    ones = on(MESH, jnp.ones((2 * N, 64)), "i")

    def run(key, x):
        return apply(params, x, rng=key, train=True)

    key = on(MESH, jax.random.key(0))
    mask = jax.jit(run)(key, ones)
    rows = {tuple(row) for row in np.asarray(mask).tolist()}
    assert len(rows) == 2 * N
    gradient = jax.jit(jax.grad(lambda x, key: run(key, x).sum()))(ones, key)
    np.testing.assert_array_equal(gradient, mask)
    np.testing.assert_array_equal(jax.jit(run)(key, ones), mask)
    with use_tape(False):
        jax.clear_caches()
        gradient = jax.jit(jax.grad(lambda x, key: run(key, x).sum()))(ones, key)
        np.testing.assert_array_equal(gradient, mask)


def test_statistics_are_the_mean_over_the_shards():
    torch.manual_seed(0)
    norm = torch.nn.BatchNorm1d(4).double()
    apply, params, state = convert_pytnn_to_jax(norm, with_state=True, batch_axes=0)
    run = jax.jit(lambda s, x: apply(params, s, x, train=True))
    everywhere = jax.tree.map(lambda s: on(MESH, s), state)
    out, new = run(everywhere, XS)
    parts = []
    for i in range(N):
        fresh = torch.nn.BatchNorm1d(4).double().train()
        rows = torch.from_numpy(np.array(X[2 * i : 2 * i + 2]))
        np.testing.assert_allclose(out[2 * i : 2 * i + 2], fresh(rows).detach(), rtol=1e-9, atol=1e-12)
        parts.append(fresh)
    close(new["running_mean"], sum(p.running_mean for p in parts) / N)
    close(new["running_var"], sum(p.running_var for p in parts) / N)
    assert int(new["num_batches_tracked"]) == 1
    evaluate = jax.jit(lambda s, x: apply(params, s, x)[0])
    expected = norm.eval()(torch.from_numpy(np.array(X))).detach()
    close(evaluate(everywhere, XS), expected)


def test_buffers_inside_the_function():
    norm = torch.nn.BatchNorm1d(4).double().eval()
    apply, params = convert_pytnn_to_jax(norm, batch_axes=0)
    close(jax.jit(apply)(params, XS), norm(torch.from_numpy(np.array(X))).detach())


# -- tensor parallelism -----------------------------------------------------------------------------------


@pytest.mark.parametrize("check_vma", [True, False])
def test_a_linear_layer_split_over_an_axis(check_vma):
    """The columns of the first matrix and the rows of the second, and a sum over the devices."""
    first, second = jnp.linspace(-1, 1, 4 * 16).reshape(4, 16), jnp.linspace(-1, 1, 16 * 3).reshape(16, 3)

    def parallel(up, down):
        def local(x, a, b):
            return jax.lax.psum(down(up(x, a), b), "model")

        specs = dict(in_specs=(P("data"), P(None, "model"), P("model")), out_specs=P("data"))
        return jax.shard_map(local, mesh=GRID, check_vma=check_vma, **specs)

    ours = parallel(torch2jax(layer), torch2jax(torch.matmul))
    step = jax.jit(jax.value_and_grad(lambda x, a, b: (ours(x, a, b) ** 2).sum(), argnums=(0, 1, 2)))
    got = step(on(GRID, X, "data"), on(GRID, first, None, "model"), on(GRID, second, "model"))
    whole = jax.value_and_grad(lambda x, a, b: ((jax_layer(x, a) @ b) ** 2).sum(), argnums=(0, 1, 2))
    close(got, whole(X, first, second))


# -- explicit meshes ----------------------------------------------------------------------------------------

EXPLICIT = jax.make_mesh((N,), ("i",), axis_types=(AxisType.Explicit,), devices=DEVICES)


@pytest.mark.parametrize("option", ["out_specs", "output_sharding_spec"])
@pytest.mark.parametrize("jit", [True, False])
def test_explicit_axes(option, jit):
    seen = []

    def counted(x, w):
        seen.append(tuple(x.shape))
        return layer(x, w)

    with jax.set_mesh(EXPLICIT):
        f = torch2jax(counted, **{option: P("i")})
        x, w = jax.device_put(X, P("i")), jax.device_put(W, P())
        call = jax.jit(f) if jit else f
        out = call(x, w)
        assert jax.typeof(out).sharding.spec == P("i", None)
        close(out, jax_layer(X, W))
        step = jax.value_and_grad(loss(f), argnums=(0, 1))
        got = (jax.jit(step) if jit else step)(x, w)
        close(got, jax.value_and_grad(loss(jax_layer), argnums=(0, 1))(X, W))
    assert set(seen) == {(2, 4)}


def test_several_outputs_and_examples_with_explicit_axes():
    with jax.set_mesh(EXPLICIT):
        f = torch2jax(
            lambda x, w: {"y": x @ w, "s": x.sum(1)},
            X,
            W,
            output_shapes={"y": torch.Size((16, 6)), "s": torch.Size((16,))},
            out_specs={"y": P("i"), "s": P("i")},
        )
        out = jax.jit(f)(jax.device_put(X, P("i")), jax.device_put(W, P()))
    close(out, {"y": X @ W, "s": X.sum(1)})


def test_explicit_axes_are_not_gathered_silently():
    with jax.set_mesh(EXPLICIT):
        x, w = jax.device_put(X, P("i")), jax.device_put(W, P())
        apply, params = convert_pytnn_to_jax(torch.nn.Linear(4, 2).double())
        for call, arguments in ((torch2jax(layer), (x, w)), (apply, (params, x))):
            with pytest.raises(DeviceError, match="sharded along i.*`out_specs`.*reshard"):
                jax.jit(call)(*arguments)
        with pytest.raises(DeviceError, match="expected an array on one device, or one that is replicated"):
            torch2jax(layer)(x, w)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ReplicationWarning)
            out = jax.jit(lambda x, w: torch2jax(layer)(reshard(x, P()), w))(x, w)
        close(out, jax_layer(X, W))


def test_out_specs_want_explicit_axes():
    with jax.set_mesh(MESH), pytest.raises(OptionError, match="expected explicit axes of the mesh, got i"):
        jax.jit(torch2jax(layer, out_specs=P("i")))(XS, WS)
    close(torch2jax(layer, out_specs=P())(X, W), jax_layer(X, W))


def test_a_part_of_a_program_has_sizes_of_its_own():
    """Whether it is large, and computes in place, was once found out for the whole."""
    f = torch2jax(layer, batch_axes=(0, None))
    x, w = jnp.ones((4096, 256)), jnp.ones((256, 256))
    (equation,) = jax.make_jaxpr(f)(x, w).jaxpr.eqns
    program = equation.params["program"]
    assert program.is_large(1 << 22)
    (factor,) = program.shardable
    part = program.on_shards({factor: 8})
    assert part.in_specs[0].shape == (512, 256)
    assert not part.is_large(1 << 22)
    assert program.computes_in_place
    assert not part.computes_in_place
    assert not program.with_seed(4, shared=True).computes_in_place


def test_each_executable_has_a_keeper_of_its_own():
    assert Keeper().number != Keeper().number  # though they may be in the same place
