"""Parts of arrays, and counting, where sizes may be formulas of `jax.export`'s symbols.

NumPy and Python's `slice`, `range` and `int` take numbers only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax._internals import InconclusiveDimensionOperation, is_symbolic


def are_numbers(*sizes: Any) -> bool:
    """Whether none of these is a formula."""
    return not any(map(is_symbolic, sizes))


def count(n: Any) -> Any:
    """`np.arange(n)`, or an array of JAX's."""
    return lax.iota(np.int32, n) if is_symbolic(n) else np.arange(n)


def slice_of(x: jax.Array, start: Any, length: Any, axis: int, step: int = 1) -> jax.Array:
    """`length` elements along an axis, `step` apart, from `start`, which is not negative.

    Where nobody can tell whether that is inside of the array (a table of 512 positions), what is outside is NaN.
    """
    if are_numbers(x.shape[axis], start, length):
        return lax.slice_in_dim(x, start, start + (length - 1) * step + 1 if length else start, step, axis)
    try:
        return lax.slice_in_dim(x, start, start + (length - 1) * step + 1, step, axis)
    except InconclusiveDimensionOperation:
        places = as_array(start) + step * count(length)
        return jnp.take(x, places, axis, mode="fill", unique_indices=True, indices_are_sorted=True)


def with_slices(x: jax.Array, new: jax.Array, slices: Sequence[tuple[Any, Any, int]]) -> jax.Array:
    """`x` with other elements where slices of all axes are; each of them as `slice_of` has it."""
    if are_numbers(*x.shape, *(n for where in slices for n in where)):
        return x.at[tuple(slice(start, start + (n - 1) * step + 1, step) for start, n, step in slices)].set(new)
    places = [
        (as_array(start) + step * count(n)).reshape(*(1,) * axis, -1, *(1,) * (x.ndim - axis - 1))
        for axis, (start, n, step) in enumerate(slices)
    ]
    try:
        if all(step == 1 for _, _, step in slices):
            return lax.dynamic_update_slice(x, new, [as_array(start) for start, _, _ in slices])
    except InconclusiveDimensionOperation:
        pass  # nobody can tell whether it fits
    return x.at[tuple(places)].set(new, unique_indices=True, indices_are_sorted=True)


def with_slice(x: jax.Array, new: jax.Array, start: Any, axis: int, step: int = 1) -> jax.Array:
    """`x` with other elements where `slice_of` would take them."""
    return with_slices(x, new, [(start, new.shape[i], step) if i == axis else (0, n, 1) for i, n in enumerate(x.shape)])


def as_array(n: Any) -> Any:
    """A number that may be a formula, to compute with."""
    return jnp.asarray(n, np.int32) if is_symbolic(n) else n


def place(n: Any, index: Any) -> Any:
    """An index that counts from the end if it is a negative number, as one from the beginning."""
    return index + n if not is_symbolic(index) and index < 0 else index
