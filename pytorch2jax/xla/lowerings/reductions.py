"""Sums, products, extremes and statistics along axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import are_numbers
from pytorch2jax.xla.lowerings._promotion import category, precise
from pytorch2jax.xla.lowerings._special import absolute, shared


def axes(x: jax.Array, dim: int | Sequence[int] | None) -> tuple[int, ...] | None:
    """The axes that torch reduces: all of them for None and for none."""
    if dim is None or (not isinstance(dim, int) and len(dim) == 0):
        return None
    dims = (dim,) if isinstance(dim, int) else tuple(dim)
    return tuple(d % x.ndim for d in dims) if x.ndim else ()


@lowers("aten.sum.default", "aten.sum.dim_IntList")
def sum_(
    x: jax.Array, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None, out: Out
) -> jax.Array:
    return jnp.sum(_in(x, out), axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.nansum.default")
def nansum(
    x: jax.Array, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None, out: Out
) -> jax.Array:
    return jnp.sum(jnp.where(jnp.isnan(x), 0, _in(x, out)), axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.mean.default", "aten.mean.dim")
def mean(
    x: jax.Array, dim: Sequence[int] | None = None, keepdim: bool = False, *, dtype: Any = None, out: Out
) -> jax.Array:
    return jnp.mean(_in(x, out), axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.prod.default", "aten.prod.dim_int")
def prod(x: jax.Array, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.prod(_in(x, out), axis=axes(x, dim), keepdims=keepdim)


def _in(x: jax.Array, out: Out) -> jax.Array:
    """In the dtype of the result; half precision in single precision."""
    if category(x.dtype) == 3 and category(out.dtype) != 3:
        x = jnp.real(x)
    return precise(x.astype(out.dtype))


# -- extremes -------------------------------------------------------------------------------------------------


def _extreme(reduce: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """An extreme; all elements that have it share the derivative equally, in torch and in JAX."""

    def extreme(x: jax.Array, dims: tuple[int, ...] | None, keepdim: bool) -> jax.Array:
        if x.dtype == np.bool_:
            return reduce(x.astype(np.int8), axis=dims, keepdims=keepdim).astype(bool)
        return reduce(x, axis=dims, keepdims=keepdim)

    return extreme


_amax, _amin = _extreme(jnp.max), _extreme(jnp.min)


@lowers("aten.amax.default")
def amax(x: jax.Array, dim: Sequence[int] = (), keepdim: bool = False) -> jax.Array:
    return _amax(x, axes(x, dim), keepdim)


@lowers("aten.amin.default")
def amin(x: jax.Array, dim: Sequence[int] = (), keepdim: bool = False) -> jax.Array:
    return _amin(x, axes(x, dim), keepdim)


def _extreme_of_all(extreme: Callable[..., jax.Array], x: jax.Array) -> jax.Array:
    value = extreme(lax.stop_gradient(x), None, False)
    return shared(value, x) if jnp.issubdtype(x.dtype, jnp.inexact) else value


@lowers("aten.max.default")
def max_(x: jax.Array) -> jax.Array:
    return _extreme_of_all(_amax, x)


@lowers("aten.min.default")
def min_(x: jax.Array) -> jax.Array:
    return _extreme_of_all(_amin, x)


@lowers("aten.aminmax.default", "aten._aminmax.default", "aten._aminmax.dim")
def aminmax(x: jax.Array, dim: int | None = None, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return _amin(x, axes(x, dim), keepdim), _amax(x, axes(x, dim), keepdim)


def _with_index(find: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def extreme(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), np.int32)
        index = find(lax.stop_gradient(x), axis=dim, keepdims=True)
        value = jnp.take_along_axis(x, index, axis=dim)
        return (value, index) if keepdim else (jnp.squeeze(value, dim), jnp.squeeze(index, dim))

    return extreme


_max_dim, _min_dim = _with_index(jnp.argmax), _with_index(jnp.argmin)


@lowers("aten.max.dim")
def max_dim(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return _max_dim(x, dim, keepdim)


@lowers("aten.min.dim")
def min_dim(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return _min_dim(x, dim, keepdim)


@lowers("aten.argmax.default")
def argmax(x: jax.Array, dim: int | None = None, keepdim: bool = False, *, out: Out) -> jax.Array:
    return (jnp.argmax(x, axis=dim) if x.ndim else jnp.zeros((), np.int32)).reshape(out.shape)


@lowers("aten.argmin.default")
def argmin(x: jax.Array, dim: int | None = None, keepdim: bool = False, *, out: Out) -> jax.Array:
    return (jnp.argmin(x, axis=dim) if x.ndim else jnp.zeros((), np.int32)).reshape(out.shape)


# -- truth ----------------------------------------------------------------------------------------------------


@lowers("aten.all.default", "aten.all.dim", "aten.all.dims", "aten._is_all_true.default")
def all_(x: jax.Array, dim: Any = None, keepdim: bool = False) -> jax.Array:
    return jnp.all(x, axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.any.default", "aten.any.dim", "aten.any.dims", "aten._is_any_true.default")
def any_(x: jax.Array, dim: Any = None, keepdim: bool = False) -> jax.Array:
    return jnp.any(x, axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.count_nonzero.default", "aten.count_nonzero.dim_IntList")
def count_nonzero(x: jax.Array, dim: Any = None) -> jax.Array:
    return jnp.count_nonzero(x, axis=axes(x, dim))


# -- statistics -----------------------------------------------------------------------------------------------


def _variance(x: jax.Array, dim: Any, correction: float | None, keepdim: bool) -> tuple[jax.Array, jax.Array]:
    dims = axes(x, dim)
    wide = precise(x)
    n = math.prod(x.shape[d] for d in (range(x.ndim) if dims is None else dims))
    middle = jnp.mean(wide, axis=dims, keepdims=True)
    squares = jnp.sum(jnp.abs(wide - middle) ** 2, axis=dims, keepdims=keepdim)
    lost = 1 if correction is None else correction
    middle = middle if keepdim else jnp.mean(wide, axis=dims)
    free = max(n - lost, 0) if are_numbers(n) else jnp.maximum(jnp.asarray(n, squares.dtype) - lost, 0)
    return squares / jnp.asarray(free, squares.dtype), middle


@lowers("aten.var.correction")
def var(x: jax.Array, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> jax.Array:
    return _variance(x, dim, correction, keepdim)[0]


@lowers("aten.std.correction")
def std(x: jax.Array, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> jax.Array:
    return _root(_variance(x, dim, correction, keepdim)[0])


@lowers("aten.var_mean.correction")
def var_mean(x: jax.Array, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance(x, dim, correction, keepdim)


@lowers("aten.std_mean.correction")
def std_mean(x: jax.Array, dim: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    variance, middle = _variance(x, dim, correction, keepdim)
    return _root(variance), middle


def _root(square: jax.Array) -> jax.Array:
    """The square root, with torch's derivative at 0: none."""
    zero = square == 0
    return jnp.where(zero, 0, jnp.sqrt(jnp.where(zero, 1, square)))


