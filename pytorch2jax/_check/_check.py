"""`check` itself: runs a model through everything, and says what came of it."""

from __future__ import annotations

import functools
import math
import os
import re
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.export
import torch
from torch import nn

from pytorch2jax._check import _report as report_of
from pytorch2jax._check._report import Cell, Cost, Found, Report
from pytorch2jax._check._show import progress, show
from pytorch2jax._check._subject import Subject, copied, jax_loss, largest_difference
from pytorch2jax._errors import BridgedWarning, ConversionError, LoopWarning, Pytorch2JaxError
from pytorch2jax._params import Leaf, flat_name, layout_of, leaf_in, nest
from pytorch2jax._rng import seeded
from pytorch2jax._transfer import t2j

_ENGINES = ("torch", "xla")
_ROUNDS = 7
_LONGEST_S = 2.0  # for the rounds of one computation
_SLOW_RATIO = 1.5
_MANY_BYTES = 10**8
_RUNS = (report_of.AGREES, report_of.RAN)


def check(model: nn.Module, *args: Any, timing: bool = True, **kwargs: Any) -> Report:
    """Run a torch module through everything, print a report, and return it.

    Both engines are tried, eagerly and under `jax.jit`, with first and second derivatives, batches, gradients for each
    example, in train mode and exported, and compared with what torch itself gives. A tolerance of 1e-4 of the
    largest value counts as agreement in single precision, 1e-9 in double. Derivatives are those of one number, a
    weighted sum of the floating outputs and the means of their squares, for the trainable parameters and the floating
    arguments.

    Args:
        model: any `torch.nn.Module`. It is not changed.
        *args, **kwargs: what its `forward` gets: tensors or arrays, pytrees of them, and static values.
        timing: whether to measure what it costs, too, which takes the most time.

    Returns:
        The report, a dataclass: `report.works["xla"]["grad"].error`; `report.to_markdown()`, `report.to_json()`.
        Ctrl-C ends the check; the report has then what was found until then.

    Copies:
        The module, its parameters and the arguments.

    Raises:
        ConversionError: `model` is no torch module.
        OptionError: the module does not run on these arguments in torch.

    Example:
        >>> import contextlib, io, torch
        >>> with contextlib.redirect_stdout(io.StringIO()):
        ...     report = check(torch.nn.Linear(3, 2), torch.ones(4, 3), timing=False)
        >>> report.works["torch"]["grad"].status
        'agrees'
    """
    if not isinstance(model, nn.Module):
        raise ConversionError(f"check: expected a torch.nn.Module, got {type(model).__name__}.")
    subject = Subject(model, args, kwargs)
    report = Report(subject.name, _found(subject))
    try:
        with progress(f"checking {subject.name}") as step:
            for engine in _ENGINES:
                _check_engine(report, subject, engine, step)
            if timing:
                _measure(report, subject, step)
        report.advice = _advice(report)
    except KeyboardInterrupt:
        report.is_complete = False
    show(report)
    return report


# -- what there is ---------------------------------------------------------------------------------------------------


def _found(subject: Subject) -> Found:
    layout = layout_of(subject.model)
    own = dict(subject.model.named_parameters())
    trained, notes = _noticed(subject)
    return Found(
        parameters=sum(math.prod(leaf.shape) for leaf in layout.params),
        parameter_bytes=sum(p.numel() * p.element_size() for p in own.values()),
        dtypes=sorted({str(leaf.dtype).removeprefix("torch.") for leaf in layout.params}),
        tied=[[flat_name(slot) for slot in leaf.slots] for leaf in layout.params if len(leaf.slots) > 1],
        frozen=[name for name, p in own.items() if not p.requires_grad],
        buffers=[".".join(leaf.path) for leaf in layout.state],
        trained_buffers=[".".join(leaf.path) for leaf in trained],
        inputs=subject.described(subject.tensors, [f"#{i}" for i in range(len(subject.tensors))]),
        outputs=subject.described(subject.outputs, subject.output_paths()),
        notes=notes,
    )


