"""Picking elements by indices, and writing to them.

Indices out of range are an error in torch. XLA cannot raise one: reads are clamped to the nearest element, and writes
out of range are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax._errors import CaptureError
from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import count, slice_of
from pytorch2jax.xla.lowerings._promotion import as_array, cast, precise


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
    indices = [i.astype(np.bool_) if i is not None and i.dtype == np.uint8 else i for i in indices]  # masks of old
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if len(given) == 1 and given[0][1].dtype == np.bool_:
        axis, mask = given[0]
        _check_mask(x, mask, axis)
        new = _spread(cast(values, x.dtype), x, mask, axis)
        mask = mask.reshape(mask.shape + (1,) * (x.ndim - axis - mask.ndim))
        return jnp.where(mask, _sum(x, new) if accumulate else new, x)
    where = x.at[_index(x, indices)]
    return _add(where, values) if accumulate else where.set(values)


def _check_mask(x: jax.Array, mask: jax.Array, axis: int) -> None:
    if mask.shape != x.shape[axis : axis + mask.ndim]:
        raise CaptureError(
            f"index_put: the shape of the mask {list(mask.shape)} does not match the shape of the indexed tensor "
            f"{list(x.shape)} at axis {axis}. Masks are not broadcast: expand it (`mask.expand(...)`)."
        )


def _spread(values: jax.Array, x: jax.Array, mask: jax.Array, axis: int) -> jax.Array:
    """The values for the elements of `x` where `mask` is True, each at its place.

    Args:
        values: with one axis, or one of length 1, where `x` has those of the mask: an entry for each True.
        x: the array.
        mask: for some axes of `x`.
        axis: the first of them.
    """
    values = values.reshape((1,) * (x.ndim - mask.ndim + 1 - values.ndim) + values.shape)
    if values.size == 0:  # there is no True
        return jnp.zeros((), x.dtype)
    number = jnp.cumsum(mask.reshape(-1), dtype=np.int32).reshape(mask.shape) - 1
    return jnp.take(values, number, axis=axis, mode="clip")


# JAX neither adds nor multiplies booleans.


def _sum(x: jax.Array, y: jax.Array) -> jax.Array:
    return x | y if x.dtype == np.bool_ else x + y


def _add(where: Any, values: jax.Array) -> jax.Array:
    return where.max(values) if values.dtype == np.bool_ else where.add(values)


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
    return (_add(where, source) if accumulate else where.set(source)).reshape(x.shape)


@lowers("aten.embedding.default")
def embedding(
    weight: jax.Array, indices: jax.Array, padding_idx: int = -1, scale_grad_by_freq: bool = False, sparse: bool = False
) -> jax.Array:
    rows = jnp.take(weight, indices, axis=0, mode="clip")
    if scale_grad_by_freq:
        rows = _with_gradient_times(rows, _shares(weight, indices, rows.dtype)[..., None])
    if padding_idx < 0:
        return rows
    padding = (indices == padding_idx)[..., None]  # gets no gradient
    return jnp.where(padding, lax.stop_gradient(rows), rows)


def _shares(weight: jax.Array, indices: jax.Array, dtype: Any) -> jax.Array:
    """For each index one through the number of times that it occurs."""
    counts = jnp.zeros(weight.shape[0], dtype).at[indices].add(1)
    return 1 / jnp.take(counts, indices, mode="clip")


@jax.custom_jvp
def _with_gradient_times(x: jax.Array, factor: jax.Array) -> jax.Array:
    return x


@_with_gradient_times.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, factor = primals
    return x, tangents[0] * factor


@lowers("aten._embedding_bag.default", "aten._embedding_bag_forward_only.default")
def embedding_bag(
    weight: jax.Array,
    indices: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
    *,
    out: Sequence[Out],
) -> tuple[jax.Array, ...]:
    """Modes are sum, mean and maximum. What torch keeps for its own derivatives is left empty."""
    n_bags, n = out[0].shape[0], indices.shape[0]
    bags = jnp.searchsorted(offsets[:n_bags], count(n), side="right") - 1
    rows = precise(embedding(weight, indices, -1, scale_grad_by_freq))
    used = indices != padding_idx
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    if mode == 2:
        result = _largest_in_bags(rows, used, bags, n_bags)
    else:
        result = jax.ops.segment_sum(jnp.where(used[:, None], rows, 0), bags, n_bags)
    if mode == 1:
        counts = jax.ops.segment_sum(used.astype(rows.dtype), bags, n_bags)
        result = result / jnp.maximum(counts, 1)[:, None]
    return result, *(jnp.zeros(o.shape, o.dtype) for o in out[1:])


def _largest_in_bags(rows: jax.Array, used: jax.Array, bags: jax.Array, n_bags: int) -> jax.Array:
    """The first of the largest elements has the derivative; an empty bag is 0."""
    n = rows.shape[0]
    if n == 0:
        return jnp.zeros((n_bags, rows.shape[1]), rows.dtype)
    values = lax.stop_gradient(jnp.where(used[:, None], rows, -jnp.inf))
    is_largest = used[:, None] & (values == jax.ops.segment_max(values, bags, n_bags)[bags])
    first = jax.ops.segment_min(jnp.where(is_largest, count(n)[:, None], n), bags, n_bags)
    found = jnp.take_along_axis(rows, jnp.minimum(first, n - 1), axis=0)
    return jnp.where(first < n, found, 0)


# -- an index for each element --------------------------------------------------------------------------------


def _places(index: jax.Array, dim: int) -> tuple[jax.Array, ...]:
    """Where each element of `index` points to: its own place, but along `dim`."""
    places = [lax.broadcasted_iota(np.int32, index.shape, axis) for axis in range(index.ndim)]
    places[dim] = index
    return tuple(places)


@lowers("aten.gather.default")
def gather(x: jax.Array, dim: int, index: jax.Array, *, sparse_grad: bool = False) -> jax.Array:
    if index.size == 0:
        return jnp.zeros(index.shape, x.dtype)
    y, places = _one_axis(x, index)
    dim = dim % y.ndim
    covered = _cut(y, (n if axis != dim else m for axis, (n, m) in enumerate(zip(places.shape, y.shape, strict=True))))
    return jnp.take_along_axis(covered, places, axis=dim, mode="clip").reshape(index.shape)


def _at(x: jax.Array, dim: int, index: jax.Array) -> Any:
    return x.at[_places(index, dim)]


def _one_axis(x: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
    return (x[None] if x.ndim == 0 else x), (index[None] if index.ndim == 0 else index)


def _cut(source: Any, shape: Iterable[Any]) -> Any:
    """The first elements along each axis."""
    if not isinstance(source, jax.Array):
        return source
    if source.ndim == 0:
        source = source[None]
    for axis, n in enumerate(shape):
        if source.shape[axis] != n:
            source = slice_of(source, 0, n, axis)
    return source


@lowers("aten.scatter.src", "aten.scatter.value")
def scatter(x: jax.Array, dim: int, index: jax.Array, source: Any) -> jax.Array:
    y, index = _one_axis(x, index)
    return _at(y, dim, index).set(cast(jnp.asarray(_cut(source, index.shape)), x.dtype)).reshape(x.shape)


@lowers("aten.scatter_add.default")
def scatter_add(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    y, index = _one_axis(x, index)
    return _add(_at(y, dim, index), _cut(source, index.shape)).reshape(x.shape)


@lowers("aten.scatter.reduce", "aten.scatter.value_reduce")
def scatter_with(x: jax.Array, dim: int, index: jax.Array, source: Any, *, reduce: str) -> jax.Array:
    y, index = _one_axis(x, index)
    source = jnp.broadcast_to(cast(jnp.asarray(_cut(source, index.shape)), x.dtype), index.shape)
    if reduce == "add":
        return _add(_at(y, dim, index), source).reshape(x.shape)
    return _multiplied(y, _places(index, dim), source).reshape(x.shape)


@lowers("aten.scatter_reduce.two")
def scatter_reduce(
    x: jax.Array, dim: int, index: jax.Array, source: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    y, index = _one_axis(x, index)
    return _reduced_at(y, _places(index, dim), _cut(source, index.shape), reduce, include_self).reshape(x.shape)


@lowers("aten.index_reduce.default")
def index_reduce(
    x: jax.Array, dim: int, index: jax.Array, source: jax.Array, reduce: str, *, include_self: bool = True
) -> jax.Array:
    y, source = (x[None], source.reshape(-1)) if x.ndim == 0 else (x, source)
    along = index.reshape([-1 if axis == dim % y.ndim else 1 for axis in range(y.ndim)])
    places = _places(jnp.broadcast_to(along, source.shape), dim)
    return _reduced_at(y, places, source, reduce, include_self).reshape(x.shape)


def _reduced_at(x: jax.Array, places: Any, source: jax.Array, reduce: str, include_self: bool) -> jax.Array:
    source = cast(source, x.dtype)
    start = x
    if not include_self:
        start = x.at[places].set(jnp.asarray(_neutral(reduce, x.dtype), x.dtype))
    where = start.at[places]
    if reduce in ("sum", "mean"):
        total = _add(where, source)
        if reduce == "sum":
            return total
        count = jnp.full(x.shape, 1 if include_self else 0, np.int32).at[places].add(1)
        count = jnp.maximum(count, 1).astype(x.dtype)
        return total / count if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.floor_divide(total, count)
    if reduce == "prod":
        return _multiplied(start, places, source)
    return where.max(source) if reduce == "amax" else where.min(source)


@jax.custom_jvp
def _multiplied(x: jax.Array, places: Any, source: jax.Array) -> jax.Array:
    """JAX has no derivative where several elements of `source` are multiplied into one of `x`."""
    where = x.at[places]
    return where.min(source) if x.dtype == np.bool_ else where.multiply(source)


@_multiplied.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    x, places, source = primals
    by_x, _, by_source = tangents
    rest = _multiplied(_nonzero(x), places, _nonzero(source))
    zeros = (x == 0).astype(np.int32).at[places].add((source == 0).astype(np.int32))
    moved = by_x * _others(x, rest, zeros)
    moved = moved.at[places].add(by_source * _others(source, rest[places], zeros[places]))
    return _multiplied(x, places, source), moved


def _nonzero(x: jax.Array) -> jax.Array:
    return jnp.where(x == 0, 1, x)


def _others(x: jax.Array, rest: jax.Array, zeros: jax.Array) -> jax.Array:
    """What `x` is multiplied with: `rest` is the product of all that is not zero, `zeros` the number of zeros."""
    return jnp.where(zeros == (x == 0), rest / _nonzero(x), 0)


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
    return _add(_slices(y, dim, index), cast(scaled, x.dtype)).reshape(x.shape)


@lowers("aten.index_copy.default")
def index_copy(x: jax.Array, dim: int, index: jax.Array, source: jax.Array) -> jax.Array:
    y, source = (x[None], source.reshape(-1)) if x.ndim == 0 else (x, source)
    return _slices(y, dim, index).set(cast(source, x.dtype)).reshape(x.shape)


@lowers("aten.index_fill.int_Scalar", "aten.index_fill.int_Tensor")
def index_fill(x: jax.Array, dim: int, index: jax.Array, value: Any) -> jax.Array:
    y = x[None] if x.ndim == 0 else x
    return _slices(y, dim, index).set(as_array(value, x.dtype)).reshape(x.shape)


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


@lowers("aten.repeat_interleave.Tensor")
def repeat_interleave(repeats: jax.Array, *, output_size: int | None = None, out: Out) -> jax.Array:
    """The number of each entry, as many times as it says."""
    return jnp.repeat(count(repeats.shape[0]), repeats, total_repeat_length=out.shape[0])
