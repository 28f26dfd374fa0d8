"""What a model costs with both engines, beside torch."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from pytorch2jax._bound import BoundFunction
from pytorch2jax._check import _machine
from pytorch2jax._check._report import RUNS, Cell, Cost, Report
from pytorch2jax._check._rows import Engine
from pytorch2jax._check._subject import Subject
from pytorch2jax._inference import Spec
from pytorch2jax._program import Program
from pytorch2jax._tape import HANDLE, FromTape
from pytorch2jax._transforms import Vjp

_ROUNDS = 7
_LONGEST_S = 2.0  # for the rounds of one computation
COMPUTATIONS = {"forward": "jit", "value and gradient": "grad"}  # and the rows that say whether an engine does them


class _Run:
    """One computation with one engine, compiled."""

    def __init__(self, subject: Subject, backend: str, *, derives: bool) -> None:
        engine, self._arrays = Engine(subject, backend), subject.arrays()  # a new one, which has compiled nothing yet
        self._variables = engine.variables(self._arrays)
        self._jitted = jax.jit(jax.value_and_grad(engine.loss) if derives else engine.outputs)

    def __call__(self) -> Any:
        return jax.block_until_ready(self._jitted(self._variables, *self._arrays))

    def copied_bytes(self) -> int:
        """How much a call copies between the frameworks."""
        return copied_bytes(self._jitted.trace(self._variables, *self._arrays).jaxpr.jaxpr)


def measure(report: Report, subject: Subject, step: Callable[[str], None], load: tuple[float, int]) -> None:
    """Time both engines beside torch, in turn; put the costs into the report.

    Args:
        load: of the machine before the check, which is a load itself.
    """
    scatters: list[float] = []
    for what, row in COMPUTATIONS.items():
        derives = what != "forward"
        if derives and subject.why_no_derivatives():
            continue
        runs: dict[str, _Run] = {}
        first: dict[str, float] = {}
        for name, cells in report.works.items():
            if cells.get(row, Cell("")).status in RUNS:
                step(f"{name}: time of {what}")
                runs[name] = _Run(subject, name, derives=derives)
                first[name] = _seconds(runs[name])
        step(f"time of {what}")
        gradients = functools.partial(subject.gradients, subject.tensors, as_it_comes=True)
        in_torch: Callable[[], Any] = gradients if derives else subject.time_forward
        try:
            in_torch()
        except Exception:  # the cells say that torch itself fails here
            continue
        times = _rounds({"": in_torch, **runs})
        report.torch_seconds[what] = statistics.median(times[""])
        scatters += map(_machine.scatter, times.values())
        report.busy = _machine.why_rough(load, scatters)
        for name, run in runs.items():
            ratios = [t / base for t, base in zip(times[name], times[""], strict=True)]
            seconds, ratio = statistics.median(times[name]), statistics.median(ratios)
            cost = Cost(what, seconds, ratio, first[name], _machine.peak_bytes(run), run.copied_bytes())
            report.costs.setdefault(name, []).append(cost)


def _rounds(runs: dict[str, Callable[[], Any]]) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + _LONGEST_S * len(runs)
    for done in range(_ROUNDS):
        if done >= 2 and time.perf_counter() > end:
            break
        for name, run in runs.items():
            times[name].append(_seconds(run))
    return times


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


# -- bytes between the frameworks --------------------------------------------------------------------------------------


def copied_bytes(jaxpr: Any) -> int:
    """How much the calls of torch in a computation copy; the body of a loop with an unknown number of rounds once."""
    total = 0
    for equation in jaxpr.eqns:
        program = equation.params.get("program")
        if isinstance(program, Program):
            total += _copied_by(program)
        times = equation.params["length"] if equation.primitive.name == "scan" else 1
        total += times * sum(map(copied_bytes, _inside(equation.params.values())))
    return total


def _inside(values: Iterable[Any]) -> Iterator[Any]:
    """The computations among the parameters of an equation."""
    for value in values:
        if isinstance(value, (tuple, list)):
            yield from _inside(value)
        elif hasattr(inner := getattr(value, "jaxpr", value), "eqns"):
            yield inner


def _copied_by(program: Program) -> int:
    """In a call: the inputs that torch may write to, and the outputs, save those that it computes where they belong."""
    if isinstance(program, FromTape):  # the forward pass has been
        cotangents = program.in_specs[len(program.in_specs) - program.n_linear :]
        return _bytes(cotangents) + _bytes(_copied_outputs(program))
    root = program.root
    written: list[Spec] = []
    if isinstance(root, BoundFunction):
        written = [root.in_specs[i + root.is_seeded] for i in root.copied_inputs]
    return _bytes(written) + (0 if program.computes_in_place else _bytes(program.out_specs))


def _copied_outputs(program: FromTape) -> Sequence[Spec]:
    """The gradients save the large ones, which appear where XLA wants them."""
    if not isinstance(program.base, Vjp):
        return program.out_specs
    large = program.taped.large
    return [spec for i, spec in zip(program.base.active, program.out_specs, strict=True) if i not in large]


def _bytes(specs: Iterable[Spec]) -> int:
    return sum(math.prod(spec.shape) * spec.dtype.itemsize for spec in specs if spec != HANDLE)
