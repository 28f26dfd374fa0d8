"""Functions of each element by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from pytorch2jax.xla._registry import Out, lowers
from pytorch2jax.xla.lowerings import _special as special
from pytorch2jax.xla.lowerings._promotion import as_array, cast, category, in_dtype_of_result, result_type

# -- one argument, computed in the dtype of the result -------------------------------------------------------


def _trunc(x: jax.Array) -> jax.Array:
    return x if category(x.dtype) <= 1 else lax.select(x < 0, lax.ceil(x), lax.floor(x))


def _round(x: jax.Array) -> jax.Array:
    return x if category(x.dtype) <= 1 else lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)


def _whole_as_is(function: Callable[[jax.Array], jax.Array]) -> Callable[[jax.Array], jax.Array]:
    return lambda x: x if category(x.dtype) <= 1 else function(x)


def _frac(x: jax.Array) -> jax.Array:
    return x - _trunc(x)


def _rsqrt(x: jax.Array) -> jax.Array:
    return 1 / jnp.sqrt(x) if category(x.dtype) == 3 else lax.rsqrt(x)


def _sgn(x: jax.Array) -> jax.Array:
    if category(x.dtype) == 3:
        size = jnp.abs(x)
        return jnp.where(size == 0, 0, x / jnp.where(size == 0, 1, size))
    return _sign(x)


def _sign(x: jax.Array) -> jax.Array:
    if category(x.dtype) == 0:
        return x
    return special.sign(x)


def _angle(x: jax.Array) -> jax.Array:
    return special.atan2(x.imag, x.real) if category(x.dtype) == 3 else jnp.angle(lax.stop_gradient(x))


_UNARY: dict[str, Callable[[jax.Array], jax.Array]] = {
    "abs": special.absolute,
    "acos": jnp.arccos,
    "acosh": jnp.arccosh,
    "angle": _angle,
    "asin": jnp.arcsin,
    "asinh": jnp.arcsinh,
    "atan": jnp.arctan,
    "atanh": jnp.arctanh,
    "ceil": _whole_as_is(jnp.ceil),
    "cos": jnp.cos,
    "cosh": jnp.cosh,
    "exp": jnp.exp,
    "exp2": jnp.exp2,
    "expm1": jnp.expm1,
    "floor": _whole_as_is(jnp.floor),
    "frac": _frac,
    "log": jnp.log,
    "log10": jnp.log10,
    "log1p": jnp.log1p,
    "log2": jnp.log2,
    "neg": jnp.negative,
    "reciprocal": jnp.reciprocal,
    "round": _round,
    "rsqrt": _rsqrt,
    "sgn": _sgn,
    "sigmoid": jax.nn.sigmoid,
    "sign": _sign,
    "sin": jnp.sin,
    "sinh": jnp.sinh,
    "sqrt": jnp.sqrt,
    "tan": jnp.tan,
    "tanh": jnp.tanh,
    "trunc": _trunc,
}


for _name, _function in _UNARY.items():
    lowers(f"aten.{_name}.default")(in_dtype_of_result(_function, __name__))


@lowers("aten.positive.default")
def positive(x: jax.Array) -> jax.Array:
    return x


@lowers("aten.round.decimals")
def round_decimals(x: jax.Array, *, decimals: int) -> jax.Array:
    if category(x.dtype) <= 1:
        return x
    factor = 10.0 ** abs(decimals)
    return _round(x * factor) / factor if decimals >= 0 else _round(x / factor) * factor


@lowers("aten.nan_to_num.default")
def nan_to_num(x: jax.Array, nan: float | None = None, posinf: float | None = None, neginf: float | None = None) -> Any:
    return x if category(x.dtype) <= 1 else jnp.nan_to_num(x, nan=nan or 0.0, posinf=posinf, neginf=neginf)


@lowers("aten.conj_physical.default", "aten._conj.default", "aten._conj_physical.default", "aten._conj_copy.default")
def conj(x: jax.Array) -> jax.Array:
    return jnp.conj(x)


@lowers("aten._neg_view.default", "aten._neg_view_copy.default")
def neg_view(x: jax.Array) -> jax.Array:
    return -x


# -- tests ----------------------------------------------------------------------------------------------------


@lowers("aten.isnan.default")
def isnan(x: jax.Array) -> jax.Array:
    return jnp.isnan(x)


@lowers("aten.isinf.default")
def isinf(x: jax.Array) -> jax.Array:
    return jnp.isinf(x)


@lowers("aten.isfinite.default")
def isfinite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x)


@lowers("aten.isposinf.default")
def isposinf(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, bool) if category(x.dtype) <= 1 else jnp.isposinf(x)


@lowers("aten.isneginf.default")
def isneginf(x: jax.Array) -> jax.Array:
    return jnp.zeros(x.shape, bool) if category(x.dtype) <= 1 else jnp.isneginf(x)


@lowers("aten.signbit.default")
def signbit(x: jax.Array) -> jax.Array:
    return jnp.signbit(x) if category(x.dtype) == 2 else x < 0


_COMPARISONS: dict[str, Callable[[Any, Any], jax.Array]] = {
    "eq": jnp.equal,
    "ne": jnp.not_equal,
    "lt": jnp.less,
    "le": jnp.less_equal,
    "gt": jnp.greater,
    "ge": jnp.greater_equal,
}


def _in_common_dtype(function: Callable[[Any, Any], jax.Array]) -> Callable[..., jax.Array]:
    def rule(x: Any, y: Any) -> jax.Array:
        dtype = result_type(x, y)
        return function(as_array(x, dtype), as_array(y, dtype))

    return rule


for _name, _comparison in _COMPARISONS.items():
    lowers(f"aten.{_name}.Tensor", f"aten.{_name}.Scalar")(_in_common_dtype(_comparison))


# -- logic and bits -------------------------------------------------------------------------------------------


@lowers("aten.logical_not.default")
def logical_not(x: jax.Array) -> jax.Array:
    return jnp.logical_not(x)


@lowers("aten.logical_and.default")
def logical_and(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.logical_and(x, y)


@lowers("aten.logical_or.default")
def logical_or(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.logical_or(x, y)


@lowers("aten.logical_xor.default")
def logical_xor(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.logical_xor(x, y)


@lowers("aten.bitwise_not.default")
def bitwise_not(x: jax.Array) -> jax.Array:
    return jnp.bitwise_not(x)


def _bits(name: str, function: Callable[[Any, Any], jax.Array]) -> None:
    @lowers(f"aten.{name}.Tensor", f"aten.{name}.Scalar", f"aten.{name}.Scalar_Tensor")
    def rule(x: Any, y: Any, *, out: Out) -> jax.Array:
        return function(as_array(x, out.dtype), as_array(y, out.dtype))


_bits("bitwise_and", jnp.bitwise_and)
_bits("bitwise_or", jnp.bitwise_or)
_bits("bitwise_xor", jnp.bitwise_xor)


def _shift_left(x: jax.Array, y: jax.Array) -> jax.Array:
    bits = x.dtype.itemsize * 8
    return jnp.where((y < 0) | (y >= bits), 0, jnp.left_shift(x, jnp.clip(y, 0, bits - 1)))


def _shift_right(x: jax.Array, y: jax.Array) -> jax.Array:
    bits = x.dtype.itemsize * 8
    return jnp.right_shift(x, jnp.where((y < 0) | (y >= bits), bits - 1, y))


for _names, _shift in (
    (("bitwise_left_shift", "__lshift__"), _shift_left),
    (("bitwise_right_shift", "__rshift__"), _shift_right),
):

    def _shifted(x: Any, y: Any, *, out: Out, _shift: Callable[[Any, Any], jax.Array] = _shift) -> jax.Array:
        return _shift(as_array(x, out.dtype), as_array(y, out.dtype))

    lowers(f"aten.{_names[0]}.Tensor", f"aten.{_names[0]}.Tensor_Scalar", f"aten.{_names[0]}.Scalar_Tensor")(_shifted)
    lowers(f"aten.{_names[1]}.Tensor", f"aten.{_names[1]}.Scalar")(_shifted)


# -- arithmetic -----------------------------------------------------------------------------------------------


@lowers("aten.add.Tensor", "aten.add.Scalar")
def add(x: Any, y: Any, alpha: Any = 1, *, out: Out) -> jax.Array:
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    return x + (y if alpha == 1 else as_array(alpha, out.dtype) * y)


@lowers("aten.sub.Tensor", "aten.sub.Scalar")
def sub(x: Any, y: Any, alpha: Any = 1, *, out: Out) -> jax.Array:
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    return x - (y if alpha == 1 else as_array(alpha, out.dtype) * y)


@lowers("aten.rsub.Tensor", "aten.rsub.Scalar")
def rsub(x: Any, y: Any, alpha: Any = 1, *, out: Out) -> jax.Array:
    return sub(y, x, alpha, out=out)


@lowers("aten.mul.Tensor", "aten.mul.Scalar")
def mul(x: Any, y: Any, *, out: Out) -> jax.Array:
    return as_array(x, out.dtype) * as_array(y, out.dtype)


@lowers("aten.div.Tensor", "aten.div.Scalar", "aten.true_divide.Tensor")
def div(x: Any, y: Any, *, out: Out) -> jax.Array:
    return as_array(x, out.dtype) / as_array(y, out.dtype)


@lowers("aten.div.Tensor_mode", "aten.div.Scalar_mode")
def div_mode(x: Any, y: Any, *, rounding_mode: str | None, out: Out) -> jax.Array:
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    if rounding_mode is None:
        return x / y
    if rounding_mode == "floor":
        return _floor_divide(x, y)
    return lax.div(*jnp.broadcast_arrays(x, y)) if category(out.dtype) <= 1 else _trunc(x / y)


def _floor_divide(x: jax.Array, y: jax.Array) -> jax.Array:
    if category(x.dtype) <= 1:
        return jnp.floor_divide(x, y)
    x, y = lax.stop_gradient(x), lax.stop_gradient(y)
    # As torch computes it: from the remainder, so that rounding does not lift it to the next whole number.
    remainder = lax.rem(*jnp.broadcast_arrays(x, y))
    quotient = (x - remainder) / y
    quotient = jnp.where((remainder != 0) & ((y < 0) != (remainder < 0)), quotient - 1, quotient)
    whole = jnp.floor(quotient)
    whole = jnp.where(quotient - whole > 0.5, whole + 1, whole)
    whole = jnp.where(quotient == 0, jnp.copysign(jnp.zeros_like(quotient), x / y), whole)
    return jnp.where(y == 0, x / y, whole)


@lowers("aten.floor_divide.default", "aten.floor_divide.Scalar")
def floor_divide(x: Any, y: Any, *, out: Out) -> jax.Array:
    return _floor_divide(as_array(x, out.dtype), as_array(y, out.dtype))


@lowers("aten.remainder.Tensor", "aten.remainder.Scalar", "aten.remainder.Scalar_Tensor")
def remainder(x: Any, y: Any, *, out: Out) -> jax.Array:
    x, y = jnp.broadcast_arrays(as_array(x, out.dtype), as_array(y, out.dtype))
    rest = lax.rem(x, y)
    return jnp.where((rest != 0) & ((rest < 0) != (y < 0)), rest + y, rest)


@lowers("aten.fmod.Tensor", "aten.fmod.Scalar")
def fmod(x: Any, y: Any, *, out: Out) -> jax.Array:
    return lax.rem(*jnp.broadcast_arrays(as_array(x, out.dtype), as_array(y, out.dtype)))


@lowers("aten.pow.Tensor_Tensor", "aten.pow.Tensor_Scalar", "aten.pow.Scalar")
def pow_(x: Any, y: Any, *, out: Out) -> jax.Array:
    if isinstance(y, (int, float)) and not isinstance(x, (int, float)):
        x = x.astype(out.dtype)
        if float(y).is_integer() and abs(y) <= 64 and (y >= 0 or category(out.dtype) >= 2):
            return lax.integer_pow(x, int(y))
        if y == 0.5 and category(out.dtype) >= 2:
            return jnp.sqrt(x)
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    return _power_of_whole(x, y) if category(out.dtype) <= 1 else _power(*jnp.broadcast_arrays(x, y))


@jax.custom_jvp
def _power(x: jax.Array, y: jax.Array) -> jax.Array:
    """With torch's derivatives of `0 ** y`, which are finite where `y` is not negative."""
    return jnp.power(x, y)


