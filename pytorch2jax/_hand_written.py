"""Derivatives of the backward passes that users wrote (`torch.autograd.Function`).

Torch differentiates such a backward as it differentiates any code, except that `forward` ran without a graph: what it
computed and kept for the backward is a constant to torch, and so is what `detach` and the like return. Derivatives of
second order would come out without these parts, and without an error. Therefore `forward` runs once more here, with a
graph. A backward that itself computes outside of torch's graph (in NumPy, or marked as `once_differentiable`) is found
out and refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from pytorch2jax._autograd_functions import BackwardCall
from pytorch2jax._errors import UnsupportedTransformError
from pytorch2jax._internals import DETACHING, is_functorch_active, is_turning_grad_off, set_grad_enabled


def recorded_backward(describe: Callable[[], str], order: int, call: BackwardCall) -> Any:
    """What a hand-written backward returns, with a graph in which no part is missing.

    Args:
        describe: tells which derivative it is, for messages.
        order: how many derivatives are taken.
        call: the call of the backward.

    Raises:
        UnsupportedTransformError: there is no such graph.
    """
    if is_functorch_active():
        raise NotImplementedError("torch.vmap of the derivative of a hand-written backward is not supported")
    result = call.backward(call.ctx, *call.cotangents) if order == 1 else _again(describe, call)
    kind = "the backward of a torch.autograd.Function"
    check_linear(lambda: f"{describe()}: {call.cls.__qualname__}: {kind}", call.cotangents, _listed(result))
    return result


# -- forward once more ----------------------------------------------------------------------------------------


class _Context:
    """The context of a forward that runs once more."""

    def __init__(self, ctx: Any) -> None:
        self.needs_input_grad = ctx.needs_input_grad
        self.materialize_grads = True
        self.saved_tensors: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Any) -> None:
        pass

    def mark_dirty(self, *tensors: Any) -> None:
        raise RuntimeError("it writes to its inputs")

    def set_materialize_grads(self, value: bool) -> None:
        self.materialize_grads = value

    def take_outputs(self, ctx: Any) -> None:
        """Keep those outputs that a call with this context has kept, whose derivatives are hand-written, too."""

        def chosen(new: Any, old: Any) -> Any:
            return old if isinstance(old, torch.Tensor) and old.grad_fn is ctx else new

        if len(ctx.saved_tensors) == len(self.saved_tensors):
            self.saved_tensors = tuple(map(chosen, self.saved_tensors, ctx.saved_tensors))
        for name, value in vars(self).items():
            if name in vars(ctx):
                setattr(self, name, chosen(value, vars(ctx)[name]))


class _Attached(TorchFunctionMode):
    """Within this context nothing cuts a graph: neither `detach` nor `no_grad`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in DETACHING:
            return args[0].view_as(args[0])
        out = func(*args, **(kwargs or {}))
        if is_turning_grad_off(func, args):
            set_grad_enabled(True)
        return out


def _again(describe: Callable[[], str], call: BackwardCall) -> Any:
    """The backward, after a forward with a graph.

    Raises:
        UnsupportedTransformError: it does not return the same then.
    """
    if call.inputs is None:
        raise _not_again(describe, call, "its call went unseen")
    generator = torch.get_rng_state()
    with torch.no_grad():
        expected = call.backward(call.ctx, *call.cotangents)
    torch.set_rng_state(generator)
    ctx = _Context(call.ctx)
    args, kwargs = call.inputs
    try:
        with _Attached():
            call.forward(ctx, *args, **kwargs)
            ctx.take_outputs(call.ctx)
            result = call.backward(ctx, *call.cotangents)
    except Exception as error:
        raise _not_again(describe, call, f"{type(error).__name__}: {error}") from error
    if not all(map(_is_same, _listed(expected), _listed(result))):
        raise _not_again(describe, call, "its backward returned something else then")
    return result


def _not_again(describe: Callable[[], str], call: BackwardCall, reason: str) -> UnsupportedTransformError:
    return UnsupportedTransformError(
        f"{describe()}: {call.cls.__qualname__}: expected a torch.autograd.Function whose forward can run once more "
        f"with a graph, for derivatives of its backward, got one that cannot ({reason}). Let `forward` compute in "
        "torch what it keeps for `backward`, from its inputs alone, or ask for first-order reverse mode (jax.grad)."
    )


def _is_same(left: Any, right: Any) -> bool:
    """Whether two gradients are the same but for rounding; None is zero."""
    if left is None or right is None:
        given = right if left is None else left
        return given is None or not bool(given.detach().any())
    left, right = left.detach(), right.detach()
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    tolerance = math.sqrt(torch.finfo(left.dtype).eps) if left.is_floating_point() or left.is_complex() else 0.0
    return torch.allclose(left, right, rtol=tolerance, atol=tolerance, equal_nan=True)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, (tuple, list)) else [result]


# -- what is missing in the graph of a backward ----------------------------------------------------------------


def check_linear(what: Callable[[], str], cotangents: Sequence[Any], results: Sequence[Any]) -> None:
    """Raise where a part of a backward has no graph.

    With `p` what it returns for cotangents `c`, `J` its derivative as its graph has it, and any `w`: `p` is linear in
    `c`, so that `<w, p>` equals `<c, J' w>`. Where a part has no graph, `J` lacks that part.

    Args:
        what: tells of what kind it is, for messages.
        cotangents: what it got.
        results: what it returned.

    Raises:
        UnsupportedTransformError: the two differ by more than rounding.
    """
    live = [c for c in cotangents if c is not None and c.requires_grad]
    pulled = [p for p in results if p is not None and (p.is_floating_point() or p.is_complex()) and p.numel()]
    if not live or not pulled:
        return
    weights = list(map(any_direction, pulled))
    products = [(w.conj() * p.detach()).real for w, p in zip(weights, pulled, strict=True)]
    recorded = [(p, w) for p, w in zip(pulled, weights, strict=True) if p.requires_grad]
    found: Sequence[Any] = ()
    if recorded:
        found = torch.autograd.grad(
            [p for p, _ in recorded], live, [w for _, w in recorded], retain_graph=True, allow_unused=True
        )
    reached = [(c, g) for c, g in zip(live, found, strict=False) if g is not None]
    again = [(c.detach().conj() * g.detach()).real for c, g in reached]
    difference = abs(sum(float(p.double().sum()) for p in products) - sum(float(p.double().sum()) for p in again))
    size = sum(float(p.double().abs().sum()) for p in (*products, *again))
    eps = max(torch.finfo(t.dtype).eps for t in (*live, *pulled))
    if math.isfinite(difference) and difference > 4 * math.sqrt(eps) * size:
        raise UnsupportedTransformError(
            f"{what()} cannot be differentiated (it is marked once_differentiable, computes outside of torch, or is "
            "not linear in what it gets), and derivatives of it would come out without a part, or as zero. Write it "
            "with torch operations only, or ask for first-order reverse mode (jax.grad)."
        )


def any_direction(like: torch.Tensor) -> torch.Tensor:
    """A fixed tensor in no special direction: one that a derivative is unlikely to send to zero."""
    numbers = torch.arange(1, like.numel() + 1, dtype=torch.float64, device=like.device)
    return torch.cos(numbers).reshape(like.shape).to(like.dtype)
