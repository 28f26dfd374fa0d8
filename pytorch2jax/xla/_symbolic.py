"""Programs for any batch size: a graph with formulas in the place of sizes.

Torch is asked for graphs at a few sizes. Where the same numbers differ between them, they are a polynomial in the
symbols, in which each occurs to the first power at most; one more size tells whether that is right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._bound import BoundFunction
from pytorch2jax._errors import CaptureError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import size_at, symbols_of
from pytorch2jax.xla._graph import Equation, Graph, Var

_FIRST, _STEP = 5, 6  # sizes to try: 5 and 11, and 7 to see whether it is right; all unlike what models have
_CHECKED = 7

Sizes = Mapping[str, int]


class AtSizes(NamedTuple):
    """A program with symbols for sizes, as programs at several sizes."""

    symbols: Mapping[str, Any]
    programs: tuple[BoundFunction, ...]


def bind_symbolic(name: str, specs: Sequence[Spec], bind: Callable[[list[Any]], BoundFunction]) -> BoundFunction:
    """The program for sizes that are symbols; see `_engines.bind_symbolic`."""
    symbols = symbols_of(n for spec in specs for n in spec.shape)
    programs = []
    for sizes in sizes_to_try(list(symbols)):
        shapes = [tuple(size_at(n, sizes) for n in spec.shape) for spec in specs]
        fixed = [jax.ShapeDtypeStruct(s, spec.dtype) for s, spec in zip(shapes, specs, strict=True)]
        programs.append(bind(fixed))
    return programs[0].with_sizes(tuple(specs), AtSizes(symbols, tuple(programs)))


def sizes_to_try(symbols: Sequence[str]) -> list[Sizes]:
    """The sizes to capture a function at: all combinations of two for each symbol, and one more."""
    tried: list[Sizes] = []
    for choice in itertools.product((0, 1), repeat=len(symbols)):
        # Another one for each symbol, so that two of them are never mistaken for one another.
        tried.append({s: _FIRST + 2 * i + _STEP * c for i, (s, c) in enumerate(zip(symbols, choice, strict=True))})
    tried.append({s: _CHECKED + 4 * i for i, s in enumerate(symbols)})
    return tried


class Polynomial:
    """Numbers at several sizes, as one formula.

    Args:
        symbols: the names.
        values: the number at each of `sizes_to_try(symbols)`.

    Raises:
        CaptureError: no such formula gives these numbers.
    """

    def __init__(self, name: str, symbols: Sequence[str], values: Sequence[int]) -> None:
        tried = sizes_to_try(symbols)
        *fitted, checked = zip(tried, values, strict=True)
        self._terms = [t for n in range(len(symbols) + 1) for t in itertools.combinations(symbols, n)]
        matrix = [[math.prod(sizes[s] for s in term) for term in self._terms] for sizes, _ in fitted]
        solved = _solve(matrix, [value for _, value in fitted])
        if (
            any(c.denominator != 1 for c in solved)
            or sum(c * math.prod(checked[0][s] for s in term) for c, term in zip(solved, self._terms, strict=True))
            != checked[1]
        ):
            raise CaptureError(
                f"{name}: expected sizes that are polynomials in {', '.join(symbols)} with whole coefficients, got "
                f"{', '.join(f'{v} at {dict(s)}' for s, v in zip(tried, values, strict=True))}. Give the program fixed "
                "sizes."
            )
        self._coefficients = [int(c) for c in solved]

    def at(self, symbols: Mapping[str, Any]) -> Any:
        """The formula for symbols of JAX's."""
        total: Any = 0
        for coefficient, term in zip(self._coefficients, self._terms, strict=True):
            if coefficient:
                total = total + coefficient * math.prod([symbols[s] for s in term], start=1)
        return total


def _solve(matrix: list[list[int]], right: list[int]) -> list[Fraction]:
    """A system of linear equations in exact numbers, by elimination."""
    n = len(matrix)
    rows = [[Fraction(v) for v in row] + [Fraction(r)] for row, r in zip(matrix, right, strict=True)]
    for i in range(n):
        pivot = next(r for r in range(i, n) if rows[r][i] != 0)
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [v / rows[i][i] for v in rows[i]]
        for r in range(n):
            if r != i:
                rows[r] = [v - rows[r][i] * w for v, w in zip(rows[r], rows[i], strict=True)]
    return [row[n] for row in rows]


class Unifier:
    """Makes one graph of several that differ in sizes only.

    Args:
        name: the function's name, for messages.
        symbols: what each symbol is called, and what it is in JAX.
    """

    def __init__(self, name: str, symbols: Mapping[str, Any]) -> None:
        self._name, self._symbols = name, symbols
        self._vars: dict[Var, Var] = {}

    def graph(self, graphs: Sequence[Graph]) -> Graph:
        """The graph with formulas, from those at `sizes_to_try`.

        Raises:
            CaptureError: they differ in more than sizes.
        """
        first = graphs[0]
        if len({len(g.equations) for g in graphs}) > 1 or len({len(g.constants) for g in graphs}) > 1:
            raise self._differs("the number of operators")
        constants = {}
        for group in zip(*(g.constants.items() for g in graphs), strict=True):
            tensors = [tensor for _, tensor in group]
            if any(t.shape != tensors[0].shape or not torch.equal(t, tensors[0]) for t in tensors[1:]):
                raise self._differs("a constant")
            constants[self.unified([var for var, _ in group])] = tensors[0]
        inputs = tuple(self.unified(list(group)) for group in zip(*(g.inputs for g in graphs), strict=True))
        equations = tuple(self._equation(group) for group in zip(*(g.equations for g in graphs), strict=True))
        outputs = tuple(self.unified(list(group)) for group in zip(*(g.outputs for g in graphs), strict=True))
        return first._replace(inputs=inputs, constants=constants, equations=equations, outputs=outputs)

    def _equation(self, group: Sequence[Equation]) -> Equation:
        first = group[0]
        if any(type(e.operator) is not type(first.operator) for e in group):
            raise self._differs(first.name)
        if any(e.operator != first.operator for e in group):
            raise self._differs(first.name)
        return first._replace(
            args=self.unified([e.args for e in group]),
            kwargs=self.unified([e.kwargs for e in group]),
            outputs=self.unified([e.outputs for e in group]),
        )

    def unified(self, values: Sequence[Any]) -> Any:
        """One value for those at all sizes."""
        first = values[0]
        if isinstance(first, Var):
            if first not in self._vars:
                self._vars[first] = Var(self.unified([v.shape for v in values]), first.dtype)
            return self._vars[first]
        if isinstance(first, (list, tuple)):
            if len({len(v) for v in values}) > 1:
                raise self._differs("the length of an argument")
            items = [self.unified(list(group)) for group in zip(*values, strict=True)]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, dict):
            return {key: self.unified([v[key] for v in values]) for key in first}
        if type(first) in (int, np.int64) and any(v != first for v in values):
            return Polynomial(self._name, list(self._symbols), [int(v) for v in values]).at(self._symbols)
        if any(v is not first and v != first for v in values):
            raise self._differs(f"an argument ({first!r})")
        return first

    def _differs(self, what: str) -> CaptureError:
        return CaptureError(
            f"{self._name}: expected the same operators at all sizes of {', '.join(self._symbols)}, got other ones: "
            f"{what}. Give the program fixed sizes."
        )
