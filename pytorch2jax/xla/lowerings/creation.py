"""Tensors out of nothing: filled, counted, spaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import are_numbers, count
from pytorch2jax.xla.lowerings._promotion import as_array


@lowers(
    "aten.zeros.default",
    "aten.zeros_like.default",
    "aten.new_zeros.default",
    "aten.zero.default",
    "aten.empty.memory_format",
    "aten.empty_like.default",
    "aten.empty_permuted.default",
    "aten.empty_strided.default",
    "aten.new_empty.default",
    "aten.new_empty_strided.default",
    "aten._efficientzerotensor.default",
)
def zeros(*how: Any, dtype: Any = None, out: Out) -> jax.Array:
    """What is empty has zeros, so that a program does the same each time."""
    return jnp.zeros(out.shape, out.dtype)


@lowers("aten.ones.default", "aten.ones_like.default", "aten.new_ones.default")
def ones(*how: Any, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.ones(out.shape, out.dtype)


@lowers(
    "aten.full.default",
    "aten.full_like.default",
    "aten.new_full.default",
    "aten.fill.Scalar",
    "aten.fill.Tensor",
)
def full(like: Any, value: Any, *more: Any, dtype: Any = None, out: Out) -> jax.Array:
    # `new_full(self, size, value)` has one more.
    return jnp.broadcast_to(as_array(more[0] if more else value, out.dtype), out.shape)


@lowers("aten.scalar_tensor.default")
def scalar_tensor(value: Any, *, dtype: Any = None, out: Out) -> jax.Array:
    return as_array(value, out.dtype)


@lowers("aten.eye.default", "aten.eye.m")
def eye(n: int, m: int | None = None, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.eye(out.shape[0], out.shape[1], dtype=out.dtype)


@lowers("aten.arange.default", "aten.arange.start", "aten.arange.start_step", "aten.range.default", "aten.range.step")
def arange(start: Any, end: Any = None, step: Any = 1, *, dtype: Any = None, out: Out) -> jax.Array:
    first = 0 if end is None else start
    n = out.shape[0]
    if not are_numbers(n, first, step):
        dtype = out.dtype if np.issubdtype(out.dtype, np.integer) else np.promote_types(out.dtype, np.float32)
        return jnp.asarray(first, dtype) + jnp.asarray(step, dtype) * count(n).astype(dtype)
    if np.issubdtype(out.dtype, np.integer):
        return jnp.asarray(int(first) + int(step) * np.arange(n), out.dtype)
    return jnp.asarray(first + step * np.arange(n, dtype=np.float64), out.dtype)


@lowers("aten.linspace.default")
def linspace(start: Any, end: Any, steps: int, *, dtype: Any = None, out: Out) -> jax.Array:
    whole = np.issubdtype(out.dtype, np.integer)
    if not are_numbers(steps, start, end):
        if whole or not are_numbers(start, end):
            raise TypeError("`torch.linspace` between whole or symbolic numbers.")
        return _linspace(start, end, steps).astype(out.dtype)
    if steps == 1:
        return jnp.full((1,), start, out.dtype)
    if whole:
        start, end = int(start), int(end)
    # From both ends, as torch does.
    step = (end - start) / max(steps - 1, 1)
    n = np.arange(steps)
    values = np.where(n < steps // 2, start + step * n, end - step * (steps - 1 - n))
    return jnp.asarray(np.trunc(values) if whole else values, out.dtype)


def _linspace(start: Any, end: Any, steps: Any) -> jax.Array:
    n, last = count(steps), jnp.asarray(steps, np.int32) - 1
    step = (end - start) / jnp.maximum(last, 1)
    return jnp.where(n < (last + 1) // 2, start + step * n, jnp.where(last == 0, start, end - step * (last - n)))


@lowers("aten.tril_indices.default")
def tril_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(np.stack(np.tril_indices(row, offset, col)), out.dtype)


@lowers("aten.triu_indices.default")
def triu_indices(row: int, col: int, offset: int = 0, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(np.stack(np.triu_indices(row, offset, col)), out.dtype)


@lowers("aten.fft_fftfreq.default")
def fftfreq(n: int, d: float = 1.0, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(np.fft.fftfreq(n, d), out.dtype)


@lowers("aten.fft_rfftfreq.default")
def rfftfreq(n: int, d: float = 1.0, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(np.fft.rfftfreq(n, d), out.dtype)


def _window(coefficients: Sequence[float], n: int, periodic: bool) -> np.ndarray[Any, Any]:
    """A sum of cosines over one period."""
    if n == 1:
        return np.ones(1)
    angles = 2 * np.pi * np.arange(n) / (n if periodic else n - 1)
    return np.asarray(sum(c * np.cos(k * angles) for k, c in enumerate(coefficients)))


@lowers("aten.hann_window.default", "aten.hann_window.periodic")
def hann_window(n: int, periodic: bool = True, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(_window((0.5, -0.5), n, periodic), out.dtype)


@lowers(
    "aten.hamming_window.default",
    "aten.hamming_window.periodic",
    "aten.hamming_window.periodic_alpha",
    "aten.hamming_window.periodic_alpha_beta",
)
def hamming_window(
    n: int, periodic: bool = True, alpha: float = 0.54, beta: float = 0.46, *, dtype: Any = None, out: Out
) -> jax.Array:
    return jnp.asarray(_window((alpha, -beta), n, periodic), out.dtype)


@lowers("aten.blackman_window.default", "aten.blackman_window.periodic")
def blackman_window(n: int, periodic: bool = True, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(_window((0.42, -0.5, 0.08), n, periodic), out.dtype)


@lowers("aten.bartlett_window.default", "aten.bartlett_window.periodic")
def bartlett_window(n: int, periodic: bool = True, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray((np.bartlett(n + 1)[:-1] if periodic else np.bartlett(n)) if n > 1 else np.ones(n), out.dtype)


@lowers("aten.kaiser_window.default", "aten.kaiser_window.periodic", "aten.kaiser_window.beta")
def kaiser_window(n: int, periodic: bool = True, beta: float = 12.0, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.asarray(
        (np.kaiser(n + 1, beta)[:-1] if periodic else np.kaiser(n, beta)) if n > 1 else np.ones(n), out.dtype
    )
