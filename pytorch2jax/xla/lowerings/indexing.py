"""Picking elements by indices, and writing to them.

Indices out of range are an error in torch. XLA cannot raise one: reads are clamped to the nearest element, and writes out
of range are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax._errors import CaptureError
from pytorch2jax.xla._registry import Out, lowers


def _index(x: jax.Array, indices: Sequence[Any]) -> tuple[Any, ...]:
    """Torch's list of indices, None for an axis that is taken whole, as JAX wants them."""
    result: list[Any] = []
    for index in indices:
        if index is not None and index.dtype == np.bool_:
            raise CaptureError(
                "a mask as an index gives as many elements as it has True, which XLA has to know before. Use "
                '`torch.where`, or `backend="torch"`.'
            )
        result.append(slice(None) if index is None else index)
    return tuple(result)


@lowers("aten.index.Tensor", "aten._unsafe_index.Tensor")
def index(x: jax.Array, indices: Sequence[Any]) -> jax.Array:
    return x[_index(x, indices)]


@lowers("aten.index_put.default", "aten._unsafe_index_put.default", "aten._index_put_impl.default")
def index_put(
    x: jax.Array, indices: Sequence[Any], values: jax.Array, accumulate: bool = False, unsafe: bool = False
) -> jax.Array:
    if len(indices) == 1 and indices[0] is not None and indices[0].dtype == np.bool_ and values.size == 1:
        mask = indices[0].reshape(indices[0].shape + (1,) * (x.ndim - indices[0].ndim))
        return jnp.where(mask, x + values.reshape(()) if accumulate else values.reshape(()), x)
    where = x.at[_index(x, indices)]
    return where.add(values) if accumulate else where.set(values)


@lowers("aten.index_select.default")
def index_select(x: jax.Array, dim: int, index: jax.Array) -> jax.Array:
    if x.ndim == 0:
        return x
    return jnp.take(x, index.reshape(-1), axis=dim, mode="clip")


@lowers("aten.take.default")
def take(x: jax.Array, index: jax.Array) -> jax.Array:
    return x.reshape(-1)[index]


@lowers("aten.put.default")
def put(x: jax.Array, index: jax.Array, source: jax.Array, accumulate: bool = False) -> jax.Array:
    where = x.reshape(-1).at[index.reshape(-1)]
    source = source.reshape(-1)
    return (where.add(source) if accumulate else where.set(source)).reshape(x.shape)


