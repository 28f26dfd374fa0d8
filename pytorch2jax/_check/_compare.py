"""How far arrays are from what torch has in their place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from pytorch2jax._dtypes import canonical_dtype_t2j

_SMALL_LEAF = 1e-3  # of the largest value of all: what is smaller than that is compared by that


def mismatch(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> str:
    """In which shape or dtype arrays are other than tensors become in JAX; empty if in none."""
    if len(found) != len(expected):
        return f"expected {len(expected)} arrays, got {len(found)}"
    for index, (array, tensor) in enumerate(zip(found, expected, strict=True)):
        wanted = f"{canonical_dtype_t2j(tensor.dtype)}{list(tensor.shape)}"
        got = f"{array.dtype}{list(array.shape)}"
        if got != wanted:
            return f"number {index}: expected {wanted}, got {got}"
    return ""


def largest_difference(found: Sequence[Any], expected: Sequence[torch.Tensor]) -> float:
    """Between arrays and tensors of the same shapes, relative to the largest value of each; NaN if it is one."""
    errors: list[float] = []
    scales: list[float] = []
    for array, tensor in zip(found, expected, strict=True):
        wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64).numpy()
        values = np.asarray(array).astype(wide.dtype)
        if wide.size:
            scales.append(float(np.where(np.isfinite(wide), np.abs(wide), 0).max()))
            same = (values == wide) | (np.isnan(values) & np.isnan(wide))
            errors.append(float(np.where(same, 0, np.abs(values - wide)).max()))
    # Where all values are zero but for rounding, there is nothing that an error could be relative to.
    floor = max(_SMALL_LEAF * max(scales, default=0.0), float(np.finfo(np.float32).tiny))
    relative = [error / max(scale, floor) for error, scale in zip(errors, scales, strict=True)]
    return float(np.max(relative, initial=0.0))  # which is NaN if one of them is
