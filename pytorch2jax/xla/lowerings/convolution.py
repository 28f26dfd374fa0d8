"""Convolutions and their transposes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import precise


@lowers("aten.convolution.default", "aten._convolution.default", "aten.convolution_overrideable.default")
def convolution(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    *flags: bool,
    out: Out,
) -> jax.Array:
    n = weight.ndim - 2
    single = x.ndim == n + 1
    x = x[None] if single else x
    stride, padding, dilation, output_padding = (_each(v, n) for v in (stride, padding, dilation, output_padding))
    if transposed:
        y = _transposed(x, weight, stride, padding, dilation, output_padding, groups)
    elif groups == 1 and _kernel_is_larger(x.shape[2:], weight.shape[2:]):
        y = _sum_of_products(x, weight, stride, padding, dilation, out)
    else:
        y = lax.conv_general_dilated(
            x,
            weight,
            stride,
            [(p, p) for p in padding],
            rhs_dilation=dilation,
            dimension_numbers=_layout(n),
            feature_group_count=groups,
            precision=None,
        )
    if bias is not None:
        y = y + bias.reshape(-1, *(1,) * n)
    return y[0] if single else y


def _each(value: Sequence[int], n: int) -> tuple[int, ...]:
    values = tuple(value)
    return values * n if len(values) == 1 else values


def _layout(n: int) -> tuple[str, str, str]:
    axes = "DHW"[-n:] if n <= 3 else "".join(chr(ord("a") + i) for i in range(n))
    return f"NC{axes}", f"OI{axes}", f"NC{axes}"


_MOST_PRODUCTS = 64


def _kernel_is_larger(size: Sequence[Any], kernel: Sequence[int]) -> bool:
    """Whether the kernel reaches over the input along all axes: the last stages of networks for small images.

    XLA's CPU backend then exchanges the two, and takes 10 to 50 times as long as for a kernel that fits.
    """
    known = all(isinstance(n, int) for n in size)
    return known and all(n < k for n, k in zip(size, kernel, strict=True)) and math.prod(kernel) <= _MOST_PRODUCTS


def _sum_of_products(
    x: jax.Array,
    weight: jax.Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    out: Out,
) -> jax.Array:
    """A convolution as a sum over the places of its kernel, each a product of matrices."""
    n = weight.ndim - 2
    windows = out.shape[-n:]
    images = jnp.moveaxis(precise(x), 1, -1)
    total = jnp.zeros((x.shape[0], *windows, weight.shape[0]), images.dtype)
    for place in itertools.product(*map(range, weight.shape[2:])):
        # The first and last window that has something but padding here, and what it has there.
        slices, pads = [], []
        for size, count, s, p, start in zip(
            x.shape[2:], windows, stride, padding, (i * d for i, d in zip(place, dilation, strict=True)), strict=True
        ):
            first = max(0, -(-(p - start) // s))
            last = min(count - 1, (size - 1 + p - start) // s)
            slices.append(slice(first * s + start - p, last * s + start - p + 1, s) if first <= last else None)
            pads.append((first, count - 1 - last))
        if None not in slices:
            product = images[:, *slices] @ precise(weight[:, :, *place]).T
            total = total + jnp.pad(product, [(0, 0), *pads, (0, 0)])
    return jnp.moveaxis(total, -1, 1)


def _transposed(
    x: jax.Array,
    weight: jax.Array,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    output_padding: Sequence[int],
    groups: int,
) -> jax.Array:
    """The transpose of a convolution: one of the spread-out input with the turned-around kernel."""
    n = weight.ndim - 2
    kernel = weight.shape[2:]
    inputs, outputs = weight.shape[:2]
    # [in, out / groups, ...] -> [out, in / groups, ...]
    turned = weight.reshape(groups, inputs // groups, outputs, *kernel).swapaxes(1, 2)
    turned = jnp.flip(turned.reshape(groups * outputs, inputs // groups, *kernel), tuple(range(2, n + 2)))
    pads = []
    for k, d, p, o in zip(kernel, dilation, padding, output_padding, strict=True):
        reach = d * (k - 1)
        pads.append((reach - p, reach - p + o))
    return lax.conv_general_dilated(
        x,
        turned,
        (1,) * n,
        pads,
        lhs_dilation=stride,
        rhs_dilation=dilation,
        dimension_numbers=_layout(n),
        feature_group_count=groups,
    )


@lowers("aten.conv_tbc.default")
def conv_tbc(x: jax.Array, weight: jax.Array, bias: jax.Array, pad: int = 0) -> jax.Array:
    y = lax.conv_general_dilated(
        jnp.transpose(x, (1, 2, 0)), jnp.transpose(weight, (2, 1, 0)), (1,), [(pad, pad)], dimension_numbers=_layout(1)
    )
    return jnp.transpose(y, (2, 0, 1)) + bias


# -- windows as columns ---------------------------------------------------------------------------------------


def _window_places(n: int, kernel: int, dilation: int, padding: int, stride: int) -> np.ndarray[Any, Any]:
    """Where each element of each window is along a padded axis: `[kernel, windows]`."""
    count = (n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    return np.arange(kernel)[:, None] * dilation + np.arange(count)[None, :] * stride


@lowers("aten.im2col.default")
def im2col(
    x: jax.Array,
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    *,
    out: Out,
) -> jax.Array:
    single = x.ndim == 3
    x = x[None] if single else x
    (kh, kw), (dh, dw), (ph, pw), (sh, sw) = (_each(v, 2) for v in (kernel_size, dilation, padding, stride))
    rows, columns = _window_places(x.shape[2], kh, dh, ph, sh), _window_places(x.shape[3], kw, dw, pw, sw)
    padded = jnp.pad(x, ((0, 0), (0, 0), (ph, ph), (pw, pw)))
    windows = padded[:, :, rows[:, None, :, None], columns[None, :, None, :]]
    return windows.reshape(out.shape)


@lowers("aten.col2im.default")
def col2im(
    x: jax.Array,
    output_size: Sequence[int],
    kernel_size: Sequence[int],
    dilation: Sequence[int],
    padding: Sequence[int],
    stride: Sequence[int],
    *,
    out: Out,
) -> jax.Array:
    single = x.ndim == 2
    x = x[None] if single else x
    (h, w), (kh, kw), (dh, dw), (ph, pw), (sh, sw) = (
        _each(v, 2) for v in (output_size, kernel_size, dilation, padding, stride)
    )
    rows, columns = _window_places(h, kh, dh, ph, sh), _window_places(w, kw, dw, pw, sw)
    channels = x.shape[1] // (kh * kw)
    windows = x.reshape(x.shape[0], channels, kh, kw, rows.shape[1], columns.shape[1])
    total = jnp.zeros((x.shape[0], channels, h + 2 * ph, w + 2 * pw), x.dtype)
    total = total.at[:, :, rows[:, None, :, None], columns[None, :, None, :]].add(windows)
    return total[:, :, ph : ph + h, pw : pw + w].reshape(out.shape)
