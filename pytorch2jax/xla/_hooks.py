"""Hooks on gradients: JAX computes these without torch, and nobody would call them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from pytorch2jax._errors import CaptureError
from pytorch2jax.xla._internals import has_backward_hooks

HOOKS = frozenset({torch.Tensor.register_hook, torch.Tensor.register_post_accumulate_grad_hook})
"""Functions that register one on a tensor."""


def refused(name: str, where: str) -> CaptureError:
    """The error for a hook."""
    return CaptureError(
        f"{name}: {where}: expected gradients without hooks, which JAX computes without torch, got a hook on a "
        'backward pass. Remove it, write it as a torch.autograd.Function, or use `backend="torch"`, which calls it.'
    )


@contextlib.contextmanager
def refusing_module_hooks(name: str) -> Iterator[None]:
    """Within this context, this thread's calls of modules with backward hooks raise a `CaptureError`."""
    thread = threading.get_ident()

    def check(module: torch.nn.Module, inputs: Any) -> None:
        if threading.get_ident() == thread and has_backward_hooks(module):
            raise refused(name, type(module).__qualname__)

    handle = register_module_forward_pre_hook(check)
    try:
        yield
    finally:
        handle.remove()
