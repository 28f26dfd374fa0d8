"""Timing a call, and summarising the times of several rounds."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import torch

from benchmarks.case import Call


class Spread(NamedTuple):
    """A median and the quartiles around it."""

    median: float
    low: float
    high: float


def spread(samples: Sequence[float]) -> Spread:
    """Median and quartiles of one or more samples."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0])
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Spread(median, low, high)


def paired_ratio(samples: Sequence[float | None], reference: Sequence[float | None]) -> Spread | None:
    """The spread of the ratios of two competitors, each ratio within one round; None where no round has both."""
    ratios = [a / b for a, b in zip(samples, reference, strict=False) if a is not None and b]
    return spread(ratios) if ratios else None


def first_array(out: Any) -> Any:
    """The first leaf of what a call returned."""
    while isinstance(out, tuple | list) and out:
        out = out[0]
    return out


def wait_for(out: Any) -> None:
    """Wait until a call has finished. The outputs of one XLA program become ready together: one is enough."""
    first = first_array(out)
    if hasattr(first, "block_until_ready"):
        first.block_until_ready()
    elif not isinstance(first, torch.Tensor):
        jax.block_until_ready(out)


def time_calls(call: Call, count: int, device: str) -> float:
    """Seconds a call.

    On the CPU every call is waited for: JAX would otherwise run independent ones at the same time. On a GPU, where
    work is queued, only the last one is, as in a training loop.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            out = call()
        wait_for(out)
        torch.cuda.synchronize()
    elif count > 1 and isinstance(first_array(call()), torch.Tensor):
        start = time.perf_counter()
        for _ in range(count):  # asking whether there is something to wait for would take as long as a small call
            call()
    else:
        start = time.perf_counter()
        for _ in range(count):
            wait_for(call())
    return (time.perf_counter() - start) / count


def warm_up(call: Call, seconds: float, device: str) -> float:
    """Call until it has been called twice and that long; returns about how many seconds one call takes."""
    wait_for(call())
    start = time.perf_counter()
    per_call = time_calls(call, 1, device)
    while time.perf_counter() - start < seconds:
        per_call = min(per_call, time_calls(call, 1, device))
    return per_call
