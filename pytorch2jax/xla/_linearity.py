"""Whether a JAX function is linear, as far as its operations tell."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np


class _Kind(enum.Enum):
    """How a value depends on the inputs."""

    ZERO = "is zero"
    CONSTANT = "does not depend on them"
    LINEAR = "is linear in them"


_OF_ONE = frozenset(
    {
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "cumsum",
        "expand_dims",
        "imag",
        "neg",
        "real",
        "reduce_sum",
        "reduce_window_sum",
        "reshape",
        "rev",
        "slice",
        "squeeze",
        "transpose",
    }
)
"""Linear in their input."""

_OF_ALL = frozenset({"add", "add_any", "sub", "concatenate", "complex"})
"""Linear in all inputs together."""

_PRODUCTS = frozenset({"mul", "dot_general", "conv_general_dilated"})
"""Linear in each input, if the other one is constant."""

_OF_FIRST = frozenset({"div", "gather", "dynamic_slice"})
"""Linear in the first input, if the others are constant."""

_CALLS = {"pjit": "jaxpr", "jit": "jaxpr", "closed_call": "call_jaxpr", "remat": "jaxpr", "checkpoint": "jaxpr"}


def is_linear(function: Callable[[Any, Any], Any], constants: Any, inputs: Sequence[Any]) -> bool:
    """Whether all outputs of a function are known to be linear in its second argument.

    Args:
        function: a JAX function of `constants`, a pytree, and of `inputs`, a sequence of arrays.
        constants, inputs: shapes and dtypes of these.
    """
    traced = jax.make_jaxpr(function)(constants, tuple(inputs))
    n_constants = len(jax.tree.leaves(constants))
    given = [_Kind.CONSTANT] * n_constants + [_Kind.LINEAR] * len(inputs)
    kinds = _through(traced.jaxpr, [_of_value(c) for c in traced.consts], given)
    return kinds is not None and _Kind.CONSTANT not in kinds


def _of_value(value: Any) -> _Kind:
    """A concrete value; a tracer has none."""
    concrete = not isinstance(value, jax.core.Tracer) and np.ndim(value) == 0
    return _Kind.ZERO if concrete and not np.any(value) else _Kind.CONSTANT


def _through(jaxpr: Any, constants: Sequence[_Kind], inputs: Sequence[_Kind]) -> list[_Kind] | None:
    """The kinds of the outputs; None where something is not linear."""
    kinds = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*constants, *inputs), strict=True))

    def kind(atom: Any) -> _Kind:
        return _of_value(atom.val) if hasattr(atom, "val") else kinds[atom]

    for equation in jaxpr.eqns:
        found = _of_equation(equation, [kind(atom) for atom in equation.invars])
        if found is None:
            return None
        kinds.update(zip(equation.outvars, found, strict=True))
    return [kind(atom) for atom in jaxpr.outvars]


def _of_equation(equation: Any, kinds: list[_Kind]) -> list[_Kind] | None:
    name = equation.primitive.name
    if name in _CALLS:
        inner = equation.params[_CALLS[name]]
        closed = getattr(inner, "jaxpr", inner)
        return _through(closed, [_of_value(c) for c in getattr(inner, "consts", ())], kinds)
    n_outputs = len(equation.outvars)
    if _Kind.LINEAR not in kinds:
        zero = all(k is _Kind.ZERO for k in kinds) and name in _OF_ONE | _OF_ALL and kinds
        return [_Kind.ZERO if zero else _Kind.CONSTANT] * n_outputs
    first, *others = kinds
    if name in _OF_ONE:
        kept = all(np.issubdtype(v.aval.dtype, np.inexact) or v.aval.dtype.kind == "V" for v in equation.outvars)
        good = kept and all(k is not _Kind.LINEAR for k in others)
    elif name in _OF_ALL:
        good = _Kind.CONSTANT not in kinds
    elif name in _PRODUCTS:
        good = kinds.count(_Kind.LINEAR) == 1
    elif name in _OF_FIRST:
        good = _Kind.LINEAR not in others
    elif name == "select_n":
        good = first is not _Kind.LINEAR and _Kind.CONSTANT not in others
    elif name == "pad":
        good = others == [_Kind.ZERO]
    elif name == "dynamic_update_slice":
        good = _Kind.CONSTANT not in kinds[:2] and _Kind.LINEAR not in kinds[2:]
    elif name == "scatter-add":
        operand, indices, updates = kinds
        good = indices is not _Kind.LINEAR and _Kind.CONSTANT not in (operand, updates)
    else:
        good = False
    return [_Kind.LINEAR] * n_outputs if good else None
