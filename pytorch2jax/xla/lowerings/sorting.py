"""Sorting, searching, counting. NaN is larger than everything, as in torch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import slice_of
from pytorch2jax.xla.lowerings._special import shared


def _order(x: jax.Array, dim: int, descending: bool) -> jax.Array:
    """The places of the elements in order; equal ones stay as they are."""
    x = lax.stop_gradient(x)
    if not descending:
        return jnp.argsort(x, axis=dim, stable=True)
    # Backwards twice: equal elements keep their order.
    n = x.shape[dim]
    backwards = jnp.argsort(jnp.flip(x, dim), axis=dim, stable=True)
    return jnp.flip(n - 1 - backwards, dim)


def _sorted(x: jax.Array, dim: int, descending: bool) -> tuple[jax.Array, jax.Array]:
    if x.ndim == 0:
        return x, jnp.zeros((), np.int32)
    order = _order(x, dim, descending)
    return jnp.take_along_axis(x, order, axis=dim), order


@lowers("aten.sort.default")
def sort(x: jax.Array, dim: int = -1, descending: bool = False) -> tuple[jax.Array, jax.Array]:
    return _sorted(x, dim, descending)


@lowers("aten.sort.stable")
def sort_stable(
    x: jax.Array, *, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[jax.Array, jax.Array]:
    return _sorted(x, dim, descending)


@lowers("aten.argsort.stable")
def argsort(x: jax.Array, *, stable: bool = True, dim: int = -1, descending: bool = False) -> jax.Array:
    return _sorted(x, dim, descending)[1]


@lowers("aten.topk.default")
def topk(x: jax.Array, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[jax.Array, jax.Array]:
    if x.ndim == 0:
        return x, jnp.zeros((), np.int32)
    order = slice_of(_order(x, dim, largest), 0, k, dim % x.ndim)
    return jnp.take_along_axis(x, order, axis=dim), order


@lowers("aten.kthvalue.default")
def kthvalue(x: jax.Array, k: int, dim: int = -1, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    if x.ndim == 0:
        return x, jnp.zeros((), np.int32)
    values, order = _sorted(x, dim, False)
    return _taken(values, order, k - 1, dim, keepdim)


def _taken(values: jax.Array, order: jax.Array, k: int, dim: int, keepdim: bool) -> tuple[jax.Array, jax.Array]:
    value, index = (lax.index_in_dim(a, k, dim, keepdims=keepdim) for a in (values, order))
    return value, index


@lowers("aten.median.dim")
def median_dim(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return _median(x, dim, keepdim, skips_nan=False)


@lowers("aten.nanmedian.dim")
def nanmedian_dim(x: jax.Array, dim: int, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    return _median(x, dim, keepdim, skips_nan=True)


def _median(x: jax.Array, dim: int, keepdim: bool, *, skips_nan: bool) -> tuple[jax.Array, jax.Array]:
    """The lower one of the two in the middle; NaN if there is one, unless it `skips_nan`."""
    if x.ndim == 0:
        return x, jnp.zeros((), np.int32)
    values, order = _sorted(x, dim, False)
    nan = jnp.isnan(lax.stop_gradient(x)) if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.zeros(x.shape, bool)
    n_nan = jnp.sum(nan, axis=dim, keepdims=True)
    n = x.shape[dim]
    middle = jnp.maximum(n - n_nan - 1, 0) // 2 if skips_nan else jnp.where(n_nan > 0, n - n_nan, (n - 1) // 2)
    value, index = (jnp.take_along_axis(a, middle, axis=dim) for a in (values, order))
    return (value, index) if keepdim else (jnp.squeeze(value, dim), jnp.squeeze(index, dim))


@lowers("aten.median.default")
def median(x: jax.Array) -> jax.Array:
    return _median_of_all(x, skips_nan=False)


@lowers("aten.nanmedian.default")
def nanmedian(x: jax.Array) -> jax.Array:
    return _median_of_all(x, skips_nan=True)


def _median_of_all(x: jax.Array, *, skips_nan: bool) -> jax.Array:
    value, _ = _median(lax.stop_gradient(x).reshape(-1), 0, False, skips_nan=skips_nan)
    return shared(value, x) if jnp.issubdtype(x.dtype, jnp.inexact) else value


@lowers("aten.mode.default")
def mode(x: jax.Array, dim: int = -1, keepdim: bool = False) -> tuple[jax.Array, jax.Array]:
    """The smallest of the values that occur most often, and the last place where it is."""
    if x.ndim == 0:
        return x, jnp.zeros((), np.int32)
    dim = dim % x.ndim
    values, order = _sorted(x, dim, False)
    places = lax.broadcasted_iota(np.int32, x.shape, dim)
    before = jnp.roll(lax.stop_gradient(values), 1, dim)
    starts = lax.cummax(jnp.where((places == 0) | (values != before), places, 0), axis=dim)
    end = jnp.argmax(places - starts, axis=dim, keepdims=True)  # of the longest run of equal values
    value, index = (jnp.take_along_axis(a, end, axis=dim) for a in (values, order))
    return (value, index) if keepdim else (jnp.squeeze(value, dim), jnp.squeeze(index, dim))


# -- searching ------------------------------------------------------------------------------------------------


@lowers("aten.searchsorted.Tensor", "aten.searchsorted.Scalar")
def searchsorted(
    edges: jax.Array,
    x: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: jax.Array | None = None,
) -> jax.Array:
    if sorter is not None:
        edges = jnp.take_along_axis(edges, sorter, axis=-1)
    side = side or ("right" if right else "left")
    x = jnp.asarray(x)
    if edges.ndim == 1:
        return jnp.searchsorted(edges, x, side=side)
    search = jnp.vectorize(lambda e, v: jnp.searchsorted(e, v, side=side), signature="(n),(m)->(m)")
    return search(edges, x)


@lowers("aten.bucketize.Tensor", "aten.bucketize.Scalar")
def bucketize(x: Any, boundaries: jax.Array, *, out_int32: bool = False, right: bool = False) -> jax.Array:
    return jnp.searchsorted(boundaries, jnp.asarray(x), side="right" if right else "left")


@lowers("aten.isin.Tensor_Tensor", "aten.isin.Tensor_Scalar", "aten.isin.Scalar_Tensor")
def isin(x: Any, among: Any, *, assume_unique: bool = False, invert: bool = False) -> jax.Array:
    return jnp.isin(jnp.asarray(x), jnp.asarray(among), invert=invert)


@lowers("aten.histc.default")
def histc(x: jax.Array, bins: int = 100, min: Any = 0, max: Any = 0, *, out: Out) -> jax.Array:
    x = lax.stop_gradient(x).reshape(-1)
    low, high = jnp.asarray(min, x.dtype), jnp.asarray(max, x.dtype)
    if min == max and x.size:
        low, high = jnp.min(x), jnp.max(x)
        low, high = jnp.where(low == high, low - 1, low), jnp.where(low == high, high + 1, high)
    place = jnp.floor((x - low) * bins / (high - low)).astype(np.int32)
    place = jnp.where(x == high, bins - 1, place)
    inside = (x >= low) & (x <= high)
    return jnp.zeros(bins, out.dtype).at[jnp.where(inside, place, bins)].add(1, mode="drop")
