"""Several devices in one process: eight on the host, in a process of their own, which runs this file again."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from pytorch2jax import convert_pytnn_to_jax, torch2jax, use_tape
from pytorch2jax._tape import TAPE

N = 8


def test_on_eight_devices():
    if jax.device_count() == N:
        return
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", __file__],
        env={**os.environ, "XLA_FLAGS": f"--xla_force_host_platform_device_count={N}"},
        cwd=pathlib.Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "no tests ran" not in result.stdout


def layer(x, w):
    return torch.tanh(x @ w)


def jax_layer(x, w):
    return jnp.tanh(x @ w)


X, W = jnp.linspace(-1.0, 1.0, 2 * N * 4).reshape(2 * N, 4), jnp.linspace(-1.0, 1.0, 12).reshape(4, 3)

if jax.device_count() == N:
    MESH = jax.make_mesh((N,), ("i",), axis_types=(AxisType.Auto,))

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

        for transform in (hessian, pushed, batched):
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

    def test_teams_of_threads_are_shared():
        """Without this, each of the eight threads of XLA's would have a team as large as the machine."""
        sizes, threads = [], set()

        def fn(x):
            sizes.append(torch.get_num_threads())
            threads.add(threading.get_native_id())
            return torch.sin(x @ x.T) @ x

        before = torch.get_num_threads()
        x = jax.device_put(jnp.ones((N * 256, 256)), NamedSharding(MESH, P("i")))
        call = jax.jit(jax.shard_map(torch2jax(fn), mesh=MESH, in_specs=P("i"), out_specs=P("i")))
        jax.block_until_ready(call(x))
        started = len(os.listdir("/proc/self/task"))
        for _ in range(5):
            jax.block_until_ready(call(x))
        foreign = threads - {threading.main_thread().native_id}
        assert foreign
        assert min(sizes) == max(1, before // N)
        assert torch.get_num_threads() == before  # of the caller
        # XLA may start its own threads late; teams of torch's would be `N * (before - 1)` more.
        assert len(os.listdir("/proc/self/task")) - started < N

    def test_eager_calls_stay_on_their_device():
        f = torch2jax(lambda x: x + 1)
        for x in (X, jnp.ones((300, 300))):
            for device in jax.devices()[:2]:
                out = f(jax.device_put(x, device))
                assert out.devices() == {device}
            assert f(x).devices() == {jax.devices()[0]}
            assert not f(x).committed
