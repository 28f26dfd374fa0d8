"""Functions that JAX has, too, but with other derivatives at single points, or not exactly everywhere."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero


def times(tangent: Any, factor: jax.Array) -> jax.Array:
    """What a tangent adds to the result: nothing if there is none, even where the derivative is not finite."""
    return jnp.zeros_like(factor) if isinstance(tangent, SymbolicZero) else tangent * factor


def absolute(x: jax.Array) -> jax.Array:
    """The absolute value. Its derivative is 0 at 0 and for NaN."""
    return _absolute(x) if jnp.issubdtype(x.dtype, jnp.floating) else jnp.abs(x)


@jax.custom_jvp
def _absolute(x: jax.Array) -> jax.Array:
    return jnp.abs(x)


@_absolute.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _absolute(x), tangent * sign(x)


def sign(x: jax.Array) -> jax.Array:
    """The sign of real numbers: 0 for NaN and for -0.0, as in torch."""
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


@jax.custom_jvp
def maximum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The larger one. Equal ones share the derivative; if one is NaN, both have all of it."""
    return jnp.maximum(x, y)


@maximum.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    return maximum(x, y), _share(y < x, x, y, dx) + _share(x < y, x, y, dy)


def _share(wins: jax.Array, x: jax.Array, y: jax.Array, tangent: jax.Array) -> jax.Array:
    return tangent * jnp.where(x == y, 0.5, (wins | (x != x) | (y != y)).astype(x.dtype))


@jax.custom_jvp
def minimum(x: jax.Array, y: jax.Array) -> jax.Array:
    """The smaller one, with the same derivatives."""
    return jnp.minimum(x, y)


@minimum.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    return minimum(x, y), _share(x < y, x, y, dx) + _share(y < x, x, y, dy)


@jax.custom_jvp
def hypot(x: jax.Array, y: jax.Array) -> jax.Array:
    """The length of a vector, with derivatives where it is infinite."""
    return jnp.hypot(x, y)


@functools.partial(hypot.defjvp, symbolic_zeros=True)
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    z = hypot(x, y)
    return z, times(dx, x / z) + times(dy, y / z)


@jax.custom_jvp
def atan2(x: jax.Array, y: jax.Array) -> jax.Array:
    """The angle of a vector. Its derivative at the origin is 0."""
    return lax.atan2(x, y)


@atan2.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    square = x * x + y * y
    inverse = jnp.where(square == 0, 0, 1 / jnp.where(square == 0, 1, square))
    return atan2(x, y), (y * dx - x * dy) * inverse


@jax.custom_jvp
def shared(value: jax.Array, x: jax.Array) -> jax.Array:
    """An element of `x`. All that are equal to it, or are NaN as it is, share the derivative."""
    return value


@shared.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (value, x), (_, tangent) = primals, tangents
    same = jnp.where(jnp.isnan(value), jnp.isnan(x), x == value)
    return shared(value, x), jnp.sum(jnp.where(same, tangent, 0)) / jnp.sum(same).astype(x.dtype)


@jax.custom_jvp
def logaddexp(x: jax.Array, y: jax.Array) -> jax.Array:
    """The logarithm of a sum, with derivatives next to infinity, too."""
    if not jnp.issubdtype(x.dtype, jnp.complexfloating):
        return jnp.logaddexp(x, y)
    # Torch leaves the imaginary part as it comes, and does not bring it next to zero.
    swaps = x.real < y.real
    large, small = jnp.where(swaps, y, x), jnp.where(swaps, x, y)
    nothing = jnp.isneginf(large.real)
    return jnp.where(nothing, small, large + jnp.log1p(jnp.exp(jnp.where(nothing, 0, small - large))))


@logaddexp.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    return logaddexp(x, y), dx * jax.nn.sigmoid(x - y) + dy * jax.nn.sigmoid(y - x)


@jax.custom_jvp
def logaddexp2(x: jax.Array, y: jax.Array) -> jax.Array:
    """The same to base 2."""
    return jnp.logaddexp2(x, y)


@logaddexp2.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    difference = (x - y) * math.log(2)
    return logaddexp2(x, y), dx * jax.nn.sigmoid(difference) + dy * jax.nn.sigmoid(-difference)


@jax.custom_jvp
def i0(x: jax.Array) -> jax.Array:
    """The modified Bessel function of order 0. Its derivative at 0 is 0."""
    return jsp.i0(x)


@i0.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return i0(x), tangent * jsp.i1(x)


@jax.custom_jvp
def lgamma(x: jax.Array) -> jax.Array:
    """The logarithm of the absolute value of the gamma function."""
    return jsp.gammaln(x)


@lgamma.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return lgamma(x), tangent * digamma(x)


def digamma(x: jax.Array) -> jax.Array:
    """Its derivative."""
    return polygamma(0, x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def polygamma(n: int, x: jax.Array) -> jax.Array:
    """The derivative of order `n` of that."""
    if n == 0:  # which has both infinities at zero, by its sign
        return jnp.where(x == 0, -jnp.copysign(jnp.full_like(x, jnp.inf), x), jsp.digamma(x))
    if n == 1:
        left = x < 0.5
        right = jnp.where(x == jnp.inf, 0, zeta(jnp.full_like(x, 2), jnp.where(left, 1 - x, x)))
        return jnp.where(left, (np.pi / jnp.sin(np.pi * x)) ** 2 - right, right)
    return (-1) ** (n + 1) * math.factorial(n) * zeta(jnp.full_like(x, n + 1), x)


@polygamma.defjvp
def _(n: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return polygamma(n, x), tangent * polygamma(n + 1, x)


@jax.custom_jvp
def zeta(s: jax.Array, q: jax.Array) -> jax.Array:
    """Hurwitz' zeta function. Its derivative is known by `q` only."""
    s, q = jnp.broadcast_arrays(s, q)

    # XLA's is exact right of zero, where the terms are taken that are left of it.
    def right_of_zero(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, at = state
        return jnp.where(at < 0, total + jnp.power(at, -s), total), jnp.where(at < 0, at + 1, at)

    pole = (q <= 0) & (q == jnp.floor(q))
    start = jnp.where(pole, 1, q)
    total, at = lax.while_loop(lambda state: jnp.any(state[1] < 0), right_of_zero, (jnp.zeros_like(q), start))
    return jnp.where(pole & (s > 1), jnp.inf, total + jsp.zeta(s, at))


@zeta.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (s, q), (_, tangent) = primals, tangents
    return zeta(s, q), -s * zeta(s + 1, q) * tangent
