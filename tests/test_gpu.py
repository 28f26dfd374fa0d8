"""On a CUDA device: XLA's stream, ordered against torch's, and the same numbers as on the host."""

from __future__ import annotations

import gc
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from pytorch2jax import TorchCallError, convert_pytnn_to_jax, t2j, torch2jax, use_tape
from pytorch2jax._tape import TAPE

ON_CUDA = torch.cuda.is_available() and jax.default_backend() == "gpu"
# Where the host is asked for by name, these tests are rehearsed there: most of what they do is the same.
REHEARSED = os.environ.get("PYTORCH2JAX_TEST_DEVICE") == "cpu"
DEVICE = "cuda" if ON_CUDA else "cpu"
ROUNDS = 1000 if ON_CUDA else 10

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (ON_CUDA or REHEARSED), reason="needs a CUDA device that both torch and JAX can use"),
]
needs_streams = pytest.mark.skipif(not ON_CUDA, reason="needs a CUDA device: the host has no streams")


def linger(cycles=1_000_000):
    """Keep torch's current stream busy: what is queued behind this waits, and Python does not."""
    if ON_CUDA:
        torch.cuda._sleep(cycles)


def net():
    torch.manual_seed(0)
    layers = torch.nn.Linear(64, 128), torch.nn.LayerNorm(128), torch.nn.GELU(), torch.nn.Linear(128, 8)
    return torch.nn.Sequential(*layers).double()


@pytest.mark.parametrize("tape", [True, False])
@pytest.mark.parametrize("jit", [True, False])
def test_values_and_gradients(tape, jit):
    model = net().to(DEVICE)
    apply, params = convert_pytnn_to_jax(model)
    x = jnp.linspace(-1.0, 1.0, 32 * 64).reshape(32, 64)

    def loss(params):
        return (apply(params, x) ** 2).sum()

    with use_tape(tape):
        call = jax.jit(jax.value_and_grad(loss)) if jit else jax.value_and_grad(loss)
        value, grads = call(params)
    expected = (model(torch.from_numpy(np.array(x)).to(DEVICE)) ** 2).sum()
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-9)
    np.testing.assert_allclose(grads["0"]["weight"], model[0].weight.grad.cpu(), rtol=1e-6, atol=1e-9)
    assert len(TAPE) == 0


@pytest.mark.parametrize("jit", [True, False])
def test_a_program_on_the_host_of_a_cuda_machine(jit):
    """Beside one on the device, with the same function."""
    model = net()
    apply, params = convert_pytnn_to_jax(model)
    expected = model(torch.ones(4, 64, dtype=torch.float64)).sum().item()
    for device in (jax.devices("cpu")[0], jax.devices()[0], jax.devices("cpu")[0]):
        there, x = jax.device_put((params, jnp.ones((4, 64))), device)
        call = jax.value_and_grad(lambda p, x: apply(p, x).sum())
        value, grads = (jax.jit(call) if jit else call)(there, x)
        assert value.devices() == grads["0"]["weight"].devices() == {device}
        np.testing.assert_allclose(value, expected, rtol=1e-9)


def test_the_host_as_the_default_device():
    f = torch2jax(lambda: torch.arange(3.0))  # nothing among its arguments says where it runs
    with jax.default_device(jax.devices("cpu")[0]):
        for call in (f, jax.jit(f)):
            out = call()
            assert out.devices() == {jax.devices("cpu")[0]}
            np.testing.assert_array_equal(out, [0, 1, 2])


# -- order -------------------------------------------------------------------------------------------------


def test_torchs_work_before_the_call_is_waited_for():
    f = jax.jit(torch2jax(lambda x: x + 1))
    source = torch.zeros(1 << 20, device=DEVICE, dtype=torch.float64)
    array = t2j(source)
    jax.block_until_ready(f(array))
    for i in range(ROUNDS):
        linger()
        source.fill_(i)
        assert float(f(array)[-1]) == i + 1


def test_xlas_work_after_the_call_waits_for_it():
    def slow(x):
        linger()
        return x * 2

    f = jax.jit(lambda x: torch2jax(slow)(x * 3) + 1)
    x = jnp.ones(1 << 20)
    for i in range(ROUNDS):
        assert float(f(x * i)[-1]) == 6 * i + 1


