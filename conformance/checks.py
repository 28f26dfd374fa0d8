"""What is checked for a call of an operator: each check raises where JAX has something else than torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import torch

from conformance import batches
from conformance.compare import WrongError, as_arrays, as_tensors, compare, leaves_of
from conformance.converted import Converted, Unchanged, Way
from conformance.exceptions import BACKEND
from conformance.oracle import Differentiable, TorchCannotError, is_random, values
from conformance.samples import PAIRED, Call
from pytorch2jax import Pytorch2JaxError


def forward(op: Any, call: Call, way: Way) -> None:
    """What the function returns."""
    if is_random(call):
        return _reproducible(call, way)
    expected, arrays = leaves_of(values(call)), as_arrays(call.tensors)
    with Unchanged(arrays):
        compare("output", way(Converted(call))(*arrays), expected, values="empty" not in op.name)
    return None


def _reproducible(call: Call, way: Way) -> None:
    """A random function: shapes and dtypes as torch has them, and the same numbers from the same key."""
    expected, arrays = leaves_of(values(call)), as_arrays(call.tensors)
    function = Converted(call, key=True)
    state = torch.get_rng_state()
    with Unchanged(arrays):
        first, second = function(*arrays), way(function)(*arrays)
    if not torch.equal(state, torch.get_rng_state()):
        raise WrongError("torch's generator has moved on")
    compare("output", first, expected, values=False)
    compare("again", second, as_tensors(first))


def narrow(op: Any, call: Call, way: Way) -> None:
    """The same while `jax_enable_x64` is off: 64-bit numbers lose half their bits, nothing else changes."""
    if is_random(call) or "empty" in op.name:
        raise TorchCannotError("arbitrary values may not fit")
    expected = leaves_of(values(call))
    narrower = {torch.int64: torch.int32, torch.float64: torch.float32, torch.complex128: torch.complex64}
    rounded = [t.to(narrower.get(t.dtype, t.dtype)) for t in expected]
    with jax.enable_x64(False):
        arrays = as_arrays(call.tensors)
        with Unchanged(arrays):
            compare("output", way(Converted(call))(*arrays), rounded)


def in_place(op: Any, call: Call, way: Way) -> None:
    """The variant that writes to its first argument: that array stays what it is."""
    if op.inplace_variant is None or is_random(call):
        raise TorchCannotError("no such variant")
    forward(op, call.with_function(op.inplace_variant), way)


def out(op: Any, call: Call, way: Way) -> None:
    """The variant that writes to an argument `out`."""
    expected = values(call)
    if not op.supports_out or is_random(call) or not isinstance(expected, torch.Tensor):
        raise TorchCannotError("no such variant")
    n_tensors = len(call.tensors)

    def function(*tensors: torch.Tensor) -> Any:
        args, kwargs = call.arguments(tensors[:n_tensors])
        return op.op(*args, **kwargs, out=tensors[n_tensors])

    function.__qualname__ = op.name
    forward(op, Call(function, (*call.tensors, torch.zeros_like(expected)), {}), way)


def reverse(op: Any, call: Call, way: Way) -> None:
    """Reverse mode of first order."""
    if is_random(call):
        return _adjoint(call, way)
    torchs = Differentiable(call)
    expected, arrays = torchs.reverse(), as_arrays(torchs.tensors)
    primals, cotangents = as_arrays(torchs.primals), as_arrays(torchs.cotangents)
    function = Converted(call).of_active(arrays)

    def pull(primals: Any, cotangents: Any) -> Any:
        return jax.vjp(function, *primals)[1](cotangents)

    with Unchanged([*arrays, *primals, *cotangents]):
        compare("vjp", way(pull)(primals, cotangents), expected)
    return None


def _adjoint(call: Call, way: Way) -> None:
    """A random function has the same numbers in both of its derivatives: `<c, f'(x) t> = <c f'(x), t>`."""
    torchs = Differentiable(call)
    arrays, primals = as_arrays(torchs.tensors), as_arrays(torchs.primals)
    function = Converted(call, key=True).of_active(arrays)
    cotangents, tangents = as_arrays(torchs.cotangents), as_arrays(torchs.tangents)

    def both(primals: Any, cotangents: Any, tangents: Any) -> Any:
        outputs, pull = jax.vjp(function, *primals)
        return outputs, pull(cotangents), jax.jvp(function, tuple(primals), tuple(tangents))[1]

    outputs, pulled, pushed = way(both)(primals, cotangents, tangents)
    compare("forward", function(*primals), as_tensors(outputs))
    left = sum(complex((c * t).sum()) for c, t in zip(cotangents, pushed, strict=True))
    right = sum(complex((c * t).sum()) for c, t in zip(pulled, tangents, strict=True))
    if not np.isclose(left.real, right.real, rtol=1e-7, equal_nan=True):
        raise WrongError(f"reverse mode has {right}, forward mode has {left}")


def forward_mode(op: Any, call: Call, way: Way) -> None:
    """Forward mode of first order."""
    torchs = _certain(call)
    expected, arrays = torchs.forward(), as_arrays(torchs.tensors)
    primals, tangents = as_arrays(torchs.primals), as_arrays(torchs.tangents)
    function = Converted(call).of_active(arrays)
    with Unchanged([*arrays, *primals, *tangents]):
        push = way(lambda primals, tangents: jax.jvp(function, tuple(primals), tuple(tangents))[1])
        compare("jvp", push(primals, tangents), expected)


def second(op: Any, call: Call, way: Way) -> None:
    """Second order: reverse over reverse; for real numbers also forward over reverse."""
    torchs = _certain(call)
    expected, arrays = torchs.second(), as_arrays(torchs.tensors)
    primals, cotangents = as_arrays(torchs.primals), as_arrays(torchs.cotangents)
    tangents = as_arrays(torchs.tangents)
    function = Converted(call).of_active(arrays)

    def pull(primals: Any, cotangents: Any) -> Any:
        return jax.vjp(function, *primals)[1](cotangents)

    def twice(primals: Any, cotangents: Any, tangents: Any) -> Any:
        by_primals, by_cotangents = jax.vjp(pull, primals, cotangents)[1](tuple(tangents))
        return [*by_primals, *by_cotangents]

    with Unchanged([*arrays, *primals, *cotangents]):
        compare("reverse over reverse", way(twice)(primals, cotangents, tangents), expected)
        if not any(t.is_complex() for t in (*torchs.primals, *torchs.cotangents)):
            push = way(lambda p, c, t: jax.jvp(lambda p: pull(p, c), (p,), (t,))[1])
            hessian = expected[: len(primals)]  # symmetric
            compare("forward over reverse", push(primals, cotangents, tangents), hessian)


def _certain(call: Call) -> Differentiable:
    if is_random(call):
        raise TorchCannotError("random")
    return Differentiable(call)


def pair_of_dtypes(op: Any, call: Call, way: Way) -> None:
    """Arguments of any two dtypes: JAX has what torch has, and refuses what torch refuses."""
    try:
        random = is_random(call)
        expected = leaves_of(values(call))
    except TorchCannotError as refusal:
        try:
            way(Converted(call))(*as_arrays(call.tensors))
        except (Pytorch2JaxError, jax.errors.JaxRuntimeError):
            return
        raise WrongError(f"a result, and torch says {refusal}") from refusal
    got = way(Converted(call, key=random))(*as_arrays(call.tensors))
    compare("output", got, expected, values=not random and "empty" not in op.name, among=call.tensors)


_FORWARD = (torch.float32, torch.int64, torch.bool, torch.bfloat16, torch.complex64)
if BACKEND == "xla":  # other kernels, so that there is more to see
    _FORWARD = (*_FORWARD, torch.float64)
_PRECISE = (torch.float64, torch.complex128)

CHECKS: dict[str, tuple[Callable[[Any, Call, Way], None], tuple[torch.dtype, ...]]] = {
    "forward": (forward, _FORWARD),
    "narrow": (narrow, (torch.float32, torch.int64)),
    "in place": (in_place, (torch.float32, torch.int64)),
    "out": (out, (torch.float32, torch.int64)),
    "reverse": (reverse, _PRECISE),
    "forward mode": (forward_mode, _PRECISE),
    "second order": (second, _PRECISE),
    "vmap": (batches.batch, batches.DTYPES),
    "vmap of gradients": (batches.batch_of_gradients, (torch.float64,)),
    "vmap twice": (batches.batch_of_batches, batches.DTYPES),
    "vmap of jacrev": (batches.jacrev, (torch.float64,)),
    "vmap of jacfwd": (batches.jacfwd, (torch.float64,)),
    "vmap of hessian": (batches.hessian, (torch.float64,)),
    "pairs of dtypes": (pair_of_dtypes, PAIRED if BACKEND == "xla" else ()),  # else, the kernels are torch's own
}
"""Each check with the dtypes that it is made in, where the operator has them."""

DERIVATIVES = (
    "reverse",
    "forward mode",
    "second order",
    "vmap of gradients",
    "vmap of jacrev",
    "vmap of jacfwd",
    "vmap of hessian",
)

TWICE = ("vmap twice", "vmap of jacrev", "vmap of jacfwd", "vmap of hessian")
"""Those on two levels of `vmap`. With `backend="xla"`, where each mix of arguments is compiled, one sample is taken."""

IN_MANY_WAYS = (*TWICE, "pairs of dtypes")
"""These run each sample many times, and outside of `jax.jit` alone."""
