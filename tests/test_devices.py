"""Several devices in one process: the eight of the host."""

from __future__ import annotations

import _thread
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import DEVICES
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

from pytorch2jax import _threads, convert_pytnn_to_jax, torch2jax, use_tape
from pytorch2jax._tape import TAPE


def test_a_worker_that_is_busy_is_not_waited_for(monkeypatch):
    """Else a call that the worker's present one waits for would hang."""
    release, ran = threading.Event(), []

    def call():
        ran.append(threading.get_ident())
        done.set()

    def foreign():  # not one of Python's threads
        _threads.on_one_team(call)

    monkeypatch.setattr(_threads, "_FEW_CALLS", 0)
    for busy in (False, True):
        done = threading.Event()
        if busy:
            _threads._worker().put(_threads._Job(release.wait))
        _thread.start_new_thread(foreign, ())
        assert done.wait(60)
    release.set()
    assert ran[0] != ran[1]
    _threads.on_one_team(call)
    assert ran[2] == threading.get_ident()


def layer(x, w):
    return torch.tanh(x @ w)


def jax_layer(x, w):
    return jnp.tanh(x @ w)


N = len(DEVICES)
X, W = jnp.linspace(-1.0, 1.0, 2 * N * 4).reshape(2 * N, 4), jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)

MESH = jax.make_mesh((N,), ("i",), axis_types=(AxisType.Auto,), devices=DEVICES)


def gradient_inside(fn, check_vma):
    def local(x, w):
        loss, grad = jax.value_and_grad(lambda w: (fn(x, w) ** 2).sum())(w)
        # With types that vary, JAX sums the gradient of what does not.
        return jax.lax.psum(loss, "i"), grad if check_vma else jax.lax.psum(grad, "i")

    specs = dict(in_specs=(P("i"), P()), out_specs=(P(), P()))
    return jax.jit(jax.shard_map(local, mesh=MESH, check_vma=check_vma, **specs))


def gradient_outside(fn, check_vma):
    mapped = jax.shard_map(fn, mesh=MESH, in_specs=(P("i"), P()), out_specs=P("i"), check_vma=check_vma)
    return jax.jit(jax.value_and_grad(lambda x, w: (mapped(x, w) ** 2).sum(), argnums=1))


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("gradient", [gradient_inside, gradient_outside])
@pytest.mark.parametrize("tape", [True, False])
def test_gradients_under_shard_map(gradient, check_vma, tape):
    runs = []

    def counted(x, w):
        runs.append(1)
        return layer(x, w)

    with use_tape(tape):
        call = gradient(torch2jax(counted), check_vma)
        got = jax.block_until_ready(call(X, W))
        runs.clear()
        jax.tree.map(np.testing.assert_array_equal, jax.block_until_ready(call(X, W)), got)
    expected = gradient(jax_layer, check_vma)(X, W)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9), got, expected)
    assert len(runs) == (N if tape else 2 * N)
    assert len(TAPE) == 0


def test_higher_order_and_forward_mode_with_types_that_vary():
    def specs(fn):
        return jax.shard_map(fn, mesh=MESH, in_specs=(P("i"), P()), out_specs=P())

    def hessian(f):
        return specs(lambda x, w: jax.lax.psum(jax.hessian(lambda w: (f(x, w) ** 2).sum())(w), "i"))

    def pushed(f):
        return specs(lambda x, w: jax.lax.psum(jax.jvp(lambda w: f(x, w).sum(), (w,), (w,))[1], "i"))

    def batched(f):
        return specs(lambda x, w: jax.lax.psum(jax.vmap(f, in_axes=(0, None))(x, w).sum(), "i"))

    transforms = (hessian, pushed, batched)
    for transform in transforms if jax.__version_info__ >= (0, 9) else transforms[1:]:  # older JAX has none of its own
        got, expected = (jax.jit(transform(f))(X, W) for f in (torch2jax(layer), jax_layer))
        np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_a_data_parallel_step_of_a_module():
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2)).double()
    apply, params = convert_pytnn_to_jax(net)
    keys = jax.random.split(jax.random.key(0), N)

    def loss(params, x, key):
        return (apply(params, x, rng=key, train=True) ** 2).sum()

    def local(params, x, key):
        return jax.grad(loss)(params, x, key[0])

    step = jax.jit(jax.shard_map(local, mesh=MESH, in_specs=(P(), P("i"), P("i")), out_specs=P()))
    everywhere = jax.device_put(params, NamedSharding(MESH, P()))
    got = step(everywhere, jax.device_put(X, NamedSharding(MESH, P("i"))), keys)
    parts = [jax.grad(loss)(params, X[2 * i : 2 * i + 2], keys[i]) for i in range(N)]
    jax.tree.map(lambda g, *p: np.testing.assert_allclose(g, sum(p), rtol=1e-9), got, *parts)


