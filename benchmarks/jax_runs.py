"""What JAX does in each case, on top of any bridge."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import torch

from benchmarks.bridges import BRIDGES, torch_device
from benchmarks.case import Call
from benchmarks.models import Workload

CLASSES = 10


def forward(bridge: str, workload: Workload) -> Call:
    """The jitted forward pass."""
    apply, params, x = BRIDGES[bridge](workload, False)
    fn = jax.jit(apply)
    return lambda: fn(params, x)


def value_and_grad(bridge: str, workload: Workload) -> Call:
    """The sum of squares of the output and its gradient with respect to all parameters, jitted."""
    apply, params, x = BRIDGES[bridge](workload, False)
    fn = jax.jit(jax.value_and_grad(lambda params, x: (apply(params, x) ** 2).sum()))
    return lambda: fn(params, x)


def batched(bridge: str, workload: Workload) -> Call:
    """`jax.vmap` over the rows of the input, jitted."""
    apply, params, x = BRIDGES[bridge](workload, True)
    fn = jax.jit(jax.vmap(apply, in_axes=(None, 0)))
    return lambda: fn(params, x)


def per_example_grads(bridge: str, workload: Workload) -> Call:
    """`jax.vmap` of `jax.grad`, with respect to all parameters, jitted."""
    apply, params, x = BRIDGES[bridge](workload, True)
    grad = jax.grad(lambda params, row: (apply(params, row) ** 2).sum())
    fn = jax.jit(jax.vmap(grad, in_axes=(None, 0)))
    return lambda: jax.tree.leaves(fn(params, x))


def training_step(bridge: str, workload: Workload) -> Call:
    """Forward, backward and a step of optax's Adam, in one jitted function to which its state is donated."""
    import optax

    apply, params, x = BRIDGES[bridge](workload, False)
    optimizer = optax.adam(1e-4)

    def step(params: Any, state: Any) -> Any:
        loss, grads = jax.value_and_grad(lambda params: (apply(params, x) ** 2).mean())(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    fn = jax.jit(step, donate_argnums=(0, 1))
    params = jax.tree.map(jnp.copy, params)
    held = [params, optimizer.init(params)]

    def call() -> jax.Array:
        *held[:], loss = fn(*held)
        return loss

    return call


# -- a frozen feature extractor with a trainable head ----------------------------------------------------


def head_params(width: int) -> dict[str, jax.Array]:
    """The weights of a linear layer."""
    return {"kernel": jax.random.normal(jax.random.key(0), (width, CLASSES)) / width, "bias": jnp.zeros(CLASSES)}


def head_loss(head: dict[str, jax.Array], features: jax.Array) -> jax.Array:
    """Cross-entropy of the class 0, from the mean over the tokens."""
    logits = features.mean(axis=1) @ head["kernel"] + head["bias"]
    return -jax.nn.log_softmax(logits)[:, 0].mean()


def frozen(bridge: str, workload: Workload) -> Call:
    """The value and gradient of the head alone; extractor and head in one jitted function."""
    apply, params, x = BRIDGES[bridge](workload, False)
    head = head_params(x.shape[-1])
    fn = jax.jit(jax.value_and_grad(lambda head, params, x: head_loss(head, apply(params, x))))
    return lambda: fn(head, params, x)


def torch_and_head(workload: Workload) -> Call:
    """Torch under `no_grad`, and then the jitted value and gradient of the head, on the same memory."""
    device = torch_device()
    model, x = workload.model(device), workload.input(device)
    head = head_params(x.shape[-1])
    fn = jax.jit(jax.value_and_grad(head_loss))

    def call() -> Any:
        with torch.no_grad():
            features = model(x)
        if device == "cuda":
            torch.cuda.current_stream().synchronize()
        return fn(head, jax.dlpack.from_dlpack(features))

    return call


# -- scan ------------------------------------------------------------------------------------------------


def scanned(step: Any, params: Any, xs: jax.Array, h: jax.Array) -> Any:
    """A jitted scan of `step(params, x, h)`; returns the calls of its sum of squares and of the gradient of that."""

    def loss(params: Any) -> jax.Array:
        last, _ = jax.lax.scan(lambda h, x: (step(params, x, h), None), h, xs)
        return (last**2).sum()

    value, gradient = jax.jit(loss), jax.jit(jax.value_and_grad(loss))
    return {"forward": lambda: value(params), "value and gradient": lambda: gradient(params)}
