"""Attention.

Capturing turns torch's fused kernels off, so that `scaled_dot_product_attention` arrives as products and a softmax, in
torch's own order of operations; XLA fuses them. These are the fused kernels, for code that calls them by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import precise


@lowers("aten._scaled_dot_product_flash_attention_for_cpu.default")
def flash_attention_for_cpu(
    query: jax.Array,
    keys: jax.Array,
    value: jax.Array,
    dropout_p: float = 0.0,  # torch takes another kernel where it is not zero
    is_causal: bool = False,
    *,
    attn_mask: jax.Array | None = None,
    scale: float | None = None,
    out: Sequence[Out],
) -> tuple[jax.Array, jax.Array]:
    scores = _scores(query, keys, scale, is_causal)
    if attn_mask is not None:
        scores = jnp.where(attn_mask, scores, -jnp.inf) if attn_mask.dtype == np.bool_ else scores + attn_mask
    total = jax.nn.logsumexp(scores, axis=-1)
    weights = jax.nn.softmax(scores, axis=-1)
    return weights.astype(value.dtype) @ value, total.reshape(out[1].shape)


def _scores(query: jax.Array, key: jax.Array, scale: float | None, is_causal: bool) -> jax.Array:
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    scores = precise(query) @ jnp.swapaxes(precise(key), -1, -2) * factor
    if is_causal:
        scores = jnp.where(jnp.tri(scores.shape[-2], scores.shape[-1], dtype=np.bool_), scores, -jnp.inf)
    return scores


@lowers("aten._masked_softmax.default")
def masked_softmax(x: jax.Array, mask: jax.Array, dim: int | None = None, mask_type: Any = None) -> jax.Array:
    axis = -1 if dim is None else dim
    if mask.ndim != x.ndim:
        mask = mask.reshape(mask.shape[0], *(1,) * (x.ndim - mask.ndim), *mask.shape[1:])
    return jax.nn.softmax(jnp.where(mask, -jnp.inf, x), axis=axis)
