"""No JAX inside of a torch function that JAX runs.

XLA waits for the torch function that it calls. If that calls JAX again on the same devices, JAX may wait for XLA, and
neither ever ends. Whether it does depends on the number of threads and devices, so that it is refused always: while a
torch function is traced or runs, a trace of our own is JAX's current one in that thread, and refuses all operations.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from pytorch2jax._errors import NestingError
from pytorch2jax._internals import RefusingTrace, current_trace, tracing_with

_P = ParamSpec("_P")
_R = TypeVar("_R")


def refusal(name: str) -> RefusingTrace:
    """The trace for a torch function of this name, to be passed to `refusing_jax`."""
    return RefusingTrace(functools.partial(_error, name))


def _error(name: str, operation: str) -> NestingError:
    return NestingError(
        f"{name}: expected a torch function that does not call JAX, and it called `{operation}`. JAX runs the torch "
        "function, and could wait for itself for ever. Compute what is JAX's before the call and pass it as an "
        "argument, use torch's operations, or turn the parts into JAX functions one by one and combine these in JAX."
    )


def refusing_jax(trace: RefusingTrace) -> contextlib.AbstractContextManager[None]:
    """Around a torch function that JAX runs: operations of JAX raise `NestingError` in this thread."""
    context: contextlib.AbstractContextManager[None] = tracing_with(trace)
    return context


def without_jax(name: str, fn: Callable[_P, _R]) -> Callable[_P, _R]:
    """The torch function `fn`, called `name` in messages, inside of which operations of JAX raise `NestingError`."""
    trace = refusal(name)

    def refusing(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        with refusing_jax(trace):
            return fn(*args, **kwargs)

    return refusing


def check_not_inside_torch(operation: str) -> None:
    """Raise `NestingError` in a torch function that JAX runs."""
    trace = current_trace()
    if isinstance(trace, RefusingTrace):
        raise trace.error(operation)
