"""Torch's plain kernels, which have derivatives of every order and mode, in the place of its fused ones.

Torch has switches for this (`torch.backends`), which hold for the whole process, so that the last bits of what another
thread computes would change. Here the functions are exchanged, for one thread.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

States = list[torch.Tensor]


class PlainKernels(TorchFunctionMode):
    """Within this context, attention and recurrent layers that Python code calls run as plain operations.

    The fast paths of `nn.TransformerEncoder` and `nn.MultiheadAttention` are not taken while any such mode is on.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(query.dtype)
    math = torch._scaled_dot_product_attention_math
    return math(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)[0]


def _lstm(x: torch.Tensor, states: States, w: torch.Tensor, b: torch.Tensor | None, proj: Any) -> States:
    h, c = states
    i, f, g, o = (x + F.linear(h, w, b)).chunk(4, -1)
    c = f.sigmoid() * c + i.sigmoid() * g.tanh()
    h = o.sigmoid() * c.tanh()
    return [h if proj is None else F.linear(h, proj), c]


def _gru(x: torch.Tensor, states: States, w: torch.Tensor, b: torch.Tensor | None, proj: Any) -> States:
    (h,) = states
    (x_r, x_z, x_n), (h_r, h_z, h_n) = x.chunk(3, -1), F.linear(h, w, b).chunk(3, -1)
    n = (x_n + (x_r + h_r).sigmoid() * h_n).tanh()
    return [(h - n) * (x_z + h_z).sigmoid() + n]


def _rnn(nonlinearity: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., States]:
    def cell(x: torch.Tensor, states: States, w: torch.Tensor, b: torch.Tensor | None, proj: Any) -> States:
        return [nonlinearity(x + F.linear(states[0], w, b))]

    return cell


def _layers(cell: Callable[..., States], *args: Any) -> tuple[torch.Tensor, ...]:
    """A call of `torch.lstm` or its like: of a padded batch, or of a packed sequence."""
    is_lstm = cell is _lstm
    if isinstance(args[3], bool):
        x, state, params, has_biases, n_layers, dropout, train, bidirectional, batch_first = args
        x = x.transpose(0, 1) if batch_first else x
        sizes = [x.shape[1]] * x.shape[0]
    else:
        x, batch_sizes, state, params, has_biases, n_layers, dropout, train, bidirectional = args
        sizes, batch_first = batch_sizes.tolist(), False
    states: Sequence[torch.Tensor] = state if is_lstm else (state,)
    directions = 2 if bidirectional else 1
    n_weights = len(params) // (n_layers * directions)
    last: list[States] = []
    for layer in range(n_layers):
        outputs = []
        for backwards in (False, True)[:directions]:
            number = len(last)
            w_x, w_h, *rest = params[number * n_weights : (number + 1) * n_weights]
            projection = rest[-1] if len(rest) % 2 else None
            b_x, b_h = rest[:2] if has_biases else (None, None)
            steps = F.linear(x, w_x, b_x)
            parts = steps.unbind(0) if x.dim() == 3 else steps.split(sizes)
            first = [s[number] for s in states]
            made, final = _steps(cell, parts, sizes, first, backwards, w_h, b_h, projection)
            outputs.append(torch.stack(made) if x.dim() == 3 else torch.cat(made))
            last.append(final)
        x = torch.cat(outputs, -1) if bidirectional else outputs[0]
        if dropout and train and layer < n_layers - 1:
            x = F.dropout(x, dropout, train)
    x = x.transpose(0, 1) if batch_first else x
    return (x, *(torch.stack(parts) for parts in zip(*last, strict=True)))


def _steps(
    cell: Callable[..., States],
    parts: Sequence[torch.Tensor],
    sizes: Sequence[int],
    first: States,
    backwards: bool,
    *weights: Any,
) -> tuple[list[torch.Tensor], States]:
    """One layer in one direction: the outputs of all steps, and the last state of each sequence.

    Sequences in a packed batch end one after the other, the longest one last. Forwards, the state of those that end is
    put aside. Backwards, those that begin are added.
    """
    order = range(len(parts) - 1, -1, -1) if backwards else range(len(parts))
    made: list[Any] = [None] * len(parts)
    ended: list[States] = []
    state = [s[: sizes[order[0]]] for s in first]
    for number in order:
        n, running = sizes[number], state[0].shape[0]
        if n < running:
            ended.append([s[n:] for s in state])
            state = [s[:n] for s in state]
        elif n > running:
            state = [torch.cat([s, f[running:n]]) for s, f in zip(state, first, strict=True)]
        state = cell(parts[number], state, *weights)
        made[number] = state[0]
    return made, [torch.cat([s, *(e[i] for e in reversed(ended))]) for i, s in enumerate(state)]


def _recurrent(function: Callable[..., Any], cell: Callable[..., States]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 9 or 0 in args[0].shape:  # not as torch's modules call it
            return function(*args, **kwargs)
        return _layers(cell, *args)

    return call


def _with_plain_attention(function: types.FunctionType) -> Callable[..., Any]:
    """A Python function of torch's that hands itself to the mode, so that the mode does not see what it calls."""
    names = {**function.__globals__, "scaled_dot_product_attention": _attention}
    plain = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__)
    plain.__kwdefaults__ = function.__kwdefaults__
    return plain


_PLAIN: dict[Any, Callable[..., Any]] = {
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _with_plain_attention(F.multi_head_attention_forward),  # type: ignore[arg-type]
    torch.lstm: _recurrent(torch.lstm, _lstm),
    torch.gru: _recurrent(torch.gru, _gru),
    torch.rnn_tanh: _recurrent(torch.rnn_tanh, _rnn(torch.tanh)),
    torch.rnn_relu: _recurrent(torch.rnn_relu, _rnn(torch.relu)),
}
