"""What a captured function is: a list of operators on variables, without views and without writes in place."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch


class Var:
    """A tensor in a graph.

    shape, dtype: as torch has them.
    """

    __slots__ = ("dtype", "shape")

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        self.shape = tuple(shape)
        self.dtype = dtype

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


class Equation(NamedTuple):
    """One operator.

    operator: an operator of torch's, or a function of arrays for what torch has no operator for.
    args, kwargs: its arguments, with variables for tensors.
    outputs: its results; None for one that is no tensor.
    several: whether the operator returns a sequence.
    constant: grad mode was off, so that no derivative goes through.
    draw: for random operators, their number among them.
    """

    operator: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[Var | None, ...]
    several: bool
    constant: bool = False
    draw: int | None = None

    @property
    def name(self) -> str:
        return str(self.operator)


class Graph(NamedTuple):
    """A captured function.

    inputs: what it is called with.
    constants: tensors that it got from elsewhere.
    equations: in order.
    outputs: what it returns.
    symbolic: the function's name, if there are symbols for sizes.
    """

    inputs: tuple[Var, ...]
    constants: dict[Var, torch.Tensor]
    equations: tuple[Equation, ...]
    outputs: tuple[Var, ...]
    symbolic: str | None = None


def variables(tree: Any) -> Iterator[Var]:
    """The variables in the arguments of an operator."""
    return (leaf for leaf in leaves(tree) if isinstance(leaf, Var))


def leaves(tree: Any) -> Iterator[Any]:
    """The arguments of an operator, one by one."""
    if isinstance(tree, (list, tuple)):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from leaves(item)
    else:
        yield tree


def replaced(tree: Any, of: Callable[[Any], Any], kind: type) -> Any:
    """The arguments of an operator with `of(x)` for each `x` of a type."""
    if isinstance(tree, kind):
        return of(tree)
    if isinstance(tree, (list, tuple)):
        items = [replaced(item, of, kind) for item in tree]
        return items if isinstance(tree, list) or type(tree) is not tuple else tuple(items)
    if isinstance(tree, dict):
        return {name: replaced(item, of, kind) for name, item in tree.items()}
    return tree


class Unifiable:
    """An operator of this engine's own, for which attributes hold what differs with sizes."""

    def unified(self, operators: Sequence[Any], unified: Callable[[Sequence[Any]], Any]) -> Any:
        """One for all sizes of those at several, with formulas for their numbers."""
        new = copy.copy(self)
        vars(new).update(unified([vars(f) for f in operators]))
        return new


def used(equations: Sequence[Equation]) -> list[Var]:
    """The variables that equations take, as often as they take them."""
    return [var for e in equations for var in (*variables(e.args), *variables(e.kwargs))]


def pruned(equations: Sequence[Equation], wanted: Sequence[Var]) -> tuple[Equation, ...]:
    """The equations that the wanted variables depend on."""
    needed = set(wanted)
    kept = []
    for equation in reversed(equations):
        if needed.isdisjoint(equation.outputs):
            continue
        kept.append(equation)
        needed.update(variables(equation.args), variables(equation.kwargs))
    return tuple(reversed(kept))
