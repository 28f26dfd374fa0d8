"""Activation functions. In half precision they are computed in single precision, as in torch."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import as_array, precise


@lowers("aten.relu.default")
def relu(x: jax.Array) -> jax.Array:
    # Minus zero and NaN stay, and zero has no derivative.
    return jnp.where(x <= 0, lax.stop_gradient(jnp.where(x < 0, jnp.zeros_like(x), x)), x)


@lowers("aten.hardtanh.default")
def hardtanh(x: jax.Array, min_val: Any = -1, max_val: Any = 1) -> jax.Array:
    return _between(x, min_val, max_val)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def _between(x: jax.Array, low: Any, high: Any) -> jax.Array:
    """`x` cut off at both ends, with torch's derivative there: none. That for NaN is 1."""
    low, high = as_array(low, x.dtype), as_array(high, x.dtype)
    return jnp.where(x < low, low, jnp.where(x > high, high, x))  # minus zero stays


@_between.defjvp
def _(low: Any, high: Any, primals: Any, tangents: Any) -> tuple[Any, Any]:
    (x,), (tangent,) = primals, tangents
    return _between(x, low, high), jnp.where((x <= low) | (x >= high), 0, tangent)


@lowers("aten.leaky_relu.default")
def leaky_relu(x: jax.Array, negative_slope: Any = 0.01) -> jax.Array:
    return jnp.where(x > 0, x, x * as_array(negative_slope, x.dtype))


@lowers("aten._prelu_kernel.default")
def prelu(x: jax.Array, weight: jax.Array) -> jax.Array:
    return jnp.where(x > 0, x, x * weight)


@lowers("aten.elu.default")
def elu(x: jax.Array, alpha: Any = 1, scale: Any = 1, input_scale: Any = 1) -> jax.Array:
    x = precise(x)
    curved = x <= 0
    safe = jnp.where(curved, x, 0)
    return jnp.where(curved, scale * alpha * jnp.expm1(safe * input_scale), x * scale)


@lowers("aten.celu.default")
def celu(x: jax.Array, alpha: Any = 1) -> jax.Array:
    return elu(x, alpha, 1, 1 / alpha)


@lowers("aten.gelu.default")
def gelu(x: jax.Array, *, approximate: str = "none") -> jax.Array:
    x = precise(x)
    if approximate == "tanh":
        return jax.nn.gelu(x, approximate=True)
    return x * 0.5 * (1 + lax.erf(x * as_array(math.sqrt(0.5), x.dtype)))


@lowers("aten.softplus.default")
def softplus(x: jax.Array, beta: Any = 1, threshold: Any = 20) -> jax.Array:
    x = precise(x)
    scaled = x * beta
    linear = scaled > threshold
    return jnp.where(linear, x, jnp.log1p(jnp.exp(jnp.where(linear, 0, scaled))) / beta)


@lowers("aten.log_sigmoid_forward.default")
def log_sigmoid(x: jax.Array, *, out: Sequence[Out]) -> tuple[jax.Array, jax.Array]:
    return jax.nn.log_sigmoid(precise(x)), jnp.zeros(out[1].shape, out[1].dtype)


@lowers("aten.hardsigmoid.default")
def hardsigmoid(x: jax.Array) -> jax.Array:
    x = jnp.where(jnp.isnan(x), lax.stop_gradient(x), x)  # where torch has no derivative
    return _between(x + 3, 0, 6) / 6


@lowers("aten.hardswish.default")
def hardswish(x: jax.Array) -> jax.Array:
    nothing = lax.stop_gradient(x * 0)  # minus zero, and NaN for minus infinity
    curved = (x > -3) & (x < 3)
    between = jnp.where(curved, x, 0)
    return jnp.where(curved, between * (between + 3) / 6, jnp.where(x <= -3, nothing, x)).astype(x.dtype)


@lowers("aten.mish.default")
def mish(x: jax.Array) -> jax.Array:
    x = precise(x)
    return x * jnp.tanh(jax.nn.softplus(x))


@lowers("aten.glu.default")
def glu(x: jax.Array, dim: int = -1) -> jax.Array:
    left, right = jnp.split(x, 2, axis=dim)
    return left * jax.nn.sigmoid(right)


@lowers("aten.hardshrink.default")
def hardshrink(x: jax.Array, lambd: Any = 0.5) -> jax.Array:
    return jnp.where((x >= -lambd) & (x <= lambd), 0, x)


@lowers("aten.softshrink.default")
def softshrink(x: jax.Array, lambd: Any = 0.5) -> jax.Array:
    return jnp.where((x >= -lambd) & (x <= lambd), x * 0, jnp.where(x > lambd, x - lambd, x + lambd))


@lowers("aten.silu.default")
def silu(x: jax.Array, *, out: Out) -> jax.Array:
    x = precise(x.astype(out.dtype))
    return x * jax.nn.sigmoid(x)
