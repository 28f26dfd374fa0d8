"""A workload as a JAX function, in each of the ways that are compared.

A bridge takes a workload and returns `(apply, params, x)`, with `apply(params, x)` in JAX. All that is measured from
JAX (gradients, `vmap`, training) is written once on top of that, in `jax_runs`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.func import functional_call

from benchmarks.case import CALLBACK, FLAX, OURS, OURS_XLA, WRAP, LeftOutError
from benchmarks.models import Workload


class Bridged(NamedTuple):
    """A model in JAX."""

    apply: Callable[[Any, Any], Any]
    params: Any
    x: jax.Array


Bridge = Callable[[Workload, bool], Bridged]
"""Its second argument says that `apply` is to be called on one row of `x` at a time, under `jax.vmap`."""


def torch_device() -> str:
    """Torch's name for JAX's default device, which the parent has found out: asking JAX would start its threads."""
    return os.environ.get("BENCHMARK_DEVICE", "cpu")


def to_jax(tensor: torch.Tensor) -> jax.Array:
    """A copy of a tensor, on JAX's default device."""
    return jnp.array(tensor.detach().cpu().numpy())


def ours(workload: Workload, by_row: bool) -> Bridged:
    """This library."""
    from pytorch2jax import convert_pytnn_to_jax

    device = torch_device()
    apply, params = convert_pytnn_to_jax(workload.model(device))
    return Bridged(apply, params, to_jax(workload.input(device)))


def ours_xla(workload: Workload, by_row: bool) -> Bridged:
    """This library's other engine: the model translated to JAX operations."""
    from pytorch2jax import convert_pytnn_to_jax

    apply, params = convert_pytnn_to_jax(workload.model("cpu"), backend="xla")
    return Bridged(apply, params, to_jax(workload.input("cpu")))


def wrap(workload: Workload, by_row: bool) -> Bridged:
    """`wrap-torch2jax`, which needs the parameters as an argument and an example of each."""
    from wrap_torch2jax import torch2jax

    device = torch_device()
    model, x = workload.model(device), workload.input(device)
    named = {name: parameter.detach() for name, parameter in model.named_parameters()}
    apply = torch2jax(lambda p, x: functional_call(model, p, (x,)), named, x[0] if by_row else x, depth=1)
    return Bridged(apply, jax.tree.map(to_jax, named), to_jax(x))


def callback(workload: Workload, by_row: bool) -> Bridged:
    """`jax.pure_callback` in both directions, joined by a `jax.custom_vjp`, as one writes it by hand."""
    if torch_device() != "cpu":
        raise LeftOutError("pure_callback goes through the host's memory; it is measured on the CPU only")
    if by_row:
        raise LeftOutError("a pure_callback under vmap is a loop over its rows")
    model, x = workload.model("cpu"), workload.input("cpu")
    params = {name: parameter.detach() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        out = model(x)
    out_struct = jax.ShapeDtypeStruct(tuple(out.shape), jnp.float32)
    structs = {name: jax.ShapeDtypeStruct(tuple(p.shape), jnp.float32) for name, p in params.items()}

    def tensor(array: Any) -> torch.Tensor:
        found = torch.from_numpy(np.asarray(array))
        return found if found.is_floating_point() else found.long()

    def forward(p: Any, x: Any) -> Any:
        with torch.no_grad():
            return functional_call(model, jax.tree.map(tensor, p), (tensor(x),)).numpy()

    def backward(p: Any, x: Any, cotangent: Any) -> Any:
        leaves = {name: tensor(value).requires_grad_() for name, value in p.items()}
        out = functional_call(model, leaves, (tensor(x),))
        grads = torch.autograd.grad(out, list(leaves.values()), tensor(cotangent))
        return {name: grad.numpy() for name, grad in zip(leaves, grads, strict=True)}

    @jax.custom_vjp
    def apply(p: Any, x: Any) -> Any:
        return jax.pure_callback(forward, out_struct, p, x)

    def apply_bwd(residuals: Any, cotangent: Any) -> Any:
        return jax.pure_callback(backward, structs, *residuals, cotangent), None

    apply.defvjp(lambda p, x: (apply(p, x), (p, x)), apply_bwd)
    return Bridged(apply, jax.tree.map(to_jax, params), to_jax(x))


def flax(workload: Workload, by_row: bool) -> Bridged:
    """The same model written in Flax Linen, compiled by XLA. It has as many parameters, up to biases of LSTMs."""
    from benchmarks.flax_models import TWINS

    model = TWINS[workload.flax]()
    tensor = workload.input("cpu")
    x = to_jax(tensor.permute(0, 2, 3, 1) if tensor.ndim == 4 else tensor)
    variables = dict(jax.jit(model.init)(jax.random.key(0), x[:1]))
    params = variables.pop("params")
    expected = sum(p.numel() for p in workload.model("cpu").parameters())
    found = sum(p.size for p in jax.tree.leaves(params))
    if abs(found - expected) > 0.01 * expected:
        raise AssertionError(f"the Flax twin has {found} parameters, torch's model {expected}")
    return Bridged(lambda p, x: model.apply({"params": p, **variables}, x), params, x)


BRIDGES: dict[str, Bridge] = {OURS: ours, OURS_XLA: ours_xla, WRAP: wrap, CALLBACK: callback, FLAX: flax}
"""By the name of the competitor."""