def test_torch_has_one_team_of_threads(monkeypatch):
    """Without the worker, each of the threads of XLA's would have a team as large as the machine."""
    monkeypatch.setattr(_threads, "_PATIENCE_S", 60)  # the machine may be busy with something else
    workers = set()

    def fn(x):
        workers.add(threading.get_native_id())
        return torch.sin(x @ x.T) @ x

    x = jax.device_put(jnp.ones((N * 256, 256)), NamedSharding(MESH, P("i")))
    call = jax.jit(jax.shard_map(torch2jax(fn), mesh=MESH, in_specs=P("i"), out_specs=P("i")))
    jax.block_until_ready(jax.jit(jax.shard_map(jnp.sin, mesh=MESH, in_specs=P("i"), out_specs=P("i")))(x))
    before = len(os.listdir("/proc/self/task"))
    for _ in range(2):  # the first few run in XLA's threads
        jax.block_until_ready(call(x))
    workers.clear()
    for _ in range(5):
        jax.block_until_ready(call(x))
    names = {t.native_id: t.name for t in threading.enumerate()}
    assert {names[w] for w in workers} == {"pytorch2jax"}
    # The worker, its team, that of the main thread, and a few that XLA starts late.
    assert len(os.listdir("/proc/self/task")) - before <= 1 + 2 * torch.get_num_threads() + 4


def test_the_worker_follows_set_num_threads(monkeypatch):
    monkeypatch.setattr(_threads, "_PATIENCE_S", 60)  # the machine may be busy with something else
    sizes = []

    def fn(x):
        sizes.append(torch.get_num_threads())
        return torch.sin(x @ x.T) @ x

    x = jax.device_put(jnp.ones((N * 256, 256)), NamedSharding(MESH, P("i")))
    mapped = jax.shard_map(torch2jax(fn), mesh=MESH, in_specs=P("i"), out_specs=P("i"))
    before = torch.get_num_threads()
    try:
        for n in (1, 2):
            torch.set_num_threads(n)
            call = jax.jit(lambda x: mapped(x) + 0)
            jax.block_until_ready(call(x))
            sizes.clear()
            jax.block_until_ready(call(x))
            assert set(sizes) == {n}
    finally:
        torch.set_num_threads(before)


def test_the_team_is_torchs_own_where_another_package_brings_openmp():
    """As scikit-learn does, whose library came first in the alphabet."""
    pytest.importorskip("sklearn.utils._openmp_helpers")
    libraries = _threads._omp_set_num_threads.__wrapped__()
    if len(libraries) < 2:
        pytest.skip("needs two OpenMP libraries, as scikit-learn's wheels for Linux bring one")
    sizes = []

    def in_a_thread(order):
        monkey = pytest.MonkeyPatch()
        with monkey.context() as patch:
            patch.setattr(_threads, "_omp_set_num_threads", lambda: order)
            for size in (1, 2):
                _threads._set_team_size(size)
                sizes.append(torch.get_num_threads())

    for order in (libraries, libraries[::-1]):
        thread = threading.Thread(target=in_a_thread, args=(order,))
        thread.start()
        thread.join()
    assert sizes == [1, 2] * 2


def test_errors_come_back_from_the_worker():
    def fn(x):
        raise KeyError("in the worker")

    shape = jax.ShapeDtypeStruct((256, 256), jnp.float64)
    f = jax.shard_map(lambda x: torch2jax(fn, output_shapes=shape)(x), mesh=MESH, in_specs=P("i"), out_specs=P("i"))
    x = jax.device_put(jnp.ones((N * 256, 256)), NamedSharding(MESH, P("i")))
    with pytest.raises((jax.errors.JaxRuntimeError, ValueError), match="in the worker"):
        jax.block_until_ready(jax.jit(f)(x))


def test_eager_calls_stay_on_their_device():
    f = torch2jax(lambda x: x + 1)
    for x in (X, jnp.ones((300, 300))):
        for device in DEVICES[:2]:
            out = f(jax.device_put(x, device))
            assert out.devices() == {device}
        assert f(x).devices() == {jax.devices()[0]}
        assert not f(x).committed


@pytest.mark.parametrize("n", [4, 640_000])
def test_eager_calls_with_arguments_on_several_devices(n):
    f = torch2jax(lambda a, b: (a + b, a.sum()))
    a, (first, second) = jnp.ones(n), DEVICES[:2]
    assert f(a, jax.device_put(a, second))[0].devices() == {second}
    with pytest.raises(ValueError, match="incompatible devices"):
        f(jax.device_put(a, first), jax.device_put(a, second))