@_power.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (dx, dy) = primals, tangents
    z = _power(x, y)
    by_x = jnp.where(y == 0, 0, y * _power(x, jnp.where(y == 0, 1, y - 1)))
    flat = (x == 0) & (jnp.real(y) >= 0)
    by_y = jnp.where(flat, 0, z * jnp.log(jnp.where(flat, 1, x)))
    return z, dx * by_x + dy * by_y


def _power_of_whole(x: jax.Array, y: jax.Array) -> jax.Array:
    """Negative powers are cut off to whole numbers, which leaves those of 1 and of -1."""
    inverse = jnp.where(x == 1, 1, jnp.where(x == -1, jnp.where(y % 2 == 0, 1, -1), 0))
    return jnp.where(y < 0, inverse, jnp.power(x, jnp.maximum(y, 0))).astype(x.dtype)


def _of_two(function: Callable[[Any, Any], jax.Array], x: jax.Array, y: jax.Array, out: Out) -> jax.Array:
    return function(*jnp.broadcast_arrays(x.astype(out.dtype), y.astype(out.dtype)))


@lowers("aten.atan2.default")
def atan2(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.atan2, x, y, out)


@lowers("aten.hypot.default")
def hypot(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.hypot, x, y, out)


@lowers("aten.copysign.Tensor", "aten.copysign.Scalar")
def copysign(x: jax.Array, y: Any, *, out: Out) -> jax.Array:
    x = x.astype(out.dtype)
    x = jnp.where(x == 0, lax.stop_gradient(x), x)  # torch has no derivative there
    return jnp.copysign(x, lax.stop_gradient(as_array(y, out.dtype)))


