"""Which JAX function does what an operator of torch's does.

A rule gets the operator's arguments in their order, with arrays for tensors; where an array lies and how it is laid out
(`device`, `layout`, `memory_format`, `pin_memory`, `generator`) is left out. It returns an array, or a tuple of them.
The caller casts what it returns to the dtypes that torch gives the outputs, so that rules need not know how torch
promotes. A rule that asks for them gets, by keyword,

    out: the shapes and dtypes of the outputs, an `Out`, or a tuple of them
    key: a JAX key, for operators that draw random numbers
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from pytorch2jax.xla._internals import OpOverload

Function = TypeVar("Function", bound=Callable[..., Any])


class Out(NamedTuple):
    """Shape and dtype of an output: the dtype that torch gives it, and the one that JAX has for that."""

    shape: tuple[int, ...]
    torch_dtype: torch.dtype
    dtype: np.dtype[Any]


class Rule(NamedTuple):
    """A JAX function, and what it wants to know besides the arguments."""

    function: Callable[..., Any]
    wants_out: bool
    wants_key: bool


_RULES: dict[str, Rule] = {}


def lowers(*names: str) -> Callable[[Function], Function]:
    """Decorate the JAX function for operators with these names: `"aten.add.Tensor"`.

    Raises:
        ValueError: one of them has a rule already.
    """

    def register(function: Function) -> Function:
        wanted = inspect.signature(function).parameters
        rule = Rule(function, "out" in wanted, "key" in wanted)
        for name in names:
            if name in _RULES:
                raise ValueError(f"{name}: expected one rule for each operator, got a second one, {function!r}.")
            _RULES[name] = rule
        return function

    return register


def rule_for(operator: Any) -> Rule | None:
    """The rule for an operator of torch's, if there is one."""
    return _RULES.get(str(operator)) if isinstance(operator, OpOverload) else None


def names() -> tuple[str, ...]:
    """All operators that have a rule."""
    return tuple(sorted(_RULES))
