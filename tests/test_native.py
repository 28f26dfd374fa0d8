"""The C++ extension: tensors over XLA's memory, what it keeps, how it ends, and what runs without it."""

from __future__ import annotations

import gc
import os
import pathlib
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pytorch2jax import _ffi, torch2jax

ROOT = pathlib.Path(__file__).resolve().parent.parent
native = _ffi.native()
needs_native = pytest.mark.skipif(native is None, reason="the extension was not built, or is not wanted")


def run(program, **environment):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(program)],
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONFAULTHANDLER": "1", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-1000:], done.stderr[-3000:])
    return done.stdout


@needs_native
@pytest.mark.parametrize(
    "dtype", ["bool", "uint8", "int16", "bfloat16", "float16", "float32", "complex64", "complex128"]
)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3, 4)])
def test_tensors_have_the_dtype_and_shape_of_the_arrays(dtype, shape):
    seen = []

    def fn(x):
        if not isinstance(x, torch._subclasses.FakeTensor):
            seen.append((x.dtype, tuple(x.shape), x.is_contiguous(), x.requires_grad, x._version))
        return x.clone()

    x = jnp.ones(shape, dtype)
    out = jax.block_until_ready(jax.jit(torch2jax(fn, widen_ints=False))(x))
    np.testing.assert_array_equal(np.asarray(out).astype(complex), np.asarray(x).astype(complex))
    assert seen[-1] == (getattr(torch, dtype), shape, True, False, 0)


@needs_native
def test_an_input_may_lie_at_any_number_of_addresses():
    f = jax.jit(torch2jax(lambda x: x * 2))
    arrays = [jnp.full(5, float(i)) for i in range(100)]
    for _ in range(2):
        for i, x in enumerate(arrays):
            assert f(x)[0] == 2 * i


@needs_native
def test_calls_go_with_what_holds_them():
    jax.clear_caches()
    gc.collect()
    before = native.number_of_calls()
    example = (torch.empty(0), (2,))
    call = native.Call(_ffi.new_number(), lambda tensors, outputs: None, (example,))
    assert native.number_of_calls() == before + 1
    call.forget()
    del call

    def in_a_cycle():
        holder = {}
        holder["call"] = native.Call(_ffi.new_number(), lambda tensors, outputs: holder, (example,))

    in_a_cycle()
    gc.collect()
    assert native.number_of_calls() == before


@needs_native
@pytest.mark.parametrize("arguments", [(), (1,), (1, print, [(torch.empty(0), (2,))]), (1, print, ((3, (2,)),))])
def test_calls_of_other_arguments_are_refused(arguments):
    with pytest.raises((TypeError, AttributeError, RuntimeError, BufferError, ValueError)):
        native.Call(*arguments)


END = """
import atexit, threading
import jax, jax.numpy as jnp, torch

def late():  # runs after the library's own, which was registered later
    try:
        jax.block_until_ready(f(x))
    except Exception as error:
        print("is ending" in str(error))

atexit.register(late)
from pytorch2jax import torch2jax
f, x = jax.jit(torch2jax(torch.sin)), jnp.ones(4)
print(float(f(x)[0]) > 0.8)
"""


@needs_native
def test_a_call_after_the_end_is_an_error():
    assert run(END).split() == ["True", "True"]


WITHOUT = """
import jax, jax.numpy as jnp, numpy as np, torch
from pytorch2jax import TorchCallError, _ffi, convert_pytnn_to_jax, torch2jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
import warnings

assert _ffi.native() is None
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5))
apply, params, state = convert_pytnn_to_jax(model, with_state=True)
x = jnp.arange(12.0).reshape(4, 3)
loss = lambda p, s, x: (apply(p, s, x, train=True, rng=jax.random.key(0))[0] ** 2).sum()
first, second = (f(params, state, x) for f in (jax.grad(loss), jax.jit(jax.grad(loss))))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), first, second)
out, new = jax.jit(lambda *a: apply(*a))(params, state, x)
np.testing.assert_allclose(out, model.eval()(torch.tensor(np.asarray(x))).detach(), rtol=1e-5)
sin = torch2jax(torch.sin, batch_axes=0)
np.testing.assert_allclose(jax.jit(jax.vmap(jax.hessian(sin)))(jnp.ones(3)), -np.sin(np.ones(3)), rtol=1e-6)
large = jnp.linspace(0, 1, 300_000)
np.testing.assert_allclose(jax.jit(sin)(large), jnp.sin(large), rtol=1e-6)
mesh = jax.make_mesh((4,), ("i",), axis_types=(AxisType.Auto,))
mapped = jax.shard_map(lambda x: sin(x) + jax.lax.psum(x, "i").sum(), mesh=mesh, in_specs=P("i"), out_specs=P("i"))
np.testing.assert_allclose(jax.jit(mapped)(jnp.ones(8)), np.sin(1) + 8, rtol=1e-6)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    split = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("i")))
    np.testing.assert_allclose(jax.jit(sin)(split), np.sin(np.ones(8)), rtol=1e-6)
assert any("runs on each of 4 devices" in str(w.message) for w in told)

def fails(x):
    if x[0] > 0:
        raise ArithmeticError("positive")
    return x

try:
    torch2jax(fails, output_shapes=jax.ShapeDtypeStruct((2,), jnp.float32))(jnp.ones(2))
except TorchCallError as error:
    assert isinstance(error.__cause__, ArithmeticError)
print("done")
"""


def test_what_runs_without_the_extension():
    devices = "--xla_force_host_platform_device_count=4"
    assert run(WITHOUT, PYTORCH2JAX_NATIVE="0", JAX_ENABLE_X64="0", XLA_FLAGS=devices) == "done\n"
