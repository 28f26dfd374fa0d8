"""Models: the forward pass, and the value and gradient."""

from __future__ import annotations

from functools import partial

import torch

from benchmarks import jax_runs, torch_runs
from benchmarks.case import CALLBACK, COMPILED, FLAX, OURS, OURS_XLA, TORCH, WRAP, Case
from benchmarks.models import MODELS

ROWS = {workload.name: workload for workload in MODELS}
BRIDGES = (OURS, OURS_XLA, WRAP, CALLBACK, FLAX)

FORWARD = Case(
    "forward",
    "Forward pass",
    "ms",
    "Models in eval mode; torch under `no_grad`, JAX inside `jax.jit`.",
    ROWS,
    {
        TORCH: torch_runs.forward,
        COMPILED: partial(torch_runs.forward, compiler=torch.compile),
        **{name: partial(jax_runs.forward, name) for name in BRIDGES},
    },
)
VALUE_AND_GRAD = Case(
    "value-and-grad",
    "Value and gradient",
    "ms",
    "The sum of squares of the output and its gradient with respect to all parameters, in eval mode: "
    "`torch.autograd.grad`, and `jax.value_and_grad` inside `jax.jit`.",
    ROWS,
    {
        TORCH: torch_runs.value_and_grad,
        COMPILED: partial(torch_runs.value_and_grad, compiler=torch.compile),
        **{name: partial(jax_runs.value_and_grad, name) for name in BRIDGES},
    },
)
