"""Which combinations of dtypes an operator takes: torch's kernels are asked.

Fake tensors check shapes, and hardly any dtypes: to them, an integer matrix times a float one is a matrix of integers,
where torch has no such kernel; and for some operators on several dtypes they have other dtypes than the kernel. So each
operator is run on real tensors, once for each combination of dtypes.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import torch

from pytorch2jax._internals import torch_pytree
from pytorch2jax.xla._internals import OpOverload, outside_of_modes

_TORCHS = ("aten", "prims")
_FEW_ELEMENTS = 1 << 18  # with which an operator takes no time
_ABOUT_DTYPES = re.compile(
    r"dtype|scalar type|data type|not implemented for|same type|tensor type|type promotion|integral|integer|floating|"
    r"complex|boolean|without overflow|\b(Float|Double|Half|BFloat16|Int|Long|Short|Char|Byte|Bool)\b",
    re.IGNORECASE,
)


class NoKernelError(RuntimeError):
    """What torch itself would raise for these dtypes."""


class Answer(NamedTuple):
    """What torch does with arguments of some dtypes.

    Attributes:
        refusal: what it says where it has no kernel for them; None if it has one.
        dtypes: those of its results, None for what is no tensor. Empty if it could not be asked.
    """

    refusal: str | None = None
    dtypes: tuple[torch.dtype | None, ...] = ()


_UNKNOWN = Answer()
_ANSWERS: dict[Any, Answer] = {}


def ask(func: OpOverload, args: Any, kwargs: Any) -> Answer:
    """Ask torch, or remember what it said, what an operator does with arguments of these dtypes.

    Torch's own operators alone are asked: those of users may do anything.
    """
    if func is torch.ops.aten.full.default:  # whose size does not matter
        func, args = torch.ops.aten.scalar_tensor.default, args[1:]
    leaves, tree = torch_pytree.tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    makes_number = func is torch.ops.aten.scalar_tensor.default and kwargs.get("dtype") is not None
    if func.namespace not in _TORCHS or not (tensors or makes_number):
        return _UNKNOWN
    if any(t.layout is not torch.strided for t in tensors):
        return _UNKNOWN
    dtypes = {t.dtype for t in tensors} | {leaf for leaf in leaves if isinstance(leaf, torch.dtype)}
    key = (func, tree, torch.get_default_dtype(), tuple(_kind(leaf, dtypes) for leaf in leaves))
    if key not in _ANSWERS:
        _ANSWERS[key] = _answer(func, leaves, tree)
    return _ANSWERS[key]


def _kind(leaf: Any, dtypes: Collection[torch.dtype]) -> Any:
    """What matters of an argument among arguments of these dtypes."""
    if isinstance(leaf, torch.Tensor):
        return leaf.dtype, min(leaf.dim(), 1), 0 in leaf.shape  # some kernels look at nothing where there is nothing
    if isinstance(leaf, int) and not isinstance(leaf, bool):
        return int, min(max(leaf, -1), 2), _fits(leaf, dtypes)
    if isinstance(leaf, float):
        return float, _fits(leaf, dtypes)
    return leaf if isinstance(leaf, (torch.dtype, bool, str)) else type(leaf)


def _fits(number: float, dtypes: Collection[torch.dtype]) -> bool:
    """Whether torch takes a number for these dtypes: negative integers wrap in those without a sign."""
    limits = [torch.iinfo(d) for d in dtypes if not (d.is_floating_point or d.is_complex or d is torch.bool)]
    wraps = isinstance(number, int)
    return all((limit.min or wraps * -limit.max) <= number <= limit.max for limit in limits)


def _answer(func: OpOverload, leaves: list[Any], tree: Any) -> Answer:
    n_elements = sum(math.prod(leaf.shape) for leaf in leaves if isinstance(leaf, torch.Tensor))
    real = functools.partial(_real, shorten=n_elements > _FEW_ELEMENTS)
    try:
        with outside_of_modes(), torch.no_grad():
            args, kwargs = torch_pytree.tree_unflatten([real(leaf) for leaf in leaves], tree)
            out = func(*args, **kwargs)
    except Exception as error:
        text = str(error).strip().split("\n")[0]
        return Answer(text) if _ABOUT_DTYPES.search(text) else _UNKNOWN  # about values, or about the shorter shapes
    results = out if isinstance(out, (list, tuple)) else [out]
    return Answer(None, tuple(r.dtype if isinstance(r, torch.Tensor) else None for r in results))


def _real(leaf: Any, *, shorten: bool) -> Any:
    if not isinstance(leaf, torch.Tensor):
        return leaf
    shape = [min(n, 2) if shorten else n for n in leaf.shape]
    # Zeros are good indices; of floats, ones divide.
    fill = torch.ones if leaf.is_floating_point() or leaf.is_complex() else torch.zeros
    return fill(shape, dtype=leaf.dtype)
