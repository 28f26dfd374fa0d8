"""What a call costs, against the number of its arguments and against their size: an addition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch

from benchmarks.bridges import torch_device
from benchmarks.case import CALLBACK, OURS, OURS_DECLARED, TORCH, WRAP, XLA, Call, Case, LeftOutError


class Shape(NamedTuple):
    """How many arguments, of how many floats each."""

    arguments: int
    floats: int


def add(*xs: Any) -> Any:
    """The first argument plus one; the others only have to be passed."""
    return xs[0] + 1


def tensors(shape: Shape) -> list[torch.Tensor]:
    """The arguments for torch."""
    return [torch.full((shape.floats,), float(i), device=torch_device()) for i in range(shape.arguments)]


def arrays(shape: Shape) -> list[jax.Array]:
    """The arguments for JAX."""
    return [jnp.full(shape.floats, float(i)) for i in range(shape.arguments)]


def add_on_host(*xs: Any) -> Any:
    """The addition in torch, on JAX's arrays. It must be the same function at each call, or JAX compiles again."""
    return add(*(torch.from_dlpack(x) for x in xs)).numpy()


def add_callback(*xs: jax.Array) -> jax.Array:
    """The addition in torch, behind `jax.pure_callback`."""
    if torch_device() != "cpu":
        raise LeftOutError("pure_callback goes through the host's memory; it is measured on the CPU only")
    return jax.pure_callback(add_on_host, jax.ShapeDtypeStruct(xs[0].shape, xs[0].dtype), *xs)


def ours(shape: Shape) -> Callable[..., Any]:
    """This library; it needs no examples."""
    from pytorch2jax import torch2jax

    return torch2jax(add)


def declared(shape: Shape) -> Callable[..., Any]:
    """This library, told what the function returns."""
    from pytorch2jax import torch2jax

    return torch2jax(add, output_shapes=jax.ShapeDtypeStruct((shape.floats,), jnp.float32))


def wrap(shape: Shape) -> Callable[..., Any]:
    """`wrap-torch2jax`, with examples."""
    from wrap_torch2jax import torch2jax

    return torch2jax(add, *tensors(shape))


def torch_call(shape: Shape) -> Call:
    """Torch itself."""
    args = tensors(shape)
    return lambda: add(*args)


def called(make: Callable[[Shape], Callable[..., Any]], jitted: bool) -> Callable[[Shape], Call]:
    """A set-up function: what `make` makes, called on JAX arrays, inside `jax.jit` or not."""

    def set_up(shape: Shape) -> Call:
        fn = jax.jit(make(shape)) if jitted else make(shape)
        args = arrays(shape)
        return lambda: fn(*args)

    return set_up


def competitors(jitted: bool) -> dict[str, Callable[[Shape], Call]]:
    """All of them; JAX's own addition is `XLA`."""
    return {
        TORCH: torch_call,
        XLA: called(lambda shape: add, jitted),
        OURS: called(ours, jitted),
        WRAP: called(wrap, jitted),
        CALLBACK: called(lambda shape: add_callback, jitted),
    }


ARGUMENTS = {str(n): Shape(n, 10) for n in (1, 10, 100, 300)}
SIZES = {f"{n:,}".replace(",", " "): Shape(1, n) for n in (10, 1_000, 100_000, 1_000_000, 10_000_000)}

ARGUMENTS_JITTED = Case(
    "arguments-jitted",
    "A jitted call, by number of arguments",
    "µs",
    "`x[0] + 1`, with so many arguments of 10 floats each, inside `jax.jit`. XLA is JAX's own addition.",
    ARGUMENTS,
    competitors(jitted=True),
    quick_rows=2,
)
ARGUMENTS_EAGER = Case(
    "arguments-eager",
    "An eager call, by number of arguments",
    "µs",
    "The same outside of `jax.jit`. XLA does not get the others there, and neither does torch.",
    ARGUMENTS,
    competitors(jitted=False),
    quick_rows=2,
)
SIZES_JITTED = Case(
    "sizes-jitted",
    "A jitted call, by size",
    "µs",
    "`x + 1` on so many floats, inside `jax.jit`.",
    SIZES,
    competitors(jitted=True),
    quick_rows=2,
)
SIZES_EAGER = Case(
    "sizes-eager",
    "An eager call, by size",
    "µs",
    "The same outside of `jax.jit`.",
    SIZES,
    competitors(jitted=False),
    quick_rows=2,
)
DECLARED = Case(
    "declared",
    "A jitted call that is told what it returns",
    "µs",
    "`x + 1` inside `jax.jit`, with `output_shapes=` and without.",
    {name: SIZES[name] for name in ("10", "1 000", "100 000")},
    {OURS: called(ours, jitted=True), OURS_DECLARED: called(declared, jitted=True)},
    quick_rows=2,
)
