"""A step of training, of the whole model or of a head behind a frozen extractor."""

from __future__ import annotations

from functools import partial

from benchmarks import jax_runs, torch_runs
from benchmarks.case import FLAX, OURS, OURS_XLA, TORCH, WRAP, Case
from benchmarks.models import ENCODER

BRIDGES = (OURS, OURS_XLA, WRAP, FLAX)
TORCH_AND_HEAD = "torch, then the head in JAX"

FROZEN = Case(
    "frozen",
    "A frozen extractor with a trainable JAX head",
    "ms",
    "The gradient with respect to a linear head alone. The reference is torch under `no_grad`, whose output goes, "
    "without a copy, to the jitted value and gradient of the head.",
    {ENCODER.name: ENCODER},
    {TORCH_AND_HEAD: jax_runs.torch_and_head, **{name: partial(jax_runs.frozen, name) for name in BRIDGES}},
    reference=TORCH_AND_HEAD,
)
TRAINING = Case(
    "training",
    "A step of training with Adam",
    "ms",
    "Forward, backward and update: `torch.optim.Adam`, and `optax.adam` inside one `jax.jit` with donated state.",
    {ENCODER.name: ENCODER},
    {TORCH: torch_runs.training_step, **{name: partial(jax_runs.training_step, name) for name in BRIDGES}},
)
