"""What a caller sees when torch fails, and that everything works afterwards."""

from __future__ import annotations

import inspect
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from cases import DEVICES
from jax.experimental import checkify
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P

import pytorch2jax
from pytorch2jax import DeviceError, Pytorch2JaxError, TorchCallError, _errors, jax2torch, torch2jax

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


def test_there_are_few_public_errors_and_the_others_are_kinds_of_them():
    public = [c for c in map(vars(pytorch2jax).get, pytorch2jax.__all__) if isinstance(c, type)]
    public = [c for c in public if issubclass(c, Pytorch2JaxError)]
    assert len(public) == 11
    described = (Path(__file__).parent.parent / "docs" / "errors.md").read_text()
    for cls in public:
        assert f"`{cls.__name__}`" in described or f"pytorch2jax.{cls.__name__}`" in described
        assert len(inspect.getdoc(cls).splitlines()) >= 3, cls
    kinds = {c for c in vars(_errors).values() if isinstance(c, type) and issubclass(c, Pytorch2JaxError)}
    for cls in kinds - set(public):
        assert any(issubclass(cls, p) for p in public if p is not Pytorch2JaxError), cls
        assert getattr(pytorch2jax, cls.__name__) is cls
        assert cls.__name__ not in dir(pytorch2jax)


def test_messages_of_key_errors_are_readable():
    error = pytorch2jax.MissingLeafError("f: params.x: missing")
    assert str(error) == "f: params.x: missing"
    assert isinstance(error, KeyError)
    assert isinstance(error, ValueError)


@pytest.mark.parametrize("call", [torch2jax(torch.sin), pytorch2jax.j2t])
def test_an_array_on_several_devices(call):
    mesh = jax.make_mesh((2,), ("i",), axis_types=(AxisType.Auto,), devices=DEVICES[:2])
    x = jax.device_put(jnp.arange(4.0), NamedSharding(mesh, P("i")))
    with pytest.raises(DeviceError, match=r"expected an array on one device.*spread over 2 devices") as found:
        call(x)
    assert isinstance(found.value, ValueError)


def test_not_callable():
    with pytest.raises(TypeError, match="torch2jax: expected a torch callable, got int"):
        torch2jax(3)


def test_a_function_of_torch_that_is_no_python_function():
    f = torch2jax(torch.add)
    assert f(jnp.ones(2), jnp.ones(2)).tolist() == [2.0, 2.0]
    assert torch2jax(torch.nn.ReLU())(-jnp.ones(2)).tolist() == [0.0, 0.0]


# -- JAX's own checks of floating point numbers ---------------------------------------------------------------


def logs(x):
    return torch.log(x)


NEGATIVE = {"small": -np.ones(2, np.float32), "large": -np.ones((800, 800), np.float32)}
WAYS = {
    "eager": lambda f, x: f(x),
    "jit": lambda f, x: jax.jit(f)(x),
    "grad": lambda f, x: jax.grad(lambda x: f(x).sum())(x),
    "vmap": lambda f, x: jax.vmap(f)(x),
    "jit of vmap": lambda f, x: jax.jit(jax.vmap(f))(x),
    "jvp": lambda f, x: jax.jvp(f, (x,), (x,)),
}


@pytest.mark.parametrize("size", NEGATIVE)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("backend", ["torch", "xla"])
def test_debug_nans_names_the_torch_function(backend, way, size):
    f, x = torch2jax(logs, backend=backend), jnp.asarray(NEGATIVE[size])
    name = "torch function .*logs" if backend == "torch" else "log"
    with jax.debug_nans(True):
        with pytest.raises(FloatingPointError, match=rf"invalid value \(nan\) encountered in .*{name}"):
            WAYS[way](f, x)
        jax.block_until_ready(WAYS[way](f, -x))  # and nothing is left of the error


@pytest.mark.parametrize("jit", [False, True])
def test_debug_infs_names_the_torch_function(jit):
    f = jax.jit(torch2jax(logs)) if jit else torch2jax(logs)
    with jax.debug_infs(True):
        with pytest.raises(FloatingPointError, match=r"\(inf\) encountered in output 0 of the torch function logs"):
            f(jnp.zeros(2))
        with pytest.raises(FloatingPointError, match=r"\(inf\)"):
            jax2torch(jnp.log)(torch.zeros(2))
    with jax.debug_nans(True):
        assert np.isinf(f(jnp.zeros(2))).all()


@pytest.mark.parametrize("transform", [lambda f: f, jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_checkify_sees_nan_in_torch_calls(transform):
    checked = checkify.checkify(transform(torch2jax(logs)), errors=checkify.float_checks)
    error, _ = checked(jnp.ones(2))
    assert error.get() is None
    error, _ = checked(-jnp.ones(2))
    assert "nan generated by primitive: torch_call of" in error.get()
    assert "logs" in error.get()


# -- found in use -----------------------------------------------------------------------------------------------


def test_errors_of_the_user_are_raised_at_once():
    runs = []

    def f(x):
        runs.append(1)
        if len(runs) > 1:
            raise ValueError("no")
        return x

    with pytest.raises(RuntimeError, match="no"):
        jax.vmap(torch2jax(f))(jnp.ones((2, 2)))
    assert len(runs) == 2