@lowers("aten.frexp.Tensor")
def frexp(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    fixed = lax.stop_gradient(x)
    _, exponent = jnp.frexp(fixed.astype(np.float32) if x.dtype.itemsize < 4 else fixed)
    half = exponent // 2  # of both halves the power of two is a normal number
    one = jnp.ones((), x.dtype)
    return x * jnp.ldexp(one, -half).astype(x.dtype) * jnp.ldexp(one, half - exponent).astype(x.dtype), exponent


@lowers("aten.maximum.default")
def maximum(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.maximum if category(out.dtype) == 2 else jnp.maximum, x, y, out)


@lowers("aten.minimum.default")
def minimum(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.minimum if category(out.dtype) == 2 else jnp.minimum, x, y, out)


@lowers("aten.fmax.default")
def fmax(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    x, y = x.astype(out.dtype), y.astype(out.dtype)
    return jnp.where((x >= y) | jnp.isnan(y), x, y)  # of equal ones the first, which has the derivative


@lowers("aten.fmin.default")
def fmin(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    x, y = x.astype(out.dtype), y.astype(out.dtype)
    return jnp.where((x <= y) | jnp.isnan(y), x, y)


@lowers("aten.gcd.default")
def gcd(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return jnp.gcd(x.astype(out.dtype), y.astype(out.dtype))


@lowers("aten.nextafter.default")
def nextafter(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _nextafter(*jnp.broadcast_arrays(x.astype(out.dtype), y.astype(out.dtype)))


@jax.custom_jvp
def _nextafter(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.nextafter(x, y)


@_nextafter.defjvp
def _(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (x, y), (tangent, _) = primals, tangents
    return _nextafter(x, y), jnp.where(x == y, 0, tangent)


@lowers("aten.heaviside.default")
def heaviside(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.where(x == 0, y, (x > 0).astype(y.dtype))


@lowers("aten.xlogy.Tensor", "aten.xlogy.Scalar_Self", "aten.xlogy.Scalar_Other")
def xlogy(x: Any, y: Any, *, out: Out) -> jax.Array:
    x, y = as_array(x, out.dtype), as_array(y, out.dtype)
    return x * jnp.log(jnp.where((x == 0) & ((y <= 0) | jnp.isinf(y)), 1, y))


@lowers("aten.logaddexp.default")
def logaddexp(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.logaddexp, x, y, out)


@lowers("aten.logaddexp2.default")
def logaddexp2(x: jax.Array, y: jax.Array, *, out: Out) -> jax.Array:
    return _of_two(special.logaddexp2, x, y, out)


@lowers("aten.lerp.Scalar", "aten.lerp.Tensor")
def lerp(x: jax.Array, y: jax.Array, weight: Any, *, out: Out) -> jax.Array:
    weight = as_array(weight, out.dtype)
    near = jnp.abs(weight) < 0.5
    return jnp.where(near, x + weight * (y - x), y - (y - x) * (1 - weight))


@lowers("aten.addcmul.default")
def addcmul(x: jax.Array, y: jax.Array, z: jax.Array, *, value: Any = 1, out: Out) -> jax.Array:
    return x.astype(out.dtype) + as_array(value, out.dtype) * y.astype(out.dtype) * z.astype(out.dtype)


@lowers("aten.addcdiv.default")
def addcdiv(x: jax.Array, y: jax.Array, z: jax.Array, *, value: Any = 1, out: Out) -> jax.Array:
    return x.astype(out.dtype) + as_array(value, out.dtype) * (y.astype(out.dtype) / z.astype(out.dtype))


# -- choice ---------------------------------------------------------------------------------------------------


@lowers("aten.where.self", "aten.where.Scalar", "aten.where.ScalarSelf", "aten.where.ScalarOther")
def where(condition: jax.Array, x: Any, y: Any, *, out: Out) -> jax.Array:
    return jnp.where(condition.astype(bool), as_array(x, out.dtype), as_array(y, out.dtype))


@lowers("aten.clamp.default", "aten.clamp.Tensor")
def clamp(x: jax.Array, min: Any = None, max: Any = None, *, out: Out) -> jax.Array:
    # At the ends the derivative is that of `x`, all of it.
    x = x.astype(out.dtype)
    for bound, beyond in ((min, jnp.less), (max, jnp.greater)):
        if bound is not None:
            bound = as_array(bound, out.dtype)
            x = jnp.where(beyond(x, bound) | (bound != bound), bound, x)
    return x


@lowers("aten.clamp_min.default", "aten.clamp_min.Tensor")
def clamp_min(x: jax.Array, min: Any, *, out: Out) -> jax.Array:
    return clamp(x, min, out=out)


@lowers("aten.clamp_max.default", "aten.clamp_max.Tensor")
def clamp_max(x: jax.Array, max: Any, *, out: Out) -> jax.Array:
    return clamp(x, None, max, out=out)


@lowers("aten.masked_fill.Scalar", "aten.masked_fill.Tensor")
def masked_fill(x: jax.Array, mask: jax.Array, value: Any) -> jax.Array:
    return jnp.where(mask, as_array(value, x.dtype), x)


@lowers("aten.threshold.default")
def threshold(x: jax.Array, threshold: Any, value: Any) -> jax.Array:
    return jnp.where(x <= threshold, as_array(value, x.dtype), x)


@lowers("aten.copy.default")
def copy(x: jax.Array, source: jax.Array, non_blocking: bool = False) -> jax.Array:
    return jnp.broadcast_to(cast(source, x.dtype), x.shape)


# -- complex numbers and dtypes -------------------------------------------------------------------------------


@lowers("aten.complex.default")
def complex_(real: jax.Array, imag: jax.Array) -> jax.Array:
    return lax.complex(*jnp.broadcast_arrays(real, imag))


@lowers("aten.polar.default")
def polar(size: jax.Array, angle: jax.Array) -> jax.Array:
    return lax.complex(*jnp.broadcast_arrays(size * jnp.cos(angle), size * jnp.sin(angle)))


@lowers("aten._to_copy.default")
def to_copy(x: jax.Array, *, dtype: Any = None, out: Out) -> jax.Array:
    return cast(jnp.asarray(x), out.dtype)  # some decompositions pass numbers
