"""Products of matrices, decompositions, solvers."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pytorch2jax.xla._registry import lowers


@lowers("aten.mm.default", "aten.bmm.default")
def mm(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.matmul(x, y)
