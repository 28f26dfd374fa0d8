"""Functions of each element by itself, with broadcasting."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pytorch2jax.xla._registry import Out, lowers


@lowers("aten.add.Tensor", "aten.add.Scalar")
def add(x: Any, y: Any, alpha: Any = 1, *, out: Out) -> jax.Array:
    x, y = jnp.asarray(x, out.dtype), jnp.asarray(y, out.dtype)
    return jnp.logical_or(x, y) if out.dtype == jnp.bool_ else x + (y if alpha == 1 else alpha * y)


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def mul(x: Any, y: Any, *, out: Out) -> jax.Array:
    return jnp.asarray(x, out.dtype) * jnp.asarray(y, out.dtype)


@lowers("aten.sin.default")
def sin(x: jax.Array, *, out: Out) -> jax.Array:
    return jnp.sin(x.astype(out.dtype))


@lowers("aten.relu.default")
def relu(x: jax.Array) -> jax.Array:
    return jax.nn.relu(x)


@lowers("aten.detach.default")
def detach(x: jax.Array) -> jax.Array:
    return lax.stop_gradient(x)
