"""What a call does and does not do: tracing, copies, kept tensors, and errors of XLA's interface."""

from __future__ import annotations

import functools
import gc
import subprocess
import sys
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import assert_same_numbers
from jax.experimental.layout import Format, Layout
from torch import nn

from pytorch2jax import (
    TorchCallError,
    _bound,
    _bridge,
    _buffers,
    _eager,
    _ffi,
    _function,
    convert_pytnn_to_jax,
    t2j,
    torch2jax,
    use_tape,
)
from pytorch2jax._bound import BoundFunction
from pytorch2jax._program import Program

SMALL, LARGE = jnp.linspace(0.0, 1.0, 6).reshape(2, 3), jnp.linspace(0.0, 1.0, 640_000).reshape(800, 800)
SIZES = pytest.mark.parametrize("x", [SMALL, LARGE], ids=["small", "large"])


# -- nothing is done twice ------------------------------------------------------------------------------


@SIZES
def test_nothing_is_rebuilt_for_equal_calls(x, monkeypatch):
    inferred, traced = [], []
    infer = _bound.infer

    def counting(*args, **kwargs):
        inferred.append(args[0])
        return infer(*args, **kwargs)

    monkeypatch.setattr(_bound, "infer", counting)
    f = torch2jax(lambda x, scale=1.0: torch.sin(x) * scale)
    net, params = convert_pytnn_to_jax(torch.nn.Linear(x.shape[1], 2).double())

    @jax.jit
    def jitted(x, params):
        traced.append(x.shape)
        return jax.grad(lambda x: f(x, scale=2.0).sum() + net(params, x).sum())(x)

    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, *_, **__: compiled.append(name) if name.endswith("backend_compile_duration") else None
    )
    for _ in range(3):  # what is built is built now
        eager = jax.grad(lambda x: f(x, scale=2.0).sum())
        f(x), net(params, x), eager(x), jitted(x, params)
    first = len(inferred), len(traced), len(compiled)
    for _ in range(20):
        f(x), net(params, x), jitted(x + 1, params)
        jax.grad(lambda x: f(x, scale=2.0).sum())(x)
    assert (len(inferred), len(traced)) == first[:2] == (3, 1)
    assert "f" not in compiled[first[2] :]


def test_equal_functions_are_equal_programs():
    def double(x):
        return x * 2

    seen = []

    @jax.jit
    def outer(x):
        seen.append(1)
        return jax.lax.scan(lambda c, _: (torch2jax(double)(c), None), x, length=3)[0]

    np.testing.assert_array_equal(outer(SMALL), 8 * SMALL)
    jaxpr = jax.make_jaxpr(lambda x: (torch2jax(double)(x), torch2jax(double)(x)))(SMALL)
    first, second = (eqn.params["program"] for eqn in jaxpr.eqns)
    assert first == second
    assert hash(first) == hash(second)


# -- tensors over XLA's memory --------------------------------------------------------------------------


def test_a_tensor_that_is_marked_is_not_seen_again():
    """Tensors are kept by address; one that a call marks, or gives a gradient, must be new in each call."""
    flags = []

    def fn(x):
        flags.append((x.requires_grad, x.grad is None))
        x.requires_grad_()
        (x * x).sum().backward()
        return x.grad * 1

    f = jax.jit(torch2jax(fn))
    f(SMALL)
    flags.clear()
    for _ in range(3):
        np.testing.assert_allclose(f(SMALL), 2 * SMALL)
    assert set(flags) == {(False, True)}


def test_an_unexpected_write_is_an_error_and_not_remembered():
    armed = []

    def fn(x):
        if armed:
            x.mul_(2)
        return x + 1

    f = jax.jit(torch2jax(fn))
    x = jnp.copy(SMALL)
    f(x)
    armed.append(1)
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="wrote to an input in place"):
        jax.block_until_ready(f(x))
    np.testing.assert_allclose(f(SMALL), 2 * SMALL + 1)  # copied from now on
    armed.clear()
    np.testing.assert_allclose(f(SMALL), SMALL + 1)


