"""Functions written out in plain operations, where torch's derivatives of its own kernels are wrong.

Normalisations, for derivatives of second and higher order, and `select_scatter`, for gradients of a batch.

Torch's fused `layer_norm`, `batch_norm` and `instance_norm` save a mean and a scale and take them for constants
when a derivative is differentiated again. Second order in reverse mode comes out right; forward over forward
and every third derivative come out wrong, without an error (torch 2.13; `tests/test_orders.py` compares
with finite differences). Plain operations have no such shortcut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode


class CompositeNorms(TorchFunctionMode):
    """Within this context the fused normalisations run as plain operations."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN.get(func, func)(*args, **(kwargs or {}))


class CompositeScatter(TorchFunctionMode):
    """Within this context `select_scatter` runs as a plain operation.

    The gradient that torch has for `src` through `torch.vmap` is too large by the length of the axis, without an
    error (torch 2.13).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _PLAIN_SCATTER.get(func, func)(*args, **(kwargs or {}))


def _select_scatter(input: torch.Tensor, src: torch.Tensor, dim: int, index: int) -> torch.Tensor:
    size = input.shape[dim]
    if not -size <= index < size or src.shape != input.select(dim, index).shape:
        return torch.select_scatter(input, src, dim, index)  # says what is wrong
    index %= size
    parts = (input.narrow(dim, 0, index), src.unsqueeze(dim), input.narrow(dim, index + 1, size - index - 1))
    return torch.cat(parts, dim)


_PLAIN_SCATTER: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.select_scatter: _select_scatter,
    torch.Tensor.select_scatter: _select_scatter,
    torch.ops.aten.select_scatter: _select_scatter,
    torch.ops.aten.select_scatter.default: _select_scatter,
}


def _normalised(x: torch.Tensor, dims: tuple[int, ...], eps: float) -> tuple[torch.Tensor, ...]:
    """`(x - mean) / sqrt(var + eps)` over `dims`, with the mean and the biased variance."""
    mean = x.mean(dims, keepdim=True)
    centred = x - mean
    variance = (centred * centred).mean(dims, keepdim=True)
    return centred * (variance + eps).rsqrt(), mean, variance


def _wide(x: torch.Tensor) -> torch.Tensor:
    """The precision in which torch's kernels compute the statistics."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def _affine(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, shape: Sequence[int]
) -> torch.Tensor:
    if weight is not None:
        x = x * weight.reshape(shape)
    return x if bias is None else x + bias.reshape(shape)


def _layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> torch.Tensor:
    return _native_layer_norm(input, normalized_shape, weight, bias, eps)[0]


def _functional_batch_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    return _batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)


def _batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    return _native_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)[0]


def _track(
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    mean: torch.Tensor,
    variance: torch.Tensor,
    count: int,
    momentum: float,
) -> None:
    """Move the running statistics towards those of a batch; the variance in its unbiased form, over `count`."""
    _update(running_mean, mean, momentum)
    _update(running_var, variance * (count / max(count - 1, 1)), momentum)


def _update(running: torch.Tensor | None, value: torch.Tensor, momentum: float) -> None:
    if running is not None:
        running.mul_(1 - momentum).add_(momentum * value.detach().reshape(running.shape).to(running.dtype))


def _functional_instance_norm(
    input: torch.Tensor,
    running_mean: torch.Tensor | None = None,
    running_var: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> torch.Tensor:
    return _instance_norm(input, weight, bias, running_mean, running_var, use_input_stats, momentum, eps)


def _instance_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    use_input_stats: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool = True,
) -> torch.Tensor:
    if not use_input_stats:
        return _batch_norm(input, weight, bias, running_mean, running_var, False, momentum, eps)
    dims = tuple(range(2, input.dim()))
    scaled, mean, variance = _normalised(_wide(input), dims, eps)
    _track(running_mean, running_var, mean.mean(0), variance.mean(0), input[0, 0].numel(), momentum)
    return _affine(scaled, weight, bias, (1, -1, *(1,) * (input.dim() - 2))).to(input.dtype)


def _native_layer_norm(
    input: torch.Tensor,
    normalized_shape: Sequence[int],
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    dims = tuple(range(-len(normalized_shape), 0))
    scaled, mean, variance = _normalised(_wide(input), dims, eps)
    out = _affine(scaled, weight, bias, tuple(normalized_shape)).to(input.dtype)
    return out, mean.detach(), (variance + eps).rsqrt().detach()  # no derivatives, as in torch


def _native_batch_norm(
    input: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    running_mean: torch.Tensor | None,
    running_var: torch.Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[torch.Tensor, ...]:
    shape = (1, -1, *(1,) * (input.dim() - 2)) if input.dim() > 1 else (-1,)  # torch takes empty vectors
    x = _wide(input)
    saved_mean = saved_scale = x.new_empty(0)
    if training or running_mean is None or running_var is None:
        scaled, mean, variance = _normalised(x, (0, *range(2, input.dim())), eps)
        _track(running_mean, running_var, mean, variance, input.numel() // input.shape[1], momentum)
        if training:
            saved_mean, saved_scale = mean.detach().reshape(-1), (variance + eps).rsqrt().detach().reshape(-1)
    else:
        scaled = (x - running_mean.reshape(shape)) * (running_var.reshape(shape) + eps).rsqrt()
    return _affine(scaled, weight, bias, shape).to(input.dtype), saved_mean, saved_scale


_PLAIN: dict[Callable[..., Any], Callable[..., Any]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.batch_norm: _functional_batch_norm,
    torch.batch_norm: _batch_norm,
    F.instance_norm: _functional_instance_norm,
    torch.instance_norm: _instance_norm,
    torch.native_layer_norm: _native_layer_norm,
    torch.native_batch_norm: _native_batch_norm,
    torch.ops.aten.layer_norm.default: _layer_norm,
    torch.ops.aten.batch_norm.default: _batch_norm,
    torch.ops.aten.instance_norm.default: _instance_norm,
    torch.ops.aten.native_layer_norm.default: _native_layer_norm,
    torch.ops.aten.native_batch_norm.default: _native_batch_norm,
    torch.ops.aten.layer_norm: _layer_norm,
    torch.ops.aten.batch_norm: _batch_norm,
    torch.ops.aten.instance_norm: _instance_norm,
    torch.ops.aten.native_layer_norm: _native_layer_norm,
    torch.ops.aten.native_batch_norm: _native_batch_norm,
}
