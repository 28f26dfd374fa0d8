"""The gamma function and its like, the error function, Bessel functions.

They are made of several steps, of which half precision would round each. As in torch, they are computed in single
precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.special as jsp
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings import _special as special
from pytorch2jax.xla.lowerings._promotion import as_array, in_dtype_of_result, precise
from pytorch2jax.xla.lowerings.elementwise import clamp


def _precisely(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: function(precise(x))


_UNARY: dict[str, Callable[[jax.Array], jax.Array]] = {
    "digamma": special.digamma,
    "erf": lax.erf,
    "erfc": lax.erfc,
    "erfinv": lax.erf_inv,
    "i0": special.i0,
    "lgamma": special.lgamma,
    "sinc": jnp.sinc,
    "special_entr": jsp.entr,
    "special_i0e": jsp.i0e,
    "special_i1": jsp.i1,
    "special_i1e": jsp.i1e,
    "special_log_ndtr": jsp.log_ndtr,
    "special_ndtr": jsp.ndtr,
    "special_ndtri": jsp.ndtri,
}

for _name, _function in _UNARY.items():
    lowers(f"aten.{_name}.default")(in_dtype_of_result(_precisely(_function), __name__))


@lowers("aten.logit.default")
def logit(x: jax.Array, eps: float | None = None, *, out: Out) -> jax.Array:
    x = x.astype(out.dtype)
    if eps is not None:
        x = clamp(x, eps, 1 - eps, out=out)
    return _logit(x)


@jax.custom_jvp
def _logit(x: jax.Array) -> jax.Array:
    """With torch's derivative beyond 0 and 1: NaN."""
    return jnp.log(x / (1 - x))


@_logit.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x,), (tangent,) = primals, tangents
    return _logit(x), tangent * jnp.where((x < 0) | (x > 1), jnp.nan, 1 / (x * (1 - x)))


@lowers("aten.polygamma.default")
def polygamma(n: int, x: jax.Array, *, out: Out) -> jax.Array:
    return special.polygamma(n, precise(x.astype(out.dtype)))


@lowers("aten.special_xlog1py.default", "aten.special_xlog1py.other_scalar", "aten.special_xlog1py.self_scalar")
def xlog1py(x: Any, y: Any, *, out: Out) -> jax.Array:
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    return x * jnp.log1p(jnp.where((x == 0) & ((y <= -1) | jnp.isinf(y)), 0, y))


@lowers("aten.special_zeta.default", "aten.special_zeta.other_scalar", "aten.special_zeta.self_scalar")
def zeta(x: Any, q: Any, *, out: Out) -> jax.Array:
    return special.zeta(precise(as_array(x, out.dtype)), precise(as_array(q, out.dtype)))


@lowers("aten.igamma.default")
def igamma(a: jax.Array, x: jax.Array, *, out: Out) -> jax.Array:
    return jsp.gammainc(lax.stop_gradient(precise(a.astype(out.dtype))), precise(x.astype(out.dtype)))


@lowers("aten.igammac.default")
def igammac(a: jax.Array, x: jax.Array, *, out: Out) -> jax.Array:
    return jsp.gammaincc(lax.stop_gradient(precise(a.astype(out.dtype))), precise(x.astype(out.dtype)))