def test_many_addresses():
    f = jax.jit(torch2jax(lambda x: x * 2))
    arrays = [jnp.full((3,), float(i)) for i in range(100)]
    for _ in range(3):
        for i, array in enumerate(arrays):
            assert f(array)[0] == 2 * i


@pytest.mark.parametrize("n", [0, 1, 2, 4, 5, 6, 50])
def test_any_number_of_arguments_and_results(n):
    def fn(*xs):
        return (*(x * (i + 1) for i, x in enumerate(xs)), torch.ones(2))

    arrays = [jnp.full((i % 4,), float(i)) for i in range(n)]
    for call in (torch2jax(fn), jax.jit(torch2jax(fn))):
        *outputs, last = call(*arrays)
        assert last.sum() == 2
        for i, output in enumerate(outputs):
            np.testing.assert_array_equal(output, arrays[i] * (i + 1))


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "int64", "uint32", "float16", "bfloat16"])
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (600, 800)])
def test_dtypes_and_shapes_by_either_way(dtype, shape):
    x = jnp.ones(shape, dtype)
    for f in (torch2jax(lambda x: x.clone(), widen_ints=False), jax.jit(torch2jax(lambda x: x.clone()))):
        out = f(x)
        assert (out.dtype, out.shape) == (x.dtype, shape)
        np.testing.assert_array_equal(np.asarray(out).astype(float), np.asarray(x).astype(float))


# -- eager calls ----------------------------------------------------------------------------------------


def address(array):
    return array.unsafe_buffer_pointer()


def test_large_eager_calls_copy_nothing(monkeypatch):
    given, made = [], []
    tensor_at, array_from_tensor = _buffers.tensor_at, _eager.array_from_tensor
    monkeypatch.setattr(_buffers, "tensor_at", lambda at, *spec: given.append(at) or tensor_at(at, *spec))
    monkeypatch.setattr(
        _eager, "array_from_tensor", lambda t, device: made.append(t.data_ptr()) or array_from_tensor(t, device)
    )
    put = []
    monkeypatch.setattr(Program, "put", lambda *args: put.append(args))
    f = torch2jax(torch.sin)
    monkeypatch.setattr(_bound, "_FEW_OPERATORS", 0)  # else torch computes in XLA's buffers
    out = f(LARGE)
    assert (given, made, put) == ([address(LARGE)], [address(out)], [])
    gradient = jax.grad(lambda x: f(x).sum())
    gradient(LARGE)  # the first time, through views
    put.clear()
    grad = gradient(LARGE)
    assert given.count(address(LARGE)) == 5  # once, and two times forward and backward
    assert address(grad) in made
    assert all(value.numel() == 2 for _, _, value, _ in put)  # numbers on the tape
    np.testing.assert_allclose(grad, jnp.cos(LARGE), rtol=1e-12)


KEPT = []


def keeps_its_result(x):
    y = torch.sin(x)
    KEPT.append(y)
    return y


def keeps_a_view(x):
    y = torch.sin(x)
    KEPT.append(y[:1])
    return y


def keeps_its_memory(x):
    y = torch.sin(x)
    KEPT.append(torch.from_numpy(y.detach().numpy()))
    return y


@pytest.mark.parametrize("fn", [keeps_its_result, keeps_a_view, keeps_its_memory])
def test_a_result_that_torch_keeps_is_copied(fn):
    f = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct(LARGE.shape, LARGE.dtype))
    out = f(LARGE)
    expected = np.array(out)
    for tensor in KEPT:
        if tensor is not None:  # the place of one of a trial run
            tensor.zero_()
    KEPT.clear()
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("fn", [lambda x: x, lambda x: x[:100], lambda x: x.T, lambda x: (x + 1).T, lambda x: x.conj()])
def test_a_result_that_is_an_argument_is_copied(fn):
    x = jnp.copy(LARGE)
    out = torch2jax(fn)(x)
    np.testing.assert_array_equal(out, fn(torch.from_numpy(np.array(x))).numpy())
    assert out.nbytes < LARGE.nbytes or address(out) != address(x)
    jax.jit(lambda out: out * 0, donate_argnums=0)(out)
    np.testing.assert_array_equal(x, LARGE)


