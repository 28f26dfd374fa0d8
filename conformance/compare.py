"""What JAX has beside what torch has."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import torch
import torch.utils._pytree as pytree

from conformance.exceptions import BACKEND
from conformance.families import SEEN

TOLERANCES = {
    torch.bfloat16: (1.6e-2, 1e-5),
    torch.float16: (1e-3, 1e-5),
    torch.float32: (1e-5, 1e-6),
    torch.complex64: (1e-5, 1e-6),
    torch.float64: (1e-7, 1e-8),
    torch.complex128: (1e-7, 1e-8),
}
"""Relative and absolute, by dtype. The kernels are the same ones, but another way to a derivative adds up in another
order. Integers and booleans have to be equal. Single precision by other kernels: `families.TOLERANCES`."""

if BACKEND == "xla":  # other kernels
    TOLERANCES |= {torch.bfloat16: (3.2e-2, 1e-3), torch.float16: (4e-3, 1e-4)}


class WrongError(Exception):
    """JAX has something else than torch."""


def leaves_of(value: Any) -> list[torch.Tensor]:
    """The tensors in what a torch function returned; numbers as tensors, and nothing else."""
    leaves = []
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, (bool, int, float, complex)):
            wide = {float: torch.float64, complex: torch.complex128}.get(type(leaf))
            leaf = torch.tensor(leaf, dtype=wide)
        if isinstance(leaf, torch.Tensor):
            leaves.append(leaf)
    return leaves


def arrays_of(value: Any) -> list[jax.Array]:
    """The arrays in what a converted function returned."""
    return [leaf for leaf in jax.tree.leaves(value) if isinstance(leaf, (jax.Array, np.ndarray))]


def compare(
    what: str,
    got: Sequence[Any],
    expected: Sequence[torch.Tensor],
    *,
    values: bool = True,
    among: Sequence[torch.Tensor] = (),
) -> None:
    """Compare arrays with tensors: number, dtypes, shapes and values.

    Args:
        what: for the message.
        got: arrays.
        expected: tensors.
        values: False where these are arbitrary.
        among: tensors of other dtypes that went in: a result is no more precise than the least precise of them.

    Raises:
        WrongError: something differs.
    """
    if len(got) != len(expected):
        raise WrongError(f"{what}: {len(got)} arrays, torch has {len(expected)} tensors")
    for index, (array, tensor) in enumerate(zip(got, expected, strict=True)):
        ours, theirs = f"{array.dtype}{list(array.shape)}", f"{_name(tensor.dtype)}{list(tensor.shape)}"
        if ours != theirs:
            raise WrongError(f"{what}: {index}: {ours}, torch has {theirs}")
        if values:
            _compare_values(f"{what}: {index}", array, tensor, among)


def _compare_values(what: str, array: Any, tensor: torch.Tensor, among: Sequence[torch.Tensor]) -> None:
    left, right = np.asarray(array), numbers(tensor)
    if left.dtype != right.dtype:  # a small float
        left = left.astype(right.dtype)
    dtypes = [t.dtype for t in (tensor, *among) if t.dtype in TOLERANCES] if tensor.dtype in TOLERANCES else []
    dtype = max(dtypes, key=lambda dtype: TOLERANCES[dtype], default=tensor.dtype)
    single = BACKEND == "xla" and dtype in (torch.float32, torch.complex64)
    rtol, atol = (SEEN.tolerance, SEEN.tolerance / 10) if single else TOLERANCES.get(dtype, (0.0, 0.0))
    with np.errstate(all="ignore"):
        # Small numbers beside large ones are mostly differences of these.
        scale = max(1.0, float(np.abs(right, where=np.isfinite(right), out=np.zeros(right.shape)).max(initial=0.0)))
        same = np.isclose(left, right, rtol=rtol, atol=atol * scale, equal_nan=True)
        same |= np.isnan(left) & np.isnan(right)
        if single and same.all():
            errors = np.abs(left - right) / (np.abs(right) + scale / 10)
            SEEN.error = max(SEEN.error, float(errors.max(where=np.isfinite(errors), initial=0.0)))
    if not same.all():
        at = tuple(int(i) for i in np.argwhere(~same)[0])
        raise WrongError(f"{what}: {(~same).sum()} of {same.size} differ, at {at} {left[at]}, torch has {right[at]}")


def numbers(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    """A tensor in NumPy; small floats as float32."""
    tensor = tensor.detach().resolve_conj().resolve_neg()
    if tensor.is_floating_point() and tensor.itemsize <= 2:
        tensor = tensor.float()
    if tensor.dtype is torch.complex32:
        tensor = tensor.to(torch.complex64)
    return tensor.numpy(force=True)


def as_arrays(tensors: Sequence[torch.Tensor]) -> list[jax.Array]:
    """Tensors as arrays by way of NumPy, and not of the library."""
    names = [_name(tensor.dtype).replace("complex32", "complex64") for tensor in tensors]  # JAX has no such dtype
    dtypes = list(map(jax.numpy.dtype, names))
    return [jax.device_put(numbers(tensor).astype(dtype)) for tensor, dtype in zip(tensors, dtypes, strict=True)]


def as_tensors(arrays: Sequence[Any]) -> list[torch.Tensor]:
    """The way back."""
    tensors = []
    for array in map(np.array, arrays):
        dtype = getattr(torch, array.dtype.name)
        small = dtype.is_floating_point and dtype.itemsize <= 2
        tensors.append(torch.from_numpy(array.astype(np.float32) if small else array).to(dtype))
    return tensors


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
