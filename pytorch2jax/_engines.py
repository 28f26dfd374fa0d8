"""The engines that can run a bound function, by the name that `backend=` gives them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pytorch2jax._bound import BoundFunction
from pytorch2jax._errors import ExportError
from pytorch2jax._inference import Spec
from pytorch2jax._internals import trace_state_clean
from pytorch2jax._primitive import torch_call


def run(program: BoundFunction, *arrays: Any) -> list[Any]:
    """Call a program on arrays, by the engine that its user has chosen.

    Args:
        program: the program.
        *arrays: its inputs; the seed first, if it is seeded.
    """
    if program.backend != "torch":
        return _xla().xla_call(program, *arrays)
    if trace_state_clean():
        return torch_call(program, *arrays)
    with jax.named_scope(program.name):  # as `backend="xla"` has it from the name of a jitted function
        return torch_call(program, *arrays)


def bind_symbolic(
    name: str, backend: str, specs: Sequence[Spec], bind: Callable[[list[Any]], BoundFunction]
) -> BoundFunction:
    """The program for sizes that are symbols.

    Args:
        name: the function's name, for messages.
        backend: the engine.
        specs: the inputs.
        bind: gives the program for inputs of fixed sizes.

    Raises:
        ExportError: the engine runs in torch, where sizes are numbers.
        CaptureError: there is no one program for all sizes.
    """
    if backend == "torch":
        raise ExportError(
            f"{name}: expected arrays whose sizes are numbers, because torch runs on them, got symbolic sizes. Convert "
            'with `backend="xla"` to export a program for any size.'
        )
    program: BoundFunction = _xla().bind_symbolic(name, specs, bind)
    return program


def _xla() -> Any:
    # Late, because few need it: the package of rules takes a while to import.
    return importlib.import_module("pytorch2jax.xla")
