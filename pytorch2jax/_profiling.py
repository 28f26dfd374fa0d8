"""The names of torch calls in JAX's profiler and in torch's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import jax
import torch

_jax_profiler_runs = jax.profiler.TraceAnnotation.is_enabled
_torch_profiler_runs = torch.autograd._profiler_enabled


def is_profiling() -> bool:
    """Whether a profiler of JAX's or of torch's is recording this thread."""
    return _jax_profiler_runs() or _torch_profiler_runs()


@contextlib.contextmanager
def profiled(name: str) -> Iterator[None]:
    """Show what runs inside as one block of this name; in torch's profiler it has torch's operators inside."""
    with jax.profiler.TraceAnnotation(name), torch.profiler.record_function(name):
        yield
