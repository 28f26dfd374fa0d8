"""Fourier transforms."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax.xla._registry import Out, lowers


def _factor(normalization: int, n: int) -> float:
    """Torch's normalisation: 0 none, 1 by the root of `n`, 2 by `n`."""
    return (1.0, 1 / math.sqrt(max(n, 1)), 1.0 / max(n, 1))[normalization]


def _along(x: jax.Array, dim: Sequence[int], forward: bool) -> jax.Array:
    for axis in dim:
        x = jnp.fft.fft(x, axis=axis) if forward else jnp.fft.ifft(x, axis=axis, norm="forward")
    return x


@lowers("aten._fft_c2c.default")
def c2c(x: jax.Array, dim: Sequence[int], normalization: int, forward: bool) -> jax.Array:
    return _along(x, dim, forward) * _factor(normalization, math.prod(x.shape[d] for d in dim))


@lowers("aten._fft_r2c.default")
def r2c(x: jax.Array, dim: Sequence[int], normalization: int, onesided: bool) -> jax.Array:
    factor = _factor(normalization, math.prod(x.shape[d] for d in dim))
    *others, last = dim
    if not onesided:
        return _along(x.astype(np.result_type(x.dtype, np.complex64)), dim, True) * factor
    return _along(jnp.fft.rfft(x, axis=last), others, True) * factor


@lowers("aten._fft_c2r.default")
def c2r(x: jax.Array, dim: Sequence[int], normalization: int, last_dim_size: int, *, out: Out) -> jax.Array:
    *others, last = dim
    x = _along(x, others, False)
    sizes = [x.shape[d] for d in others]
    y = jnp.fft.irfft(x, n=last_dim_size, axis=last, norm="forward")
    return y * _factor(normalization, math.prod(sizes) * last_dim_size)