@lowers("aten.embedding.default")
def embedding(
    weight: jax.Array, indices: jax.Array, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> jax.Array:
    rows = jnp.take(weight, indices, axis=0, mode="clip")
    if padding_idx < 0:
        return rows
    padding = (indices == padding_idx)[..., None]  # gets no gradient
    return jnp.where(padding, lax.stop_gradient(rows), rows)


# -- an index for each element --------------------------------------------------------------------------------


def _places(index: jax.Array, dim: int) -> tuple[jax.Array, ...]:
    """Where each element of `index` points to: its own place, but along `dim`."""
    places = [lax.broadcasted_iota(np.int32, index.shape, axis) for axis in range(index.ndim)]
    places[dim] = index
    return tuple(places)


@lowers("aten.gather.default")
def gather(x: jax.Array, dim: int, index: jax.Array, *, sparse_grad: bool = False) -> jax.Array:
    if x.ndim == 0:
        return jnp.broadcast_to(x, index.shape)
    if index.ndim == 0:
        index = index[None]
        return x[_places(index, dim)].reshape(())
    return x[_places(index, dim)]


def _at(x: jax.Array, dim: int, index: jax.Array) -> Any:
    return x.at[_places(index, dim)]


def _one_axis(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x[None] if x.ndim == 0 else x), (index[None] if index.ndim == 0 else index)


def _cut(source: Any, index: jax.Array) -> Any:
    """The part of `source` that has an index."""
    if not isinstance(source, jax.Array):
        return source
    if source.ndim == 0:
        source = source[None]
    return source[tuple(slice(n) for n in index.shape)]


@lowers("aten.scatter.src", "aten.scatter.value")
def scatter(x: jax.Array, dim: int, index: jax.Array, source: Any) -> jax.Array:
    y, index = _one_axis(x, index)
    return _at(y, dim, index).set(jnp.asarray(_cut(source, index), x.dtype)).reshape(x.shape)


@lowers("aten.scatter_add.default")
def scatter_add(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    y, index = _one_axis(x, index)
    return _at(y, dim, index).add(_cut(source, index)).reshape(x.shape)


@lowers("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_with(x: jax.Array, dim: int, index: jax.Array, source: Any, *, reduce: str) -> jax.Array:
    y, index = _one_axis(x, index)
    where, source = _at(y, dim, index), jnp.asarray(_cut(source, index), x.dtype)
    return (where.add(source) if reduce == "add" else where.multiply(source)).reshape(x.shape)


@lowers("aten.scatter_reduce.two")
def scatter_reduce(
    x: jax.Array, dim: int, index: jax.Array, source: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    y, index = _one_axis(x, index)
    return _reduced_at(y, _places(index, dim), _cut(source, index), reduce, include_self).reshape(x.shape)


@lowers("aten.index_reduce.default")
def index_reduce(
    x: jax.Array, dim: int, index: jax.Array, source: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    y, source = (x[None], source.reshape(-1)) if x.ndim == 0 else (x, source)
    along = index.reshape([-1 if axis == dim % y.ndim else 1 for axis in range(y.ndim)])
    places = _places(jnp.broadcast_to(along, source.shape), dim)
    return _reduced_at(y, places, source, reduce, include_self).reshape(x.shape)


def _reduced_at(x: jax.Array, places: Any, source: jax.Array, reduce: str, include_self: bool) -> jax.Array:
    source = source.astype(x.dtype)
    start = x
    if not include_self:
        start = x.at[places].set(jnp.asarray(_neutral(reduce, x.dtype), x.dtype))
    where = start.at[places]
    if reduce in ("sum", "mean"):
        total = where.add(source)
        if reduce == "sum":
            return total
        count = jnp.full(x.shape, 1 if include_self else 0, np.int32).at[places].add(1)
        count = jnp.maximum(count, 1).astype(x.dtype)
        return total / count if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.floor_divide(total, count)
    if reduce == "prod":
        return where.multiply(source)
    return where.max(source) if reduce == "amax" else where.min(source)


def _neutral(reduce: str, dtype: np.dtype[Any]) -> Any:
    if reduce in ("sum", "mean"):
        return 0
    if reduce == "prod":
        return 1
    if jnp.issubdtype(dtype, jnp.inexact):
        return -np.inf if reduce == "amax" else np.inf
    if dtype == np.bool_:
        return reduce == "amin"
    limits = np.iinfo(dtype)
    return limits.min if reduce == "amax" else limits.max


# -- an index for each slice ----------------------------------------------------------------------------------


def _slices(x: jax.Array, dim: int, index: jax.Array) -> Any:
    where: list[Any] = [slice(None)] * x.ndim
    where[dim] = index.reshape(-1)
    return x.at[tuple(where)]


@lowers("aten.index_add.default")
def index_add(x: jax.Array, dim: int, index: jax.Array, source: jax.Array, *, alpha: Any = 1) -> jax.Array:
    y, source = (x[None], source.reshape(-1)) if x.ndim == 0 else (x, source)
    scaled = source if alpha == 1 else source * jnp.asarray(alpha, x.dtype)
    return _slices(y, dim, index).add(scaled.astype(x.dtype)).reshape(x.shape)


@lowers("aten.index_copy.default")
def index_copy(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    y, source = (x[None], source.reshape(-1)) if x.ndim == 0 else (x, source)
    return _slices(y, dim, index).set(source.astype(x.dtype)).reshape(x.shape)


@lowers("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(x: jax.Array, dim: int, index: jax.Array, value: Any) -> jax.Array:
    y = x[None] if x.ndim == 0 else x
    return _slices(y, dim, index).set(jnp.asarray(value, x.dtype)).reshape(x.shape)


# -- masks ----------------------------------------------------------------------------------------------------


@lowers("aten.masked_scatter.default")
def masked_scatter(x: jax.Array, mask: jax.Array, source: jax.Array, *, out: Out) -> jax.Array:
    x, mask = jnp.broadcast_to(x, out.shape), jnp.broadcast_to(mask, out.shape).reshape(-1)
    number = jnp.cumsum(mask.astype(np.int32)) - 1
    taken = source.reshape(-1)[jnp.clip(number, 0, max(source.size - 1, 0))]
    return jnp.where(mask, taken, x.reshape(-1)).reshape(out.shape)


@lowers("aten.nonzero_static.default")
def nonzero_static(x: jax.Array, *, size: int, fill_value: int = -1) -> jax.Array:
    if x.ndim == 0:  # there are no coordinates
        return jnp.zeros((size, 0), np.int32)
    return jnp.stack(jnp.nonzero(x, size=size, fill_value=fill_value), axis=-1)