def test_a_module_that_returns_its_parameter():
    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(800, 800))
            self.register_buffer("table", torch.ones(800, 800))

        def forward(self, x):
            return self.weight, self.table, x + 1

    apply, params = convert_pytnn_to_jax(Net())
    weight, table, _ = apply(params, LARGE)
    for array in (weight, table):
        jax.jit(lambda a: a * 0, donate_argnums=0)(array)
    np.testing.assert_array_equal(params["weight"], np.ones((800, 800)))
    np.testing.assert_array_equal(apply(params, LARGE)[1], np.ones((800, 800)))


@SIZES
def test_eager_errors_carry_the_original(x):
    def fn(x):
        if x.sum() > 1:
            raise KeyError("an unusual one")
        return x * 1

    f = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct(x.shape, x.dtype))
    np.testing.assert_array_equal(f(x * 0), x * 0)
    with pytest.raises(TorchCallError, match="an unusual one") as caught:
        f(x)
    assert isinstance(caught.value.__cause__, KeyError)
    np.testing.assert_array_equal(f(x * 0), x * 0)


@SIZES
def test_deleted_arrays_are_refused(x):
    gone = x + 1
    gone.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        torch2jax(torch.sin)(gone)


@SIZES
def test_eager_calls_in_inference_mode_and_under_other_grad_modes(x):
    f = torch2jax(lambda x: torch.sin(x) * 2)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad):
        with mode():
            out = f(x)
            grad = jax.grad(lambda x: f(x).sum())(x)
        np.testing.assert_allclose(out, 2 * jnp.sin(x), rtol=1e-12)
        np.testing.assert_allclose(grad, 2 * jnp.cos(x), rtol=1e-12)


def test_eager_results_wait_for_their_arguments():
    """An argument may still be in the making when torch gets its address."""
    f = torch2jax(lambda x: x + 0)
    slow = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, x: jnp.tanh(x @ x / 800), x))
    expected = np.asarray(slow(LARGE))
    for _ in range(5):
        np.testing.assert_array_equal(f(slow(LARGE)), expected)


# -- outputs in place -----------------------------------------------------------------------------------

DESTINATIONS = {
    "one operator": (lambda x: torch.sin(x), True),
    "several operators": (lambda x: (torch.sin(x) @ x).relu(), True),
    "written to afterwards": (lambda x: torch.sin(x).mul_(2), True),
    "another layout": (lambda x: torch.sin(x).T, False),
    "a view of it": (lambda x: torch.sin(x)[0], False),
    "the argument": (lambda x: x, False),
    "a reduction": (lambda x: x.sum(0), True),
    "no variant": (lambda x: torch.linspace(0, 1, 640_000, dtype=x.dtype).reshape(800, 800), False),
}


@pytest.mark.parametrize("name", DESTINATIONS)
def test_torch_writes_into_xlas_buffer(name, monkeypatch):
    fn, in_place = DESTINATIONS[name]
    entered = []
    original = _bound.IntoBuffer
    monkeypatch.setattr(_bound, "IntoBuffer", lambda *args: entered.append(args) or original(*args))
    got = jax.jit(torch2jax(fn))(LARGE)
    np.testing.assert_allclose(got, fn(torch.from_numpy(np.array(LARGE))).numpy(), rtol=1e-12)
    assert bool(entered) == in_place


def test_a_function_that_does_something_else_this_time():
    """The operator that inference has found may not come, or come for another purpose."""
    other = []

    def fn(x):
        if other:
            return torch.sin(torch.sin(x))
        return torch.sin(x)

    f = jax.jit(torch2jax(fn))
    np.testing.assert_allclose(f(LARGE), jnp.sin(LARGE), rtol=1e-12)
    other.append(1)
    np.testing.assert_allclose(f(LARGE), jnp.sin(jnp.sin(LARGE)), rtol=1e-12)


