"""Processes that were forked from one in which JAX has threads: JAX hangs there, so that nothing of it is called."""

from __future__ import annotations

import os
from collections.abc import Callable

from pytorch2jax._errors import ForkError
from pytorch2jax._internals import has_backends

_forked = False  # from a process in which JAX has threads


def check_process(call: Callable[[], str]) -> None:
    """Raise in a process that was forked from one in which JAX has threads; `call` says which call it was.

    Raises:
        ForkError: it was.
    """
    if _forked:
        raise ForkError(
            f"{call()}: expected a process in which JAX can run, got one that was forked when JAX was running "
            "already, where it would hang. Start processes with the method 'spawn' or 'forkserver' "
            "(`multiprocessing.set_start_method`, `DataLoader(multiprocessing_context=)`), or fork before the first "
            "use of JAX."
        )


def _after_fork() -> None:
    global _forked
    _forked = _forked or has_backends()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
