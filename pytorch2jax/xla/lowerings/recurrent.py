"""Recurrent layers: one loop over the steps."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pytorch2jax.xla._registry import lowers

State = tuple[jax.Array, ...]
"""What a step hands to the next: the hidden state and, for an LSTM, the cell."""


@lowers("pytorch2jax.recurrence.default")
def recurrence(
    kind: str,
    x: jax.Array,
    state: Sequence[jax.Array],
    weight: jax.Array,
    bias: jax.Array | None = None,
    projection: jax.Array | None = None,
) -> tuple[jax.Array, ...]:
    outputs, last = _loop(kind, weight, bias, (x, tuple(state), projection))
    return outputs, *last


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _loop(kind: str, weight: jax.Array, bias: jax.Array | None, rest: Any) -> tuple[jax.Array, State]:
    """All steps of `h_t = cell(x_t, h_{t-1} weight^T + bias)`."""
    return _steps(kind, weight, bias, None, rest)


@_loop.defjvp
def _loop_jvp(kind: str, primals: Any, tangents: Any) -> Any:
    """The tangents of `weight` and `bias`, which all steps share, are added to the sums for all steps at once.

    So is their gradient: one product of matrices after the loop, and not one added in each step.
    """
    weight, bias, rest = primals
    d_weight, d_bias, d_rest = tangents
    x, (h, *_), _ = rest
    outputs, pushed = jax.linearize(
        functools.partial(_steps, kind, weight, bias), jnp.zeros((len(x), *h.shape[:1], weight.shape[0]), x.dtype), rest
    )
    before = jnp.concatenate([h[None], outputs[0][:-1]])
    moved = before @ d_weight.T
    return outputs, pushed(moved if bias is None else moved + d_bias, d_rest)


def _steps(
    kind: str, weight: jax.Array, bias: jax.Array | None, moved: jax.Array | None, rest: Any
) -> tuple[jax.Array, State]:
    x, state, projection = rest

    def step(state: State, given: Any) -> tuple[State, jax.Array]:
        x, moved = given
        z = state[0] @ weight.T
        z = z if bias is None else z + bias
        state = _CELLS[kind](x, z if moved is None else z + moved, *state)
        if projection is not None:
            state = state[0] @ projection.T, *state[1:]
        return state, state[0]

    last, outputs = lax.scan(step, state, (x, moved))
    return outputs, last


def _lstm(x: jax.Array, z: jax.Array, h: jax.Array, c: jax.Array) -> State:
    i, f, g, o = jnp.split(x + z, 4, axis=-1)
    c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
    return jax.nn.sigmoid(o) * jnp.tanh(c), c


def _gru(x: jax.Array, z: jax.Array, h: jax.Array) -> State:
    (x_r, x_u, x_n), (z_r, z_u, z_n) = jnp.split(x, 3, axis=-1), jnp.split(z, 3, axis=-1)
    new = jnp.tanh(x_n + jax.nn.sigmoid(x_r + z_r) * z_n)
    update = jax.nn.sigmoid(x_u + z_u)
    return (new + update * (h - new),)


def _tanh(x: jax.Array, z: jax.Array, h: jax.Array) -> State:
    return (jnp.tanh(x + z),)


def _relu(x: jax.Array, z: jax.Array, h: jax.Array) -> State:
    return (jax.nn.relu(x + z),)


_CELLS: dict[str, Callable[..., State]] = {"lstm": _lstm, "gru": _gru, "tanh": _tanh, "relu": _relu}
