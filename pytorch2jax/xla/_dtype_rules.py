"""Which combinations of dtypes an operator takes: torch's kernels are asked.

Fake tensors check shapes, and hardly any dtypes: to them, an integer matrix times a float one is a matrix of integers,
where torch has no such kernel. So each operator is run on real tensors, once for each combination of dtypes.
"""

from __future__ import annotations

import functools
import math
import re
from typing import Any

import torch

from pytorch2jax._internals import torch_pytree
from pytorch2jax.xla._internals import OpOverload, outside_of_modes

_USUAL = ({torch.float32}, {torch.float64})  # for which every operator has a kernel
_FEW_ELEMENTS = 1 << 20  # with which an operator takes no time
_ABOUT_DTYPES = re.compile(
    r"dtype|scalar type|data type|not implemented for|same type|tensor type|type promotion|integral|integer|floating|"
    r"complex|boolean|\b(Float|Double|Half|BFloat16|Int|Long|Short|Char|Byte|Bool)\b",
    re.IGNORECASE,
)
_ANSWERS: dict[Any, str | None] = {}


class NoKernelError(RuntimeError):
    """What torch itself would raise for these dtypes."""


def refusal(func: OpOverload, args: Any, kwargs: Any) -> str | None:
    """What torch says where it has no kernel for an operator with arguments of these dtypes; None if it has one."""
    leaves, tree = torch_pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    if not tensors or {t.dtype for t in tensors} in _USUAL:
        return None
    if any(t.layout is not torch.strided for t in tensors):
        return None
    key = (func, tree, tuple(map(_kind, leaves)))
    if key not in _ANSWERS:
        _ANSWERS[key] = _answer(func, leaves, tree)
    return _ANSWERS[key]


def _kind(leaf: Any) -> Any:
    """What matters of an argument."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, min(leaf.dim(), 1)
    return leaf if isinstance(leaf, (torch.dtype, bool, str)) else type(leaf)


def _answer(func: OpOverload, leaves: list[Any], tree: Any) -> str | None:
    n_elements = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    real = functools.partial(_real, shorten=n_elements > _FEW_ELEMENTS)
    try:
        with outside_of_modes(), torch.no_grad():
            args, kwargs = torch_pytree.tree_unflatten([real(leaf) for leaf in leaves], tree)
            func(*args, **kwargs)
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        return text if _ABOUT_DTYPES.search(text) else None  # else it is about values, or about the shorter shapes
    return None


def _real(leaf: Any, *, shorten: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = [min(n, 2) if shorten else n for n in leaf.shape]
    # Zeros are good indices; of floats, ones divide.
    fill = torch.ones if leaf.is_floating_point() or leaf.is_complex() else torch.zeros
    return fill(shape, dtype=leaf.dtype)
