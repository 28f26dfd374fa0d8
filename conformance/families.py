"""How far single precision may be from torch's, for each family of operators, where the kernels are not torch's own.

A family is a file of `pytorch2jax/xla/lowerings/`. What an operator is made of is found out while it runs; the widest
tolerance of its parts is its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

from conformance.exceptions import BACKEND

TOLERANCES = {
    "views": 1e-6,
    "creation": 1e-6,
    "sorting": 1e-6,
    "indexing": 1e-6,
    "random": 1e-6,
    "elementwise": 2e-6,
    "activations": 5e-6,
    "reductions": 2e-6,
    "losses": 2e-6,
    "normalisation": 2e-6,
    "convolution": 2e-6,
    "fft": 2e-6,
    "recurrent": 5e-6,
    "pooling": 1e-5,
    "special": 1e-5,
    "attention": 1e-5,
    "linalg": 1e-5,
}
"""The largest distance, relative to |y| + max|y| / 10, with torch's result y and its largest element (at least 1)."""

_BRIDGED = 1e-5
"""Where no rule has run: torch's own kernels."""


class Seen:
    """What ran since an operator was begun, and how far from torch it was.

    Attributes:
        families: the families of the rules that ran.
        error: the largest distance.
    """

    def __init__(self) -> None:
        self.families: set[str] = set()
        self.error = 0.0

    def begin(self) -> None:
        """Forget what was seen before."""
        self.families, self.error = set(), 0.0

    @property
    def tolerance(self) -> float:
        """How far single precision may be from torch's."""
        family = widest(self.families)
        return _BRIDGED if family is None else TOLERANCES[family]


def widest(families: Iterable[str]) -> str | None:
    """The family with the widest tolerance of these."""
    return max(sorted(families), key=TOLERANCES.__getitem__, default=None)


def watched(function: Callable[..., Any]) -> Callable[..., Any]:
    """A rule that says that it runs."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        SEEN.families.add(function.__module__.rpartition(".")[2])
        return function(*args, **kwargs)

    return run


SEEN = Seen()

if BACKEND == "xla":
    from pytorch2jax.xla import _registry, lowerings  # noqa: F401

    for _name, _rule in _registry._RULES.items():
        _registry._RULES[_name] = _rule._replace(function=watched(_rule.function))
