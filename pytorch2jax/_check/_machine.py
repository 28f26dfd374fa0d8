"""The machine that a model is checked on: memory, load, random generators, Ctrl-C."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import random
import signal
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
import torch

from pytorch2jax._torch_state import host_generators

_PEAKS = 3  # calls of which the median is taken
_SLACK_BYTES = 1 << 20  # by how much the memory may change while a peak is set back
_SCATTER = 0.5  # of the median: more between the quartiles is not the computation's own

# -- memory ------------------------------------------------------------------------------------------------------------


def peak_bytes(run: Callable[[], Any]) -> int | None:
    """By how much the memory of the process grows in a call at most; None where the system does not tell.

    What was freed before goes back to the system first: a call that takes it again would not grow.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is None or jax.default_backend() != "cpu":
        return None
    gc.collect()
    try:
        return int(statistics.median(_peak(run, trim) for _ in range(_PEAKS)))
    except (OSError, ValueError, StopIteration):
        return None


def _peak(run: Callable[[], Any], trim: Callable[[int], Any]) -> int:
    trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak is what there is now
    before = _memory("VmHWM")
    if before > _memory("VmRSS") + _SLACK_BYTES:
        raise OSError("the system does not set the peak back")
    run()
    return _memory("VmHWM") - before


def _memory(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith(name))


# -- load --------------------------------------------------------------------------------------------------------------


def load_average() -> tuple[float, int]:
    """How many processes want to run (the mean of the last minute; 0 where the system does not tell), and the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return (os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0), cores


def scatter(times: Sequence[float]) -> float:
    """How far the times of one computation are from each other: between their quartiles, relative to the median."""
    if len(times) < 2:
        return 0.0
    first, middle, last = statistics.quantiles(times, n=4, method="inclusive")
    return (last - first) / middle


def why_rough(load: tuple[float, int], scatters: Sequence[float]) -> str:
    """Why times are rough figures, as far as the machine is the reason; empty if they are not.

    Args:
        load: what `load_average` said before the measurements.
        scatters: of each computation that was measured.
    """
    waiting, cores = load
    reasons = [f"load {waiting:.1f} on {cores} core{'s' if cores > 1 else ''}"] if waiting > cores else []
    if (worst := max(scatters, default=0.0)) > _SCATTER:
        reasons.append(f"times of one computation scatter by {worst:.0%}")
    return f"the machine is busy: {', '.join(reasons)}" if reasons else ""


# -- random generators -------------------------------------------------------------------------------------------------


def generators() -> bytes:
    """The states of the global generators of torch, NumPy and Python, to be compared."""
    python, (algorithm, keys, *counters) = host_generators()
    return torch.get_rng_state().numpy().tobytes() + keys.tobytes() + repr((python, algorithm, counters)).encode()


@contextlib.contextmanager
def generators_put_back() -> Iterator[None]:
    """Put the global generators back after the body. Other than `forked_generators`, it keeps no thread waiting."""
    python, numpy = host_generators()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


# -- Ctrl-C ------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def noticed_interrupts() -> Iterator[Callable[[], None]]:
    """A function that raises `KeyboardInterrupt` if Ctrl-C came before and nobody has heard of it.

    Python drops one that comes while the garbage collector calls back, as it does into JAX.
    """
    is_plain = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_plain or threading.current_thread() is not threading.main_thread():
        yield lambda: None
        return
    came = threading.Event()

    def note(number: int, frame: Any) -> None:
        came.set()
        signal.default_int_handler(number, frame)

    def look() -> None:
        if came.is_set():
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield look
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
