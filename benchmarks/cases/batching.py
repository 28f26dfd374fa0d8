"""`vmap` over 64 rows, and gradients for each of them."""

from __future__ import annotations

from functools import partial

from benchmarks import jax_runs, torch_runs
from benchmarks.case import FLAX, OURS, OURS_XLA, TORCH, WRAP, Case
from benchmarks.models import CONV_NET, MLP_64

ROWS = {workload.name: workload for workload in (MLP_64, CONV_NET)}
BRIDGES = (OURS, OURS_XLA, WRAP, FLAX)

VMAP = Case(
    "vmap",
    "`vmap` of 64",
    "ms",
    "A model of one example under `jax.vmap`, jitted, against `torch.vmap`.",
    ROWS,
    {TORCH: torch_runs.batched, **{name: partial(jax_runs.batched, name) for name in BRIDGES}},
)
PER_EXAMPLE_GRADS = Case(
    "per-example-grads",
    "Gradients for each of 64 examples",
    "ms",
    "`jax.vmap` of `jax.grad` with respect to all parameters, jitted, against `torch.func.vmap` of `torch.func.grad`.",
    ROWS,
    {TORCH: torch_runs.per_example_grads, **{name: partial(jax_runs.per_example_grads, name) for name in BRIDGES}},
)
