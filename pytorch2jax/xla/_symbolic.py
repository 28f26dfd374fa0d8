"""Programs for any batch size: a graph with formulas in the place of sizes.

Torch is asked for graphs at a few sizes. Where the same numbers differ between them, they are a polynomial in the
symbols, in which each occurs to the first power at most; further sizes tell whether that is right.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
import torch

from pytorch2jax._bound import BoundFunction
from pytorch2jax._errors import CaptureError, ExportError, InferenceError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import bounds_of, size_at, symbols_of
from pytorch2jax._trees import OutputTree
from pytorch2jax.xla._bridged import Bridged
from pytorch2jax.xla._graph import Equation, Graph, Unifiable, Var
from pytorch2jax.xla._internals import aten
from pytorch2jax.xla._interpret import ON_SIZES

_SMALLEST, _LARGE, _STEP = 5, 576, 384  # the large ones are multiples of 192, and unlike what models have
_LIMITS = (None, 127, 31, 15)
"""Largest sizes to try, one after the other: many models have an end, such as a table of positions. None of them is
such an end itself, where torch leaves out `[:n]`."""

Sizes = Mapping[str, int]


class AtSizes(NamedTuple):
    """A program with symbols for sizes, as programs at several sizes."""

    symbols: Mapping[str, Any]
    tried: tuple[Sizes, ...]
    programs: tuple[BoundFunction, ...]


def bind_symbolic(name: str, specs: Sequence[Spec], bind: Callable[[list[Any]], BoundFunction]) -> BoundFunction:
    """The program for sizes that are symbols; see `_engines.bind_symbolic`."""
    symbols = symbols_of(n for spec in specs for n in spec.shape)
    bounds = {s: bounds_of(symbol) for s, symbol in symbols.items()}
    from pytorch2jax.xla._call import graph_of  # which needs this module

    def bind_at(sizes: Sizes) -> BoundFunction:
        shapes = [tuple(size_at(n, sizes) for n in spec.shape) for spec in specs]
        try:
            return bind([jax.ShapeDtypeStruct(s, spec.dtype) for s, spec in zip(shapes, specs, strict=True)])
        except (CaptureError, InferenceError) as error:
            raise _fails_at(name, sizes, error) from error

    graph_of(bind_at(sizes_to_try(name, bounds)[0]))  # what cannot be captured is not run with large arrays
    limits: dict[str, int | None] = {}
    for symbol in symbols:
        _limit(name, bounds, limits, symbol, bind_at)
    tried = sizes_to_try(name, bounds, limits)
    programs = tuple(map(bind_at, tried))
    first, *others = ((_plain(p.inferred.tree), p.inferred.changed) for p in programs)
    if any(other != first for other in others):
        raise _differs(name, symbols, "what it returns besides tensors")
    return programs[0].with_sizes(tuple(specs), AtSizes(symbols, tuple(tried), programs))


def _limit(
    name: str,
    bounds: Mapping[str, tuple[int, float]],
    limits: dict[str, int | None],
    symbol: str,
    bind_at: Callable[[Sizes], BoundFunction],
) -> None:
    """Find out up to which size of a symbol the function works, and add that to `limits`."""
    for limit in _LIMITS:
        limits[symbol] = limit
        sizes = max(sizes_to_try(name, bounds, limits), key=lambda sizes: sizes[symbol])
        try:
            bind_at(sizes)
            return
        except CaptureError:
            if limit == _LIMITS[-1]:
                raise


def _plain(tree: OutputTree) -> Any:
    """What a function returns besides tensors, as far as it can be compared."""
    value = tree.context if isinstance(tree.context, (int, float, str)) else None
    return tree.kind, tree.node_type, value, [_plain(child) for child in tree.children]


def _fails_at(name: str, sizes: Sizes, error: Exception) -> CaptureError:
    where = ", ".join(f"{symbol} = {size}" for symbol, size in sizes.items())
    return CaptureError(f"{name}: expected a function for all sizes, got an error at {where}: {error} {ON_SIZES}")


def sizes_to_try(
    name: str, bounds: Mapping[str, tuple[int, float]], limits: Mapping[str, int | None] | None = None
) -> list[Sizes]:
    """The sizes to capture a function at: all combinations of two for each symbol; others; and a large one of each.

    They leave different rests when they are divided by small numbers, and no two symbols have the same, so that nothing
    is taken for a polynomial by chance.

    Args:
        name: the function's name, for messages.
        bounds: the smallest and the largest size of each symbol.
        limits: the largest sizes to try, if there are such.

    Raises:
        CaptureError: there are too few sizes between the bounds.
    """
    used: set[int] = set()
    ranges = {}
    for symbol, (low, high) in bounds.items():
        start = max(low, _SMALLEST)
        limit = (limits or {}).get(symbol)
        most = limit if limit is not None and limit >= start + 2 * _SMALLEST else start + 10 * _LARGE
        ranges[symbol] = start, int(min(high - 1, most))

    def take(candidates: Callable[[int, int], Iterable[int]]) -> dict[str, int]:
        taken = {}
        for symbol, (start, end) in ranges.items():
            low = bounds[symbol][0]
            others = itertools.chain(range(start, end + 1), range(min(start - 1, end), low, -1), {end + 1, low})
            found = next((n for n in itertools.chain(candidates(start, end), others) if n not in used), None)
            if found is None:
                raise CaptureError(
                    f"{name}: expected at least {4 * len(bounds)} sizes that {symbol} can have, to see what the "
                    f"function does with them, got {low} to {end + 1}. Give the program fixed sizes."
                )
            used.add(found)
            taken[symbol] = found
        return taken

    fitted = [take(_odd), take(_odd)]
    others, large = take(_even), take(_large)
    combined = [{s: fitted[c][s] for s, c in zip(bounds, choice, strict=True)} for choice in _choices(len(bounds))]
    return [*combined, others, *({**combined[0], symbol: size} for symbol, size in large.items())]


def _choices(n: int) -> Iterable[tuple[int, ...]]:
    return itertools.product((0, 1), repeat=n)


def _odd(start: int, end: int) -> Iterable[int]:
    return (n for n in range(start, end + 1) if math.gcd(n, 6) == 1)


def _even(start: int, end: int) -> Iterable[int]:
    return (n for n in range(start, end + 1) if n % 4 == 2 and n % 3)


def _large(start: int, end: int) -> Iterable[int]:
    """Multiples of as many numbers as possible."""
    first = _LARGE + -(-max(start - _LARGE, 0) // _STEP) * _STEP
    below = [range(end - end % step, start - 1, -step) for step in (24, 4, 1)]
    return itertools.chain(range(first, end + 1, _STEP), *below)


class Polynomial:
    """Numbers at several sizes, as one formula.

    Args:
        name: the function's name, for messages.
        tried: the sizes, as `sizes_to_try` gives them.
        values: the number at each.

    Raises:
        CaptureError: no such formula gives these numbers.
    """

    def __init__(self, name: str, tried: Sequence[Sizes], values: Sequence[int]) -> None:
        symbols = list(tried[0])
        self._terms = [t for n in range(len(symbols) + 1) for t in itertools.combinations(symbols, n)]
        n = len(self._terms)
        matrix = [[math.prod(sizes[s] for s in term) for term in self._terms] for sizes in tried]
        solved = _solve(matrix[:n], values[:n])
        found = [sum(c * v for c, v in zip(solved, row, strict=True)) for row in matrix]
        if any(c.denominator != 1 for c in solved) or found != list(values):
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


def _solve(matrix: Sequence[Sequence[int]], right: Sequence[int]) -> list[Fraction]:
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
        tried: the sizes that the graphs are for.
    """

    def __init__(self, name: str, symbols: Mapping[str, Any], tried: Sequence[Sizes]) -> None:
        self._name, self._symbols, self._tried = name, symbols, tried
        self._vars: dict[Var, tuple[Var, Sequence[Var]]] = {}

    def graph(self, graphs: Sequence[Graph]) -> Graph:
        """The graph with formulas, from those at the sizes that were tried.

        Raises:
            CaptureError: they differ in more than sizes.
        """
        first = graphs[0]
        for what, parts in (
            ("operators", [g.equations for g in graphs]),
            ("constants", [g.constants for g in graphs]),
            ("results", [g.outputs for g in graphs]),
        ):
            if len(set(map(len, parts))) > 1:
                raise self._differs(f"the number of {what}")
        constants = {}
        for group in zip(*(g.constants.items() for g in graphs), strict=True):
            tensors = [tensor for _, tensor in group]
            if not all(_same(t, tensors[0]) for t in tensors[1:]):
                raise self._differs("a constant")
            constants[self.unified([var for var, _ in group])] = tensors[0]
        inputs = tuple(self.unified(list(group)) for group in zip(*(g.inputs for g in graphs), strict=True))
        equations = tuple(self._equation(group) for group in zip(*(g.equations for g in graphs), strict=True))
        outputs = tuple(self.unified(list(group)) for group in zip(*(g.outputs for g in graphs), strict=True))
        return first._replace(
            inputs=inputs, constants=constants, equations=equations, outputs=outputs, symbolic=self._name
        )

    def _equation(self, group: Sequence[Equation]) -> Equation:
        first = group[0]
        operator = first.operator
        if any(type(e.operator) is not type(operator) for e in group):
            raise self._differs(first.name)
        if isinstance(operator, Bridged):
            raise ExportError(
                f"{self._name}: {first.name}: expected operators with a JAX function, got one that torch has to run, "
                "where sizes are numbers. Such a program cannot be exported."
            )
        if isinstance(operator, Unifiable):
            operator = operator.unified([e.operator for e in group], self.unified)
        elif any(e.operator != operator for e in group):
            raise self._differs(first.name)
        if any((e.several, e.constant, e.draw) != (first.several, first.constant, first.draw) for e in group):
            raise self._differs(first.name)
        group = [_from_beginning(e) for e in group]
        return first._replace(
            operator=operator,
            args=self.unified([e.args for e in group]),
            kwargs=self.unified([e.kwargs for e in group]),
            outputs=self.unified([e.outputs for e in group]),
        )

    def unified(self, values: Sequence[Any]) -> Any:
        """One value for those at all sizes."""
        first = values[0]
        if all(isinstance(v, (int, np.integer)) and not isinstance(v, bool) for v in values):
            if all(v == first for v in values):
                return first
            return Polynomial(self._name, self._tried, [int(v) for v in values]).at(self._symbols)
        if any(type(v) is not type(first) for v in values):
            raise self._differs(f"an argument ({first!r})")
        if isinstance(first, Var):
            return self._var(values)
        if isinstance(first, Equation):
            return self._equation(values)
        if isinstance(first, Unifiable):
            return first.unified(values, self.unified)
        if isinstance(first, (list, tuple)):
            if len({len(v) for v in values}) > 1:
                raise self._differs("the length of an argument")
            items = [self.unified(list(group)) for group in zip(*values, strict=True)]
            return items if isinstance(first, list) else tuple(items)
        if isinstance(first, dict):
            if any(v.keys() != first.keys() for v in values):
                raise self._differs("the names of arguments")
            return {key: self.unified([v[key] for v in values]) for key in first}
        if any(v is not first and v != first for v in values):
            raise self._differs(f"an argument ({first!r})")
        return first

    def _var(self, values: Sequence[Var]) -> Var:
        first = values[0]
        if first not in self._vars:
            if any(v.dtype != first.dtype or len(v.shape) != len(first.shape) for v in values):
                raise self._differs(f"a tensor ({first!r})")
            self._vars[first] = Var(self.unified([v.shape for v in values]), first.dtype), values
        var, same = self._vars[first]
        if any(v is not other for v, other in zip(values, same, strict=True)):
            raise self._differs(f"which tensor an operator gets ({first!r})")
        return var

    def _differs(self, what: str) -> CaptureError:
        return _differs(self._name, self._symbols, what)