def _noticed(subject: Subject) -> tuple[list[Leaf], list[str]]:
    """The buffers that training changes, and what a trial run says."""
    notes = []
    before = _attributes(subject.model)
    probe = copied(subject.model)
    with torch.no_grad():
        subject.flat(probe, [t.clone() for t in subject.tensors])
    changed = sorted(name for name, value in _attributes(probe).items() if before.get(name) != value)
    if changed:
        notes.append(f"attributes that a call changes, and that are put back: {', '.join(changed[:5])}")
    try:
        converted = subject.converted("torch")
        call = subject.fill(subject.arrays())
        inferred = {train: converted.inferred(*call, train=train) for train in (False, True)}
        trained = converted.split_state(call)[0]
    except Exception:
        return [], notes  # the cells say why
    if inferred[True].random or inferred[False].random:
        modes = [name for train, name in ((False, "eval"), (True, "train")) if inferred[train].random]
        notes.append(f"draws random numbers in {' and '.join(modes)} mode: pass keys (`rng=`)")
    evaluated = inferred[False]
    if not evaluated.certain:
        notes.append("reads values: under `jax.jit` it is tried on made-up ones; pass `example_args=` for others")
    if evaluated.hand_written:
        notes.append("has gradients written by hand (`torch.autograd.Function`)")
    if evaluated.hooks:
        notes.append("has hooks on gradients, which act in reverse mode")
    return trained, notes


def _attributes(model: nn.Module) -> dict[str, str]:
    return {
        f"{name}.{key}".lstrip("."): repr(value)
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if not key.startswith("_") and not isinstance(value, (torch.Tensor, nn.Module)) and key != "training"
    }


# -- what works --------------------------------------------------------------------------------------------------------


class _Engine:
    """The model with one engine, as functions of its variables (see `Subject.variables`) and of its arguments."""

    def __init__(self, subject: Subject, backend: str) -> None:
        self.subject, self.backend = subject, backend
        self.module = subject.converted(backend)
        self.params, self.state = self.module.initial()
        self._own = [t2j(p.detach(), copy=True) for p in subject.parameters]
        self._trains = [leaf.trainable for leaf in self.module.layout.params]
        self.key = jax.random.key(0)

    def variables(self, arrays: Sequence[Any]) -> list[Any]:
        """The trainable parameters, and the floating ones among the arguments."""
        return self.subject.variables(arrays, self._own)

    def outputs(self, variables: list[Any], *arrays: Any) -> list[Any]:
        """The flat outputs in eval mode."""
        trained, floating = iter(variables[: len(self._own)]), variables[len(self._own) :]
        leaves = self.module.layout.params
        old = {leaf.path: leaf_in(self.params, leaf) for leaf in leaves}
        tree = nest(leaves, [next(trained) if t else old[x.path] for x, t in zip(leaves, self._trains, strict=True)])
        varied = dict(zip(self.subject.floating, floating, strict=True))
        args, kwargs = self.subject.fill([varied.get(i, array) for i, array in enumerate(arrays)])
        out, _ = self.module.apply(tree, self.state, args, kwargs, rng=lambda: self.key, train=False)
        return [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]

    def loss(self, variables: list[Any], *arrays: Any) -> Any:
        """The number of which derivatives are taken."""
        return jax_loss(self.outputs(variables, *arrays))


_Compared = tuple[list[Any], list[torch.Tensor]]


def _eager(engine: _Engine) -> _Compared:
    arrays = engine.subject.arrays()
    return engine.outputs(engine.variables(arrays), *arrays), engine.subject.outputs


def _jit(engine: _Engine) -> _Compared:
    arrays = engine.subject.arrays()
    return jax.jit(engine.outputs)(engine.variables(arrays), *arrays), engine.subject.outputs


def _grad(engine: _Engine) -> _Compared:
    arrays = engine.subject.arrays()
    found = jax.jit(jax.grad(engine.loss))(engine.variables(arrays), *arrays)
    return found, engine.subject.gradients(engine.subject.tensors)


