"""Torch's ambient state: captured where JAX traces, set again where XLA calls back.

Autocast is thread-local, so that a context manager around the traced call would not reach XLA's thread; the
default dtype and the deterministic flag are global and may have changed by then. What `torch.vmap` does without a
batching rule is global in torch, so that concurrent users are counted.
"""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from pytorch2jax._internals import (
    is_any_autocast_enabled,
    is_deterministic,
    set_vmap_fallback,
)

_DEVICE_TYPES = ("cpu", "cuda")


class TorchState(NamedTuple):
    """What surrounds a torch call and changes its result, apart from its arguments."""

    autocast: tuple[tuple[bool, torch.dtype], ...]
    default_dtype: torch.dtype
    deterministic: tuple[bool, bool]

    def is_current(self) -> bool:
        """Whether the calling thread has this state already, and keeps it."""
        if _GLOBALS.may_change:
            return False
        return self._is_here()

    def _is_here(self) -> bool:
        if is_any_autocast_enabled() or self.autocast[0][0] or self.autocast[1][0]:
            for device_type, (enabled, dtype) in zip(_DEVICE_TYPES, self.autocast, strict=True):
                if torch.is_autocast_enabled(device_type) is not enabled:
                    return False
                if enabled and torch.get_autocast_dtype(device_type) is not dtype:
                    return False
        return torch.get_default_dtype() is self.default_dtype and (
            self.deterministic == _deterministic() if is_deterministic() else not self.deterministic[0]
        )

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Run the body under this state."""
        with contextlib.ExitStack() as stack:
            for device_type, (enabled, dtype) in zip(_DEVICE_TYPES, self.autocast, strict=True):
                stack.enter_context(_autocast(device_type, enabled, dtype))
            stack.enter_context(_GLOBALS.applied(self.default_dtype, self.deterministic))
            yield


def capture_torch_state() -> TorchState:
    """The ambient state of the calling thread."""
    global _last
    state = _last
    if state is None or _GLOBALS.may_change or not state._is_here():
        _last = state = _captured()
    return state


_last: TorchState | None = None  # most often it is what it was


def _captured() -> TorchState:
    return TorchState(
        tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in _DEVICE_TYPES),
        *_GLOBALS.ambient(),
    )


def _deterministic() -> tuple[bool, bool]:
    return torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()


class _Globals:
    """Torch's settings for the whole process that calls need at other values than those that are there.

    Calls that need the same values run at once. Others wait for these, also those that need what is there outside of
    calls. When the last one ends, what was there before comes back, unless somebody else has set something since.

    may_change: whether there ever was such a call.
    """

    def __init__(self) -> None:
        self.may_change = False
        self._changed = threading.Condition()
        self._threads: list[int] = []  # one for each call
        self._wanted: tuple[Any, Any] | None = None
        self._before: tuple[Any, Any] = (None, None)

    @contextlib.contextmanager
    def applied(self, default_dtype: torch.dtype, deterministic: tuple[bool, bool]) -> Iterator[None]:
        """Run the body under these settings."""
        wanted, thread = (default_dtype, deterministic), threading.get_ident()
        with self._changed:
            if self._wanted is None and _globals() == wanted and not self.may_change:
                nested, changes = None, False
            else:
                self.may_change = True
                self._changed.wait_for(lambda: self._wanted in (None, wanted) or thread in self._threads)
                nested, changes = self._enter(wanted), True
                self._threads.append(thread)
        try:
            yield
        finally:
            if changes:
                with self._changed:
                    self._threads.remove(thread)
                    self._leave(wanted, nested)
                    self._changed.notify_all()

    def ambient(self) -> tuple[Any, Any]:
        """The settings outside of other threads' calls."""
        with self._changed:
            here, wanted = _globals(), self._wanted
            if wanted is None or threading.get_ident() in self._threads:
                return here
            dtype, deterministic = (b if h == w else h for h, w, b in zip(here, wanted, self._before, strict=True))
            return dtype, deterministic

    def _enter(self, wanted: tuple[Any, Any]) -> tuple[Any, Any] | None:
        """Set them; returns those of a call of this thread in which this one is."""
        if self._wanted == wanted:
            return None
        nested, here = self._wanted, _globals()
        if nested is None:
            self._before = here
        _set_globals(here, wanted)
        self._wanted = wanted
        return nested

    def _leave(self, wanted: tuple[Any, Any], nested: tuple[Any, Any] | None) -> None:
        if nested is None and self._threads:
            return
        here, back = _globals(), self._before if nested is None else nested
        _set_globals(here, tuple(b if h == w else h for h, w, b in zip(here, wanted, back, strict=True)))
        self._wanted = nested


_GLOBALS = _Globals()


def _globals() -> tuple[Any, Any]:
    return torch.get_default_dtype(), _deterministic()


def _set_globals(here: tuple[Any, ...], wanted: tuple[Any, ...]) -> None:
    if here[0] is not wanted[0]:
        torch.set_default_dtype(wanted[0])
    if here[1] != wanted[1]:
        enabled, warn_only = wanted[1]
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)


def _autocast(device_type: str, enabled: bool, dtype: torch.dtype) -> Any:
    if device_type == "cuda" and not torch.cuda.is_available():
        return contextlib.nullcontext()  # torch warns when it is asked to
    return torch.autocast(device_type, enabled=enabled, dtype=dtype)


_SMALLEST = 5e-324


def flushes_subnormals() -> bool:
    """Whether the calling thread takes subnormal numbers for zero, as XLA's threads do, and torch's do not."""
    return _SMALLEST * 1.0 == 0.0


set_flushing: Callable[[bool], bool] = torch.set_flush_denormal
"""Has the calling thread do so, or not; and the threads that it starts from then on."""


# Torch's default generators are global: two threads that seed and draw at once would mix their numbers.
GENERATORS = threading.RLock()


@contextlib.contextmanager
def forked_generators(devices: Sequence[int] = (), *, host: bool = False) -> Iterator[None]:
    """Put torch's generators (and with `host` those of NumPy and Python) back after the body.

    One thread at a time: what draws random numbers, or might, does not run in parallel.
    """
    with GENERATORS, torch.random.fork_rng(devices):
        before = host_generators() if host else None
        try:
            yield
        finally:
            if before is not None:
                random.setstate(before[0])
                np.random.set_state(before[1])


def host_generators() -> tuple[Any, Any]:
    """The states of Python's and NumPy's global generators."""
    return random.getstate(), np.random.get_state()


class _SharedFlags:
    """Global torch flags that several threads may want changed at once: first in sets, last out restores."""

    def __init__(self, set_all: Callable[[Any], Any], values: Any) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._set_all = set_all
        self._values = values
        self._before: Any = None

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        with self._lock:
            if self._users == 0:
                self._before = self._set_all(self._values)
            self._users += 1
        try:
            yield
        finally:
            with self._lock:
                self._users -= 1
                if self._users == 0:
                    self._set_all(self._before)


_NO_FALLBACK = _SharedFlags(set_vmap_fallback, False)


def vmap_fallback(allowed: bool) -> contextlib.AbstractContextManager[None]:
    """Whether `torch.vmap` may run an operator that has no batching rule once for each example."""
    return contextlib.nullcontext() if allowed else _NO_FALLBACK.changed()
