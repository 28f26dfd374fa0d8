"""Views: the same elements in another shape or order. The operators whose names end with `_copy` do the same."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from pytorch2jax.xla._registry import Out, lowers


@lowers("aten.view.default", "aten._unsafe_view.default", "aten.view_copy.default")
def view(x: jax.Array, size: Sequence[int], *, out: Out) -> jax.Array:
    return x.reshape(out.shape)


@lowers("aten.t.default", "aten.t_copy.default")
def t(x: jax.Array) -> jax.Array:
    return x.T


@lowers("aten.permute.default", "aten.permute_copy.default")
def permute(x: jax.Array, dims: Sequence[int]) -> jax.Array:
    return jnp.transpose(x, dims)


@lowers("aten.clone.default", "aten.alias.default", "aten.lift_fresh.default", "aten.lift_fresh_copy.default")
def identity(x: jax.Array) -> jax.Array:
    return x


@lowers("aten._to_copy.default")
def to_copy(x: jax.Array, *, dtype: object = None) -> jax.Array:
    return x
