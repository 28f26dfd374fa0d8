"""What torch itself does in each case: the calls that everything else is compared with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.func import functional_call

from benchmarks.bridges import torch_device
from benchmarks.case import Call
from benchmarks.models import Workload

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


def as_it_is(fn: Callable[..., Any]) -> Callable[..., Any]:
    """No compiler: torch's eager mode."""
    return fn


def forward(workload: Workload, compiler: Compiler = as_it_is) -> Call:
    """The forward pass under `no_grad`."""
    device = torch_device()
    model, x = compiler(workload.model(device)), workload.input(device)

    def call() -> torch.Tensor:
        with torch.no_grad():
            return model(x)

    return call


def value_and_grad(workload: Workload, compiler: Compiler = as_it_is) -> Call:
    """The sum of squares of the output and its gradient with respect to all parameters."""
    device = torch_device()
    model, x = workload.model(device), workload.input(device)
    params = list(model.parameters())
    loss_of = compiler(lambda x: model(x).square().sum())

    def call() -> Any:
        loss = loss_of(x)
        return loss, torch.autograd.grad(loss, params)

    return call


def _function_of(workload: Workload) -> tuple[Callable[..., torch.Tensor], dict[str, torch.Tensor], torch.Tensor]:
    device = torch_device()
    model = workload.model(device)
    params = {name: p.detach() for name, p in model.named_parameters()}

    def on_one(params: dict[str, torch.Tensor], row: torch.Tensor) -> torch.Tensor:
        return functional_call(model, params, (row,))

    return on_one, params, workload.input(device)


def batched(workload: Workload) -> Call:
    """`torch.vmap` over the rows of the input."""
    on_one, params, x = _function_of(workload)
    fn = torch.vmap(on_one, in_dims=(None, 0))

    def call() -> torch.Tensor:
        with torch.no_grad():
            return fn(params, x)

    return call


def per_example_grads(workload: Workload) -> Call:
    """`torch.func.vmap` of `torch.func.grad`, with respect to all parameters."""
    on_one, params, x = _function_of(workload)
    grad = torch.func.grad(lambda params, row: on_one(params, row).square().sum())
    fn = torch.func.vmap(grad, in_dims=(None, 0))
    return lambda: next(iter(fn(params, x).values()))


def training_step(workload: Workload) -> Call:
    """Forward, backward and a step of Adam."""
    device = torch_device()
    model, x = workload.model(device), workload.input(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)

    def call() -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    return call
