"""What to do about what was found."""

from __future__ import annotations

import os

import jax

from pytorch2jax._check._report import DIFFERS, RUNS, Cell, Report

_SLOW_RATIO = 1.5
_MANY_BYTES = 10**8


def _engines_that_run(report: Report, row: str) -> list[str]:
    return [engine for engine, cells in report.works.items() if cells.get(row, Cell("")).status in RUNS]


def _rows_that_differ(report: Report) -> dict[str, list[str]]:
    rows = {
        engine: [row for row, cell in cells.items() if cell.status == DIFFERS] for engine, cells in report.works.items()
    }
    return {engine: names for engine, names in rows.items() if names}


def advice(report: Report) -> list[str]:
    """Which engine to take, and what would make the model faster."""
    usable, wrong = _engines_that_run(report, "jit"), _rows_that_differ(report)
    if not usable:
        if wrong:
            return ["It runs, and gives other values than torch, which should not be: please report it."]
        if eager := _engines_that_run(report, "eager"):
            return [f'It runs with `backend="{eager[0]}"` outside of `jax.jit` alone.']
        return ["Neither engine runs it; the reasons are above."]
    lines: list[str] = []
    if report.found.made:
        lines.append("Call the model once in torch before you convert it: its first call makes parameters.")
    costs = {engine: costs[-1] for engine, costs in report.costs.items() if costs and engine in usable}
    right = [engine for engine in usable if engine not in wrong]
    for engine, rows in wrong.items():
        lines.append(f'Take care with `backend="{engine}"`: {", ".join(rows)} should not differ. Please report it.')
    if len(usable) == 1:
        lines.append(f'Take `backend="{usable[0]}"`: the other engine does not run this model under `jax.jit`.')
    elif len(right) == 1:
        lines.append(f'Take `backend="{right[0]}"`: the other engine differs from torch.')
    elif len(costs) == 2:
        best = min(costs, key=lambda engine: costs[engine].ratio)
        other = next(e for e in costs if e != best)
        lines.append(
            f'Take `backend="{best}"`: {costs[best].what} takes {costs[best].short_ratio()} times as long as in torch, '
            f"and {costs[other].short_ratio()} times with the other engine."
        )
    torch_cost = costs.get("torch")
    if torch_cost is not None and torch_cost.ratio > _SLOW_RATIO and "OMP_WAIT_POLICY" not in os.environ:
        lines.append("Set the environment variable OMP_WAIT_POLICY=PASSIVE: threads of torch and XLA share the cores.")
    if torch_cost is not None and report.torch_seconds.get("forward", 1) < 1e-3 and "xla" in usable:
        lines.append(
            "It is small: a call into torch costs some 20 µs, so that loops over it (`lax.scan`) are faster with "
            '`backend="xla"`.'
        )
    if report.loops and "xla" in usable and not report.bridged:
        lines.append('Batches that torch runs in loops (`jax.vmap`) are one computation with `backend="xla"`.')
    if jax.device_count() > 1 and "torch" in usable:
        lines.append("With several devices, `batch_axes=0` has each run its own rows.")
    if report.found.parameter_bytes > _MANY_BYTES:
        lines.append("`copy=False` converts it without a second copy of its parameters.")
    return lines
