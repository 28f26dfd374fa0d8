"""`check` itself: runs a model through everything, and says what came of it."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import torch
from torch import nn

from pytorch2jax._check import _machine, _report as report_of
from pytorch2jax._check._advice import advice
from pytorch2jax._check._compare import largest_difference, mismatch
from pytorch2jax._check._costs import measure
from pytorch2jax._check._found import WAY_TO_64_BITS, find_hooks, find_in_call, find_out, find_parts
from pytorch2jax._check._report import Cell, Report
from pytorch2jax._check._rows import (
    DERIVATIVES,
    ROWS,
    Comparison,
    Engine,
    NotApplicableError,
)
from pytorch2jax._check._show import progress, show
from pytorch2jax._check._subject import Subject
from pytorch2jax._errors import BridgedWarning, LoopWarning, Pytorch2JaxError
from pytorch2jax._params import check_module

_ENGINES = ("torch", "xla")


def check(model: nn.Module, /, *args: Any, timing: bool = True, **kwargs: Any) -> Report:
    """Run a torch module through everything, print a report, and return it.

    Both engines are tried, eagerly and under `jax.jit`, with first and second derivatives, batches, gradients for each
    example, in train mode and exported, and compared with what torch itself gives. A tolerance of 1e-4 of the
    largest value counts as agreement in single precision, 1e-9 in double. Derivatives are those of one number, a
    weighted sum of the floating and complex outputs and the means of their squares, for the trainable parameters and
    the floating and complex arguments. What draws random numbers is compared with torch where torch can be seeded
    alike, which is with `backend="torch"`; otherwise shapes, dtypes, and two calls with one key.

    Args:
        model: any `torch.nn.Module`. It is not changed, and neither are the random generators.
        *args, **kwargs: what its `forward` gets: tensors or arrays, pytrees of them, and static values.
        timing: whether to measure what it costs, too, which takes the most time.

    Returns:
        The report, a dataclass: `report.works["xla"]["grad"].error`; `report.to_markdown()`, `report.to_json()`.
        Ctrl-C ends the check; the report has then what was found until then.

    Copies:
        The module, its parameters and the arguments.

    Raises:
        ConversionError: `model` is no torch module, or has weights without values.
        OptionError: the module does not run on these arguments in torch, or cannot be copied.

    Example:
        >>> import contextlib, io, torch
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     report = check(torch.nn.Linear(3, 2), torch.ones(4, 3), timing=False)
        >>> report.works["torch"]["grad"].status
        'agrees'
    """
    return checked(model, args, kwargs, timing=timing)


def checked(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, timing: bool) -> Report:
    """The same for a `forward` whose arguments may have any name."""
    check_module("check", model)
    report, load = Report(type(model).__name__), _machine.load_average()
    try:
        with _steps(report) as step, _machine.generators_put_back():
            subject = _look_at(report, model, args, kwargs, step)
            for engine in _ENGINES:
                _check_engine(report, subject, engine, step)
            if timing:
                with _noted(report):
                    measure(report, subject, step, load)
        report.advice = advice(report)
    except KeyboardInterrupt:
        report.is_complete = False
    show(report)
    return report


@contextmanager
def _steps(report: Report) -> Iterator[Callable[[str], None]]:
    """A function that says what comes next, if Ctrl-C has not come."""
    with _machine.noticed_interrupts() as look, progress(f"checking {report.model}") as say:

        def step(what: str) -> None:
            look()
            say(what)

        yield step
        look()


def _look_at(
    report: Report, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], step: Callable[[str], None]
) -> Subject:
    """The model and its arguments, and in the report what is found of them; after an interrupt, what was found."""
    step("what it consists of")
    subject = Subject(model, args, kwargs)
    find_hooks(report.found, subject.model)
    if not subject.has_lazy_parts:
        find_parts(report.found, subject.model)
    step("a call in torch")
    subject.try_out()
    find_parts(report.found, subject.model)
    find_in_call(report.found, subject)
    with _noted(report):
        find_out(report.found, subject)
    return subject


# -- what works --------------------------------------------------------------------------------------------------------


def _check_engine(report: Report, subject: Subject, backend: str, step: Callable[[str], None]) -> None:
    cells = report.works.setdefault(backend, {})
    try:
        engine = Engine(subject, backend)
    except Pytorch2JaxError as error:
        cells["convert"] = Cell(report_of.REFUSED, reason=_in_one_line(error))
        return
    for name in ROWS:
        step(f"{backend}: {name}")
        with _noted(report):
            cells[name] = _cell(engine, name)
        if name == "jit" and all(cell.status == report_of.REFUSED for cell in cells.values()):
            return  # neither way: the rest says the same


def _cell(engine: Engine, name: str) -> Cell:
    subject, derives = engine.subject, name in DERIVATIVES
    try:
        if derives and (reason := subject.why_no_derivatives()):
            raise NotApplicableError(reason)
        comparison = ROWS[name](engine)
    except NotApplicableError as error:
        return Cell(report_of.NOT_APPLICABLE, reason=_in_one_line(error))
    except Exception as error:
        return _refused(subject, error)
    refusal: Exception | None = None
    found: list[Any] = []
    try:
        found = jax.tree.leaves(comparison.found())
    except Exception as error:
        refusal = error
    try:
        expected = comparison.expected()
    except Exception as error:
        status = report_of.RAN if refusal is None else report_of.NOT_APPLICABLE
        return Cell(status, reason=f"torch itself fails here: {_in_one_line(error)}")
    if refusal is not None:
        return _refused(subject, refusal)
    if said := mismatch(found, expected):
        return Cell(report_of.DIFFERS, reason=f"differs from torch: {said}")
    tolerance = subject.tolerance() * (10 if derives else 1)
    if engine.backend != "torch" and engine.draws(train=name == "train mode"):
        return _drawn(comparison, found, tolerance)
    difference = largest_difference(found, expected)
    agrees = difference <= tolerance  # False for a NaN
    return Cell(report_of.AGREES if agrees else report_of.DIFFERS, difference, tolerance)


def _refused(subject: Subject, error: Exception) -> Cell:
    reason = _in_one_line(error)
    if wide := subject.in_double_precision():
        reason = f"{reason.rstrip('.')}. JAX rounds double precision to single here ({wide[0]}). {WAY_TO_64_BITS}"
    return Cell(report_of.REFUSED, reason=reason)


def _drawn(comparison: Comparison, found: list[Any], tolerance: float) -> Cell:
    """The cell of a computation that draws other random numbers than torch: it is compared with itself."""
    again = [torch.tensor(jax.device_get(array)) for array in jax.tree.leaves(comparison.found())]
    difference = largest_difference(found, again)
    if not difference <= tolerance:
        return Cell(report_of.DIFFERS, difference, tolerance, "two calls with one key differ")
    return Cell(
        report_of.RAN,
        reason="values were not compared, because the model draws random numbers, and from one key JAX draws others "
        "than torch; shapes and dtypes are torch's, and two calls with one key are equal",
    )


@contextmanager
def _noted(report: Report) -> Iterator[None]:
    """Put what the library warns of into the report."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", LoopWarning)
        warnings.simplefilter("always", BridgedWarning)
        yield
    for warning in caught:
        notes = report.bridged if issubclass(warning.category, BridgedWarning) else report.loops
        if (text := _in_one_line(warning.message)) not in notes:
            notes.append(text)


def _in_one_line(error: Any) -> str:
    """The first lines of a message, as one; cut where it quotes another error at length."""
    said = re.split(r"\n-{20}|\nTraceback ", str(error))[0]
    lines = [re.sub(r"^INTERNAL: pytorch2jax error \d+: ", "", x.strip()) for x in said.splitlines() if x.strip()]
    text = " ".join(lines[:3]) if lines else type(error).__name__
    quotes_another = re.search(r"(Pytorch2Jax\w*|Error|Exception): ", text)
    return f"{text[:400]} ..." if quotes_another and len(text) >= 400 else text
