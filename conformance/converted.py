"""A call of an operator in JAX."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from conformance.compare import WrongError, arrays_of
from conformance.exceptions import BACKEND
from conformance.samples import Call
from pytorch2jax import _eager, torch2jax

Way = Callable[[Callable[..., Any]], Callable[..., Any]]
"""What is done to a JAX function before it is called: `jax.jit`, or `eagerly`."""

KEY = 7
"""Of random functions."""


class Converted:
    """A call in JAX.

    Args:
        call: the call.
        key: whether it draws random numbers, and gets a key.
    """

    def __init__(self, call: Call, *, key: bool = False) -> None:
        self.call, self._options = call, {"rng": jax.random.key(KEY)} if key else {}
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