def test_large_gradients_arrive_in_xlas_buffers():
    net = torch.nn.Sequential(torch.nn.Linear(800, 800), torch.nn.Tanh(), torch.nn.Linear(800, 800)).double()
    net[2].weight = net[0].weight  # tied: one gradient, which is a sum
    apply, params = convert_pytnn_to_jax(net)
    grads = jax.jit(jax.grad(lambda p: (apply(p, LARGE) ** 2).sum()))(params)
    (net(torch.from_numpy(np.array(LARGE))) ** 2).sum().backward()
    np.testing.assert_allclose(grads["0"]["weight"], net[0].weight.grad, rtol=1e-9)
    np.testing.assert_allclose(grads["2"]["bias"], net[2].bias.grad, rtol=1e-9)


def test_sparse_gradients():
    table = torch.nn.Embedding(5000, 64, sparse=True)
    apply, params = convert_pytnn_to_jax(table)
    index = jnp.array([1, 2, 2, 4999])
    for enabled in (True, False):
        with use_tape(enabled):
            grad = jax.jit(jax.grad(lambda p: (apply(p, index) ** 2).sum()))(params)["weight"]
        dense = np.zeros((5000, 64), np.float32)
        np.add.at(dense, np.asarray(index), 2 * np.asarray(params["weight"])[np.asarray(index)])
        np.testing.assert_allclose(grad, dense, rtol=1e-6)


# -- XLA's interface ------------------------------------------------------------------------------------


@pytest.mark.skipif(_ffi.native() is None, reason="the extension counts them")
def test_functions_are_forgotten_with_their_executables():
    class Callable:
        def __call__(self, x):
            return x + 1

    gc.collect()
    before = _ffi.native().number_of_calls()
    fn = Callable()
    seen = weakref.ref(fn)
    f = jax.jit(torch2jax(fn))
    f(SMALL)
    assert _ffi.native().number_of_calls() == before + 1
    del f, fn
    jax.clear_caches()
    gc.collect()
    assert _ffi.native().number_of_calls() <= before
    assert seen() is None


def test_a_compiled_program_keeps_its_function():
    compiled = jax.jit(torch2jax(lambda x: x + 1)).lower(SMALL).compile()
    gc.collect()
    np.testing.assert_array_equal(compiled(SMALL), SMALL + 1)


IN_ANOTHER_PROCESS = """
import sys
import jax, jax.numpy as jnp, numpy as np, torch
import pytorch2jax
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
function = getattr(torch, sys.argv[2])
def call(x):
    return function(x)
x = jnp.linspace(0.0, 1.0, 8)
for _ in range(2):
    out = jax.jit(pytorch2jax.torch2jax(call))(x)
    np.testing.assert_allclose(out, getattr(np, sys.argv[2])(x), rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: pytorch2jax.torch2jax(call)(x).sum()))(x)
    expected = {"sin": np.cos, "cos": lambda x: -np.sin(x), "exp": np.exp}[sys.argv[2]](x)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)
    jax.clear_caches()
print("right")
"""


@pytest.mark.exhaustive
def test_the_persistent_cache_gives_no_process_the_function_of_another(tmp_path):
    """Programs that differ in the numbers of their functions only; jax 0.11.2 and newer write them to the cache."""
    for function in ("sin", "cos", "exp", "cos"):
        command = [sys.executable, "-c", IN_ANOTHER_PROCESS, str(tmp_path), function]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
        assert done.stdout.strip() == "right", (function, done.stderr[-3000:])


SAVED = """
import pathlib, pickle, sys
import jax, jax.numpy as jnp, torch
from jax.experimental import serialize_executable
import pytorch2jax
path, function = pathlib.Path(sys.argv[1]), getattr(torch, sys.argv[2])
compiled = jax.jit(pytorch2jax.torch2jax(lambda x: function(x))).lower(jnp.zeros(3)).compile()
if path.exists():
    print(serialize_executable.deserialize_and_load(*pickle.loads(path.read_bytes()))(jnp.zeros(3)))
else:
    path.write_bytes(pickle.dumps(serialize_executable.serialize(compiled)))
"""


