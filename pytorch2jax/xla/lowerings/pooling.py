"""Pooling, and resampling of images."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._sizes import are_numbers, count
from pytorch2jax.xla.lowerings._promotion import precise

# -- windows --------------------------------------------------------------------------------------------------


def _each(value: int | Sequence[int], n: int) -> tuple[int, ...]:
    values = (value,) if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _right_padding(
    sizes: Sequence[int],
    outputs: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[tuple[int, int]]:
    """Padding on both sides of each axis so that there are `outputs` windows: those of `ceil_mode` reach further."""
    pads = []
    for n, o, k, s, p, d in zip(sizes, outputs, kernel, stride, padding, dilation, strict=True):
        reach = (o - 1) * s + d * (k - 1) + 1
        pads.append((p, max(reach - n - p, 0)))
    return pads


class _Windows(NamedTuple):
    """Windows over the last axes of an array, an entry for each axis."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]

    def reduce(self, operands: Any, inits: Any, by: Callable[..., Any]) -> Any:
        """`lax.reduce_window`."""
        outer = jax.tree.leaves(operands)[0].ndim - len(self.size)
        ones = (1,) * outer
        return lax.reduce_window(
            operands,
            inits,
            by,
            (*ones, *self.size),
            (*ones, *self.stride),
            [(0, 0)] * outer + list(self.padding),
            window_dilation=(*ones, *self.dilation),
        )


