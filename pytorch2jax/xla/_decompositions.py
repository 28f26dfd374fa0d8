"""Operators as others, where torch has no decomposition, or one that looks at values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

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


OPERATORS: dict[Any, Callable[..., Any]] = {aten.linalg_lstsq.default: _lstsq}
"""Instead of torch's decompositions."""

FUNCTIONS: dict[Any, Callable[..., Any]] = {
    torch.Tensor.data.__get__: torch.Tensor.detach,  # type: ignore[attr-defined]  # `x.data` is a tensor that no operator has made
    torch.istft: istft_without_a_check,
    torch.Tensor.istft: istft_without_a_check,
}
"""Functions that torch composes of operators in a way that cannot be followed."""
