"""Operators as others, where torch has no decomposition, or one that looks at values."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from pytorch2jax._internals import DETACHING
from pytorch2jax.xla._internals import aten, istft_without_a_check


def _lstsq(
    a: torch.Tensor, b: torch.Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[torch.Tensor, ...]:
    """Least squares by the pseudo-inverse, by which torch differentiates them."""
    m, n = a.shape[-2:]
    driver = driver or "gelsy"
    if m > n and driver in ("gelsd", "gelss"):  # whether there are residuals depends on the rank
        return NotImplemented
    vector = b.dim() == 1 or (b.dim() == a.dim() - 1 and b.shape == a.shape[:-1])
    right = b.unsqueeze(-1) if vector else b
    solution = torch.linalg.pinv(a, rtol=rcond) @ right
    real = a.real.dtype if a.is_complex() else a.dtype
    nothing = a.new_empty(0, dtype=real)
    residuals = (a @ solution - right).abs().square().sum(-2) if m > n and driver == "gels" else nothing
    rank = a.new_empty(0, dtype=torch.int64) if driver == "gels" else torch.linalg.matrix_rank(a, rtol=rcond)
    values = torch.linalg.svdvals(a.detach()) if driver in ("gelsd", "gelss") else nothing
    return solution.squeeze(-1) if vector else solution, residuals, rank, values


def _cov(
    x: torch.Tensor,
    *,
    correction: int = 1,
    fweights: torch.Tensor | None = None,
    aweights: torch.Tensor | None = None,
) -> torch.Tensor:
    """`torch.cov`, which does not look whether there are too few observations."""
    rows = x.reshape(1, -1) if x.dim() < 2 else x
    weights = fweights
    if aweights is not None:
        weights = aweights if fweights is None else fweights * aweights
    if weights is None:
        free: Any = max(rows.shape[1] - correction, 0)
        middle = rows.sum(1) / rows.shape[1]
    else:
        total = weights.sum()
        lost = correction * ((weights * aweights).sum() / total if aweights is not None else 1)
        free = (total - lost).clamp(min=0)
        middle = (rows * weights).sum(1) / total
    rows = rows - middle.unsqueeze(1)
    weighted = rows if weights is None else rows * weights
    return ((rows @ weighted.t().conj()) / free).squeeze()


def _corrcoef(x: torch.Tensor) -> torch.Tensor:
    covariance = _cov(x)
    if covariance.dim() == 0:
        return covariance / covariance
    variance = covariance.diagonal()
    deviation = (variance.real if variance.is_complex() else variance).sqrt()
    c = covariance / deviation.unsqueeze(1) / deviation.unsqueeze(0)
    if c.is_complex():
        return torch.complex(c.real.clamp(-1, 1), c.imag.clamp(-1, 1))
    return c.clamp(-1, 1)


def _matrix_rank(*args: Any, out: torch.Tensor | None = None, **kwargs: Any) -> torch.Tensor:
    """`torch.linalg.matrix_rank`, which does not write to `out` if that is a fake tensor."""
    rank = torch.linalg.matrix_rank(*args, **kwargs)
    return rank if out is None else out.copy_(rank)


def _combinations(x: torch.Tensor, r: int = 2, with_replacement: bool = False) -> torch.Tensor:
    if r == 0:
        return x.new_empty(0)
    choose = itertools.combinations_with_replacement if with_replacement else itertools.combinations
    return x[torch.tensor(list(choose(range(x.shape[0]), r)), dtype=torch.int64).reshape(-1, r)]


def _detached(x: torch.Tensor, *owner: Any) -> torch.Tensor:
    """`x.detach()`, and `x.data`, which no operator makes.

    Autograd detaches, too, what it saves for its backward pass. Only what is asked for by name cuts derivatives, which
    is what operators do while grad mode is off.
    """
    with torch.no_grad():
        return x.detach()


def _with_lengths(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`ctc_loss`: lengths in lists are read into memory, which fake tensors do not have."""
    args = tuple(_as_tensor(a) if i in (2, 3) else a for i, a in enumerate(args))
    return function(*args, **{n: _as_tensor(a) if n.endswith("_lengths") else a for n, a in kwargs.items()})


def _as_tensor(lengths: Any) -> torch.Tensor:
    return lengths if isinstance(lengths, torch.Tensor) else torch.tensor(lengths)


