"""What a benchmark case is: a table whose rows are jobs and whose columns are competitors for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Call = Callable[[], Any]
"""Does the job once and returns what it computed. The worker waits for JAX arrays and for the GPU by itself."""

OURS = "pytorch2jax"
OURS_XLA = 'pytorch2jax, backend="xla"'
OURS_DECLARED = "pytorch2jax, output_shapes="
WRAP = "wrap-torch2jax"
TORCH = "torch"
COMPILED = "torch.compile"
FLAX = "Flax"
XLA = "XLA"
CALLBACK = "pure_callback"

SCALES = {"µs": 1e6, "ms": 1e3, "s": 1.0, "MiB": 1.0}
"""What a sample, in seconds or in MiB, is multiplied with to be shown in a unit."""


class LeftOutError(Exception):
    """A competitor has nothing to show for a row; the message says why, and becomes a footnote."""


@dataclass(frozen=True)
class Settings:
    """How much time to spend."""

    launches: int = 2
    """How often the processes of a case are started anew."""
    rounds: int = 5
    """In how many rounds the competitors take turns, in each launch."""
    round_s: float = 0.12
    """How long a competitor calls its job in each round; at least one call."""
    repeats: int = 5
    """How many rounds of a row may be repeated, in each launch, because other programs were at work."""
    warm_up_s: float = 0.25
    """How long it calls it before the first round, at least twice."""
    quick: bool = False


FULL = Settings()
QUICK = Settings(launches=1, rounds=2, round_s=0.02, repeats=0, warm_up_s=0.02, quick=True)


@dataclass(frozen=True)
class Entry:
    """What was measured for one competitor and one row: a sample for each round, or why there is none."""

    samples: tuple[float | None, ...] = ()
    error: str | None = None
    details: Mapping[str, Any] = field(default_factory=dict)


Rows = dict[str, dict[str, Entry]]
"""Row label -> competitor -> what was measured."""


@dataclass(frozen=True)
class Case:
    """A table to measure. It has either `competitors`, which run in worker processes, or its own `measure`."""

    name: str
    title: str
    unit: str
    about: str
    """What is measured, for a reader of the table."""
    rows: Mapping[str, Any] = field(default_factory=dict)
    """Row label -> the argument with which the competitors are set up."""
    competitors: Mapping[str, Callable[[Any], Call]] = field(default_factory=dict)
    """Name -> a function that takes the row's argument and sets up a call."""
    measure: Callable[[Settings], Rows] | None = None
    reference: str | None = TORCH
    """The competitor that all are compared with."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Environment variables of the worker processes."""
    limit_s: float = 120.0
    """How long setting up one row, or one round of it, may take."""
    quick_rows: int = 1
    """How many rows a quick run measures."""
