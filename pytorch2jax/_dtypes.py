"""The one table of dtypes that jax and torch share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import torch

from pytorch2jax._errors import DtypeError
from pytorch2jax._internals import x64_enabled

_SHARED_NAMES = (
    "bool",
    *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "complex64",
    "complex128",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)

_TORCH_TO_JAX: dict[torch.dtype, np.dtype[Any]] = {
    getattr(torch, name): jnp.dtype(name) for name in _SHARED_NAMES if hasattr(torch, name)
}
_JAX_TO_TORCH = {array_dtype: tensor_dtype for tensor_dtype, array_dtype in _TORCH_TO_JAX.items()}

# What a 64-bit dtype becomes in JAX while `jax_enable_x64` is off.
_NARROWED = {
    torch.int64: torch.int32,
    torch.uint64: torch.uint32,
    torch.float64: torch.float32,
    torch.complex128: torch.complex64,
}


def dtype_t2j(dtype: Any) -> np.dtype[Any]:
    """The JAX dtype of a torch dtype, whatever `jax_enable_x64` says.

    Args:
        dtype: a torch dtype. A JAX dtype is returned as it is.

    Returns:
        The NumPy dtype object that JAX uses under the same name.

    Raises:
        StructureError: JAX has no such dtype (`torch.complex32`, the quantised dtypes).

    Example:
        >>> import torch
        >>> dtype_t2j(torch.bfloat16)
        dtype(bfloat16)
    """
    try:
        return _TORCH_TO_JAX[dtype]
    except (KeyError, TypeError):
        if not isinstance(dtype, (torch.dtype, str)) and _is_jax_dtype(dtype):
            return jnp.dtype(dtype)
        raise DtypeError(
            f"dtype_t2j: expected a torch dtype that JAX has too, got {dtype!r}. "
            f"Shared dtypes: {', '.join(_SHARED_NAMES)}. Convert the tensor with `.to(...)` first."
        ) from None


def dtype_j2t(dtype: Any) -> torch.dtype:
    """The torch dtype of a JAX (or NumPy) dtype.

    Args:
        dtype: anything that `jax.numpy.dtype` takes: `jnp.float32`, `"int8"`, `np.dtype("bool")`. A torch dtype is
            returned as it is.

    Returns:
        The torch dtype of the same name.

    Raises:
        StructureError: torch has no such dtype (`int4`, `float8_e3m4`, strings, a PRNG key's dtype).

    Example:
        >>> import jax.numpy as jnp
        >>> dtype_j2t(jnp.float32)
        torch.float32
    """
    if isinstance(dtype, torch.dtype) and dtype in _TORCH_TO_JAX:
        return dtype
    try:
        return _JAX_TO_TORCH[jnp.dtype(_not_none(dtype))]
    except (KeyError, TypeError):
        raise DtypeError(
            f"dtype_j2t: expected a dtype that torch has too, got {dtype!r}. "
            f"Shared dtypes: {', '.join(_SHARED_NAMES)}. Convert the array with `.astype(...)` first."
        ) from None


def _not_none(dtype: Any) -> Any:
    """The same; NumPy takes None for float64."""
    if dtype is None:
        raise TypeError("None is no dtype")
    return dtype


def _is_jax_dtype(dtype: Any) -> bool:
    try:
        return jnp.dtype(_not_none(dtype)) in _JAX_TO_TORCH
    except TypeError:
        return False


def narrowed(dtype: torch.dtype) -> torch.dtype:
    """What JAX keeps of a torch dtype: itself, or its 32-bit sibling while `jax_enable_x64` is off."""
    return dtype if x64_enabled() else _NARROWED.get(dtype, dtype)


def canonical_dtype_t2j(dtype: torch.dtype) -> np.dtype[Any]:
    """The dtype of the JAX array that holds a tensor of `dtype` under the present `jax_enable_x64`."""
    return dtype_t2j(narrowed(dtype))


def is_inexact(dtype: Any) -> bool:
    """Whether values of this NumPy dtype have derivatives (floating point and complex)."""
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def is_complex(dtype: Any) -> bool:
    """Whether a NumPy dtype is complex."""
    return bool(jnp.issubdtype(dtype, jnp.complexfloating))
