"""A process that checks operators, told by its parent which, one at a time.

    python -m conformance.worker COUNT [CHECK ...]

Its first line of JSON has the names of all operators. It then reads names as lines and answers each with a line of
JSON: the outcomes, and how long it took. What libraries print
goes to standard error.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any

import jax
import torch

from conformance import samples
from conformance.checks import CHECKS, DERIVATIVES, IN_MANY_WAYS, TWICE
from conformance.compare import WrongError
from conformance.converted import eagerly
from conformance.exceptions import BACKEND, skipped
from conformance.families import SEEN
from conformance.oracle import TorchCannotError
from pytorch2jax import BridgedWarning, Pytorch2JaxError, _errors as errors

_NO_REFUSALS = (errors.TorchCallError, errors.InferenceError)
"""Errors that tell of what torch could not do, where it can."""

_BY_NAME = re.compile(rf"raised ({'|'.join(name for name in dir(errors) if name.endswith('Error'))}): (.*)")

_BRIDGED = re.compile(r"\b\w+\.\w+\.\w+\b(?=[,.])")


@dataclasses.dataclass
class Outcome:
    """How the samples of one operator fared in one check with one dtype.

    Attributes:
        operator, check, dtype: which.
        passed, refused, failed: how many samples: JAX has what torch has; a clear error of the library's own; anything
            else.
        message: of the first failure, else of the first refusal.
    """

    operator: str
    check: str
    dtype: str
    passed: int = 0
    refused: int = 0
    failed: int = 0
    message: str = ""


def check_operator(name: str, count: int, checks: Collection[str] = tuple(CHECKS)) -> list[Outcome]:
    """Check one operator.

    Args:
        name: of the operator.
        count: how many samples for each check and dtype.
        checks: which of the checks.

    Returns:
        The outcomes of what torch itself can do.
    """
    op = samples.OPERATORS[name]
    outcomes = []
    take = functools.cache(functools.partial(_calls, op, count))
    for check, (function, dtypes) in CHECKS.items():
        for dtype in dtypes:
            if check not in checks or not _has(op, check, dtype) or skipped(name, check, _short(dtype)):
                continue
            outcome = Outcome(name, check, _short(dtype))
            calls = take(dtype, _kind(check))
            for number, call in enumerate(calls[:1] if check in TWICE and BACKEND == "xla" else calls):
                for way in (eagerly, jax.jit) if number == 0 and check not in IN_MANY_WAYS else (eagerly,):
                    _count(outcome, functools.partial(function, op, call, way), call)
            if outcome.passed or outcome.refused or outcome.failed:
                outcomes.append(outcome)
    return outcomes


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _has(op: Any, check: str, dtype: torch.dtype) -> bool:
    """Whether torch has this for an operator."""
    supported = op.supported_dtypes("cpu")
    if check == "pairs of dtypes":
        return True  # what torch does not have is of interest as well
    if check in ("vmap", "vmap twice") and dtype is not torch.float64 and torch.float64 in supported:
        return False
    if check in DERIVATIVES:
        second = check not in ("second order", "vmap of hessian") or op.supports_gradgrad
        return bool(op.supports_autograd and second and dtype in op.supported_backward_dtypes("cpu"))
    return dtype in supported


def _kind(check: str) -> str:
    """Which samples a check takes."""
    return "pairs" if check == "pairs of dtypes" else "derivatives" if check in DERIVATIVES else "values"


def _calls(op: Any, count: int, dtype: torch.dtype, kind: str) -> list[samples.Call]:
    try:
        if kind == "pairs":
            return samples.pairs(op, dtype, 1)
        calls = samples.calls(op, dtype, count, derivatives=kind == "derivatives")
    except Exception:  # torch cannot make its own samples, which need more than is here
        return []
    return [call for call in calls if call.active or kind != "derivatives"]


def _count(outcome: Outcome, function: Callable[[], None], call: samples.Call) -> None:
    torch.random.default_generator.manual_seed(0)
    try:
        function()
    except TorchCannotError:
        return
    except Exception as error:
        refusal = None if isinstance(error, WrongError) else refusal_in(error)
        if refusal is None:
            outcome.failed += 1
        else:
            outcome.refused += 1
        if (refusal is None and outcome.failed == 1) or not outcome.message:
            outcome.message = f"{refusal or describe(error)} [{call.describe()}]"
        return
    outcome.passed += 1


def refusal_in(error: Exception) -> str | None:
    """The library's own error, in words, if that is what it is."""
    if isinstance(error, Pytorch2JaxError):
        return None if isinstance(error, _NO_REFUSALS) else describe(error)
    found = _BY_NAME.search(str(error))
    if found is None or found[1] in {kind.__name__ for kind in _NO_REFUSALS}:
        return None
    return f"{found[1]}: {found[2]}"[:400]


def describe(error: Exception) -> str:
    """One line about an exception."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:400]


def main() -> None:
    """Serve standard input, and keep standard output for the answers."""
    warnings.simplefilter("ignore")
    jax.config.update("jax_enable_x64", True)
    torch.set_num_threads(1)
    count, checks = int(sys.argv[1]), sys.argv[2:] or list(CHECKS)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    print(json.dumps({"operators": list(samples.OPERATORS)}), file=answers, flush=True)
    for line in sys.stdin:
        start = time.perf_counter()
        SEEN.begin()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", BridgedWarning)
            outcomes = check_operator(line.strip(), count, checks)
        answer = {"outcomes": list(map(dataclasses.asdict, outcomes)), "bridged": bridged_in(caught)}
        answer |= {"families": sorted(SEEN.families), "error": float(f"{SEEN.error:.2g}")}
        print(json.dumps({**answer, "seconds": round(time.perf_counter() - start, 2)}), file=answers, flush=True)


def bridged_in(caught: list[warnings.WarningMessage]) -> list[str]:
    """The operators that ran in torch although another engine was asked for."""
    texts = [str(w.message) for w in caught if issubclass(w.category, BridgedWarning)]
    return sorted({name for text in texts for name in _BRIDGED.findall(text)})


if __name__ == "__main__":
    main()