def test_the_call_waits_for_xlas_work_before_it():
    f = torch2jax(lambda x: x[0, :4] * 2)

    @jax.jit
    def call(x):
        for _ in range(8):  # long for the device, short for the host
            x = x @ x
        return f(x) + 1

    n = 1024 if ON_CUDA else 64
    ones = jnp.eye(n)
    for i in range(ROUNDS):
        sign = -1.0 if i % 2 else 1.0
        np.testing.assert_array_equal(call(ones * sign), [3.0, 1.0, 1.0, 1.0])
        np.testing.assert_array_equal(f(ones * sign), [2 * sign, 0.0, 0.0, 0.0])


def test_calls_in_flight_keep_their_order():
    """Nobody waits between them."""

    def slow(x):
        linger(100_000)
        return x + 1

    f = jax.jit(lambda x: torch2jax(slow)(x) * 1)
    x = jnp.zeros(1 << 16)
    for _ in range(ROUNDS):
        x = f(x)
    assert float(x[-1]) == ROUNDS


@needs_streams
def test_torchs_work_on_a_stream_of_the_callers():
    """Torch's current stream is what a call is ordered against, whichever it is."""
    f, stream = jax.jit(torch2jax(lambda x: x + 1)), torch.cuda.Stream()
    source = torch.zeros(1 << 20, device=DEVICE, dtype=torch.float64)
    array = t2j(source)
    jax.block_until_ready(f(array))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for i in range(ROUNDS):
            linger()
            source.fill_(i)
            assert float(f(array)[-1]) == i + 1


@needs_streams
def test_several_streams_inside_of_the_model():
    streams = [torch.cuda.Stream() for _ in range(3)]

    def fn(x):
        current, parts = torch.cuda.current_stream(), []
        for number, stream in enumerate(streams):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                linger()
                parts.append(x * number)
        for stream, part in zip(streams, parts, strict=True):
            current.wait_stream(stream)
            part.record_stream(current)
        return sum(parts)

    f = torch2jax(fn)
    value_and_grad = jax.jit(jax.value_and_grad(lambda x: (f(x * 2) ** 2).sum()))
    for i in range(1, 101):
        value, gradient = value_and_grad(jnp.full(1 << 10, float(i)))
        assert float(value) == (6 * i) ** 2 * 1024
        assert float(gradient[-1]) == 72 * i


# -- memory ------------------------------------------------------------------------------------------------


def test_memory_that_torch_frees_is_not_used_again_while_xla_reads_it():
    """A call's temporaries, and its output, are free for torch when the host leaves it, and not yet computed."""

    def slow(x):
        linger()
        return x * 2 + 1

    f = jax.jit(lambda x: torch2jax(slow)(x) * 1)
    x = jnp.ones(1 << 18)
    for i in range(ROUNDS):
        out = f(x * i)
        for _ in range(4):  # of the same size, on torch's own stream
            torch.full((1 << 18,), float("nan"), device=DEVICE, dtype=torch.float64)
        assert float(out[-1]) == 2 * i + 1


def test_a_tensor_that_became_an_array_may_be_freed():
    def slow(x):
        linger()
        return x + 1

    f = jax.jit(torch2jax(slow))
    for i in range(ROUNDS // 5):
        source = torch.full((1 << 18,), float(i), device=DEVICE, dtype=torch.float64)
        out = f(t2j(source))
        del source
        gc.collect()
        for _ in range(4):
            torch.full((1 << 18,), float("nan"), device=DEVICE, dtype=torch.float64)
        assert float(out[-1]) == i + 1


def test_both_frameworks_get_memory_in_turns():
    """With `XLA_PYTHON_CLIENT_PREALLOCATE=false`; the other way XLA takes three quarters of it at its start."""
    f = jax.jit(jax.grad(lambda x: torch2jax(lambda x: (x**3).sum())(x)))
    for n in (1 << 10, 1 << 20, 1 << 22, 1 << 20):
        np.testing.assert_array_equal(f(jnp.full(n, 2.0))[-1], 12.0)
        if ON_CUDA:
            torch.cuda.empty_cache()


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