def _jvp(engine: _Engine) -> _Compared:
    subject, arrays = engine.subject, engine.subject.arrays()
    tangents = [t2j(d, copy=True) for d in subject.directions]
    slope_along = jax.jit(lambda p, t: jax.jvp(lambda p: engine.loss(p, *arrays), (p,), (t,))[1])
    found = slope_along(engine.variables(arrays), tangents)
    gradients = [g.double() for g in subject.gradients(subject.tensors)]
    slope = sum(((g * d).sum() for g, d in zip(gradients, subject.directions, strict=True)), torch.zeros(()))
    # The sum may cancel: it is compared beside what such a sum is as a rule.
    norm = torch.stack([g.norm() for g in gradients]).norm()
    return [jax.numpy.stack([found, float(norm)])], [torch.stack([slope.double(), norm])]


def _second(engine: _Engine) -> _Compared:
    subject, arrays = engine.subject, engine.subject.arrays()
    try:
        expected = subject.gradients(subject.tensors, second=True)
    except RuntimeError as error:
        raise _NothingToCompareError(f"torch itself has no second derivatives here: {_in_one_line(error)}") from error
    tangents = [t2j(d, copy=True) for d in subject.directions]
    product = jax.jit(lambda p, t: jax.jvp(jax.grad(lambda p: engine.loss(p, *arrays)), (p,), (t,))[1])
    return product(engine.variables(arrays), tangents), expected


def _batch(engine: _Engine) -> list[Any]:
    if not any(t.is_floating_point() for t in engine.subject.tensors):
        examples = [engine.subject.tensors] * 3
    else:
        examples = engine.subject.examples()
    return [jax.numpy.stack(column) for column in zip(*map(engine.subject.arrays, examples), strict=True)]


def _examples(engine: _Engine) -> list[list[torch.Tensor]]:
    if not engine.subject.tensors:
        raise _NotApplicableError("it has no arrays among its arguments")
    return engine.subject.examples()


def _vmap(engine: _Engine) -> _Compared:
    rows = [engine.subject.run(example) for example in _examples(engine)]
    found = jax.jit(jax.vmap(lambda *arrays: engine.outputs(engine.variables(arrays), *arrays)))(*_batch(engine))
    return found, [torch.stack(column) for column in zip(*rows, strict=True)]


def _per_example(engine: _Engine) -> _Compared:
    rows = [engine.subject.gradients(example) for example in _examples(engine)]
    gradients = jax.vmap(lambda *arrays: jax.grad(engine.loss)(engine.variables(arrays), *arrays))
    return jax.jit(gradients)(*_batch(engine)), [torch.stack(column) for column in zip(*rows, strict=True)]


def _train(engine: _Engine) -> _Compared:
    subject, module = engine.subject, engine.module
    args, kwargs = subject.fill(subject.arrays())

    def call(params: Any, state: Any, key: Any) -> Any:
        return module.apply(params, state, args, kwargs, rng=key, train=True)

    out, state = jax.jit(call)(engine.params, engine.state, engine.key)
    leaves = [leaf for leaf in jax.tree.leaves(out) if hasattr(leaf, "dtype")]
    if engine.backend != "torch" and module.inferred(args, kwargs, train=True).random:
        again = jax.tree.leaves(jax.jit(call)(engine.params, engine.state, engine.key)[0])
        repeated = [torch.tensor(jax.device_get(x)) for x in again]
        if largest_difference(leaves, repeated) != 0:  # two calls with one key differ
            return leaves, repeated
        raise _NothingToCompareError("random numbers are drawn from JAX's key, and are others than torch's")
    model = copied(subject.model).train()
    with torch.no_grad(), seeded(torch.tensor(jax.random.key_data(engine.key).tolist()), host=True):
        expected = subject.flat(model, [t.clone() for t in subject.tensors])
    buffers = dict(model.named_buffers())
    layout = module.layout.state
    expected += [buffers[flat_name(leaf.slots[0])] for leaf in layout]
    return [*leaves, *(leaf_in(state, leaf) for leaf in layout)], expected


