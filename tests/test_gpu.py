"""On a CUDA device: XLA's stream, ordered against torch's, and the same numbers as on the host."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pytorch2jax import TorchCallError, convert_pytnn_to_jax, t2j, torch2jax, use_tape
from pytorch2jax._tape import TAPE

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or jax.default_backend() != "gpu",
        reason="needs a CUDA device that both torch and JAX can use",
    ),
]


def net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 128), torch.nn.LayerNorm(128), torch.nn.GELU(), torch.nn.Linear(128, 8)
    return torch.nn.Sequential(*layers).double()


@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("jit", [True, False])
def test_values_and_gradients(tape, jit):
    model = net().cuda()
    apply, params = convert_pytnn_to_jax(model)
    x = jnp.linspace(-1.0, 1.0, 32 * 64).reshape(32, 64)

    def loss(params):
        return (apply(params, x) ** 2).sum()

    with use_tape(tape):
        call = jax.jit(jax.value_and_grad(loss)) if jit else jax.value_and_grad(loss)
        value, grads = call(params)
    expected = (model(torch.from_numpy(np.array(x)).cuda()) ** 2).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-9)
    np.testing.assert_allclose(grads["0"]["weight"], model[0].weight.grad.cpu(), rtol=1e-6, atol=1e-9)
    assert len(TAPE) == 0


def test_a_program_on_the_host_of_a_cuda_machine():
    apply, params = convert_pytnn_to_jax(net())
    host = jax.devices("cpu")[0]
    params, x = jax.device_put((params, jnp.ones((4, 64))), host)
    out = jax.jit(apply)(params, x)
    assert out.devices() == {host}


def test_torchs_work_before_the_call_is_waited_for():
    f = jax.jit(torch2jax(lambda x: x + 1))
    source = torch.zeros(1 << 20, device="cuda", dtype=torch.float64)
    array = t2j(source)
    jax.block_until_ready(f(array))
    for i in range(100):
        torch.cuda._sleep(1_000_000)  # cycles, queued on torch's stream
        source.fill_(i)
        assert float(f(array)[-1]) == i + 1


def test_xlas_work_after_the_call_waits_for_it():
    def slow(x):
        torch.cuda._sleep(1_000_000)
        return x * 2

    f = jax.jit(lambda x: torch2jax(slow)(x * 3) + 1)
    x = jnp.ones(1 << 20)
    for i in range(100):
        assert float(f(x * i)[-1]) == 6 * i + 1


def test_a_scan_with_gradients():
    f, g = torch2jax(lambda c, w: torch.tanh(c @ w)), lambda c, w: jnp.tanh(c @ w)
    c, w = jnp.ones((2, 8)) / 3, jnp.eye(8) / 2

    def loss(f):
        return lambda w: jax.lax.scan(lambda c, _: (f(c, w), None), c, None, length=10)[0].sum()

    call = jax.jit(jax.grad(loss(f)))
    for _ in range(3):
        np.testing.assert_allclose(call(w), jax.grad(loss(g))(w), rtol=1e-9)
    assert len(TAPE) == 0


def test_errors():
    def fn(x):
        raise KeyError("on the device")

    f = torch2jax(fn, output_shapes=jax.ShapeDtypeStruct((3,), jnp.float64))
    with pytest.raises(TorchCallError, match="on the device"):
        jax.block_until_ready(f(jnp.ones(3)))
