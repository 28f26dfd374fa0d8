"""Normalisations by statistics of a batch, of groups or of layers; softmax."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla._storage import new_value
from pytorch2jax.xla.lowerings._promotion import precise
from pytorch2jax.xla.lowerings.reductions import norm


def _normalised(x: jax.Array, axes: tuple[int, ...], eps: float) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """`x` without its mean and scaled to variance 1, the mean, the variance and the reciprocal of its root."""
    mean = jnp.mean(x, axis=axes, keepdims=True)
    centered = x - mean
    variance = jnp.mean(centered * centered, axis=axes, keepdims=True)
    scale = lax.rsqrt(variance + jnp.asarray(eps, x.dtype))
    return centered * scale, mean, variance, scale


@lowers("aten.native_layer_norm.default")
def layer_norm(
    x: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None,
    bias: jax.Array | None,
    eps: float,
    *,
    out: Sequence[Out],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    y, mean, _, scale = _normalised(precise(x), axes, eps)
    y = y if weight is None else y * precise(weight)
    y = y if bias is None else y + precise(bias)
    # Torch does not derive by what it keeps for its own backward pass.
    mean, scale = lax.stop_gradient((mean, scale))
    return y, mean.reshape(out[1].shape), scale.reshape(out[2].shape)


@lowers("aten.native_group_norm.default")
def group_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    N: int,  # noqa: N803
    C: int,  # noqa: N803
    HxW: int,  # noqa: N803
    group: int,
    eps: float,
    *,
    out: Sequence[Out],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    y, mean, _, scale = _normalised(precise(x).reshape(N, group, C // group * HxW), (2,), eps)
    y = y.reshape(x.shape)
    channels = (1, C, *(1,) * (x.ndim - 2))
    y = y if weight is None else y * precise(weight).reshape(channels)
    y = y if bias is None else y + precise(bias).reshape(channels)
    return y, mean.reshape(out[1].shape), scale.reshape(out[2].shape)


@lowers("aten._fused_rms_norm.default")
def rms_norm(
    x: jax.Array, normalized_shape: Sequence[int], weight: jax.Array | None, eps: float | None, *, out: Sequence[Out]
) -> tuple[jax.Array, jax.Array]:
    wide = precise(x)
    axes = tuple(range(x.ndim - len(normalized_shape), x.ndim))
    tiny = np.finfo(wide.dtype).eps if eps is None else eps
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=axes, keepdims=True) + jnp.asarray(tiny, wide.dtype))
    y = wide * scale
    return (y if weight is None else y * precise(weight)), scale.reshape(out[1].shape)


# -- over a batch ---------------------------------------------------------------------------------------------


def _batch_norm(
    x: jax.Array,
    weight: jax.Array | None,
    bias: jax.Array | None,
    mean: jax.Array | None,
    var: jax.Array | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None, jax.Array | None]:
    wide = precise(x)
    channels = (1, -1, *(1,) * (x.ndim - 2))
    axes = (0, *range(2, x.ndim))
    new_mean, new_var = mean, var
    if training:
        y, batch_mean, variance, scale = _normalised(wide, axes, eps)
        n = x.size // max(x.shape[1], 1)
        if mean is not None and var is not None:
            # Torch's running variance is the unbiased one; and nothing is differentiated through either.
            count = jnp.asarray(n, wide.dtype)
            unbiased = lax.stop_gradient(variance).reshape(-1) * (count / jnp.maximum(count - 1, 1))
            new_mean = (1 - momentum) * mean + momentum * lax.stop_gradient(batch_mean).reshape(-1).astype(mean.dtype)
            new_var = (1 - momentum) * var + momentum * unbiased.astype(var.dtype)
    else:
        assert mean is not None
        assert var is not None
        scale = lax.rsqrt(precise(var) + eps).reshape(channels)
        batch_mean = precise(mean).reshape(channels)
        y = (wide - batch_mean) * scale
    y = y if weight is None else y * precise(weight).reshape(channels)
    y = y if bias is None else y + precise(bias).reshape(channels)
    batch_mean, scale = lax.stop_gradient((batch_mean, scale))  # as torch has it
    return y, batch_mean.reshape(-1), scale.reshape(-1), new_mean, new_var


@lowers("aten._native_batch_norm_legit_functional.default")
def batch_norm_functional(
    x: jax.Array,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    training: bool,
    momentum: float,
    eps: float,
    *,
    out: Sequence[Out],
) -> Any:
    y, batch_mean, scale, *statistics = _batch_norm(x, weight, bias, mean, var, training, momentum, eps)
    if not training:  # torch has nothing there either
        batch_mean, scale = (jnp.zeros(o.shape, o.dtype) for o in out[1:3])
    return y, batch_mean, scale, *statistics


@lowers("aten._batch_norm_with_update_functional.default")
def batch_norm_with_update(
    x: jax.Array, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float, *, out: Sequence[Out]
) -> Any:
    y, batch_mean, scale, *statistics = _batch_norm(x, weight, bias, mean, var, True, momentum, eps)
    return y, batch_mean, scale, jnp.zeros(out[3].shape, out[3].dtype), *statistics


@lowers("aten._native_batch_norm_legit.no_stats")
def batch_norm_no_stats(
    x: jax.Array, weight: Any, bias: Any, training: bool, momentum: float, eps: float, *, out: Sequence[Out]
) -> Any:
    return _batch_norm(x, weight, bias, None, None, True, momentum, eps)[:3]


@lowers("aten._native_batch_norm_legit_no_training.default")
def batch_norm_no_training(
    x: jax.Array, weight: Any, bias: Any, mean: Any, var: Any, momentum: float, eps: float, *, out: Sequence[Out]
) -> Any:
    y = _batch_norm(x, weight, bias, mean, var, False, momentum, eps)[0]
    return y, *(jnp.zeros(o.shape, o.dtype) for o in out[1:])  # torch has nothing there either


# -- softmax --------------------------------------------------------------------------------------------------


@lowers("aten._softmax.default")
def softmax(x: jax.Array, dim: int, half_to_float: bool = False, *, out: Out) -> jax.Array:
    return jax.nn.softmax(precise(x.astype(out.dtype)), axis=dim) if x.ndim else jnp.ones(out.shape, out.dtype)


@lowers("aten._safe_softmax.default")
def safe_softmax(x: jax.Array, dim: int, dtype: Any = None, *, out: Out) -> jax.Array:
    """The softmax; zeros where everything is masked."""
    return _safe_softmax(dim, precise(x.astype(out.dtype)))


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _safe_softmax(axis: int, x: jax.Array) -> jax.Array:
    largest = jnp.max(x, axis=axis, keepdims=True, initial=-jnp.inf)
    powers = jnp.exp(x - jnp.where(largest == -jnp.inf, 0, largest))
    total = jnp.sum(powers, axis=axis, keepdims=True)
    return powers / jnp.where(total == 0, 1, total)


@_safe_softmax.defjvp
def _(axis: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    y = _safe_softmax(axis, x)
    return y, y * (tangent - jnp.sum(y * tangent, axis=axis, keepdims=True))


@lowers("aten._log_softmax.default")
def log_softmax(x: jax.Array, dim: int, half_to_float: bool = False, *, out: Out) -> jax.Array:
    return jax.nn.log_softmax(precise(x.astype(out.dtype)), axis=dim) if x.ndim else jnp.zeros(out.shape, out.dtype)


@lowers("aten._weight_norm_interface.default")
def weight_norm(v: jax.Array, g: jax.Array, dim: int = 0) -> tuple[jax.Array, jax.Array]:
    axes = tuple(i for i in range(v.ndim) if i != dim % v.ndim)
    norm = jnp.sqrt(jnp.sum(v * v, axis=axes, keepdims=True))
    return v * (g / norm), norm.reshape(g.shape)


@lowers("aten.renorm.default")
def renorm(x: jax.Array, p: Any, dim: int, maxnorm: Any) -> jax.Array:
    axes = tuple(i for i in range(x.ndim) if i != dim % x.ndim)
    size = norm(precise(x), p, axes, True)
    return jnp.where(size > maxnorm, x * (maxnorm / (size + 1e-7)), x)


@lowers("aten.embedding_renorm.default")
def embedding_renorm(weight: jax.Array, indices: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    return new_value(_renormalised(weight, indices, max_norm, norm_type), weight)  # autograd does not know about it


def _renormalised(weight: jax.Array, indices: jax.Array, max_norm: float, norm_type: float) -> jax.Array:
    size = norm(precise(weight), norm_type, (1,), True)
    used = jnp.zeros(weight.shape[0], bool).at[indices.reshape(-1)].set(True)[:, None]
    return jnp.where(used & (size > max_norm), weight * (max_norm / (size + 1e-7)), weight)