def _export(engine: _Engine) -> _Compared:
    arrays = engine.subject.arrays()
    if engine.backend == "torch":
        raise _NotApplicableError('a program that calls torch cannot be saved; `backend="xla"` makes one that can')
    exported = jax.export.export(jax.jit(engine.outputs))(engine.variables(arrays), *arrays)
    again = jax.export.deserialize(exported.serialize())
    return again.call(engine.variables(arrays), *arrays), engine.subject.outputs


_ROWS: dict[str, Callable[[_Engine], _Compared]] = {
    "eager": _eager,
    "jit": _jit,
    "grad": _grad,
    "jvp": _jvp,
    "second order": _second,
    "vmap": _vmap,
    "per-example gradients": _per_example,
    "train mode": _train,
    "export": _export,
}


_DERIVATIVES = {"grad", "jvp", "second order", "per-example gradients"}


class _NotApplicableError(Exception):
    """There is no such thing for this model or engine."""


class _NothingToCompareError(Exception):
    """It runs, and torch has nothing to compare it with."""


def _check_engine(report: Report, subject: Subject, backend: str, step: Callable[[str], None]) -> None:
    cells = report.works.setdefault(backend, {})
    try:
        engine = _Engine(subject, backend)
    except Pytorch2JaxError as error:
        cells["convert"] = Cell(report_of.REFUSED, reason=_in_one_line(error))
        return
    draws = _draws(engine)
    for name in _ROWS:
        step(f"{backend}: {name}")
        with _noted(report):
            cells[name] = _cell(engine, name, draws=draws and name != "train mode")
        if name == "jit" and all(cell.status == report_of.REFUSED for cell in cells.values()):
            return  # neither way: the rest says the same


def _draws(engine: _Engine) -> bool:
    try:
        return engine.module.inferred(*engine.subject.fill(engine.subject.arrays()), train=False).random
    except Exception:
        return False


def _cell(engine: _Engine, name: str, *, draws: bool) -> Cell:
    row, derives = _ROWS[name], name in _DERIVATIVES
    tolerance = engine.subject.tolerance() * (10 if derives else 1)
    try:
        if derives and not (engine.subject.parameters or engine.subject.floating):
            raise _NotApplicableError("it has no trainable parameters, and no floating arguments")
        found, expected = row(engine)
    except _NotApplicableError as error:
        return Cell(report_of.NOT_APPLICABLE, reason=str(error))
    except _NothingToCompareError as error:
        return Cell(report_of.RAN, reason=str(error))
    except Exception as error:
        return Cell(report_of.REFUSED, reason=_in_one_line(error))
    if draws:
        return Cell(report_of.RAN, reason="random numbers are drawn from JAX's key, and are others than torch's")
    difference = largest_difference(jax.tree.leaves(found), expected)
    agrees = difference <= tolerance  # False for a NaN
    return Cell(report_of.AGREES if agrees else report_of.DIFFERS, difference, tolerance)


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
    lines = [line.strip() for line in str(error).split("\n--------------------")[0].splitlines() if line.strip()]
    text = " ".join(lines[:3]) if lines else type(error).__name__
    quotes_another = re.search(r"(Pytorch2Jax\w*|Error|Exception): ", text)
    return f"{text[:400]} ..." if quotes_another and len(text) >= 400 else text


# -- what it costs ----------------------------------------------------------------------------------------------------