def _lowest(dtype: np.dtype[Any]) -> Any:
    return np.array(-np.inf if jnp.issubdtype(dtype, jnp.inexact) else np.iinfo(dtype).min, dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _largest(x: jax.Array, windows: _Windows) -> jax.Array:
    """The largest element of each window; the derivative is that of the first of them."""
    return windows.reduce(x, _lowest(x.dtype), lax.max)


@_largest.defjvp
def _(windows: _Windows, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _largest(primals[0], windows), _taken(tangents[0], _where_largest(primals[0], windows), len(windows.size))


def _taken(x: jax.Array, places: jax.Array, n: int) -> jax.Array:
    """The elements of images, which have `n` axes, at places in each of them when it is flat."""
    outer = x.shape[:-n]
    rows, columns = math.prod(outer), math.prod(x.shape[-n:])
    if not places.size:
        return jnp.zeros(places.shape, x.dtype)
    flat = jnp.take_along_axis(x.reshape(rows, columns), places.reshape(rows, -1), axis=-1, mode="clip")
    return flat.reshape(places.shape)


def _where_largest(x: jax.Array, windows: _Windows) -> jax.Array:
    """Where the first of the largest elements of each window is in a flat image; of NaNs the last one, as in torch."""
    sizes = x.shape[x.ndim - len(windows.size) :]
    x = lax.stop_gradient(x)
    outside = np.int32(np.iinfo(np.int32).max)
    places = jnp.broadcast_to(count(math.prod(sizes)).astype(np.int32).reshape(sizes), x.shape)

    def better(left: Any, right: Any) -> Any:
        (a, i), (b, j) = left, right
        takes = (b > a) | ((b == a) & (j < i)) | ((b != b) & ((a == a) | (j > i)))
        return jnp.where(takes, b, a), jnp.where(takes, j, i)

    return windows.reduce((x, places), (_lowest(x.dtype), outside), better)[1]


def _max_pool(n: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def rule(
        x: jax.Array,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        dilation: Any = 1,
        ceil_mode: bool = False,
        *,
        out: Sequence[Out],
    ) -> tuple[jax.Array, jax.Array]:
        kernel = _each(kernel_size, n)
        steps = _each(stride, n) if stride not in ((), []) else kernel
        spread = _each(dilation, n)
        pads = _right_padding(x.shape[-n:], out[0].shape[-n:], kernel, steps, _each(padding, n), spread)
        windows = _Windows(kernel, steps, spread, tuple(pads))
        return _largest(x, windows), _where_largest(x, windows)  # what is not used, XLA leaves out

    return rule


lowers("aten.max_pool2d_with_indices.default")(_max_pool(2))
lowers("aten.max_pool3d_with_indices.default")(_max_pool(3))


def _avg_pool(n: int) -> Callable[..., jax.Array]:
    def rule(
        x: jax.Array,
        kernel_size: Any,
        stride: Any = (),
        padding: Any = 0,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        *,
        out: Out,
    ) -> jax.Array:
        kernel = _each(kernel_size, n)
        steps = _each(stride, n) if stride not in ((), []) else kernel
        padding = _each(padding, n)
        sizes, outputs = x.shape[-n:], out.shape[-n:]
        pads = _right_padding(sizes, outputs, kernel, steps, padding, (1,) * n)
        wide = precise(x)
        # A constant to start with, by which JAX knows that this is a sum, and its derivative.
        total = _Windows(kernel, steps, (1,) * n, tuple(pads)).reduce(wide, np.zeros((), wide.dtype), lax.add)
        if divisor_override is not None:
            return _divided(total, divisor_override)
        counts = np.ones((), np.int64)
        for size, o, k, s, p in zip(sizes, outputs, kernel, steps, padding, strict=True):
            first = np.arange(o) * s - p
            last = np.minimum(first + k, size + p if count_include_pad else size)
            along = last - (first if count_include_pad else np.maximum(first, 0))
            counts = counts[..., None] * along
        return _divided(total, counts)

    return rule


def _divided(total: jax.Array, by: Any) -> jax.Array:
    if jnp.issubdtype(total.dtype, jnp.inexact):
        return total / jnp.asarray(by, total.dtype)
    return lax.div(*jnp.broadcast_arrays(total, jnp.asarray(by, total.dtype)))


lowers("aten.avg_pool2d.default")(_avg_pool(2))
lowers("aten.avg_pool3d.default")(_avg_pool(3))


# -- windows that cover the image -----------------------------------------------------------------------------


def _adaptive(n: int, o: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Where each of `o` windows over `n` elements begins and ends."""
    i = np.arange(o)
    return (i * n) // o, -((-(i + 1) * n) // o)


def _adaptive_avg_pool(n: int) -> Callable[..., jax.Array]:
    def rule(x: jax.Array, output_size: Sequence[int], *, out: Out) -> jax.Array:
        y = precise(x)
        for axis, o in zip(range(-n, 0), out.shape[-n:], strict=True):
            size = x.shape[axis]
            if o == 0 or size == 0:
                continue
            if size % o == 0:
                shape = (*y.shape[: y.ndim + axis], o, size // o, *y.shape[y.ndim + axis + 1 :])
                y = jnp.mean(y.reshape(shape), axis=y.ndim + axis + 1)
                continue
            begins, ends = _adaptive(size, o)
            j = np.arange(size)
            share = ((j >= begins[:, None]) & (j < ends[:, None])) / (ends - begins)[:, None]
            y = _weighted(y, axis, share)
        return y.reshape(out.shape) if y.shape == out.shape else jnp.zeros(out.shape, y.dtype)

    return rule


lowers("aten._adaptive_avg_pool2d.default")(_adaptive_avg_pool(2))
lowers("aten._adaptive_avg_pool3d.default")(_adaptive_avg_pool(3))


def _adaptive_max_pool(n: int) -> Callable[..., tuple[jax.Array, jax.Array]]:
    def rule(x: jax.Array, output_size: Sequence[int], *, out: Sequence[Out]) -> tuple[jax.Array, jax.Array]:
        sizes, outputs = x.shape[-n:], out[0].shape[-n:]
        if all(o and size % o == 0 for size, o in zip(sizes, outputs, strict=True)):
            kernel = tuple(size // o for size, o in zip(sizes, outputs, strict=True))
            windows = _Windows(kernel, kernel, (1,) * n, ((0, 0),) * n)
            return _largest(x, windows), _where_largest(x, windows)
        index, valid = [], np.ones((1,) * (2 * n), bool)
        for axis, (size, o) in enumerate(zip(sizes, outputs, strict=True)):
            begins, ends = _adaptive(size, o)
            k = int((ends - begins).max(initial=0))
            along = begins[:, None] + np.arange(k)[None, :]
            shape = [1] * (2 * n)
            shape[axis], shape[n + axis] = o, k
            valid = valid & (along < ends[:, None]).reshape(shape)
            index.append(np.minimum(along, size - 1).reshape(shape))
        flat = np.arange(math.prod(sizes), dtype=np.int32).reshape(sizes)
        places = np.broadcast_to(flat[tuple(index)], valid.shape).reshape(*outputs, -1)
        taken = x[(..., *index)]
        values = taken.reshape(*taken.shape[: x.ndim - n], *outputs, -1)
        mask = valid.reshape(*outputs, -1)
        best = jnp.argmax(jnp.where(mask, lax.stop_gradient(values), _lowest(x.dtype)), axis=-1, keepdims=True)
        where = jnp.take_along_axis(jnp.broadcast_to(places, values.shape), best, axis=-1)
        return jnp.take_along_axis(values, best, axis=-1)[..., 0], where[..., 0]

    return rule


lowers("aten.adaptive_max_pool2d.default")(_adaptive_max_pool(2))
lowers("aten.adaptive_max_pool3d.default")(_adaptive_max_pool(3))


@lowers("aten.max_unpool2d.default")
def max_unpool2d(x: jax.Array, indices: jax.Array, output_size: Sequence[int], *, out: Out) -> jax.Array:
    return _unpooled(x, indices, 2, out)


@lowers("aten.max_unpool3d.default")
def max_unpool3d(
    x: jax.Array, indices: jax.Array, output_size: Any, stride: Any, padding: Any, *, out: Out
) -> jax.Array:
    return _unpooled(x, indices, 3, out)


def _unpooled(x: jax.Array, indices: jax.Array, n: int, out: Out) -> jax.Array:
    outer = x.shape[:-n]
    flat, places = x.reshape(math.prod(outer), -1), indices.reshape(math.prod(outer), -1)
    image = jnp.zeros((flat.shape[0], math.prod(out.shape[-n:])), x.dtype)
    return _put(image, places, flat).reshape(out.shape)


@jax.custom_jvp
def _put(images: jax.Array, places: jax.Array, values: jax.Array) -> jax.Array:
    """Flat images with values written to places of each; where several are written to one, torch derives by all."""
    return images.at[count(images.shape[0])[:, None], places].set(values)


@_put.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    images, places, _ = primals
    moved = jnp.zeros_like(images).at[count(images.shape[0])[:, None], places].add(tangents[2])
    return _put(*primals), moved


# -- resampling -----------------------------------------------------------------------------------------------


def _scale(n: Any, o: Any, align_corners: bool, factor: float | None) -> Any:
    """How far one step in the output is in the input."""
    if align_corners:
        if not are_numbers(n, o):
            return _quotient(n - 1, jnp.maximum(jnp.asarray(o) - 1, 1))
        return (n - 1) / (o - 1) if o > 1 else 0.0
    if factor is not None and factor > 0:
        return 1.0 / factor
    return n / o if are_numbers(n, o) else _quotient(n, o)


def _quotient(n: Any, o: Any) -> jax.Array:
    return jnp.asarray(n, np.float32) / jnp.asarray(o, np.float32)


def _source(n: Any, o: Any, align_corners: bool, factor: float | None, cubic: bool = False) -> Any:
    """Where each element of the output is in the input, in elements."""
    scale, i = _scale(n, o, align_corners, factor), count(o)
    if align_corners:
        return scale * i
    where = scale * (i + 0.5) - 0.5
    return where if cubic else where.clip(0)


def _weighted(x: jax.Array, axis: int, weights: Any) -> jax.Array:
    """A product with a matrix `[outputs, inputs]` along an axis."""
    matrix = jnp.asarray(weights.T, x.dtype)
    moved = jnp.matmul(jnp.moveaxis(x, axis, -1), matrix, precision=lax.Precision.HIGHEST)
    return jnp.moveaxis(moved, -1, axis)


def _matrix(o: Any, n: Any, places: Sequence[Any], weights: Sequence[Any]) -> Any:
    if not are_numbers(o, n):
        table = jnp.zeros((o, n))
        for where, weight in zip(places, weights, strict=True):
            table = table.at[count(o), jnp.clip(where, 0, n - 1)].add(weight)
        return table
    matrix = np.zeros((o, n))
    for where, weight in zip(places, weights, strict=True):
        np.add.at(matrix, (np.arange(o), np.clip(where, 0, n - 1)), weight)
    return matrix


def _linear(n: Any, o: Any, align_corners: bool, factor: float | None) -> Any:
    where = _source(n, o, align_corners, factor)
    low = (where // 1).astype(int).clip(0, n - 1)
    part = (where - low).clip(0, 1)
    return _matrix(o, n, (low, (low + 1).clip(0, n - 1)), (1 - part, part))


def _cubic(n: Any, o: Any, align_corners: bool, factor: float | None, a: float = -0.75) -> Any:
    where = _source(n, o, align_corners, factor, cubic=True)
    low = (where // 1).astype(int)
    t = where - low
    return _matrix(o, n, [low + k for k in (-1, 0, 1, 2)], cubic_weights(t, a))


def cubic_weights(t: Any, a: float = -0.75) -> list[Any]:
    """Keys' cubic convolution: the weights of the four elements around a place `t` behind the second of them.

    R. Keys, "Cubic convolution interpolation for digital image processing", 1981; `a = -0.75` is torch's.
    """

    def near(d: Any) -> Any:
        return ((a + 2) * d - (a + 3)) * d * d + 1

    def far(d: Any) -> Any:
        return ((a * d - 5 * a) * d + 8 * a) * d - 4 * a

    return [far(t + 1), near(t), near(1 - t), far(2 - t)]


def _resampled(kind: Callable[..., np.ndarray[Any, Any]]) -> Callable[..., jax.Array]:
    def rule(x: jax.Array, output_size: Any, align_corners: bool, *scales: float | None, out: Out) -> jax.Array:
        n = x.ndim - 2
        factors = scales or (None,) * n
        y = precise(x)
        for axis, factor in zip(range(-n, 0), factors, strict=True):
            y = _weighted(y, axis, kind(x.shape[axis], out.shape[axis], align_corners, factor))
        return y

    return rule


lowers("aten.upsample_linear1d.default", "aten.upsample_bilinear2d.default", "aten.upsample_trilinear3d.default")(
    _resampled(_linear)
)
lowers("aten.upsample_bicubic2d.default")(_resampled(_cubic))


def _antialiased(
    reach: float, kernel: Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]
) -> Callable[..., np.ndarray[Any, Any]]:
    def matrix(n: int, o: int, align_corners: bool, factor: float | None) -> np.ndarray[Any, Any]:
        scale = _scale(n, o, align_corners, factor)
        support = reach * max(scale, 1.0)
        stretch = 1.0 / scale if scale >= 1.0 else 1.0
        center = scale * (np.arange(o) + 0.5)
        first = np.maximum((center - support + 0.5).astype(int), 0)
        last = np.minimum((center + support + 0.5).astype(int), n)
        j = np.arange(n)
        weights = kernel((j[None, :] - center[:, None] + 0.5) * stretch)
        weights = np.where((j >= first[:, None]) & (j < last[:, None]), weights, 0)
        return weights / np.maximum(weights.sum(axis=1, keepdims=True), np.finfo(float).tiny)

    return matrix


def _triangle(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.maximum(1 - np.abs(x), 0)


def _keys(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    d, a = np.abs(x), -0.5
    near, far = ((a + 2) * d - (a + 3)) * d * d + 1, ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
    return np.where(d < 1, near, np.where(d < 2, far, 0))


lowers("aten._upsample_bilinear2d_aa.default")(_resampled(_antialiased(1.0, _triangle)))
lowers("aten._upsample_bicubic2d_aa.default")(_resampled(_antialiased(2.0, _keys)))


def _nearest(exact: bool) -> Callable[..., jax.Array]:
    def rule(x: jax.Array, output_size: Any, *scales: float | None, out: Out) -> jax.Array:
        n = x.ndim - 2
        for axis, factor in zip(range(2, n + 2), scales or (None,) * n, strict=True):
            size, o = x.shape[axis], out.shape[axis]
            if are_numbers(size, o):
                scale = np.float32(1.0 / factor if factor is not None and factor > 0 else size / o)
                where = (np.arange(o, dtype=np.float32) + (0.5 if exact else 0)) * scale
                x = jnp.take(x, np.minimum(where.astype(np.int64), size - 1), axis=axis)
                continue
            step = _scale(size, o, False, factor)
            places = ((count(o) + (0.5 if exact else 0)) * step).astype(np.int32)
            x = jnp.take(x, jnp.minimum(places, size - 1), axis=axis)
        return x

    return rule


lowers(*(f"aten.upsample_nearest{n}d.default" for n in (1, 2, 3)))(_nearest(False))
lowers(*(f"aten._upsample_nearest_exact{n}d.default" for n in (1, 2, 3)))(_nearest(True))


# -- sampling at given places ---------------------------------------------------------------------------------


def _unnormalised(place: jax.Array, n: int, align_corners: bool) -> jax.Array:
    """From [-1, 1] to elements."""
    return (place + 1) / 2 * (n - 1) if align_corners else ((place + 1) * n - 1) / 2


def _reflected(place: jax.Array, low: float, high: float) -> jax.Array:
    """Places outside of [low, high] mirrored back into it."""
    span = high - low
    if span == 0:
        return jnp.zeros_like(place)
    away = jnp.abs(place - low)
    flips, rest = jnp.floor(away / span), jnp.fmod(away, span)
    return jnp.where(flips % 2 == 0, rest + low, span - rest + low)


def _inside(place: jax.Array, n: int, padding: int, align_corners: bool) -> jax.Array:
    """Places outside of the image treated as torch's padding modes say: 0 zeros, 1 border, 2 reflection."""
    if padding == 2:
        place = _reflected(place, 0, n - 1) if align_corners else _reflected(place, -0.5, n - 0.5)
    if padding in (1, 2):
        kept = (place > 0) & (place < n - 1)  # no derivative at the border
        place = jnp.where(kept, place, jnp.clip(lax.stop_gradient(place), 0, n - 1))
    return place


def _sampled(x: jax.Array, places: Sequence[jax.Array]) -> jax.Array:
    """`x[n, :, *places]` with zeros outside; places are whole, `[N, ...]` each. Channels come last."""
    sizes = x.shape[2:]
    valid = jnp.ones((), bool)
    index = []
    for place, n in zip(places, sizes, strict=True):
        valid = valid & (place >= 0) & (place < n)
        index.append(jnp.clip(jnp.nan_to_num(place), 0, n - 1).astype(np.int32))
    batch = count(x.shape[0]).reshape(-1, *(1,) * (places[0].ndim - 1))
    taken = jnp.moveaxis(x, 1, -1)[(batch, *index)]
    return jnp.where(valid[..., None], taken, 0)


def _grid_sample(n: int) -> Callable[..., jax.Array]:
    def rule(
        x: jax.Array, grid: jax.Array, interpolation_mode: int, padding_mode: int, align_corners: bool
    ) -> jax.Array:
        sizes = x.shape[2:]
        raw = [_unnormalised(grid[..., n - 1 - i], sizes[i], align_corners) for i in range(n)]
        if interpolation_mode == 2:
            return jnp.moveaxis(_sampled_cubic(x, raw, padding_mode, align_corners), -1, 1)
        places = [_inside(p, size, padding_mode, align_corners) for p, size in zip(raw, sizes, strict=True)]
        if interpolation_mode == 1:
            return jnp.moveaxis(_sampled(x, [lax.stop_gradient(jnp.round(p)) for p in places]), -1, 1)
        lows = [lax.stop_gradient(jnp.floor(p)) for p in places]
        total = jnp.zeros((), x.dtype)
        for corner in itertools.product((0, 1), repeat=n):
            weight = jnp.ones((), x.dtype)
            for c, p, low in zip(corner, places, lows, strict=True):
                weight = weight * ((p - low) if c else (1 - (p - low)))
            values = _sampled(x, [low + c for low, c in zip(lows, corner, strict=True)])
            total = total + values * weight[..., None]
        return jnp.moveaxis(total, -1, 1)

    return rule


def _sampled_cubic(x: jax.Array, places: Sequence[jax.Array], padding: int, align_corners: bool) -> jax.Array:
    lows = [lax.stop_gradient(jnp.floor(p)) for p in places]
    weights = [cubic_weights(p - low) for p, low in zip(places, lows, strict=True)]
    total = jnp.zeros((), x.dtype)
    for i, j in itertools.product(range(4), repeat=2):
        whole = [low + k - 1 for low, k in zip(lows, (i, j), strict=True)]
        where = [_inside(p, n, padding, align_corners) for p, n in zip(whole, x.shape[2:], strict=True)]
        total = total + _sampled(x, where) * (weights[0][i] * weights[1][j])[..., None]
    return total


lowers("aten.grid_sampler_2d.default", "aten._grid_sampler_2d_cpu_fallback.default")(_grid_sample(2))
lowers("aten.grid_sampler_3d.default")(_grid_sample(3))