def _differs(name: str, symbols: Iterable[str], what: str) -> CaptureError:
    return CaptureError(
        f"{name}: expected the same operators at all sizes of {', '.join(symbols)}, got other ones: {what}. Give the "
        "program fixed sizes."
    )


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())


def _from_beginning(equation: Equation) -> Equation:
    """Slices with both ends inside of their array, and indices from its beginning: rules cannot tell of a formula."""
    names = _COUNTED.get(equation.operator)
    if names is None:
        return equation
    given = {"dim": 0, **dict(zip(names, equation.args, strict=False)), **equation.kwargs}
    n = given["self"].shape[given["dim"]]
    if "index" in names:
        given["index"] %= n
    else:
        step = given.setdefault("step", 1)
        start, end, _ = slice(given.get("start"), given.get("end"), step).indices(n)
        given |= {"start": start, "end": max(start, end)}
    return equation._replace(args=tuple(given[name] for name in names), kwargs={})


_SLICE, _SELECT = ("dim", "start", "end", "step"), ("dim", "index")
_COUNTED: dict[Any, tuple[str, ...]] = {
    aten.slice.Tensor: ("self", *_SLICE),
    aten.slice_copy.Tensor: ("self", *_SLICE),
    aten.slice_scatter.default: ("self", "src", *_SLICE),
    aten.select.int: ("self", *_SELECT),
    aten.select_copy.int: ("self", *_SELECT),
    aten.select_scatter.default: ("self", "src", *_SELECT),
}
"""The arguments of operators that count from the end of an axis, too."""
