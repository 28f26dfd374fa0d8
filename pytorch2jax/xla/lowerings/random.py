"""Random numbers, from the JAX key that the call got: other ones than torch draws, from the same distributions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings._promotion import category


def _real(dtype: np.dtype[Any]) -> Any:
    """A dtype to draw in: that of the result, single precision for half precision."""
    if dtype in (np.dtype(np.float64), np.dtype(np.complex128)):
        return np.float64
    return np.float32


# -- uniform --------------------------------------------------------------------------------------------------


@lowers("aten.rand.default", "aten.rand.generator", "aten.rand_like.default", "aten.rand_like.generator")
def rand(*how: Any, dtype: Any = None, out: Out, key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, out.shape, _real(out.dtype))


@lowers("aten.uniform.default")
def uniform(x: jax.Array, low: float = 0.0, high: float = 1.0, *, key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, x.shape, _real(x.dtype), low, high)


@lowers(
    "aten.randint.default",
    "aten.randint.generator",
    "aten.randint.low",
    "aten.randint.low_generator",
    "aten.randint_like.default",
    "aten.randint_like.generator",
    "aten.randint_like.Tensor",
    "aten.randint_like.Tensor_generator",
    "aten.randint_like.low_dtype",
    "aten.randint_like.low_generator_dtype",
)
def randint(*how: Any, dtype: Any = None, out: Out, key: jax.Array) -> jax.Array:
    bounds = [h for h in how if isinstance(h, int) or (isinstance(h, jax.Array) and h.ndim == 0)]
    if not isinstance(how[0], int):  # `randint_like`: the first is the tensor that it is to be like
        bounds = [h for h in how[1:] if not isinstance(h, (list, tuple))]
    low, high = (0, bounds[0]) if len(bounds) == 1 else bounds[:2]
    return _whole(key, out, low, high)


def _whole(key: jax.Array, out: Out, low: Any, high: Any) -> jax.Array:
    dtype = out.dtype if category(out.dtype) == 1 and out.dtype.itemsize >= 4 else np.dtype(np.int32)
    return jax.random.randint(key, out.shape, low, high, dtype)


@lowers("aten.random.default", "aten.random.to", "aten.random.from")
def random(x: jax.Array, *bounds: int | None, out: Out, key: jax.Array) -> jax.Array:
    # Without an end: all that the dtype can hold, as far as whole numbers are exact.
    most = (
        2**31 - 1
        if out.dtype.itemsize >= 4
        else {np.dtype(np.float16): 2**11, np.dtype(jnp.bfloat16): 2**8}.get(
            out.dtype, 2 if out.dtype == np.bool_ else 2**7
        )
    )
    if not bounds:
        return _whole(key, out, 0, most)
    low, high = (0, bounds[0]) if len(bounds) == 1 else bounds
    return _whole(key, out, low, most if high is None else high)


@lowers("aten.randperm.default", "aten.randperm.generator")
def randperm(n: int, *, dtype: Any = None, key: jax.Array) -> jax.Array:
    return jax.random.permutation(key, n)


# -- yes or no ------------------------------------------------------------------------------------------------


@lowers("aten.bernoulli.default")
def bernoulli(p: jax.Array, *, key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, p.shape, _real(p.dtype)) < jax.lax.stop_gradient(p)


@lowers("aten.bernoulli.p", "aten.bernoulli.Tensor")
def bernoulli_p(x: jax.Array, p: Any = 0.5, *, key: jax.Array) -> jax.Array:
    return jax.random.uniform(key, x.shape, np.float32) < jnp.asarray(p, np.float32)


@lowers("aten.native_dropout.default", "aten._fused_dropout.default")
def dropout(x: jax.Array, p: float, train: bool | None = True, *, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    if train is False or p == 0:
        return x, jnp.ones(x.shape, bool)
    if p == 1:
        return jnp.zeros_like(x), jnp.zeros(x.shape, bool)
    kept = jax.random.bernoulli(key, 1 - p, x.shape)
    return jnp.where(kept, x / jnp.asarray(1 - p, x.dtype), 0), kept


@lowers("aten.rrelu_with_noise_functional.default")
def rrelu(
    x: jax.Array,
    noise: jax.Array,
    lower: float = 0.125,
    upper: float = 1 / 3,
    training: bool = False,
    *,
    key: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    if not training:
        return jnp.where(x > 0, x, x * ((lower + upper) / 2)), noise
    slope = jax.random.uniform(key, x.shape, _real(x.dtype), lower, upper).astype(x.dtype)
    slope = jnp.where(x <= 0, slope, 1)
    return x * slope, slope


# -- other distributions --------------------------------------------------------------------------------------


@lowers("aten.randn.default", "aten.randn.generator", "aten.randn_like.default", "aten.randn_like.generator")
def randn(*how: Any, dtype: Any = None, out: Out, key: jax.Array) -> jax.Array:
    return _normal(key, out.shape, out.dtype)


def _normal(key: jax.Array, shape: Sequence[int], dtype: np.dtype[Any]) -> jax.Array:
    if category(dtype) == 3:
        return jax.random.normal(key, tuple(shape), dtype)
    return jax.random.normal(key, tuple(shape), _real(dtype)).astype(dtype)


@lowers("aten.normal_functional.default")
def normal_like(x: jax.Array, mean: float = 0.0, std: float = 1.0, *, key: jax.Array) -> jax.Array:
    return mean + std * _normal(key, x.shape, x.dtype)


@lowers("aten.normal.Tensor_Tensor", "aten.normal.Tensor_float", "aten.normal.float_Tensor")
def normal(mean: Any, std: Any = 1.0, *, out: Out, key: jax.Array) -> jax.Array:
    return jnp.asarray(mean, out.dtype) + jnp.asarray(std, out.dtype) * _normal(key, out.shape, out.dtype)


@lowers("aten.normal.float_float")
def normal_of_size(
    mean: float, std: float, size: Sequence[int], *, dtype: Any = None, out: Out, key: jax.Array
) -> jax.Array:
    return mean + std * _normal(key, out.shape, out.dtype)


@lowers("aten.exponential.default")
def exponential(x: jax.Array, lambd: float = 1.0, *, key: jax.Array) -> jax.Array:
    return jax.random.exponential(key, x.shape, _real(x.dtype)) / lambd


@lowers("aten.cauchy.default")
def cauchy(x: jax.Array, median: float = 0.0, sigma: float = 1.0, *, key: jax.Array) -> jax.Array:
    return median + sigma * jax.random.cauchy(key, x.shape, _real(x.dtype))


@lowers("aten.log_normal.default")
def log_normal(x: jax.Array, mean: float = 1.0, std: float = 2.0, *, key: jax.Array) -> jax.Array:
    return jnp.exp(mean + std * _normal(key, x.shape, x.dtype))


@lowers("aten.geometric.default")
def geometric(x: jax.Array, p: float, *, key: jax.Array) -> jax.Array:
    return jax.random.geometric(key, p, x.shape)


@lowers("aten.poisson.default")
def poisson(rate: jax.Array, *, out: Out, key: jax.Array) -> jax.Array:
    return jax.random.poisson(key, jax.lax.stop_gradient(rate)).astype(out.dtype)


@lowers("aten.binomial.default")
def binomial(count: jax.Array, prob: jax.Array, *, key: jax.Array) -> jax.Array:
    count, prob = jnp.broadcast_arrays(jax.lax.stop_gradient(count), jax.lax.stop_gradient(prob))
    return jax.random.binomial(key, count, prob)


@lowers("aten._standard_gamma.default")
def standard_gamma(alpha: jax.Array, *, key: jax.Array) -> jax.Array:
    return jax.random.gamma(key, alpha)


@lowers("aten._sample_dirichlet.default")
def dirichlet(alpha: jax.Array, *, key: jax.Array) -> jax.Array:
    draws = jax.random.gamma(key, alpha)
    return draws / jnp.sum(draws, axis=-1, keepdims=True)


@lowers("aten.multinomial.default")
def multinomial(
    weights: jax.Array, num_samples: int, replacement: bool = False, *, out: Out, key: jax.Array
) -> jax.Array:
    logits = jnp.log(weights)
    if replacement:
        shape = (num_samples, *weights.shape[:-1])
        return jnp.moveaxis(jax.random.categorical(key, logits, axis=-1, shape=shape), 0, -1)
    # The largest of logits with Gumbel noise are a draw without replacement.
    noisy = logits + jax.random.gumbel(key, logits.shape, logits.dtype)
    return jax.lax.top_k(noisy, num_samples)[1]
