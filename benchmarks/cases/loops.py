"""A recurrent cell of torch in `lax.scan`."""

from __future__ import annotations

from typing import Any

import jax
import torch
from torch.func import functional_call

from benchmarks.bridges import to_jax, torch_device
from benchmarks.case import FLAX, OURS, TORCH, WRAP, Call, Case
from benchmarks.jax_runs import scanned

STEPS, BATCH, WIDTH = 100, 8, 64


def cell_and_inputs() -> tuple[torch.nn.RNNCell, torch.Tensor, torch.Tensor]:
    """The cell, the inputs of all steps, and the first hidden state."""
    torch.manual_seed(0)
    device = torch_device()
    cell = torch.nn.RNNCell(WIDTH, WIDTH).to(device)
    return cell, torch.randn(STEPS, BATCH, WIDTH, device=device), torch.zeros(BATCH, WIDTH, device=device)


def torch_loop(job: str) -> Call:
    """A Python loop over the steps."""
    cell, xs, first = cell_and_inputs()
    params = list(cell.parameters())

    def loss() -> torch.Tensor:
        h = first
        for x in xs:
            h = cell(x, h)
        return h.square().sum()

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return loss()

    def gradient() -> Any:
        value = loss()
        return value, torch.autograd.grad(value, params)

    return {"forward": forward, "value and gradient": gradient}[job]


def ours(job: str) -> Call:
    """The converted cell."""
    from pytorch2jax import convert_pytnn_to_jax

    cell, xs, h = cell_and_inputs()
    apply, params = convert_pytnn_to_jax(cell)
    return scanned(apply, params, to_jax(xs), to_jax(h))[job]


def wrap(job: str) -> Call:
    """The cell through `wrap-torch2jax`."""
    from wrap_torch2jax import torch2jax

    cell, xs, h = cell_and_inputs()
    named = {name: parameter.detach() for name, parameter in cell.named_parameters()}
    step = torch2jax(lambda p, x, h: functional_call(cell, p, (x, h)), named, xs[0], h, depth=1)
    return scanned(step, jax.tree.map(to_jax, named), to_jax(xs), to_jax(h))[job]


def flax(job: str) -> Call:
    """The cell in Flax."""
    from benchmarks.flax_models import RNNCell

    _, xs, h = cell_and_inputs()
    cell = RNNCell(WIDTH)
    x, first = to_jax(xs), to_jax(h)
    params = cell.init(jax.random.key(0), x[0], first)
    return scanned(cell.apply, params, x, first)[job]


SCAN = Case(
    "scan",
    f"`lax.scan` of {STEPS} steps",
    "ms",
    f"A torch `RNNCell` of width {WIDTH}, batch {BATCH}, in `lax.scan`, jitted, against a Python loop in torch.",
    {job: job for job in ("forward", "value and gradient")},
    {TORCH: torch_loop, OURS: ours, WRAP: wrap, FLAX: flax},
)
