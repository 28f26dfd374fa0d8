"""The engines that can run a bound function, by the name that `backend=` gives them."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any

from pytorch2jax._bound import BoundFunction
from pytorch2jax._primitive import torch_call

Engine = Callable[..., list[Any]]


def run(program: BoundFunction, *arrays: Any) -> list[Any]:
    """Call a program on arrays, by the engine that its user has chosen.

    Args:
        program: the program.
        *arrays: its inputs; the seed first, if it is seeded.
    """
    return torch_call(program, *arrays) if program.backend == "torch" else _xla()(program, *arrays)


@functools.cache
def _xla() -> Engine:
    # Late, because few need it: the package of rules takes a while to import.
    engine: Engine = importlib.import_module("pytorch2jax.xla").xla_call
    return engine
