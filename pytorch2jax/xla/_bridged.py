"""Operators without a JAX function: torch runs them, as one call inside the compiled program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pytorch2jax._wrap import torch2jax
from pytorch2jax.xla._graph import Equation, Var, replaced, variables


def bridged(equation: Equation) -> Equation:
    """The same equation, with an operator that calls torch's."""
    inputs = list(dict.fromkeys([*variables(equation.args), *variables(equation.kwargs)]))
    operator = Bridged(equation, inputs)
    return equation._replace(operator=operator, args=tuple(inputs), kwargs={})


class Bridged:
    """An operator of torch's as a function of arrays.

    Args:
        equation: a call of it.
        inputs: the variables in its arguments, which it is a function of.
    """

    takes_key = True

    def __init__(self, equation: Equation, inputs: Sequence[Var]) -> None:
        operator, order = equation.operator, {var: i for i, var in enumerate(inputs)}
        args = replaced(equation.args, lambda var: _Place(order[var]), Var)
        kwargs = replaced(equation.kwargs, lambda var: _Place(order[var]), Var)
        dtypes = [var.dtype for var in inputs]

        def call(*tensors: torch.Tensor) -> Any:
            given = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
            return operator(*_filled(args, given), **_filled(kwargs, given))

        call.__qualname__ = self.name = str(operator)
        self._function: Callable[..., Any] = torch2jax(call, widen_ints=False)

    def __call__(self, *arrays: Any, key: Any = None) -> Any:
        return self._function(*arrays) if key is None else self._function(*arrays, rng=key)

    def __repr__(self) -> str:
        return self.name


class _Place:
    """Where a tensor goes in the arguments of an operator."""

    def __init__(self, index: int) -> None:
        self.index = index


def _filled(tree: Any, tensors: Sequence[torch.Tensor]) -> Any:
    return replaced(tree, lambda place: tensors[place.index], _Place)
