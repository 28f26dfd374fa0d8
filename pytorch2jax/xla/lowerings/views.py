"""Views: the same elements in another shape or order, and what is put together of parts.

Operators whose names end with `_copy` compute the same. A view for which there is no rule here is read by its strides
(`_storage.Read`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax

from pytorch2jax._dtypes import canonical_dtype_t2j
from pytorch2jax._errors import DtypeError
from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import are_numbers, count, place, slice_of, with_slice
from pytorch2jax.xla.lowerings._promotion import cast


@lowers(
    "aten.alias.default",
    "aten.alias_copy.default",
    "aten.clone.default",
    "aten.detach.default",
    "aten.detach_copy.default",
    "aten.lift.default",
    "aten.lift_fresh.default",
    "aten.lift_fresh_copy.default",
    "aten._lazy_clone.default",
)
def identity(x: jax.Array) -> jax.Array:
    return x


@lowers(
    "aten.view.default",
    "aten.view_copy.default",
    "aten._unsafe_view.default",
    "aten._reshape_alias.default",
    "aten._reshape_alias_copy.default",
    "aten.squeeze.default",
    "aten.squeeze.dim",
    "aten.squeeze.dims",
    "aten.squeeze_copy.default",
    "aten.squeeze_copy.dim",
    "aten.squeeze_copy.dims",
    "aten.unsqueeze.default",
    "aten.unsqueeze_copy.default",
)
def reshape(x: jax.Array, *how: Any, out: Out) -> jax.Array:
    return x.reshape(out.shape)


@lowers("aten.view.dtype", "aten.view_copy.dtype")
def view_dtype(x: jax.Array, dtype: Any, *, out: Out) -> jax.Array:
    target = canonical_dtype_t2j(dtype)
    narrow = target.itemsize != out.torch_dtype.itemsize
    if are_numbers(*x.shape, *out.shape) and (narrow or x.nbytes != math.prod(out.shape) * target.itemsize):
        raise DtypeError(
            f"aten.view.dtype: expected tensors whose bits JAX has, got a view of them as {dtype} while jax_enable_x64 "
            "is off, where tensors of 64 bits (and complex ones of 128) have half of them. Call "
            "`jax.config.update('jax_enable_x64', True)`, or use `backend=\"torch\"`."
        )
    if target == np.bool_:
        return view_dtype(x, torch.uint8, out=out._replace(torch_dtype=torch.uint8)) != 0
    source = x.astype(np.uint8) if x.dtype == np.bool_ else x
    if jnp.issubdtype(source.dtype, jnp.complexfloating):
        source = view_as_real(source)
        source = source.reshape(*source.shape[:-2], -1)
    if jnp.issubdtype(target, jnp.complexfloating):
        real = np.finfo(target).dtype
        return view_as_complex(view_dtype_real(source, real).reshape(*out.shape, 2))
    return view_dtype_real(source, target).reshape(out.shape)


def view_dtype_real(x: jax.Array, dtype: np.dtype[Any]) -> jax.Array:
    """The bits of `x` as another real dtype; the last axis grows or shrinks with the size of an element."""
    ratio = x.dtype.itemsize / dtype.itemsize
    if ratio < 1:
        x = x.reshape(*x.shape[:-1], -1, int(1 / ratio))
    y = lax.bitcast_convert_type(x, dtype)
    return y.reshape(*y.shape[:-2], -1) if ratio > 1 else y


@lowers("aten.view_as_real.default", "aten.view_as_real_copy.default")
def view_as_real(x: jax.Array) -> jax.Array:
    return jnp.stack([jnp.real(x), jnp.imag(x)], axis=-1)


@lowers("aten.view_as_complex.default", "aten.view_as_complex_copy.default")
def view_as_complex(x: jax.Array) -> jax.Array:
    return lax.complex(x[..., 0], x[..., 1])


# -- order of axes and elements -------------------------------------------------------------------------------


@lowers("aten.t.default", "aten.t_copy.default")
def t(x: jax.Array) -> jax.Array:
    return x.T


@lowers("aten.transpose.int", "aten.transpose_copy.int")
def transpose(x: jax.Array, dim0: int, dim1: int) -> jax.Array:
    return jnp.swapaxes(x, dim0, dim1) if x.ndim else x


@lowers("aten.permute.default", "aten.permute_copy.default")
def permute(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(x, tuple(dims))


@lowers("aten.flip.default")
def flip(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.flip(x, tuple(dims)) if x.ndim else x


@lowers("aten.roll.default")
def roll(x: jax.Array, shifts: Sequence[int], dims: Sequence[int] = ()) -> jax.Array:
    if not dims:
        return jnp.roll(x, shifts[0])
    return jnp.roll(x, tuple(shifts), tuple(dims)) if x.ndim else x


# -- repetition -----------------------------------------------------------------------------------------------


@lowers("aten.expand.default", "aten.expand_copy.default")
def expand(x: jax.Array, size: Sequence[int], *, implicit: bool = False, out: Out) -> jax.Array:
    return jnp.broadcast_to(x, out.shape)


@lowers("aten.repeat.default")
def repeat(x: jax.Array, repeats: Sequence[int]) -> jax.Array:
    return jnp.tile(x, tuple(repeats)) if repeats else x


# -- parts ----------------------------------------------------------------------------------------------------


@lowers("aten.select.int", "aten.select_copy.int")
def select(x: jax.Array, dim: int, index: int) -> jax.Array:
    if are_numbers(x.shape[dim], index):
        return lax.index_in_dim(x, index, dim, keepdims=False)
    return jnp.squeeze(slice_of(x, place(x.shape[dim], index), 1, dim % x.ndim), dim)


@lowers("aten.slice.Tensor", "aten.slice_copy.Tensor")
def slice_(x: jax.Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1, *, out: Out) -> jax.Array:
    if not are_numbers(x.shape[dim], start, end):
        return slice_of(x, start, out.shape[dim], dim % x.ndim, step)
    return x[_along(x.ndim, dim, _bounded(x.shape[dim], start, end, step))]


def _bounded(n: int, start: int | None, end: int | None, step: int) -> slice:
    begin, stop, step = slice(start, end, step).indices(n)
    return slice(begin, max(begin, stop), step)


def _along(ndim: int, dim: int, where: Any) -> tuple[Any, ...]:
    index: list[Any] = [slice(None)] * ndim
    index[dim] = where
    return tuple(index)


@lowers("aten.narrow_copy.default")
def narrow(x: jax.Array, dim: int, start: int, length: int) -> jax.Array:
    return slice_of(x, place(x.shape[dim], start), length, dim % x.ndim)


@lowers("aten.diagonal.default", "aten.diagonal_copy.default")
def diagonal(x: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1, *, out: Out) -> jax.Array:
    if not are_numbers(x.shape[dim1], x.shape[dim2]):
        n = count(out.shape[-1])
        return jnp.moveaxis(x, (dim1, dim2), (0, 1))[n + max(-offset, 0), n + max(offset, 0)].transpose(
            (*range(1, x.ndim - 1), 0)
        )
    return jnp.diagonal(x, offset, dim1, dim2)


@lowers("aten.unbind.int", "aten.unbind_copy.int")
def unbind(x: jax.Array, dim: int = 0) -> tuple[jax.Array, ...]:
    return tuple(lax.index_in_dim(x, i, dim, keepdims=False) for i in range(x.shape[dim]))


@lowers("aten.split.Tensor", "aten.split_copy.Tensor", "aten.unsafe_split.Tensor")
def split(x: jax.Array, split_size: int, dim: int = 0, *, out: Sequence[Out]) -> tuple[jax.Array, ...]:
    return _parts(x, [o.shape[dim] for o in out], dim)


@lowers("aten.split_with_sizes.default", "aten.split_with_sizes_copy.default", "aten.unsafe_split_with_sizes.default")
def split_with_sizes(x: jax.Array, split_sizes: Sequence[int], dim: int = 0) -> tuple[jax.Array, ...]:
    return _parts(x, split_sizes, dim)


def _parts(x: jax.Array, sizes: Sequence[int], dim: int) -> tuple[jax.Array, ...]:
    ends = itertools.accumulate(sizes)
    return tuple(slice_of(x, end - size, size, dim % x.ndim) for size, end in zip(sizes, ends, strict=True))


@lowers("aten.unfold.default", "aten.unfold_copy.default")
def unfold(x: jax.Array, dimension: int, size: int, step: int, *, out: Out) -> jax.Array:
    if x.ndim == 0:
        return x.reshape(1)[:size]
    dim = dimension % x.ndim
    starts = count(out.shape[dim]) * step
    windows = jnp.take(x, starts[:, None] + np.arange(size), axis=dim)
    return jnp.moveaxis(windows, dim + 1, -1)


# -- parts replaced -------------------------------------------------------------------------------------------


@lowers("aten.slice_scatter.default")
def slice_scatter(
    x: jax.Array, source: jax.Array, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> jax.Array:
    if not are_numbers(x.shape[dim], start, end):
        return with_slice(x, cast(source, x.dtype), start, dim % x.ndim, step)
    return x.at[_along(x.ndim, dim, _bounded(x.shape[dim], start, end, step))].set(cast(source, x.dtype))


@lowers("aten.select_scatter.default")
def select_scatter(x: jax.Array, source: jax.Array, dim: int, index: int) -> jax.Array:
    if not are_numbers(x.shape[dim], index):
        return with_slice(x, jnp.expand_dims(cast(source, x.dtype), dim), index, dim % x.ndim)
    return x.at[_along(x.ndim, dim, index)].set(cast(source, x.dtype))


@lowers("aten.diagonal_scatter.default")
def diagonal_scatter(x: jax.Array, source: jax.Array, offset: int = 0, dim1: int = 0, dim2: int = 1) -> jax.Array:
    moved = jnp.moveaxis(x, (dim1, dim2), (-2, -1))
    n = source.shape[-1]
    rows, columns = count(n) + max(-offset, 0), count(n) + max(offset, 0)
    return jnp.moveaxis(moved.at[..., rows, columns].set(cast(source, x.dtype)), (-2, -1), (dim1, dim2))


# -- put together ---------------------------------------------------------------------------------------------


@lowers("aten.cat.default", "aten.concat.default")
def cat(tensors: Sequence[jax.Array], dim: int = 0, *, out: Out) -> jax.Array:
    # Torch leaves out empty vectors, whatever the shape of the others.
    parts = [x.astype(out.dtype) for x in tensors if x.shape != (0,) or len(out.shape) == 1]
    return jnp.concatenate(parts, dim) if parts else jnp.zeros(out.shape, out.dtype)


@lowers("aten.stack.default", "aten._stack.default")
def stack(tensors: Sequence[jax.Array], dim: int = 0, *, out: Out) -> jax.Array:
    return jnp.stack([x.astype(out.dtype) for x in tensors], dim)


@lowers("aten.diag_embed.default")
def diag_embed(x: jax.Array, offset: int = 0, dim1: int = -2, dim2: int = -1, *, out: Out) -> jax.Array:
    return diagonal_scatter(jnp.zeros(out.shape, x.dtype), x, offset, dim1, dim2)


# -- padding --------------------------------------------------------------------------------------------------


def _pairs(pad: Sequence[int], ndim: int) -> list[tuple[int, int]]:
    """Torch's padding, which begins with the last axis, for each axis from the first."""
    pairs = [(pad[2 * i], pad[2 * i + 1]) for i in range(len(pad) // 2)][::-1]
    return [(0, 0)] * (ndim - len(pairs)) + pairs


@lowers("aten.constant_pad_nd.default")
def constant_pad(x: jax.Array, pad: Sequence[int], value: Any = 0) -> jax.Array:
    widths = [(low, high, 0) for low, high in _pairs(pad, x.ndim)]
    return lax.pad(x, jnp.asarray(value, x.dtype), widths)


@lowers("aten.reflection_pad1d.default", "aten.reflection_pad2d.default", "aten.reflection_pad3d.default")
def reflection_pad(x: jax.Array, pad: Sequence[int]) -> jax.Array:
    return _padded(x, pad, "reflect")


@lowers("aten.replication_pad1d.default", "aten.replication_pad2d.default", "aten.replication_pad3d.default")
def replication_pad(x: jax.Array, pad: Sequence[int]) -> jax.Array:
    return _padded(x, pad, "edge")


def _padded(x: jax.Array, pad: Sequence[int], mode: str) -> jax.Array:
    pairs = _pairs(pad, x.ndim)
    known = are_numbers(*pad, *(x.shape[axis] for axis, pair in enumerate(pairs) if pair != (0, 0)))
    if known and min(pad) >= 0:
        return jnp.pad(x, pairs, mode=mode)
    for axis, (low, high) in enumerate(pairs):  # negative padding cuts off
        n = x.shape[axis]
        if low or high:
            where = count(n + low + high) - low
            if mode == "reflect":
                where = n - 1 - abs(n - 1 - abs(where))
            x = jnp.take(x, where.clip(0, n - 1), axis=axis)
    return x


# -- triangles ------------------------------------------------------------------------------------------------


@lowers("aten.tril.default")
def tril(x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.tril(x, diagonal)


@lowers("aten.triu.default")
def triu(x: jax.Array, diagonal: int = 0) -> jax.Array:
    return jnp.triu(x, diagonal)


# -- images ---------------------------------------------------------------------------------------------------


@lowers("aten.pixel_shuffle.default")
def pixel_shuffle(x: jax.Array, upscale_factor: int, *, out: Out) -> jax.Array:
    r = upscale_factor
    *batch, channels, height, width = x.shape
    y = x.reshape(*batch, channels // (r * r), r, r, height, width)
    n = len(batch)
    order = (*range(n), n, n + 3, n + 1, n + 4, n + 2)
    return y.transpose(order).reshape(out.shape)


@lowers("aten.pixel_unshuffle.default")
def pixel_unshuffle(x: jax.Array, downscale_factor: int, *, out: Out) -> jax.Array:
    r = downscale_factor
    *batch, channels, height, width = x.shape
    y = x.reshape(*batch, channels, height // r, r, width // r, r)
    n = len(batch)
    return y.transpose((*range(n), n, n + 2, n + 4, n + 1, n + 3)).reshape(out.shape)
