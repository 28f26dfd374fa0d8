"""What is checked for a call of an operator: each check raises where JAX has something else than torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from conformance.compare import WrongError, arrays_of, as_arrays, as_tensors, compare, leaves_of
from conformance.exceptions import BACKEND
from conformance.oracle import Differentiable, TorchCannotError, is_random, values
from conformance.samples import Call
from pytorch2jax import _eager, torch2jax

Way = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is done to a JAX function before it is called: `jax.jit`, or `eagerly`."""

_KEY = 7
_BATCH = (1.0, 0.9, 1.1)
"""Each example of a batch is the sample times one of these, where it is floating point."""


class Converted:
    """A call in JAX.

    Args:
        call: the call.
        key: whether it draws random numbers, and gets a key.
    """

    def __init__(self, call: Call, *, key: bool = False) -> None:
        self.call, self._options = call, {"rng": jax.random.key(_KEY)} if key else {}
        self._function = torch2jax(call.fn, backend=BACKEND)

    def __call__(self, *arrays: Any, **options: Any) -> list[Any]:
        args, kwargs = self.call.arguments(arrays)
        return arrays_of(self._function(*args, **kwargs, **self._options, **options))

    def of_active(self, arrays: Sequence[Any]) -> Callable[..., list[Any]]:
        """The same as a function of the active inputs, with the outputs that have derivatives."""

        def function(*active: Any) -> list[Any]:
            inputs = list(arrays)
            for position, array in zip(self.call.active, active, strict=True):
                inputs[position] = array
            return [output for output in self(*inputs) if jnp.issubdtype(output.dtype, jnp.inexact)]

        return function


def eagerly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function outside of `jax.jit`, past XLA: on tensors and arrays that share their memory."""

    def run(*args: Any) -> Any:
        limit, _eager._LARGE_BYTES = _eager._LARGE_BYTES, -1
        try:
            return function(*args)
        finally:
            _eager._LARGE_BYTES = limit

    return run


class Unchanged:
    """Within this context nobody may write to these arrays."""

    def __init__(self, arrays: Sequence[jax.Array]) -> None:
        self._arrays = arrays

    def __enter__(self) -> None:
        self._before = [np.array(array) for array in self._arrays]

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if kind is not None:
            return
        for index, (array, before) in enumerate(zip(self._arrays, self._before, strict=True)):
            if np.asarray(array).tobytes() != before.tobytes():
                raise WrongError(f"the JAX array of input {index} has changed")


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


def batch(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap`, with all arguments batched, and with the first one only."""
    if is_random(call):
        return _batch_of_keys(call, way)
    if not call.tensors or "empty" in op.name:
        raise TorchCannotError("nothing to compare")
    function = Converted(call)
    for batched in {len(call.tensors), 1}:
        examples = _examples(call, range(batched))
        expected = _stacked([leaves_of(values(call, example)) for example in examples])
        arrays = as_arrays(_batched(examples, range(batched)))
        axes = tuple(0 if i < batched else None for i in range(len(arrays)))
        with Unchanged(arrays):
            got = way(jax.vmap(function, in_axes=axes))(*arrays)
        compare(f"vmap of {batched} arguments", got, expected)
    return None


def _batch_of_keys(call: Call, way: Way) -> None:
    """A random function with a key for each example, and with one key for all of them, gives what a loop gives."""
    arrays, keys = as_arrays(call.tensors), jax.random.split(jax.random.key(_KEY), len(_BATCH))
    converted = Converted(call)

    def draw(key: Any, *arrays: Any) -> list[Any]:
        return converted(*arrays, rng=key)

    rows = [as_tensors(draw(key, *arrays)) for key in keys]
    expected = _stacked(rows)
    compare("vmap over keys", way(jax.vmap(draw, in_axes=(0, *(None for _ in arrays))))(keys, *arrays), expected)
    if call.tensors:
        copies = [jnp.stack([array] * len(_BATCH)) for array in arrays]
        expected = _stacked([rows[0]] * len(_BATCH))
        got = way(jax.vmap(draw, in_axes=(None, *(0 for _ in arrays))))(keys[0], *copies)
        compare("vmap with one key", got, expected)


def batch_of_gradients(op: Any, call: Call, way: Way) -> None:
    """`jax.vmap` of a gradient, for each example its own."""
    if is_random(call):
        raise TorchCannotError("random")
    examples = _examples(call, call.active)
    torchs = [Differentiable(call, example) for example in examples]
    expected = _stacked([t.reverse() for t in torchs])
    arrays = as_arrays(_batched(examples, call.active))
    primals = [arrays[i] for i in call.active]
    cotangents = as_arrays(_stacked([t.cotangents for t in torchs]))
    converted = Converted(call)

    def pull(primals: Any, cotangents: Any) -> Any:
        return jax.vjp(converted.of_active(arrays), *primals)[1](cotangents)

    with Unchanged([*arrays, *cotangents]):
        compare("vmap of vjp", way(jax.vmap(pull))(primals, cotangents), expected)


def _examples(call: Call, batched: Sequence[int]) -> list[list[torch.Tensor]]:
    return [
        [
            t * f if i in batched and (t.is_floating_point() or t.is_complex()) else t.clone()
            for i, t in enumerate(tensors)
        ]
        for f in _BATCH
        for tensors in [call.tensors]
    ]


def _batched(examples: list[list[torch.Tensor]], batched: Sequence[int]) -> list[torch.Tensor]:
    columns = zip(*examples, strict=True)
    return [torch.stack(column) if i in batched else column[0] for i, column in enumerate(columns)]


def _stacked(rows: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    try:
        return [torch.stack(column) for column in zip(*rows, strict=True)]
    except RuntimeError as error:
        raise TorchCannotError("each example has another shape") from error


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
    "vmap": (batch, (torch.float64, torch.int64, torch.bool)),
    "vmap of gradients": (batch_of_gradients, (torch.float64,)),
}
"""Each check with the dtypes that it is made in, where the operator has them."""

DERIVATIVES = ("reverse", "forward mode", "second order", "vmap of gradients")
