"""What one jitted call costs against the number of its arguments, beside XLA's own add in the same run.

    python benchmarks/call_overhead.py

Writes `results/call_overhead.json` and `results/call_overhead.md`. Times are medians over interleaved rounds; on
a shared machine only differences and ratios within one run mean anything.
"""

from __future__ import annotations

import json
import pathlib
import platform
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import torch

from pytorch2jax import torch2jax

RESULTS = pathlib.Path(__file__).parent / "results"
ARGUMENTS = (1, 10, 100, 300)
ROUNDS = 15
CALLS = 200


def add_all(*xs: Any) -> Any:
    """The first argument plus one; the others only have to be passed."""
    return xs[0] + 1


def time_one_round(call: Callable[..., Any], args: list[Any]) -> float:
    """Microseconds a call."""
    start = time.perf_counter()
    for _ in range(CALLS):
        out = call(*args)
    jax.block_until_ready(out)
    return (time.perf_counter() - start) / CALLS * 1e6


def measure() -> list[dict[str, float]]:
    """Median microseconds of each kind of call for each number of arguments."""
    rows = []
    for n in ARGUMENTS:
        arrays = [jnp.full(10, float(i)) for i in range(n)]
        tensors = [torch.full((10,), float(i)) for i in range(n)]
        wrapped = torch2jax(add_all)
        calls = {
            "torch": (add_all, tensors),
            "xla": (jax.jit(add_all), arrays),
            "jitted": (jax.jit(wrapped), arrays),
            "eager": (wrapped, arrays),
        }
        for call, args in calls.values():
            time_one_round(call, args)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(ROUNDS):
            for name, (call, args) in calls.items():
                times[name].append(time_one_round(call, args))
        rows.append({"arguments": n, **{name: statistics.median(t) for name, t in times.items()}})
    return rows


def as_table(rows: list[dict[str, float]]) -> str:
    """The results as Markdown."""
    lines = [
        "| arguments (10 floats each) | torch, µs | XLA, µs | jitted call, µs | over XLA, µs | eager call, µs |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['arguments']} | {r['torch']:.1f} | {r['xla']:.1f} | {r['jitted']:.1f} "
        f"| {r['jitted'] - r['xla']:.1f} | {r['eager']:.1f} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print and write the results."""
    rows = measure()
    RESULTS.mkdir(exist_ok=True)
    machine = {"cpu": platform.machine(), "cores": torch.get_num_threads(), "jax": jax.__version__}
    report = {"machine": {**machine, "torch": torch.__version__, "device": jax.default_backend()}, "rows": rows}
    (RESULTS / "call_overhead.json").write_text(json.dumps(report, indent=2) + "\n")
    (RESULTS / "call_overhead.md").write_text(as_table(rows))
    print(as_table(rows))


if __name__ == "__main__":
    main()
