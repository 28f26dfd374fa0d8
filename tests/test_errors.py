"""What a caller sees when torch fails, and that everything works afterwards."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import pytorch2jax
from pytorch2jax import Pytorch2JaxError, TorchCallError, torch2jax

SPEC = jax.ShapeDtypeStruct((3,), jnp.float64)


def _fails_on_negative(x):
    if (x < 0).any():
        raise ArithmeticError("negative input in the torch function")
    return x * 2


@pytest.fixture
def f():
    return torch2jax(_fails_on_negative, output_shapes=SPEC)


GOOD, BAD = jnp.ones(3), -jnp.ones(3)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: lambda x: jax.vmap(f)(x[None]),
        lambda f: lambda x: jax.jvp(f, (x,), (x,))[1],
        lambda f: jax.hessian(lambda x: (f(x) ** 2).sum()),
    ],
)
def test_eager_errors_carry_the_original(f, transform):
    call = transform(f)
    for _ in range(2):
        np.testing.assert_array_equal(np.isfinite(call(GOOD)), True)
        with pytest.raises(TorchCallError, match="ArithmeticError: negative input in the torch function") as info:
            call(BAD)
        assert isinstance(info.value.__cause__, ArithmeticError)
        names = []
        traceback = info.value.__cause__.__traceback__
        while traceback is not None:
            names.append(traceback.tb_frame.f_code.co_name)
            traceback = traceback.tb_next
        assert "_fails_on_negative" in names
    np.testing.assert_array_equal(np.isfinite(call(GOOD)), True)


@pytest.mark.filterwarnings("ignore::pytorch2jax.LoopWarning")
@pytest.mark.parametrize(
    "transform",
    [
        lambda f: f,
        lambda f: jax.grad(lambda x: f(x).sum()),
        lambda f: lambda x: jax.vmap(f)(x[None]),
        lambda f: lambda x: jax.lax.scan(lambda c, _: (f(c), None), x, None, length=2)[0],
    ],
)
def test_errors_under_jit_carry_message_and_traceback(f, transform):
    call = jax.jit(transform(f))
    for _ in range(2):
        jax.block_until_ready(call(GOOD))
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)) as info:
            jax.block_until_ready(call(BAD))
        assert "ArithmeticError: negative input in the torch function" in str(info.value)
        assert "in _fails_on_negative" in str(info.value)
    jax.block_until_ready(call(GOOD))


def test_kept_errors_are_bounded(f):
    from pytorch2jax import _bridge

    call = jax.jit(f)
    for _ in range(3 * _bridge._KEPT_ERRORS):
        with pytest.raises((jax.errors.JaxRuntimeError, ValueError)):
            jax.block_until_ready(call(BAD))
    assert len(_bridge._errors) <= _bridge._KEPT_ERRORS


def test_torchs_own_errors():
    f = torch2jax(lambda x, i: x[i])
    with pytest.raises(TorchCallError, match=r"IndexError: index 7 is out of bounds"):
        f(jnp.ones(3), jnp.array([7]))
    assert f(jnp.ones(3), jnp.array([2])).tolist() == [1.0]


def test_every_exception_derives_from_a_builtin_one():
    classes = [c for c in vars(pytorch2jax).values() if isinstance(c, type) and issubclass(c, Pytorch2JaxError)]
    assert len(classes) >= 14
    for cls in set(classes) - {Pytorch2JaxError}:
        others = [b for b in cls.__mro__ if issubclass(b, Exception) and not issubclass(b, Pytorch2JaxError)]
        assert others[0] not in (Exception, BaseException), cls


def test_messages_of_key_errors_are_readable():
    error = pytorch2jax.MissingLeafError("f: params.x: missing")
    assert str(error) == "f: params.x: missing"
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)


def test_an_array_on_several_devices():
    """In a process with two host devices."""
    program = """
import jax, jax.numpy as jnp, torch, pytorch2jax
from jax.sharding import NamedSharding, PartitionSpec as P
mesh = jax.make_mesh((2,), ("d",))
x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, P("d")))
for call in (pytorch2jax.torch2jax(torch.sin), pytorch2jax.j2t):
    try:
        call(x)
    except pytorch2jax.DeviceError as error:
        assert "expected an array on one device, got one on 2 devices" in str(error), error
        assert isinstance(error, ValueError)
    else:
        raise SystemExit("no error")
on_second = jax.device_put(jnp.arange(4.0), jax.devices()[1])
out = pytorch2jax.torch2jax(torch.sin)(on_second)
assert out.devices() == {jax.devices()[1]}
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_not_callable():
    with pytest.raises(TypeError, match="torch2jax: expected a torch callable, got int"):
        torch2jax(3)


def test_a_function_of_torch_that_is_no_python_function():
    f = torch2jax(torch.add)
    assert f(jnp.ones(2), jnp.ones(2)).tolist() == [2.0, 2.0]
    assert torch2jax(torch.nn.ReLU())(-jnp.ones(2)).tolist() == [0.0, 0.0]
