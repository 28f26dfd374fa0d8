"""Recurrent layers as operators of their own, so that XLA gets one loop over the steps.

Torch composes `lstm`, `gru` and `rnn` of an operator for each step. What does not depend on the step before is computed
for all steps at once, and the rest is the operator `pytorch2jax::recurrence` (`lowerings/recurrent.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from pytorch2jax._internals import is_functorch_active

_LIBRARY = torch.library.Library("pytorch2jax", "FRAGMENT")
_LIBRARY.define(
    "recurrence(str kind, Tensor x, Tensor[] state, Tensor weight, Tensor? bias, Tensor? projection) -> Tensor[]"
)


def _recurrence(
    kind: str,
    x: torch.Tensor,
    state: list[torch.Tensor],
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    projection: torch.Tensor | None,
) -> list[torch.Tensor]:
    return [x.new_empty(*x.shape[:2], state[0].shape[-1]), *map(torch.empty_like, state)]


torch.library.register_fake("pytorch2jax::recurrence", _recurrence, lib=_LIBRARY)


def _one_layer(
    kind: str, x: torch.Tensor, state: Sequence[torch.Tensor], weights: Sequence[torch.Tensor], has_biases: bool
) -> list[torch.Tensor]:
    """One layer in one direction: the outputs of all steps, and the last state."""
    w_x, w_h, *rest = weights
    projection = rest[-1] if len(rest) % 2 else None
    b_x, b_h = (rest[0], rest[1]) if has_biases else (None, None)
    if b_x is not None and b_h is not None and kind != "gru":  # in a GRU, a gate multiplies it
        b_x, b_h = b_x + b_h, None
    return torch.ops.pytorch2jax.recurrence(kind, F.linear(x, w_x, b_x), list(state), w_h, b_h, projection)


def _layers(
    kind: str,
    x: torch.Tensor,
    states: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, ...]:
    directions = 2 if bidirectional else 1
    n_weights = len(params) // (num_layers * directions)
    last: list[Sequence[torch.Tensor]] = []
    y = x.transpose(0, 1) if batch_first else x
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            number = len(last)
            given = y.flip(0) if direction else y
            weights = params[number * n_weights : (number + 1) * n_weights]
            output, *state = _one_layer(kind, given, [s[number] for s in states], weights, has_biases)
            outputs.append(output.flip(0) if direction else output)
            last.append(state)
        y = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and layer < num_layers - 1:
            y = F.dropout(y, dropout, train)
    y = y.transpose(0, 1) if batch_first else y
    return (y, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _as_loop(kind: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """A call of `torch.lstm` or its like; torch's own way where it is called in another way than by its modules."""
    if kwargs or len(args) != 9 or not isinstance(args[3], bool):  # packed sequences have their lengths there
        return function(*args, **kwargs)
    x, state, params, *options = args
    states = state if kind == "lstm" else (state,)
    if torch.is_autocast_enabled(x.device.type) or 0 in x.shape or is_functorch_active():
        return function(*args, **kwargs)
    return _layers(kind, x, states, params, *options)


LAYERS: dict[Any, Callable[..., Any]] = {
    function: functools.partial(_as_loop, kind, function)
    for kind, function in (
        ("lstm", torch.lstm),
        ("gru", torch.gru),
        ("tanh", torch.rnn_tanh),
        ("relu", torch.rnn_relu),
    )
}
"""What to call instead of torch's functions."""