@pytest.mark.exhaustive
def test_a_saved_program_does_not_call_the_function_of_another_process(tmp_path):
    command = [sys.executable, "-c", SAVED, str(tmp_path / "program")]
    subprocess.run([*command, "sin"], capture_output=True, timeout=120, check=True)
    done = subprocess.run([*command, "cos"], capture_output=True, text=True, timeout=120, check=False)
    assert "expected a program that was compiled in this process" in done.stderr
    assert not done.stdout


FORKED = """
import os
from pytorch2jax import _ffi
child = os.fork()
os.write(1, f"{_ffi.new_number()}\\n".encode())
if child:
    os.waitpid(child, 0)
"""


def test_forked_processes_give_their_functions_other_numbers():
    """A fork before JAX has started is allowed, and its children may share a persistent cache."""
    done = subprocess.run([sys.executable, "-c", FORKED], capture_output=True, text=True, timeout=120, check=True)
    first, second = map(int, done.stdout.split())
    assert first != second


def test_threads_share_an_executable():
    f = jax.jit(torch2jax(lambda x: torch.sin(x) * 2))
    arrays = [jnp.full((64,), float(i)) for i in range(8)]
    wrong = []

    def work(x):
        expected = 2 * np.sin(np.asarray(x))
        for _ in range(200):
            if not np.allclose(f(x), expected):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=(x,)) for x in arrays]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


# -- found by attack ------------------------------------------------------------------------------------

FLAT = jnp.linspace(0.0, 1.0, 640_000)


@pytest.mark.parametrize(
    "fn",
    [lambda x: x, lambda x: x.contiguous(), lambda x: x.detach(), lambda x: (x, x.sum()), lambda x: x.double()],
    ids=["identity", "contiguous", "detach", "two", "double"],
)
@pytest.mark.parametrize("x", [FLAT, LARGE], ids=["flat", "matrix"])
def test_an_argument_that_is_returned_is_copied(fn, x):
    """Its memory was taken over: only the shape of an array, by accident, told it from torch's own."""
    given = jnp.copy(x)
    out = jax.tree.leaves(torch2jax(fn)(given))[0]
    assert address(out) != address(given)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(given))
    np.testing.assert_array_equal(out, x)


def test_memory_that_is_not_torchs_is_copied():
    raw = np.zeros(640_064, np.float64)
    offset = (-raw.ctypes.data % 64) // 8
    table = raw[offset : offset + 640_000]

    def fn(x):
        np.multiply(np.asarray(x), 2, out=table)
        return torch.from_numpy(table)

    f = torch2jax(fn)
    f(FLAT)
    out = f(FLAT)
    f(FLAT * 10)
    np.testing.assert_allclose(out, 2 * FLAT)