def _without_options(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """`linear_cross_entropy`: what saves memory asks its inputs whether they require a gradient."""
    return function(*args, **{n: a for n, a in kwargs.items() if n != "options"})


def _narrow(input: torch.Tensor, dim: int, start: Any, length: int) -> torch.Tensor:
    """A tensor to start at would be asked for its value."""
    if not isinstance(start, torch.Tensor):
        return torch.narrow(input, dim, start, length)
    first = torch.where(start < 0, start + input.shape[dim], start)
    return input.index_select(dim, first + torch.arange(length))


def _as_strided_scatter(x: torch.Tensor, source: torch.Tensor, size: Any, stride: Any, offset: Any = None) -> Any:
    """Torch's decomposition calls itself."""
    out = x.clone()
    out.as_strided(size, stride, x.storage_offset() if offset is None else offset).copy_(source)
    return out


def _gaussian_nll_loss(
    input: torch.Tensor,
    target: torch.Tensor,
    var: Any,
    full: bool = False,
    eps: float = 1e-6,
    reduction: str = "mean",
) -> torch.Tensor:
    """`gaussian_nll_loss`, which does not look whether there are negative variances."""
    if not isinstance(var, torch.Tensor):
        return F.gaussian_nll_loss(input, target, var, full=full, eps=eps, reduction=reduction)
    if var.shape == input.shape[:-1]:
        var = var.unsqueeze(-1)
    elif var.shape != input.shape:
        others = [m for n, m in zip(input.shape, var.shape, strict=False) if n != m]
        if input.dim() != var.dim() or others != [1]:
            raise ValueError("var is of incorrect size")
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"{reduction} is not valid")
    var = var.clone()
    with torch.no_grad():
        var.clamp_(min=eps)
    loss = 0.5 * (var.log() + (input - target) ** 2 / var)
    if full:
        loss = loss + 0.5 * math.log(2 * math.pi)
    return loss if reduction == "none" else loss.mean() if reduction == "mean" else loss.sum()


def _gumbel_softmax(
    logits: torch.Tensor, tau: float = 1, hard: bool = False, eps: float = 1e-10, dim: int = -1
) -> torch.Tensor:
    """`gumbel_softmax`; where torch detaches within a function of its own, nobody asks for it by name."""
    soft = F.gumbel_softmax(logits, tau, dim=dim)
    if not hard:
        return soft
    with torch.no_grad():
        largest = torch.zeros_like(logits).scatter(dim, soft.argmax(dim, keepdim=True), 1.0)
        difference = largest - soft
    return difference + soft


def batch_norm_with_cumulative_average(module: Any, x: torch.Tensor) -> torch.Tensor:
    """The forward pass of a batch norm with `momentum=None` in training: torch reads how many batches there were."""
    module._check_input_dim(x)
    module.num_batches_tracked.add_(1)
    statistics = module.running_mean, module.running_var
    mean, var = (torch.zeros_like(kept) for kept in statistics)
    y = F.batch_norm(x, mean, var, module.weight, module.bias, True, 1.0, module.eps)
    with torch.no_grad():
        for kept, new in zip(statistics, (mean, var), strict=True):
            share = module.num_batches_tracked.to(kept.dtype).reciprocal()
            kept.copy_(share * new + (1 - share) * kept)
    return y


def bmm_with_one(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Products of a batch with one matrix, which torch expands to a batch where `x` is not contiguous.

    It costs torch nothing; XLA would multiply with each copy by itself, six times as slow as one product of matrices.
    The matrix is read from memory: a gradient that went through `y[0]` and `expand` would be a batch, mostly of zeros.
    """
    batch, n, k = x.shape
    one = y.as_strided(y.shape[1:], y.stride()[1:], y.storage_offset())
    return aten.mm(x.reshape(batch * n, k), one).view(batch, n, y.shape[2])


OPERATORS: dict[Any, Callable[..., Any]] = {
    aten.as_strided_scatter.default: _as_strided_scatter,
    aten.linalg_lstsq.default: _lstsq,
}
"""Instead of torch's decompositions."""

INSTEAD_OF_DETACHING: dict[Any, Callable[..., Any]] = dict.fromkeys(DETACHING, _detached)

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.istft: istft_without_a_check,
    torch.Tensor.istft: istft_without_a_check,
    torch.cov: _cov,
    torch.Tensor.cov: _cov,
    torch.corrcoef: _corrcoef,
    torch.Tensor.corrcoef: _corrcoef,
    torch.combinations: _combinations,
    torch.narrow: _narrow,
    torch.Tensor.narrow: _narrow,
    **{f: functools.partial(_with_lengths, f) for f in (torch.ctc_loss, torch.nn.functional.ctc_loss)},
    torch.linalg.matrix_rank: _matrix_rank,
    F.gaussian_nll_loss: _gaussian_nll_loss,
    F.gumbel_softmax: _gumbel_softmax,
}
"""Functions that torch composes of operators in a way that cannot be followed."""
if hasattr(torch.nn.functional, "linear_cross_entropy"):  # torch 2.13
    FUNCTIONS[torch.nn.functional.linear_cross_entropy] = functools.partial(
        _without_options, torch.nn.functional.linear_cross_entropy
    )