@lowers("aten.logsumexp.default")
def logsumexp(x: jax.Array, dim: Sequence[int], keepdim: bool = False, *, out: Out) -> jax.Array:
    return jax.nn.logsumexp(_in(x, out), axis=axes(x, dim), keepdims=keepdim)


@lowers("aten.linalg_vector_norm.default")
def vector_norm(
    x: jax.Array, ord: Any = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None, out: Out
) -> jax.Array:
    x = x.astype(np.result_type(x.dtype, out.dtype)) if category(x.dtype) == 3 else precise(x.astype(out.dtype))
    return norm(x, ord, axes(x, dim), keepdim)


def norm(x: jax.Array, ord: Any, dims: tuple[int, ...] | None, keepdim: bool) -> jax.Array:
    """The norm of order `ord`. Where it has a kink, its derivative is 0."""
    size = absolute(x)
    if ord == 0:
        return jnp.sum((size != 0).astype(size.dtype), axis=dims, keepdims=keepdim)
    if ord == float("inf"):
        return _amax(size, dims, keepdim)
    if ord == float("-inf"):
        return _amin(size, dims, keepdim)
    if ord == 1:
        return jnp.sum(size, axis=dims, keepdims=keepdim)
    if ord == 2:
        return _root(jnp.sum(jnp.real(x * jnp.conj(x)), axis=dims, keepdims=keepdim))
    none = size == 0  # where torch has no derivative
    powers = jnp.where(none, 0 if ord > 0 else jnp.inf, jnp.where(none, 1, size) ** ord)
    total = jnp.sum(powers, axis=dims, keepdims=keepdim)
    none = total == 0
    return jnp.where(none, 0 if ord > 0 else jnp.inf, jnp.where(none, 1, total) ** (1.0 / ord))


# -- along an axis, step by step ------------------------------------------------------------------------------


@lowers("aten.cumsum.default")
def cumsum(x: jax.Array, dim: int, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.cumsum(_in(x, out), axis=dim) if x.ndim else x


@lowers("aten.cumprod.default")
def cumprod(x: jax.Array, dim: int, *, dtype: Any = None, out: Out) -> jax.Array:
    return jnp.cumprod(_in(x, out), axis=dim) if x.ndim else x


@lowers("aten.logcumsumexp.default", "aten._logcumsumexp.default")
def logcumsumexp(x: jax.Array, dim: int) -> jax.Array:
    return lax.cumlogsumexp(precise(x), axis=dim % x.ndim) if x.ndim else x


def _running(better: Callable[[jax.Array, jax.Array], jax.Array]) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def extreme(x: jax.Array, dim: int) -> tuple[jax.Array, jax.Array]:
        if x.ndim == 0:
            return x, jnp.zeros((), np.int32)
        dim = dim % x.ndim
        places = lax.broadcasted_iota(np.int32, x.shape, dim)

        def later(left: Any, right: Any) -> Any:
            takes = better(right[0], left[0]) | jnp.isnan(right[0])
            return jnp.where(takes, right[0], left[0]), jnp.where(takes, right[1], left[1])

        _, index = lax.associative_scan(later, (lax.stop_gradient(x), places), axis=dim)
        return jnp.take_along_axis(x, index, axis=dim), index

    return extreme


lowers("aten.cummax.default", "aten._cummax_helper.default")(_running(lambda new, old: new >= old))
lowers("aten.cummin.default", "aten._cummin_helper.default")(_running(lambda new, old: new <= old))


@lowers("aten.trace.default")
def trace(x: jax.Array, *, out: Out) -> jax.Array:
    return jnp.trace(x.astype(out.dtype))
