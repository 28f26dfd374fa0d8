"""Torch's rules for the dtype of a result of several arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax._internals import is_symbolic
from pytorch2jax.xla._registry import Out

_HALF = (np.dtype(np.float16), np.dtype(jnp.bfloat16))
_PYTHON = {bool: np.bool_, int: np.int64, float: np.float64, complex: np.complex128}


def category(dtype: Any) -> int:
    """0 for bool, 1 for integers, 2 for real and 3 for complex numbers."""
    if dtype == np.bool_:
        return 0
    if jnp.issubdtype(dtype, jnp.integer):
        return 1
    return 3 if jnp.issubdtype(dtype, jnp.complexfloating) else 2


def as_array(value: Any, dtype: Any) -> jax.Array:
    """An array or a number in a dtype. Whole numbers that do not fit keep their last bits, as in torch.

    But the smallest and the largest number of 64 bits, which stand for infinity, are those of 32 bits where JAX has
    no others.
    """
    if isinstance(value, int) and category(dtype) == 1:
        wide, own = np.iinfo(np.int64), np.iinfo(dtype)
        ends = {int(wide.min): own.min, int(wide.max): own.max} if dtype == np.int32 else {}
        value = np.asarray(ends.get(value, value)).astype(dtype)
    return jnp.asarray(value, dtype)


def cast(x: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    """The values in another dtype: complex numbers lose their imaginary part, other numbers their fractions."""
    if category(x.dtype) == 3 and category(dtype) != 3:
        x = x != 0 if category(dtype) == 0 else jnp.real(x)
    if category(x.dtype) == 2 and category(dtype) == 1 and dtype.itemsize < 4:
        x = x.astype(jax.dtypes.canonicalize_dtype(np.int64))  # of what does not fit, torch keeps the last bits
    return x.astype(dtype)


def precise(x: jax.Array) -> jax.Array:
    """Half precision as single precision, in which torch adds it up."""
    return x.astype(np.float32) if x.dtype in _HALF else x


def result_type(*values: Any, default: Any = np.float32) -> np.dtype[Any]:
    """The dtype in which torch computes with these arrays and numbers.

    Arrays with axes count most, then arrays without, then Python's numbers; of those that count less, only a higher
    category (complex, real, whole, bool) makes a difference.

    Args:
        *values: arrays and Python numbers.
        default: torch's default dtype, for Python's numbers among whole numbers.
    """
    ranks: list[list[np.dtype[Any]]] = [[], [], []]
    for value in values:
        if isinstance(value, (jax.Array, np.ndarray)):
            ranks[0 if value.ndim else 1].append(np.dtype(value.dtype))
        elif value is not None:
            ranks[2].append(_of_number(value, default))
    result: np.dtype[Any] | None = None
    for dtypes in ranks:
        if not dtypes:
            continue
        dtype = dtypes[0]
        for other in dtypes[1:]:
            dtype = np.dtype(jnp.promote_types(dtype, other))
        if result is None or category(dtype) > category(result):
            result = _complex_of(result, dtype)
    assert result is not None
    return np.dtype(jax.dtypes.canonicalize_dtype(result))


def _of_number(value: Any, default: Any) -> np.dtype[Any]:
    dtype = np.dtype(_PYTHON[int if is_symbolic(value) else type(value)])
    if category(dtype) == 2:
        return np.dtype(default)
    if category(dtype) == 3:
        return np.dtype(np.complex128 if default == np.float64 else np.complex64)
    return dtype


def _complex_of(real: np.dtype[Any] | None, dtype: np.dtype[Any]) -> np.dtype[Any]:
    """A complex dtype takes its precision from the real one that counted more."""
    if real == np.float64 and category(dtype) == 3:
        return np.dtype(np.complex128)
    return dtype


def in_dtype_of_result(function: Callable[[jax.Array], jax.Array], module: str) -> Callable[..., jax.Array]:
    """The rule for a function of one argument, computed in the dtype of the result.

    Args:
        function: the function.
        module: in whose name it is registered.
    """

    def rule(x: jax.Array, *, out: Out) -> jax.Array:
        # The absolute value and the angle of complex numbers are real, and computed of the complex ones.
        return function(x if category(x.dtype) == 3 else x.astype(out.dtype))

    rule.__module__ = module
    return rule