class Recompute(torch.autograd.Function):
    """Its backward differentiates with respect to the input that it has saved."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sin()

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        with torch.enable_grad():
            return torch.autograd.grad(x.sin(), x, grad)[0]


def test_a_backward_that_differentiates_with_respect_to_a_large_input():
    """The hook that takes large gradients saw the inner one, and gave it zeros."""
    gradient = jax.jit(jax.grad(lambda x: torch2jax(Recompute.apply)(x).sum()))
    for _ in range(3):
        np.testing.assert_allclose(gradient(FLAT), jnp.cos(FLAT), rtol=1e-12)


def test_arrays_in_another_layout():
    a = np.arange(640_000.0).reshape(800, 800)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    x = jax.device_put(a, Format(Layout((1, 0)), device))
    f = torch2jax(lambda x: (x * 2, x.sum(0)))
    for call in (f, jax.jit(f)):
        double, total = call(x)
        np.testing.assert_array_equal(double, 2 * a)
        np.testing.assert_allclose(total, a.sum(0))


def test_attributes_of_tensors_do_not_outlast_a_call():
    def fn(x):
        factor = 3 if hasattr(x, "seen") else 2
        x.seen = True
        return x * factor

    f = jax.jit(torch2jax(fn))
    for _ in range(3):
        np.testing.assert_array_equal(f(SMALL), 2 * SMALL)


def test_a_default_device_says_where_a_call_without_arrays_runs(monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert _function._device([]).type == "cuda"
    for host in (jax.devices("cpu")[0], "cpu"):
        with jax.default_device(host):
            assert _function._device([]).type == "cpu"


def test_the_call_on_cuda_is_not_left_out_either_if_its_results_are_empty():
    """Compiled here, not run: nobody would notice that the results are empty because of values."""

    def lowered(f, x):
        (call,) = jax.make_jaxpr(f)(x).eqns
        return jax.jit(functools.partial(_bridge.call_in_xla, call.params["program"])).lower(x).as_text()

    empty, full = torch2jax(lambda x: x[:0]), torch2jax(lambda x: x * 2)
    assert "has_side_effect = true" in lowered(empty, SMALL)
    assert "has_side_effect = true" not in lowered(full, SMALL)


# -- found in use -----------------------------------------------------------------------------------------------


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


def test_python_integers_that_jax_wraps():
    f = torch2jax(lambda x, i: x * i)
    value, pull = jax.vjp(f, jnp.ones(2), 3)
    assert value.tolist() == [3.0, 3.0]
    assert pull(jnp.ones(2))[1].dtype == jax.dtypes.float0


def test_numpy_integers_inside_of_a_trace(x32):
    apply, params = convert_pytnn_to_jax(nn.Embedding(10, 3))
    ids = np.array([[1, 2]])
    assert_same_numbers(jax.jit(lambda p: apply(p, ids))(params), apply(params, ids))


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


def test_calls_without_results_run():
    """XLA left them out: a function that returned nothing on the values that it was tried on returned nothing ever."""
    f = torch2jax(torch.argwhere)  # tried on zeros
    with pytest.raises(jax.errors.JaxRuntimeError, match=r"expected torch.int64\[0, 1\].*got torch.int64\[2, 1\]"):
        jax.jit(f)(jnp.array([1, 0, 2]))
    assert jax.jit(f)(jnp.zeros(3, jnp.int64)).shape == (0, 1)
    assert jax.jit(torch2jax(lambda x: x[:0]))(jnp.ones(3)).shape == (0,)


@pytest.mark.parametrize("n", [4, 1 << 22])
def test_subnormal_numbers_are_not_taken_for_zero(n):
    """XLA's threads do so, and the threads that torch starts from them did after that."""
    f = torch2jax(lambda x: torch.sign(x) + torch.log(x))
    x = torch.full((n,), 1e-40)
    expected = np.full(n, float(1 + np.log(np.float64(1e-40))), np.float32)
    for call in (f, jax.jit(f), lambda x: jax.vmap(f)(x[None])[0]):
        np.testing.assert_allclose(call(t2j(x)), expected, rtol=1e-5)
    gradient = jax.jit(jax.grad(lambda x: (f(x) * 1e-20).sum()))
    np.testing.assert_allclose(gradient(t2j(x * 100)), 1e18, rtol=1e-4)
    assert (torch.sign(x) == 1).all()
    assert jnp.sign(t2j(x))[0] == 0  # JAX's own functions go on as before


def test_subnormal_numbers_are_taken_for_zero_where_the_user_wants_it():
    f, x = torch2jax(torch.sign), jnp.full(4, 1e-40, jnp.float32)
    assert torch.set_flush_denormal(True)
    try:
        np.testing.assert_array_equal(jax.jit(f)(x), 0)
        np.testing.assert_array_equal(f(x), 0)
    finally:
        torch.set_flush_denormal(False)
    np.testing.assert_array_equal(jax.jit(lambda x: f(x))(x), 1)
    np.testing.assert_array_equal(f(x), 1)