def _measure(report: Report, subject: Subject, step: Callable[[str], None]) -> None:
    """Time both engines beside torch, in turn."""
    arrays = subject.arrays()
    for what in ("forward", "value and gradient"):
        derives = what != "forward"
        if derives and not (subject.parameters or subject.floating):
            continue
        runs: dict[str, Callable[[], Any]] = {"": functools.partial(_torch_run, subject, derives=derives)}
        first: dict[str, float] = {}
        engines: dict[str, _Engine] = {}
        for name in _ENGINES:
            cells = report.works.get(name, {})
            if cells.get("grad" if derives else "jit", Cell("")).status not in _RUNS:
                continue
            step(f"{name}: time of {what}")
            engine = engines[name] = _Engine(subject, name)  # a new one, which has compiled nothing yet
            jitted = jax.jit(jax.value_and_grad(engine.loss) if derives else engine.outputs)
            runs[name] = functools.partial(_jax_run, jitted, engine.variables(arrays), arrays)
            with _noted(report):
                first[name] = _seconds(runs[name])
        step(f"time of {what}")
        times = _rounds(runs)
        report.torch_seconds[what] = statistics.median(times[""])
        for name in first:
            ratios = [t / base for t, base in zip(times[name], times[""], strict=True)]
            cost = Cost(
                what, statistics.median(times[name]), statistics.median(ratios), first[name], _peak(runs[name]),
                _copied(engines[name]) if not derives else None,
            )  # fmt: skip
            report.costs.setdefault(name, []).append(cost)


def _torch_run(subject: Subject, *, derives: bool) -> Any:
    if derives:
        return subject.gradients(subject.tensors)
    with torch.no_grad():
        return subject.flat(subject.model, subject.tensors)


def _jax_run(jitted: Any, variables: list[Any], arrays: list[Any]) -> Any:
    return jax.block_until_ready(jitted(variables, *arrays))


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


def _peak(run: Callable[[], Any]) -> int | None:
    """By how much the memory of the process grows in a call; None where the system does not tell."""
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the peak is what there is now
        before = _memory("VmHWM")
        run()
        return max(0, _memory("VmHWM") - before)
    except (OSError, ValueError, StopIteration):
        return None


def _memory(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


def _copied(engine: _Engine) -> int | None:
    """How many bytes a forward pass copies between the frameworks."""
    if engine.backend != "torch":
        return 0
    try:
        return engine.module.copied_bytes(*engine.subject.fill(engine.subject.arrays()))
    except Exception:
        return None


# -- what to do -------------------------------------------------------------------------------------------------------


def _engines_that_run(report: Report, row: str) -> list[str]:
    return [engine for engine, cells in report.works.items() if cells.get(row, Cell("")).status in _RUNS]


def _advice(report: Report) -> list[str]:
    usable, eager = _engines_that_run(report, "jit"), _engines_that_run(report, "eager")
    if not usable:
        if eager:
            return [f'It runs with `backend="{eager[0]}"` outside of `jax.jit` alone.']
        return ["Neither engine runs it; the reasons are above."]
    advice = []
    costs = {engine: costs[-1] for engine, costs in report.costs.items() if costs and engine in usable}
    if len(usable) == 1:
        advice.append(f'Take `backend="{usable[0]}"`: the other engine does not run this model under `jax.jit`.')
    elif len(costs) == 2:
        best = min(costs, key=lambda engine: costs[engine].ratio)
        other = next(e for e in costs if e != best)
        advice.append(
            f'Take `backend="{best}"`: {costs[best].what} takes {costs[best].ratio:.2f} times as long as in torch, and '
            f"{costs[other].ratio:.2f} times with the other engine."
        )
    torch_cost = costs.get("torch")
    if torch_cost is not None and torch_cost.ratio > _SLOW_RATIO and "OMP_WAIT_POLICY" not in os.environ:
        advice.append("Set the environment variable OMP_WAIT_POLICY=PASSIVE: threads of torch and XLA share the cores.")
    if torch_cost is not None and report.torch_seconds.get("forward", 1) < 1e-3 and "xla" in usable:
        advice.append(
            "It is small: a call into torch costs some 20 µs, so that loops over it (`lax.scan`) are faster with "
            '`backend="xla"`.'
        )
    if report.loops and "xla" in usable:
        advice.append('Batches that torch runs in loops (`jax.vmap`) are one computation with `backend="xla"`.')
    if jax.device_count() > 1 and "torch" in usable:
        advice.append("With several devices, `batch_axes=0` has each run its own rows.")
    if report.found.parameter_bytes > _MANY_BYTES:
        advice.append("`copy=False` converts it without a second copy of its parameters.")
    return advice
